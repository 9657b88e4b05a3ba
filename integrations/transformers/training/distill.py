"""Train a model whose attention was replaced to the quality of the original, its teacher.

Training has two stages. The first fits each replaced layer to the output of the attention that it replaces, on the
teacher's inputs, all layers in one pass. The second distils the whole model from the teacher's probabilities and,
optionally, the labels.

Source: Zhang et al. 2024, arXiv:2410.10254 (LoLCATs). Differs: retention replaces linear attention, the second stage
    trains all weights unless it is told otherwise, the layers may be replaced in parts, one after another, and further
    stages train on longer sequences.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, default_data_collator, set_seed

from retention.options import check_choice, check_eps, check_factor, check_is, check_whole, shown

from ...files import read_json
from ...swap import Swapped, plan_replacement, replace_attention, restore_attention
from ..compat import TRAINER_STATE_NAME, TrainerState
from .best import Best
from .lora import low_rank_updates, peft
from .progress import progress_bar
from .rates import STEPS, Group, search_rates
from .resumable import ResumableTrainer, log_every
from .saving import last_checkpoint, step_of, write_text

__all__ = [
    "CONTEXT",
    "TRANSFER",
    "TUNE",
    "TUNING",
    "AttentionTransfer",
    "Recovery",
    "recover",
    "replace_in_parts",
    "sequences_per_step",
    "teacher_of",
]

TRANSFER, TUNING = "transfer", "tuning"  # names of the stages and of their folders
TUNE = _ALL, _LAYERS, _LORA = "all", "layers", "lora"  # what the second stage trains
CONTEXT = "context"  # "context-T" is the folder of the training on examples of length T
_RATES, _BEST = "rates.json", "best.pt"  # in the folder of a stage
_BATCH = 4  # examples per step, unless the caller says otherwise


@dataclass
class Recovery:
    """Losses on the validation data, in nats per token. `str()` gives them in one line.

    Attributes:
        teacher: loss of the teacher.
        replaced: loss of the model before training.
        transferred: loss after the first stage.
        tuned: loss after the second stage.
        tokens: number of tokens trained on in both stages, those of the search for learning rates included.
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
    longer: Sequence[tuple[Dataset, Dataset]] = (),
    longer_steps: int = 200,
    **arguments: Any,
) -> list[Recovery]:
    """Replace some layers, train, replace further layers, train, and so on.

    Each part thus learns while later layers still compute attention. Each part is calibrated on the first 8 training
    examples. At the end the second stage goes on with longer sequences, if there are any.

    Args:
        model: a transformers model; it is changed in place.
        parts: lists of layer indices, as `replace_attention` takes them.
        train_data, valid_data: as in `recover`.
        out: folder; part n trains in its subfolder "part-n".
        options: options of `replace_attention` for all parts.
        longer: training and validation data with longer examples, from short to long; those of length T train in the
            subfolder "context-T". The batch shrinks as the length grows, to one example at least.
        longer_steps: optimiser steps for each of `longer`.
        arguments: arguments of `recover` for each part.
    Returns: one `Recovery` per part, then one for each of `longer`; the last one describes the final model.
    Raises: TypeError or ValueError as `replace_attention` does, before any training; and as `recover` does.
    Example:
        found = replace_in_parts(model, [[2, 3], [0, 1]], train, valid, out="runs/parts", options={"window": 64})
    """
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not all(isinstance(x, Sequence) for x in parts):
        raise TypeError(f"parts must be lists of numbers of layers, such as [[0, 1], [2]]; got parts {shown(parts)}")
    check_is("out", out, str | Path, "a folder")
    check_is("options", options, dict | None, "options of replace_attention by name, or None")
    out = Path(out)
    check_whole("longer_steps", longer_steps)
    tune = arguments.get("tune", _ALL)
    check_choice("tune", tune, TUNE)
    chosen = plan_replacement(model, layers=[i for part in parts for i in part], **options or {}).replaced
    found = []
    with _learning(model, chosen, tune):
        teacher = _frozen_copy(model)
        for number, part in enumerate(parts, start=1):
            there = {name for name, module in model.named_modules() if isinstance(module, Swapped)}
            names = plan_replacement(model, layers=part, **options or {}).replaced
            with _layers_shown(model, names, hidden=bool(arguments.get("disable_tqdm"))):
                report = replace_attention(model, layers=part, calibrate_on=_first(train_data, 8), **options or {})
            new = [name for name in report.replaced if name not in there]
            folder = out / f"part-{number}"
            found.append(recover(model, train_data, valid_data, out=folder, teacher=teacher, taught=new, **arguments))
        tokens = arguments.get("batch", _BATCH) * _length(train_data)
        for train, valid in longer:
            context = _length(train)
            sizes = {"transfer_steps": 0, "tuning_steps": longer_steps, "batch": sequences_per_step(tokens, context)}
            folder = out / f"{CONTEXT}-{context}"
            found.append(recover(model, train, valid, out=folder, teacher=teacher, **arguments | sizes))
    return found


def sequences_per_step(tokens: int, context: int) -> int:
    """Return how many sequences of length `context` are trained on in a step of about so many tokens; at least 1."""
    return max(tokens // context, 1)


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
    batch: int = _BATCH,
    transfer_lr: float | None = None,
    tuning_lr: float | None = None,
    tune: str = "all",
    rank: int = 16,
    patience: int | None = None,
    label_weight: float = 0.0,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Recovery:
    """Train `model`, whose attention was replaced by `replace_attention`, in two stages.

    No stage ends worse than it began: the first keeps the best weights of each layer, the second those of the model,
    by the validation data; and if the fitted layers give a worse model than before, they are put back.

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
            Default: each layer gets the one of 1e-3, 3e-3, 1e-2 and 4e-2 with which its error is lowest after 8 steps.
        tuning_lr: learning rate of the second stage. Default: the one of 3e-5, 1e-4, 3e-4 and 1e-3 with which the
            model's loss is lowest after 8 steps.
        tune: what the second stage trains: "all" weights, or those of the replaced "layers" only. With "layers",
            teacher and model share all other weights, and the optimiser needs memory for the layers only. "lora" is
            like "layers", and all other linear layers but the head learn by low-rank updates, which are added to
            their weights at the end; it needs the library peft.
        rank: rank of these updates.
        patience: number of evaluations without a lower loss after which a stage ends. Default: none does.
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
    for name, rate in (("transfer_lr", transfer_lr), ("tuning_lr", tuning_lr)):
        if rate is not None:
            check_factor(name, rate)
    check_choice("tune", tune, TUNE)
    check_whole("rank", rank)
    check_whole("patience", patience, optional=True)
    check_eps("label_weight", label_weight)
    if tune == _LORA:
        peft()
    out = Path(out)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no replaced attention; call replace_attention first")
    wrong = [name for name in taught or () if name not in layers]
    if wrong:
        raise ValueError(f"taught must name replaced layers; got {wrong[0]!r}; there are {', '.join(layers)}")
    taught_layers = {name: layers[name] for name in layers if taught is None or name in taught}

    def args(name: str, steps: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(out / name),
            max_steps=steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
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
    with _learning(model, layers, tune):
        teacher = teacher_of(model) if teacher is None else cast(Any, teacher).requires_grad_(False).eval()
        tuner = _Tuner(model, args(TUNING, tuning_steps), **options)
        tuner.label_weight, tuner.teacher = label_weight, cast(Any, teacher).to(tuner.args.device)
        tuner.parts, tuner.rate, tuner.patience = {"model": model}, tuning_lr, patience
        as_teacher, replaced = _loss(tuner, tuner.teacher), _loss(tuner, model)

        transfer = AttentionTransfer(tuner.teacher, taught_layers)
        stage = _Transfer(transfer, args(TRANSFER, transfer_steps), **options)
        stage.parts, stage.rate, stage.patience = taught_layers, transfer_lr, patience
        start = {name: copy.deepcopy(layer.state_dict()) for name, layer in taught_layers.items()}
        try:
            stage.run()
        finally:
            transfer.release()
        transferred = _loss(tuner, model) if transfer_steps else replaced
        if transferred > replaced:
            tqdm.write(f"the fitted layers give {transferred:.4f} nats, more than {replaced:.4f}; they are put back")
            transferred = replaced
            for name, layer in taught_layers.items():
                layer.load_state_dict(start[name])
        del start
        with low_rank_updates(model, layers, rank) if tune == _LORA else nullcontext():
            tuner.run()
        tuned = tuner.best.losses["model"] if tuning_steps else transferred
        return Recovery(as_teacher, replaced, transferred, tuned, stage.tokens + tuner.tokens)


@contextmanager
def _learning(model: PreTrainedModel, layers: Iterable[str], tune: str) -> Iterator[None]:
    """Within the block, freeze all parameters that `tune` leaves out; `layers` are the names of the replaced layers."""
    ours = tuple(f"{name}." for name in layers)
    frozen = [
        name for name, p in model.named_parameters() if tune != _ALL and p.requires_grad and not name.startswith(ours)
    ]
    try:
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        yield
    finally:
        for name in frozen:
            model.get_parameter(name).requires_grad_(True)


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
        """Run the teacher on input_ids (B, T) and return {"loss": the loss, "errors": the error of each layer (L,)}.

        The teacher's head does not run.
        """
        with torch.no_grad():
            self.run_teacher[0].base_model(input_ids, use_cache=False, **inputs)
        losses = []
        for layer, (args, kwargs, want) in zip(self.layers, self.seen, strict=True):
            got = layer(*args, **kwargs)[0]
            size = want.square().mean()
            losses.append((got - want).square().mean() / size.clamp(min=torch.finfo(size.dtype).tiny))
        errors = torch.stack(losses)
        return {"loss": errors.mean(), "errors": errors.detach()}


class _Stage(ResumableTrainer):
    """Trainer of a stage: it finds its learning rates if none is given, and ends with the best weights it has seen.

    Attributes:
        parts: what the stage trains, by name; each part has its own learning rate, and its own best weights.
        rate: the learning rate of all parts, or None to search it.
        patience: number of evaluations without a lower loss after which the stage ends; None: never.
        ladder: the rates that a search tries.
        slowness: learning rate of parameters outside of retention, relative to that of its own.
        tokens: number of tokens that the stage was trained on, those of the search included; set by `run`.
    """

    ladder: Sequence[float]
    slowness: float
    parts: dict[str, nn.Module]
    rate: float | None
    patience: int | None
    rates: dict[str, float]
    tokens = 0

    def losses_of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the validation loss of each part on a batch."""
        raise NotImplementedError

    def run(self) -> None:
        """Train, or continue from the last checkpoint; then put back the best weights of each part."""
        out, most = Path(str(self.args.output_dir)), self.args.max_steps
        if most <= 0:
            return
        self.best = Best(out / _BEST, self.parts)
        last = last_checkpoint(out)
        if last is None or not (out / _RATES).is_file():
            set_seed(self.args.seed)  # same random state whether the earlier stage was trained or loaded
            self.best.forget()
            self._measure()
            rates, searched = self._found_rates()
            write_text(out / _RATES, json.dumps({"rates": rates, "steps": searched}, indent=2) + "\n")
        kept = read_json(out / _RATES, "learning rates")
        self.rates = kept["rates"]
        self.args.learning_rate = max(self.rates.values())
        done = self._done(last) if last else 0
        if last and done:
            self._load_from_checkpoint(str(last))
        else:
            set_seed(self.args.seed)  # and whether the rates were searched or read
            self.train(resume_from_checkpoint=str(last) if last else None)
            done = self.state.global_step
            if done < most and not self._is_stale(self.state.log_history):
                raise KeyboardInterrupt
        self._measure()
        self.best.restore()
        examples = (done + kept["steps"]) * self.args.train_batch_size * self.args.gradient_accumulation_steps
        self.tokens = examples * _length(self.train_dataset)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """Evaluate; during training, also keep the weights of each part that is better than before."""
        self.seen: list[tuple[Tensor, int]] = []
        found = super().evaluate(*args, **options)
        if self.is_in_train:
            self.best.offer(self._by_part(self.seen))
            if self._is_stale(self.state.log_history):
                self.control.should_save = self.control.should_training_stop = True
        return found

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            losses = self.losses_of(model, inputs)
        self.seen.append((losses, len(inputs["input_ids"])))
        return losses.mean(), None, None

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = [group for name in self.parts for group in self._groups(name, self.rates[name])]
            self.optimizer = torch.optim.AdamW(groups, self.args.learning_rate, weight_decay=0.0)
        return self.optimizer

    def _groups(self, part: str, rate: float) -> list[Group]:
        named = [(".retention." in f".{name}", p) for name, p in self.parts[part].named_parameters() if p.requires_grad]
        new: Group = {"params": [p for is_new, p in named if is_new], "lr": rate}
        old: Group = {"params": [p for is_new, p in named if not is_new], "lr": self.slowness * rate}
        return [group for group in (new, old) if group["params"]]

    def _found_rates(self) -> tuple[dict[str, float], int]:
        """Return the learning rate of each part, and the steps of the search."""
        if self.rate is not None:
            return dict.fromkeys(self.parts, self.rate), 0
        size = self.args.train_batch_size
        rows, held = (self._spread(data, n * size) for data, n in ((self.train_dataset, STEPS), (self.eval_dataset, 2)))
        batches, held_out = (self._batches(rows, size), self._batches(held, size))

        def step(i: int) -> Tensor:
            with self.compute_loss_context_manager():
                return cast(Tensor, self.compute_loss(cast(nn.Module, self.model), dict(batches[i])))

        @torch.no_grad()
        def measure() -> dict[str, float]:
            cast(nn.Module, self.model).eval()
            found = self._by_part([(self.losses_of(self.model, dict(batch)), size) for batch in held_out])
            cast(nn.Module, self.model).train()
            return found

        groups = {name: partial(self._groups, name) for name in self.parts}
        rates, steps = search_rates(groups, self.ladder, step, measure, hidden=bool(self.args.disable_tqdm))
        counts = sorted(Counter(rates.values()).items())
        found = ", ".join(f"{rate:g}" + (f" for {count} layers" if len(rates) > 1 else "") for rate, count in counts)
        if not self.args.disable_tqdm:
            tqdm.write(f"{self.args.output_dir}: the learning rate is {found}")
        return rates, steps

    def _spread(self, data: Any, count: int) -> list[Any]:
        """Return examples that lie evenly over a dataset."""
        return [data[i * len(data) // count] for i in range(count)]

    def _batches(self, examples: list[Any], size: int) -> list[dict[str, Any]]:
        starts = range(0, len(examples), size)
        return [self._prepare_inputs(default_data_collator(examples[i : i + size])) for i in starts]

    def _measure(self) -> None:
        """Evaluate outside of the training, and keep what is better than before."""
        self.evaluate()
        self.best.offer(self._by_part(self.seen))

    def _by_part(self, seen: Sequence[tuple[Tensor, int]]) -> dict[str, float]:
        """Return the mean losses of the parts over batches of so many rows."""
        rows = sum(count for _, count in seen)
        means = sum(losses.double() * count for losses, count in seen) / rows
        return dict(zip(self.parts, cast(Tensor, means).tolist(), strict=True))

    def _done(self, checkpoint: Path) -> int:
        """Return the number of steps if the stage ended with this checkpoint; else 0."""
        step = step_of(checkpoint)
        log = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history
        return step if step >= self.args.max_steps or self._is_stale(log) else 0

    def _is_stale(self, log: Sequence[Mapping[str, float]]) -> bool:
        """Tell whether the last evaluations have brought nothing."""
        losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        if self.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience


class _Transfer(_Stage):
    """Trainer of the first stage, whose model computes the losses itself."""

    ladder = (1e-3, 3e-3, 1e-2, 4e-2)
    slowness = 0.1

    def losses_of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return model(**inputs)["errors"]


class _Tuner(_Stage):
    """Trainer of the second stage; it also measures the labels' cross-entropy for all losses in `Recovery`."""

    ladder = (3e-5, 1e-4, 3e-4, 1e-3)
    slowness = 1.0
    teacher: PreTrainedModel
    label_weight: float

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        with torch.no_grad():
            wanted = self.teacher(**inputs, use_cache=False).logits.log_softmax(-1)
        tokens = logits[..., 0].numel()
        divergence = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum") / tokens
        if not self.label_weight:
            return divergence
        return divergence + self.label_weight * _cross_entropy(logits, labels)

    def losses_of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        labels = inputs.pop("labels")
        return _cross_entropy(model(**inputs, use_cache=False).logits, labels)[None]


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


def _length(data: Any) -> int:
    """Return the length of the examples of a dataset."""
    return len(data[0]["input_ids"])


def _first(data: Any, count: int) -> dict[str, Tensor]:
    """Return a batch of the first `count` examples."""
    return {"input_ids": torch.stack([data[i]["input_ids"] for i in range(min(count, len(data)))])}


def _loss(tuner: _Tuner, model: PreTrainedModel) -> float:
    """Return the cross-entropy of `model` on the validation data."""
    mine, tuner.model = tuner.model, model
    try:
        tuner.evaluate()
        return tuner._by_part(tuner.seen)["model"]
    finally:
        tuner.model = mine


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
