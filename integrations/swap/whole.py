"""The whole models that a layer is part of, whatever part of them or wrapper around them is at hand."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable
from typing import Any

from torch import nn


def whole_models(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Of the living modules that hold one of `layers` at any depth, those that no other of them holds.

    A module knows its children and not its parents, so the garbage collector is asked for all modules there are.
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
    """By the exact class, as isinstance would run code of proxies; without a loop, as there are a million objects."""
    things: list[Any] = gc.get_objects()
    return list(itertools.compress(things, map(_subclasses(nn.Module).__contains__, map(type, things))))


def _subclasses(kind: type) -> set[type]:
    found, open_ends = {kind}, [kind]
    while open_ends:
        new: set[type] = set(type.__subclasses__(open_ends.pop())) - found
        found |= new
        open_ends += new
    return found
