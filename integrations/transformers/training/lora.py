"""Low-rank updates of a model's frozen weights, by the library peft.

Source: Hu et al. 2021, arXiv:2106.09685 (LoRA).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..compat import Conv1D

__all__ = ["low_rank_updates", "peft"]


def peft() -> Any:
    """Import and return the library peft. Raises: ImportError that tells how to install it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError('tune "lora" needs the library peft; pip install "multiscale-retention[lora]"') from error
    return peft


@contextmanager
def low_rank_updates(model: PreTrainedModel, layers: Collection[str], rank: int) -> Iterator[None]:
    """Within the block, the linear layers outside of `layers` learn by low-rank updates, W + B A.

    At the end the updates are added to the weights. These are new tensors, since a teacher may share the old ones.

    Shapes: W (out, in), frozen; B (out, rank), zeros at first; A (rank, in).
    Args:
        model: a transformers model; it is changed in place.
        layers: names of the modules without updates.
        rank: rank of the updates.
    Raises: ValueError if the model has no linear layer to update; ImportError if peft is not installed.
    """
    linear = _linear_layers(model, layers)
    if not linear:
        raise ValueError(
            f"lora needs linear layers outside of the replaced ones; {type(model).__name__} has none; tune 'layers'"
        )
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    config = peft().LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(linear),
        fan_in_fan_out=isinstance(next(iter(linear.values())), Conv1D),
    )
    updated = peft().LoraModel(model, config, "default")  # it also freezes all other parameters
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or name in learning)
    try:
        yield
    finally:
        for module in linear.values():
            weight = module.get_parameter("weight")
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        updated.merge_and_unload(progressbar=False)


def _linear_layers(model: PreTrainedModel, layers: Collection[str]) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, without its head and those inside of `layers`."""
    ours = tuple(f"{name}." for name in layers)
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not name.startswith(ours)
    }
