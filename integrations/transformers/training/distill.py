"""Train a model whose attention was replaced to the quality of the original, its teacher.

Training has two stages. The first fits each replaced layer to the output of the attention that it replaces, on the
teacher's inputs, all layers in one pass. The second distils the whole model from the teacher's probabilities and,
optionally, the labels.

Source: Zhang et al. 2024, arXiv:2410.10254 (LoLCATs). Differs: retention replaces linear attention, the second stage
    trains all weights instead of LoRA, and the layers may be replaced in parts, one after another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from retention.options import check_eps, check_factor, check_is, check_whole, shown

from ...swap import Swapped, plan_replacement, replace_attention, restore_attention
from .progress import progress_bar
from .resumable import ResumableTrainer, log_every
from .saving import last_checkpoint, step_of

__all__ = ["TRANSFER", "TUNING", "AttentionTransfer", "Recovery", "recover", "replace_in_parts", "teacher_of"]

TRANSFER, TUNING = "transfer", "tuning"  # names of the stages and of their folders


@dataclass
class Recovery:
    """Losses on the validation data, in nats per token. `str()` gives them in one line.

    Attributes:
        teacher: loss of the teacher.
        replaced: loss of the model before training.
        transferred: loss after the first stage.
        tuned: loss after the second stage.
        tokens: number of tokens trained on in both stages.
    """

    teacher: float
    replaced: float
    transferred: float
    tuned: float
    tokens: int

    def __str__(self) -> str:
        gap = 100 * (self.tuned / self.teacher - 1)
        return (
            f"teacher {self.teacher:.4f}; replaced {self.replaced:.4f}, layers taught {self.transferred:.4f}, "
            f"tuned {self.tuned:.4f} nats per token, {gap:+.1f} %, after {self.tokens:,} tokens"
        )


def teacher_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy of the model with its original attention.

    It is the teacher only if the model was not trained after the replacement. The copy shares the model's frozen
    parameters, such as those under LoRA.
    """
    teacher = _frozen_copy(model)
    restore_attention(teacher)
    return teacher


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return cast(Any, copy.deepcopy(model, shared)).requires_grad_(False).eval()


def replace_in_parts(
    model: PreTrainedModel,
    parts: Sequence[Sequence[int]],
    train_data: Dataset,
    valid_data: Dataset,
    *,
    out: str | Path,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> list[Recovery]:
    """Replace some layers, train, replace further layers, train, and so on.

    Each part thus learns while later layers still compute attention. Each part is calibrated on the first 8 training
    examples.

    Args:
        model: a transformers model; it is changed in place.
        parts: lists of layer indices, as `replace_attention` takes them.
        train_data, valid_data: as in `recover`.
        out: folder; part n trains in its subfolder "part-n".
        options: options of `replace_attention` for all parts.
        arguments: arguments of `recover` for each part.
    Returns: one `Recovery` per part; the last one describes the final model.
    Raises: TypeError or ValueError as `replace_attention` does, before any training; and as `recover` does.
    Example:
        found = replace_in_parts(model, [[2, 3], [0, 1]], train, valid, out="runs/parts", options={"window": 64})
    """
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not all(isinstance(x, Sequence) for x in parts):
        raise TypeError(f"parts must be lists of numbers of layers, such as [[0, 1], [2]]; got parts {shown(parts)}")
    check_is("out", out, str | Path, "a folder")
    check_is("options", options, dict | None, "options of replace_attention by name, or None")
    out = Path(out)
    plan_replacement(model, layers=[i for part in parts for i in part], **options or {})
    teacher = _frozen_copy(model)
    found = []
    for number, part in enumerate(parts, start=1):
        there = {name for name, module in model.named_modules() if isinstance(module, Swapped)}
        names = plan_replacement(model, layers=part, **options or {}).replaced
        with _layers_shown(model, names, hidden=bool(arguments.get("disable_tqdm"))):
            report = replace_attention(model, layers=part, calibrate_on=_first(train_data, 8), **options or {})
        new = [name for name in report.replaced if name not in there]
        folder = out / f"part-{number}"
        found.append(recover(model, train_data, valid_data, out=folder, teacher=teacher, taught=new, **arguments))
    return found


def recover(
    model: PreTrainedModel,
    train_data: Dataset,
    valid_data: Dataset,
    *,
    out: str | Path,
    teacher: PreTrainedModel | None = None,
    taught: Sequence[str] | None = None,
    transfer_steps: int = 600,
    tuning_steps: int = 1400,
    batch: int = 4,
    transfer_lr: float = 4e-2,
    tuning_lr: float = 3e-4,
    label_weight: float = 0.0,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Recovery:
    """Train `model`, whose attention was replaced by `replace_attention`, in two stages.

    Args:
        model: a transformers language model; it is changed in place.
        train_data, valid_data: datasets of examples {"input_ids": (T,), "labels": (T,)}, all of one length T, int64.
        out: folder for checkpoints, in subfolders "transfer" and "tuning". A run continues from checkpoints found
            there.
        teacher: the original model. Default: `teacher_of(model)`; pass it if the model was trained after the
            replacement.
        taught: names of the layers that the first stage trains. Default: all replaced layers.
        transfer_steps, tuning_steps: optimiser steps of the two stages; 0 skips a stage.
        batch: examples per step and device.
        transfer_lr: learning rate of retention's own parameters in the first stage; the projections take a tenth of it.
        tuning_lr: learning rate of the second stage.
        label_weight: factor of the labels' cross-entropy, which is added to the divergence from the teacher.
        callbacks: callbacks of transformers' Trainer, for both stages.
        arguments: further arguments of `transformers.TrainingArguments`, for both stages.
    Returns: the losses.
    Raises: TypeError or ValueError for a wrong argument, such as a model without replaced layers. KeyboardInterrupt if
        a callback stops the training early, as the one that saves on Ctrl-C does. FloatingPointError if the training
        diverges.
    Example:
        replace_attention(model, calibrate_on={"input_ids": train[0]["input_ids"][None]})
        print(recover(model, train, valid, out="runs/recovered", transfer_steps=600, tuning_steps=1400))
    """
    check_is("model", model, PreTrainedModel, "a model of transformers")
    check_is("out", out, str | Path, "a folder")
    check_is("teacher", teacher, PreTrainedModel | None, "a model of transformers, or None")
    for name, count, least in (
        ("transfer_steps", transfer_steps, 0),
        ("tuning_steps", tuning_steps, 0),
        ("batch", batch, 1),
    ):
        check_whole(name, count, least)
    check_factor("transfer_lr", transfer_lr)
    check_factor("tuning_lr", tuning_lr)
    check_eps("label_weight", label_weight)
    out = Path(out)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no replaced attention; call replace_attention first")
    wrong = [name for name in taught or () if name not in layers]
    if wrong:
        raise ValueError(f"taught must name replaced layers; got {wrong[0]!r}; there are {', '.join(layers)}")
    layers = {name: layers[name] for name in layers if taught is None or name in taught}
    teacher = teacher_of(model) if teacher is None else cast(Any, teacher).requires_grad_(False).eval()

    def args(name: str, steps: int, lr: float) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(out / name),
            max_steps=steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 10),
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_total_limit=2,
            **{
                "report_to": "none",
                "logging_steps": log_every(steps),
                "save_steps": max(steps // 4, 1),
                **arguments,
            },
        )

    options: Any = dict(train_dataset=train_data, eval_dataset=valid_data, callbacks=callbacks)
    tuner = _Tuner(model, args(TUNING, tuning_steps, tuning_lr), **options)
    tuner.label_weight, tuner.teacher = label_weight, cast(Any, teacher).to(tuner.args.device)
    as_teacher, replaced = _loss(tuner, tuner.teacher), _loss(tuner, model)

    transfer = AttentionTransfer(tuner.teacher, layers)
    stage = _Stage(transfer, args(TRANSFER, transfer_steps, transfer_lr), **options)
    try:
        stage.run()
    finally:
        transfer.release()
    transferred = _loss(tuner, model)
    tuner.run()
    tokens = (transfer_steps + tuning_steps) * batch * len(train_data[0]["input_ids"])
    return Recovery(as_teacher, replaced, transferred, _loss(tuner, model), tokens)


class AttentionTransfer(nn.Module):
    """The loss of the first stage: the error of each replaced layer on its attention's inputs.

        loss = mean over layers of ||retention(x) - attention(x)||^2 / ||attention(x)||^2

    The teacher is not a child module, so its parameters are neither trained nor saved.

    Args:
        teacher: the model with the original attention.
        layers: the replaced layers, under their names in the teacher.
    """

    def __init__(self, teacher: PreTrainedModel, layers: dict[str, nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers.values())
        self.run_teacher = [teacher]
        self.seen: list[Any] = [None] * len(layers)
        self.hooks = [
            teacher.get_submodule(name).register_forward_hook(self._keep(i), with_kwargs=True)
            for i, name in enumerate(layers)
        ]

    def _keep(self, i: int) -> Any:
        def hook(attention: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.seen[i] = args, kwargs, out[0]

        return hook

    def release(self) -> None:
        """Remove the hooks from the teacher."""
        for hook in self.hooks:
            hook.remove()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """Run the teacher on input_ids (B, T) and return {"loss": the loss}."""
        with torch.no_grad():
            self.run_teacher[0](input_ids, use_cache=False, **inputs)
        errors = []
        for layer, (args, kwargs, want) in zip(self.layers, self.seen, strict=True):
            got = layer(*args, **kwargs)[0]
            errors.append((got - want).square().mean() / want.square().mean())
        return {"loss": torch.stack(errors).mean()}


class _Stage(ResumableTrainer):
    """Trainer of the first stage, whose model computes the loss itself."""

    slowness = 0.1  # learning rate of parameters outside of retention, relative to its own

    def run(self) -> None:
        """Train, or continue from the last checkpoint."""
        last = last_checkpoint(Path(str(self.args.output_dir)))
        if last and step_of(last) >= self.args.max_steps:
            self._load_from_checkpoint(str(last))
        elif self.args.max_steps > 0:
            set_seed(self.args.seed)  # same random state whether the earlier stage was trained or loaded
            self.train(resume_from_checkpoint=str(last) if last else None)
            if self.state.global_step < self.args.max_steps:
                raise KeyboardInterrupt

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = cast(nn.Module, self.model)
            named = [(".retention." in name, p) for name, p in model.named_parameters() if p.requires_grad]
            new: dict[str, Any] = {"params": [p for is_new, p in named if is_new]}
            slow = self.slowness * self.args.learning_rate
            old: dict[str, Any] = {"params": [p for is_new, p in named if not is_new], "lr": slow}
            self.optimizer = torch.optim.AdamW([new, old], self.args.learning_rate, weight_decay=0.0)
        return self.optimizer


class _Tuner(_Stage):
    """Trainer of the second stage; it also measures the labels' cross-entropy for all losses in `Recovery`."""

    slowness = 1.0
    teacher: PreTrainedModel
    label_weight: float

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        with torch.no_grad():
            wanted = self.teacher(**inputs, use_cache=False).logits.log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1).mean()
        if not self.label_weight:
            return divergence
        return divergence + self.label_weight * _cross_entropy(logits, labels)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad():
            return _cross_entropy(model(**inputs, use_cache=False).logits, labels), None, None


@contextmanager
def _layers_shown(model: PreTrainedModel, names: Sequence[str], *, hidden: bool) -> Iterator[None]:
    """Show the calibration on a progress bar, which advances whenever one of the layers runs."""
    with progress_bar("calibrating", total=len(names), unit="layer", disable=hidden) as bar:

        def move(*_: Any) -> None:
            bar.update()

        hooks = [model.get_submodule(name).register_forward_hook(move) for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _first(data: Any, count: int) -> dict[str, Tensor]:
    """Return a batch of the first `count` examples."""
    return {"input_ids": torch.stack([data[i]["input_ids"] for i in range(min(count, len(data)))])}


def _loss(tuner: _Tuner, model: PreTrainedModel) -> float:
    """Return the cross-entropy of `model` on the validation data."""
    mine, tuner.model = tuner.model, model
    try:
        return tuner.evaluate()["eval_loss"]
    finally:
        tuner.model = mine


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
