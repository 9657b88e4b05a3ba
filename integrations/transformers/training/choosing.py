"""Chooses the layers whose attention is cheapest to replace, by the loss of the model with each replaced alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from retention.options import check_factor, check_is, check_whole

from ...files import read_json
from ...swap import replace_attention
from .distill import AttentionTransfer
from .progress import progress_bar
from .saving import written_whole

__all__ = ["LayerCosts", "choose_layers"]


@dataclass
class LayerCosts:
    """The losses of a model with each layer replaced alone, in nats per token. `str()` gives a table.

    Attributes:
        names: names of the layers, in the model's order.
        original: loss of the model as it is.
        untrained: its loss with each layer replaced and calibrated.
        fitted: its loss with each layer replaced and fitted to its attention for a few steps.
        chosen: numbers of the layers with the lowest fitted losses, in the model's order.
    """

    names: list[str]
    original: float
    untrained: list[float]
    fitted: list[float]
    chosen: list[int]

    def __str__(self) -> str:
        lines = [f"{'layer':>5}  {'untrained':>9}  {'fitted':>9}  chosen; nats per token above {self.original:.4f}"]
        for i, losses in enumerate(zip(self.untrained, self.fitted, strict=True)):
            before, after = (f"{loss - self.original:+9.4f}" for loss in losses)
            lines.append(f"{i:>5}  {before}  {after}  {'yes' if i in self.chosen else ''}".rstrip())
        return "\n".join(lines)

    def write(self, file: Path) -> None:
        """Write the costs as JSON."""
        with written_whole(file.parent, file.name) as folder:
            (folder / file.name).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> LayerCosts:
        """Read what `write` has written."""
        return cls(**read_json(file, "the costs of layers"))


def choose_layers(
    model: PreTrainedModel,
    train_data: Dataset,
    valid_data: Dataset,
    count: int,
    *,
    options: dict[str, Any] | None = None,
    steps: int = 16,
    batch: int = 4,
    lr: float = 3e-3,
    examples: int = 16,
    hidden: bool = False,
) -> LayerCosts:
    """Choose the layers of `model` that cost the least when retention replaces each of them alone.

    All layers are fitted in the same steps, each to its own attention on the model's inputs; then the model runs once
    for each layer. The costs of single layers need not add up when several are replaced.

    Args:
        model: a transformers language model with its attention; it does not change.
        train_data, valid_data: as in `recover`; the losses are those of the first `examples` of valid_data.
        count: number of layers to choose.
        options: options of `replace_attention` for all layers.
        steps, batch, lr: optimiser steps of the fit, examples per step, learning rate; the projections take a tenth.
        hidden: show no progress bars.
    Returns: the losses, and the layers that are chosen.
    Raises: TypeError or ValueError for a wrong argument, or as `replace_attention` does.
    Example:
        costs = choose_layers(model, train, valid, 15, options={"window": 64, "sinks": 4})
        replace_attention(model, layers=costs.chosen, window=64, sinks=4)
    """
    check_is("model", model, PreTrainedModel, "a model of transformers")
    for name, number in (("count", count), ("batch", batch), ("examples", examples)):
        check_whole(name, number)
    check_whole("steps", steps, 0)
    check_factor("lr", lr)
    data: Any = train_data
    twin = _twin(model)
    calibration = {"input_ids": torch.stack([data[i]["input_ids"] for i in range(min(8, len(data)))])}
    names = replace_attention(twin, calibrate_on=_on(model, calibration), **options or {}).replaced
    if count > len(names):
        raise ValueError(f"count must be at most {len(names)}, the layers of the model; got count {count}")
    layers = {name: twin.get_submodule(name) for name in names}
    held = [valid_data[i]["input_ids"] for i in range(min(examples, len(cast(Any, valid_data))))]
    batches = [_on(model, {"input_ids": part})["input_ids"] for part in torch.stack(held).split(batch)]
    with _in_evaluation(model), progress_bar("layers", total=2 * len(names) + 1, unit="loss", disable=hidden) as bar:
        original = _loss(model, batches, bar)
        untrained = [_loss_with(model, name, layer, batches, bar) for name, layer in layers.items()]
        _fit(model, layers, train_data, steps, batch, lr, hidden)
        fitted = [_loss_with(model, name, layer, batches, bar) for name, layer in layers.items()]
    chosen = sorted(sorted(range(len(names)), key=fitted.__getitem__)[:count])
    return LayerCosts(names, original, untrained, fitted, chosen)


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy for the replaced layers; it shares all weights until `_fit` gives the layers their own."""
    return cast(Any, copy.deepcopy(model, {id(p): p for p in model.parameters()})).eval()


def _on(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in batch.items()}


def _fit(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    data: Any,
    steps: int,
    batch: int,
    lr: float,
    hidden: bool,
) -> None:
    """Fit each layer to the output of its attention."""
    new: list[nn.Parameter] = []
    old: list[nn.Parameter] = []
    for layer in layers.values():
        for name, p in list(layer.named_parameters()):
            parent, _, last = name.rpartition(".")
            own = nn.Parameter(p.detach().clone())
            setattr(layer.get_submodule(parent), last, own)
            (new if name.startswith("retention.") else old).append(own)
    groups: list[dict[str, Any]] = [{"params": new}, {"params": old, "lr": lr / 10}]
    optimiser = torch.optim.AdamW(groups, lr, weight_decay=0.0)
    transfer = AttentionTransfer(model, layers)
    try:
        with torch.enable_grad(), progress_bar("fitting", total=steps, unit="step", disable=hidden) as bar:
            for step in range(steps):
                rows = [data[(step * batch + i) * len(data) // (steps * batch)]["input_ids"] for i in range(batch)]
                transfer(**_on(model, {"input_ids": torch.stack(rows)}))["loss"].backward()
                nn.utils.clip_grad_norm_(transfer.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
                bar.update()
    finally:
        transfer.release()


def _loss_with(model: PreTrainedModel, name: str, layer: nn.Module, batches: Sequence[Tensor], bar: tqdm) -> float:
    """Return the loss of the model with another layer in the place of the one of this name."""
    mine = model.get_submodule(name)
    model.set_submodule(name, layer)
    try:
        return _loss(model, batches, bar)
    finally:
        model.set_submodule(name, mine)


@torch.no_grad()
def _loss(model: PreTrainedModel, batches: Sequence[Tensor], bar: tqdm) -> float:
    total, count = 0.0, 0
    for ids in batches:
        logits = model(ids, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    bar.update()
    return total / count


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
