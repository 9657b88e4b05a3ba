"""Changes of a model that are made whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def all_or_nothing(models: Iterable[nn.Module], tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """If the block raises anything, give all modules of `models`, and `tensors`, back what they had before it.

    Of a module: its class, attributes, parameters, buffers, children and hooks. Of a tensor: its values.
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
    """Set torch's random numbers on the devices of `model` back to where they stood: always, or if the block fails."""
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
