"""Context managers that undo the changes of a model if they fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["all_or_nothing", "kept_random_state"]


@contextmanager
def all_or_nothing(models: Iterable[nn.Module], tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore all modules of `models`, and `tensors`, if the block raises an exception.

    Args:
        models: their modules get back their class, attributes, parameters, buffers, children and hooks, but not the
            values of tensors that were changed in place.
        tensors: they get back their values.
    """
    snapshots = [_Snapshot(module) for model in models for module in model.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore()
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


@contextmanager
def kept_random_state(model: nn.Module, *, always: bool = True) -> Iterator[None]:
    """Restore torch's random state on the CPU and on the devices of `model` after the block.

    Args:
        model: its parameters name the devices.
        always: True restores after every block; False restores only if the block raises.
    """
    devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    cpu = torch.get_rng_state()
    others = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
    done = False
    try:
        yield
        done = True
    finally:
        if always or not done:
            torch.set_rng_state(cpu)
            for device, state in others:
                torch.get_device_module(device).set_rng_state(state, device)


class _Snapshot:
    """The class and attributes of an object, and the contents of the dicts among them."""

    def __init__(self, thing: Any):
        self.thing, self.kind, self.attributes = thing, type(thing), dict(vars(thing))
        self.contents = [(value, value.copy()) for value in self.attributes.values() if isinstance(value, dict)]

    def restore(self) -> None:
        if type(self.thing) is not self.kind:
            self.thing.__class__ = self.kind
        for place, before in [(vars(self.thing), self.attributes), *self.contents]:
            place.clear()
            place.update(before)
