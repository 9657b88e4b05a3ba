"""The modules that hold a layer, up to the whole model, whatever part of it or wrapper around it is at hand."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from torch import nn


def holders(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """`layers` and every living module that holds one of them, at any depth.

    A module knows its children and not its parents, so the garbage collector is asked for all modules there are.
    """
    parents: dict[int, list[nn.Module]] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):  # isinstance would run code of proxies
            for child in thing.__dict__.get("_modules", {}).values():
                parents.setdefault(id(child), []).append(thing)
    found: dict[int, nn.Module] = {}
    open_ends = list(layers)
    while open_ends:
        module = open_ends.pop()
        if id(module) not in found:
            found[id(module)] = module
            open_ends += parents.get(id(module), [])
    return list(found.values())
