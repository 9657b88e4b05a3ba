"""A short search for the learning rates of a stage: a few steps at each of several rates, from the same start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .progress import progress_bar

__all__ = ["STEPS", "Group", "search_rates"]

STEPS = 8  # steps at each rate
Group = dict[str, Any]  # of an optimiser's parameters, with its learning rate


def search_rates(
    groups: Mapping[str, Callable[[float], list[Group]]],
    ladder: Sequence[float],
    step: Callable[[int], Tensor],
    measure: Callable[[], Mapping[str, float]],
    *,
    hidden: bool = False,
) -> tuple[dict[str, float], int]:
    """Find the learning rate of each part with which its loss is lowest after a few steps.

    The rates are tried from the lowest up, each from the same start and on the same batches, until no part gains by a
    higher one. The weights are put back at the end. A part that no rate improves gets the lowest rate.

    Args:
        groups: by the name of each part, the optimiser's groups of its parameters at a rate.
        ladder: learning rates, the lowest first.
        step: returns the training loss of batch i.
        measure: returns the loss of each part on held-out batches.
        hidden: show no progress bar.
    Returns: the rates, and the number of steps that the search took.
    """
    weights = [p for make in groups.values() for group in make(0.0) for p in group["params"]]
    start = [weight.detach().clone() for weight in weights]
    best, rates, tried = dict(measure()), dict.fromkeys(groups, ladder[0]), 0
    with progress_bar("choosing the learning rate", total=len(ladder) * STEPS, unit="step", disable=hidden) as bar:
        try:
            for rate in ladder:
                tried += 1
                _put(weights, start)
                _train([group for make in groups.values() for group in make(rate)], step, bar)
                found = measure()
                better = [name for name in groups if found[name] < best[name]]
                if not better and tried > 1:
                    break
                best |= {name: found[name] for name in better}
                rates |= dict.fromkeys(better, rate)
        finally:
            _put(weights, start)
    return rates, tried * STEPS


def _train(groups: list[Group], step: Callable[[int], Tensor], bar: tqdm) -> None:
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    weights = [weight for group in groups for weight in group["params"]]
    for i in range(STEPS):
        optimiser.zero_grad()
        with torch.enable_grad():
            step(i).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        bar.update()
    optimiser.zero_grad()


@torch.no_grad()
def _put(weights: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
