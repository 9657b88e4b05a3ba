"""Trains a RetNet language model with transformers' Trainer, on one process or, under torchrun, on several."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import TrainingArguments, default_data_collator, set_seed

from retention.distributed import context_parallel, tensor_parallel
from retention.layer import set_backend

from ..compat import TRAINER_STATE_NAME, TrainerState, logging
from ..modeling import RetNetForCausalLM, shifted
from .codec import Codec, load_codec
from .corpus import Corpus, read_corpus
from .parallel import HEADS, ROWS, SEQUENCE, SHARDS, batch_per_process, check_epochs, meshes_of
from .progress import PLOT, Batch, Plot, Progress, SaveOnInterrupt
from .resumable import ResumableTrainer, log_every
from .saving import alone_in, check_folder, last_checkpoint, step_of, written_whole
from .settings import Settings
from .sharded import reshard, shard

__all__ = ["Run", "device_arguments", "quiet", "train"]

_A_DAY = 24 * 60 * 60


@dataclass
class Run:
    """The result of a training.

    Attributes:
        model: the trained model; of one whose weights are shared among processes, the first has the whole.
        codec: encodes and decodes its text.
        corpus: its data.
        loss: validation loss, in nats per byte or token.
    """

    model: RetNetForCausalLM
    codec: Codec
    corpus: Corpus
    loss: float


def quiet() -> None:
    """Turn off the progress bars and notices of transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def train(settings: Settings, out: Path, *, resume: bool = False) -> Run:
    """Run or continue a training; write checkpoints, the model, its tokenizer and a plot of the losses to `out`.

    Args:
        settings: the settings of the run.
        out: the folder of the run.
        resume: continue from the last complete checkpoint in `out`, or start anew if there is none.
    Returns: the model and its loss.
    Raises: ValueError, ImportError or BackendError for settings that cannot run, before anything is written to `out`.
        Stopped, a KeyboardInterrupt, if Ctrl-C or another signal ends the run. FloatingPointError if the training
        diverges. NotSavedError if the disk is full.
    """
    settings.check()
    check_folder(out)
    args = _arguments(settings, out)  # sets up communication between processes
    with SaveOnInterrupt() as stop, alone_in(out) if args.process_index == 0 else nullcontext():
        return _train(settings, args, out, stop, resume)


def _train(settings: Settings, args: TrainingArguments, out: Path, stop: SaveOnInterrupt, resume: bool) -> Run:
    meshes = meshes_of(args, settings.context_parallel, settings.tensor_parallel, settings.fsdp)
    mesh, weights = meshes or (None, None)
    processes = 1 if mesh is None else mesh[ROWS].size()
    begun = settings.processes or processes
    batch = batch_per_process(settings.batch, begun, processes)
    args.per_device_train_batch_size = args.per_device_eval_batch_size = batch
    codec = load_codec(settings.tokenizer)
    if resume:
        settings.check_same(vocabulary=codec.digest)
    with args.main_process_first(desc="reading the corpus"):  # the other processes read the cache
        corpus = read_corpus(settings.files, codec, settings.context, column=settings.text_column, skip=out)
    if resume:
        settings.check_same(corpus=corpus.digest)
        check_epochs(begun, processes, len(corpus.train), batch * processes, settings.steps * settings.accumulate)

    checkpoint = _agreed(args, out) if resume else None
    finished = checkpoint if checkpoint and step_of(checkpoint) >= settings.steps else None
    set_seed(settings.seed)
    model = _model(settings, codec, corpus, finished)
    if weights is not None and settings.tensor_parallel > 1:
        tensor_parallel(model, weights[HEADS])
    if weights is not None and settings.fsdp:
        shard(model, weights[SHARDS])
    else:
        cast(nn.Module, model).to(args.device)
    _try(model, corpus, mesh, args.device)
    trainer = _trainer(model, args, mesh, codec, corpus, out, stop)
    args.distributed_state.wait_for_everyone()  # nothing is written if a process failed
    if args.process_index == 0:
        found: dict[str, Any] = dict(processes=begun, vocabulary=codec.digest, corpus=corpus.digest, unit=corpus.unit)
        replace(settings, **found).write(out)

    if finished:
        trainer.state = TrainerState.load_from_json(str(finished / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    with written_whole(out, "the model") if args.process_index == 0 else nullcontext(out) as folder:
        trainer.save_model(str(folder))  # the first process writes; the others hand it their shards
    loss = trainer.evaluate()["eval_loss"]
    if trainer.sharded and args.process_index == 0:  # it decodes alone
        model = RetNetForCausalLM.from_pretrained(out)
        set_backend(model, settings.backend, settings.form)
    return Run(model, codec, corpus, loss)


def _agreed(args: TrainingArguments, out: Path) -> Path | None:
    """Return the checkpoint to continue from, which the first process chooses for all."""
    found = [last_checkpoint(out) if args.process_index == 0 else None]
    return broadcast_object_list(found)[0]


def _model(settings: Settings, codec: Codec, corpus: Corpus, finished: Path | None) -> RetNetForCausalLM:
    """Return a new model, or that of a finished run's last checkpoint."""
    if finished:
        model = RetNetForCausalLM.from_pretrained(finished)
    else:
        model = RetNetForCausalLM(settings.model_config(codec, corpus.vocabulary))
    if settings.gradient_checkpointing:  # transformers 5.16 has the old name only
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    set_backend(model, settings.backend, settings.form)
    return model


def _try(model: RetNetForCausalLM, corpus: Corpus, mesh: DeviceMesh | None, device: torch.device) -> None:
    """Run the model once. Raises: BackendError or ValueError for what it cannot do, such as a sequence in parts."""
    tokens = corpus.train[0]["input_ids"][None, :2].to(device)
    in_parts = mesh is not None and mesh[SEQUENCE].size() > 1
    with torch.no_grad(), context_parallel(mesh[SEQUENCE], length=2) if mesh and in_parts else nullcontext():
        model(tokens)
    reshard(model)


class _Trainer(ResumableTrainer):
    """Evaluates by cross-entropy only, while the training loss may include other terms, such as that of experts.

    The validation loss is the mean over the tokens, whatever the number of processes: the rows with which several of
    them fill the last batch do not count.
    """

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Evaluate as Trainer does, and add the mean loss."""
        self.sums: list[tuple[float, int]] = []  # the loss and the number of tokens of each batch
        out: Any = super().evaluation_loop(*args, **options)
        own = torch.tensor(self.sums, dtype=torch.float64).sum(0).to(self.args.device, torch.float32)
        loss, count = self.accelerator.reduce(own, "sum").tolist()
        out.metrics["eval_loss"] = loss / count
        return out

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[None, None, None]:
        plain = cast(RetNetForCausalLM, self.model)
        context, inputs = self._prepare_context_parallel_inputs(model, self._prepare_inputs(inputs))
        with torch.no_grad(), context(), self.compute_loss_context_manager():
            logits = model(inputs["input_ids"], use_cache=False).logits
            targets: Any = inputs["shift_labels"] if "shift_labels" in inputs else shifted(inputs["labels"])
            targets = targets[: self._own_rows(len(targets))]
            loss = plain.loss_function(
                logits[: len(targets)], None, plain.config.vocab_size, shift_labels=targets, num_items_in_batch=1
            )
        self.sums.append((loss.item(), int((targets != -100).sum())))
        return None, None, None

    def _own_rows(self, rows: int) -> int:
        """Return how many of the rows of a batch belong to this process; more may fill up the last batch."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        first = 0 if self.mesh is None else self.mesh[ROWS].get_local_rank() * rows
        return min(max(state.remainder - first, 0), rows)


def _trainer(
    model: RetNetForCausalLM,
    args: TrainingArguments,
    mesh: DeviceMesh | None,
    codec: Codec,
    corpus: Corpus,
    out: Path,
    stop: SaveOnInterrupt,
) -> ResumableTrainer:
    processes = 1 if mesh is None else mesh[ROWS].size()
    batch = Batch(args.train_batch_size, args.gradient_accumulation_steps, processes, corpus.train.context, corpus.unit)
    return _Trainer(
        model=model,
        args=args,
        mesh=mesh,
        data_collator=default_data_collator,
        train_dataset=corpus.train,
        eval_dataset=corpus.valid,
        processing_class=codec.tokenizer,  # saved with the model
        callbacks=[Progress(batch, corpus), Plot(batch, out / PLOT), stop],
    )


def device_arguments(device: str, dtype: str) -> dict[str, Any]:
    """Return the arguments of `TrainingArguments` for a device and a dtype, named as in `Settings`."""
    return {
        "use_cpu": device == "cpu" or torch.accelerator.current_accelerator(check_available=True) is None,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _arguments(settings: Settings, out: Path) -> TrainingArguments:
    warmup = min(100, settings.steps // 10) if settings.warmup is None else settings.warmup
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        logging_steps=log_every(settings.steps),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        **device_arguments(settings.device, settings.dtype),
        ddp_find_unused_parameters=False,
        ddp_timeout=_A_DAY,  # seconds; the first process may tokenise for hours while the others wait
        report_to=settings.report_to,
        disable_tqdm=False,  # else a callback prints each log as well
    )
    args._n_gpu = min(1, args.n_gpu)  # one device per process; transformers would else split batches over all
    return args
