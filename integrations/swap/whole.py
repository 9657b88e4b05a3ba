"""Finds the whole models that contain a layer, given only a part of the model or a wrapper around it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["whole_models"]


def whole_models(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the outermost living modules that contain one of `layers` at any depth.

    A module knows its children but not its parents, so the garbage collector lists all living modules.
    """
    parents: dict[int, list[nn.Module]] = {}
    for module in _living_modules():
        for child in module.__dict__.get("_modules", {}).values():
            parents.setdefault(id(child), []).append(module)
    seen: set[int] = set()
    tops: list[nn.Module] = []
    open_ends = list(layers)
    while open_ends:
        module = open_ends.pop()
        if id(module) not in seen:
            seen.add(id(module))
            above = parents.get(id(module), [])
            open_ends += above
            tops += [] if above else [module]
    return tops


def _living_modules() -> list[nn.Module]:
    """All living modules; compares exact classes, as isinstance runs code of proxies, and loops in C for speed."""
    things: list[Any] = gc.get_objects()
    return list(itertools.compress(things, map(_subclasses(nn.Module).__contains__, map(type, things))))


def _subclasses(kind: type) -> set[type]:
    found, open_ends = {kind}, [kind]
    while open_ends:
        new: set[type] = set(type.__subclasses__(open_ends.pop())) - found
        found |= new
        open_ends += new
    return found
