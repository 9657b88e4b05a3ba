"""A Trainer whose runs can be killed at any moment and resumed with the same results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Trainer, TrainerCallback, TrainingArguments

from retention.local import local

from ..compat import SCHEDULER_NAME, ExportableState, ProgressCallback
from .parallel import SEQUENCE, split_sequence
from .saving import ASIDE, remove_older, written_whole
from .sharded import is_sharded, load_optimizer, load_weights, save_optimizer, whole_weights

__all__ = ["LossSum", "ResumableTrainer", "log_every"]

_PATIENCE = 10  # overflowing batches in a row before a float16 run counts as diverged; the scaler skips their steps


def log_every(steps: int) -> int:
    """Return the number of steps between two logged losses: 10; fewer in a run of less than 200 steps, for its plot."""
    return min(10, max(1, steps // 20))


class LossSum(TrainerCallback, ExportableState):
    """The sum of losses since the last log, which Trainer itself does not keep in checkpoints."""

    def __init__(self) -> None:
        self.total: float | Tensor = 0.0
        self.logged_at = 0  # the step of the last log

    def state(self) -> dict[str, Any]:
        """Return the values that trainer_state.json keeps."""
        return {"args": {}, "attributes": {"total": float(self.total), "logged_at": self.logged_at}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the values from trainer_state.json."""
        kept = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.total, self.logged_at = torch.tensor(kept["total"], device=args.device), kept["logged_at"]


class ResumableTrainer(Trainer):
    """A Trainer with atomic checkpoints, exact logs after a resume, and a stop when training diverges.

    Checkpoints are complete or absent. The first loss logged after a resume covers all its steps. A diverged training
    stops before its weights are saved. The model's parameters may be sharded already, by FSDP2 or by heads.

    Args:
        model, args, options: as in `transformers.Trainer`; load_best_model_at_end must be off.
        callbacks: a progress bar among them replaces that of transformers.
        mesh: how the processes share a batch, see `meshes_of`. Default: each process has its own rows.
    Raises: ValueError for load_best_model_at_end.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        mesh: DeviceMesh | None = None,
        **options: Any,
    ):
        self.losses, self.mesh, self.sharded = LossSum(), mesh, is_sharded(model)
        super().__init__(model, args, callbacks=[self.losses], **options)
        if mesh is not None:  # the data loader reads it; ParallelismConfig refuses CPUs, and rows without FSDP
            self.accelerator.state.device_mesh = mesh
        if self.args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end must be False: a resumed run ends with its last step; got True")
        self.overflows = 0  # overflowing batches in a row
        self.whole: list[str] = []  # complete checkpoints, oldest first
        if any(isinstance(callback, ProgressCallback) for callback in callbacks):
            self.remove_callback(ProgressCallback)
        for callback in callbacks:
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Train as Trainer does.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or None.
            args, options: as in Trainer.
        Raises: FloatingPointError if the training diverges; NotSavedError if a checkpoint cannot be written.
        """
        self.whole = [Path(resume_from_checkpoint).name] if resume_from_checkpoint else []
        try:
            return super().train(resume_from_checkpoint, *args, **options)
        finally:
            for callback in self.callback_handler.callbacks:
                bar = getattr(callback, "training_bar", None)
                if bar is not None:  # after an error, its message gets its own line
                    bar.close()

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Run a step and return its loss. Raises: FloatingPointError if the loss stays infinite or NaN."""
        step = self.state.global_step + 1
        try:
            loss = super().training_step(*args, **options)
        except ValueError as error:  # for example, from a layer whose decays are no longer finite
            self._check_weights(step, error)
            raise
        self.losses.total += loss
        # This synchronises with the device, as Trainer's own check does.
        self.overflows = 0 if loss.isfinite() else self.overflows + 1
        if self.overflows > (_PATIENCE if self.args.fp16 else 0):
            raise self._diverged(step, f"the loss is {loss.item()}")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log the mean loss since the last log, over all processes."""
        if "loss" in logs:
            total = self._mean_over_processes()
            logs["loss"] = total.item() / (self.state.global_step - self.losses.logged_at)
            self.losses.total, self.losses.logged_at = torch.zeros_like(total), self.state.global_step
        super().log(logs, *args, **options)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """Evaluate. Raises: FloatingPointError if a weight is not finite during training."""
        if self.is_in_train:
            self._check_weights(self.state.global_step)
        return super().evaluate(*args, **options)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Give each process its part of the sequences. It is contiguous; Trainer's would suit the load of attention."""
        if self.mesh is None or self.mesh[SEQUENCE].size() == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)
        return split_sequence(self.mesh, self._prepare_inputs(inputs))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Return the number of tokens in the loss of a step, over all processes, each of which counts whole rows."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count if count is None or self.mesh is None else count / self.mesh[SEQUENCE].size()

    def _wrap_model(self, model: Any, training: bool = True, *args: Any, **options: Any) -> Any:
        """Keep accelerate from wrapping a sharded model for data parallel; mixed precision is set up as usual."""
        model = super()._wrap_model(model, training, *args, **options)
        if not self.sharded or not training:
            return model
        return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Trainer does; where its weights are sharded, all processes hand them to the first."""
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        weights = whole_weights(cast(nn.Module, self.model))
        if self.args.should_save:
            self._save(output_dir, weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.model, resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer(cast(nn.Module, self.model), self._plain_optimizer(), output_dir)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(cast(nn.Module, self.model), self._plain_optimizer(), checkpoint)
        cast(Any, self.lr_scheduler).load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser inside of accelerate's."""
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    def _mean_over_processes(self) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(self.losses.total, "mean"))

    def _check_weights(self, step: int, cause: Exception | None = None) -> None:
        """Raises: FloatingPointError if a trained weight is not finite; on all processes, unless there is a cause."""
        weights = [(name, p) for name, p in cast(nn.Module, self.model).named_parameters() if p.requires_grad]
        wrong = [name for name, p in weights if not local(p).isfinite().all()][:1]
        if self.sharded and cause is None:
            wrong = gather_object(wrong)
        if wrong:
            raise self._diverged(step, f"{wrong[0]} is not finite") from cause

    def _diverged(self, step: int, what: str) -> FloatingPointError:
        kept = f"{self.whole[-1]} is kept" if self.whole else "no checkpoint was written before"
        float16 = "; or in bfloat16 or float32" if self.args.fp16 else ""
        return FloatingPointError(
            f"the training diverged at step {step}: {what}; begin a new run with a lower learning rate "
            f"(it was {self.args.learning_rate:g}), or a longer warmup{float16}; {kept}"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Trainer write the checkpoint to a separate folder, shared by all processes; then rename it."""
        self._check_weights(self.state.global_step)
        self.losses.total = self._mean_over_processes()
        out, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        first, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with written_whole(out, name, as_folder=name) if first else nullcontext():
            wait()
            self.args.output_dir = str(out / ASIDE)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(out)
            wait()
        wait()
        if self.args.save_total_limit:
            self.whole = [*self.whole, name][-self.args.save_total_limit :]
            if first:
                remove_older(out, self.whole)
        else:
            self.whole.append(name)
