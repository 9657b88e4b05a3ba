"""Give a model whose attention was replaced its quality back, with the model that it was as the teacher.

First each replaced layer learns to give what its attention gave, on the teacher's inputs, all layers in one pass; then
the whole model learns the teacher's probabilities and the labels. Source of the two stages: Zhang et al. 2024,
arXiv:2410.10254 (LoLCATs). Differs: retention instead of linear attention, all weights instead of LoRA in the second,
and the layers may be replaced in parts, one after another.
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

from ..swap import Swapped, plan_replacement, replace_attention, restore_attention
from .training.progress import progress_bar
from .training.resumable import ResumableTrainer
from .training.saving import last_checkpoint, step_of

TRANSFER, TUNING = "transfer", "tuning"  # the stages, and their folders


@dataclass
class Recovery:
    """Losses on the validation data, in nats per token: the teacher's, and the model's before, between and after."""

    teacher: float
    replaced: float
    transferred: float
    tuned: float
    tokens: int  # that were trained on, in both stages

    def __str__(self) -> str:
        gap = 100 * (self.tuned / self.teacher - 1)
        return (
            f"teacher {self.teacher:.4f}; replaced {self.replaced:.4f}, layers taught {self.transferred:.4f}, "
            f"tuned {self.tuned:.4f} nats per token, {gap:+.1f} %, after {self.tokens:,} tokens"
        )


def teacher_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it was before its attention was replaced, frozen. For models that were not trained since.

    It shares the parameters that do not learn, such as those beneath LoRA.
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
    """Replace some layers, train, replace some more, and so on: each part learns beside layers that still attend.

    parts: numbers of layers, as `replace_attention` takes them. options: for `replace_attention`.
    out: each part has a folder of its own in it. arguments: of `recover`, the steps of each part.
    Returns: what each part gave; the last is that of the model as it is now.
    Raises: ValueError as `replace_attention` does, before anything is trained.
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
    """Train `model`, whose attention `replace_attention` has replaced, until it is as good as it was.

    train_data, valid_data: examples {"input_ids": (T,), "labels": (T,)} of equal length.
    out: folder for checkpoints; what was trained there before is gone on from.
    teacher: default: `teacher_of(model)`.
    taught: names of the layers that learn in the first stage; default: all that are replaced.
    transfer_steps, tuning_steps: of the two stages; 0 leaves one out. transfer_lr: of what retention has brought, in
        the first; the projections learn there at a tenth of it.
    label_weight: of the labels' cross-entropy, beside the divergence from the teacher.
    arguments: for `transformers.TrainingArguments`.
    Raises: ValueError if nothing in the model is replaced, or taught is not. KeyboardInterrupt if a callback ended the
        training before its end, such as the one that saves on Ctrl-C. FloatingPointError if a training diverges.
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
            **{"report_to": "none", "logging_steps": 10, "save_steps": max(steps // 4, 1), **arguments},
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
    """The loss of the first stage: how far each replaced layer is from its attention, on the attention's own inputs.

    ||retention(x) - attention(x)||^2 / ||attention(x)||^2, the mean over the layers. The teacher is no child of it:
    neither its parameters nor its checkpoints hold it.
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
        """Take the hooks off the teacher."""
        for hook in self.hooks:
            hook.remove()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            self.run_teacher[0](input_ids, use_cache=False, **inputs)
        errors = []
        for layer, (args, kwargs, want) in zip(self.layers, self.seen, strict=True):
            got = layer(*args, **kwargs)[0]
            errors.append((got - want).square().mean() / want.square().mean())
        return {"loss": torch.stack(errors).mean()}


class _Stage(ResumableTrainer):
    """The first stage, whose model computes the loss."""

    slowness = 0.1  # of all that was there before the replacement

    def run(self) -> None:
        """Train, or go on from where an earlier run ended."""
        last = last_checkpoint(Path(str(self.args.output_dir)))
        if last and step_of(last) >= self.args.max_steps:
            self._load_from_checkpoint(str(last))
        elif self.args.max_steps > 0:
            set_seed(self.args.seed)  # so that it does not matter whether the stage before was trained or loaded
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
    """The second stage, and the measure of all: the labels' cross-entropy."""

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
    """The calibration on a bar, which these layers move when they run."""
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
    """A batch of the first examples."""
    return {"input_ids": torch.stack([data[i]["input_ids"] for i in range(min(count, len(data)))])}


def _loss(tuner: _Tuner, model: PreTrainedModel) -> float:
    """On the validation data."""
    mine, tuner.model = tuner.model, model
    try:
        return tuner.evaluate()["eval_loss"]
    finally:
        tuner.model = mine


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
