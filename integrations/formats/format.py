"""`Format`, which describes how one implementation of RetNet names its tensors and options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from retention.former import current_options, warn_of_former
from retention.layer import MultiScaleRetention
from retention.model import FORMER, FORMER_FLAGS, RetNetBackbone

from ..files import one_line
from .facts import Tensors, described, positions, shared_heads

__all__ = ["OPTIONS", "Format", "flat"]

_Rules = tuple[tuple[str, str], ...]

_BACKBONE = inspect.signature(RetNetBackbone).parameters.keys() - {"device", "dtype", "retention"}
_LAYER = inspect.signature(MultiScaleRetention).parameters.keys() - {"dim", "num_heads", "device", "dtype"}
_HEADS = {"z_loss_coeff", "router_aux_loss_coef", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"}
OPTIONS = {*_BACKBONE, *_HEADS, "vocab_size", "lm_head_bias", *(f"retention.{name}" for name in _LAYER)}


@dataclass(frozen=True)
class Format:
    """Describes the checkpoints of one implementation.

    Attributes:
        name: the name of the format.
        marks: patterns of tensor names; a checkpoint with a matching name has this format.
        rules: pairs of patterns (theirs, ours), applied in both directions; the first match counts. A star stands for
            one part of a name, at the end for all further parts. Tensors whose name here begins with `constant.` are
            compared with this library's computed values.
        defaults: options that the weights do not determine: fixed choices and defaults of the implementation.
        options: their names of options and the corresponding names here; () if an option has no effect or follows from
            the weights. None under their name means that the option is not given.
        allowed: the values that this library can compute, by their name, of options that have other values too.
        values: the values here of those options that have other values there, by their name and their value.
        prepare: brings their tensors into the layout that the rules expect; raises ValueError for a checkpoint that is
            not supported.
    """

    name: str
    marks: tuple[str, ...]
    rules: _Rules
    defaults: dict[str, Any] = field(default_factory=dict)
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    allowed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    values: dict[str, dict[Any, Any]] = field(default_factory=dict)
    prepare: Callable[[Tensors], Tensors] = dict

    def detects(self, keys: Iterable[str]) -> bool:
        """Tell whether one of the keys matches one of the marks."""
        return any(_pattern(mark).fullmatch(key) for key in keys for mark in self.marks)

    def to_ours(self, key: str) -> str | None:
        """Return this library's name of their tensor; None if no rule matches."""
        return _renamed(key, self.rules)

    def to_theirs(self, key: str) -> str | None:
        """Return their name of this library's tensor; None if no rule matches."""
        return _renamed(key, tuple((ours, theirs) for theirs, ours in self.rules))

    def option_to_ours(self, name: str, value: Any) -> dict[str, Any]:
        """Return the options of this library, by name, that an option has set, under its name there or here.

        Raises: ValueError for an unknown option.
        """
        value = next((ours for theirs, ours in self.values.get(name, {}).items() if _equal(theirs, value)), value)
        return dict.fromkeys(self._meaning(name), "silu" if value == "swish" else value)

    def value_to_theirs(self, name: str, value: Any) -> Any:
        """Return their value of the option that they call `name`; None if they have none for this value."""
        if name not in self.values:
            return value
        return next((theirs for theirs, ours in self.values[name].items() if _equal(ours, value)), None)

    def known(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options that `config` accepts; a config.json holds many more."""
        current = current_options(options, self._former, FORMER_FLAGS)  # a file of an earlier version
        return {name: value for name, value in current.items() if name in self.options or name in OPTIONS}

    def config(self, tensors: Tensors, given: dict[str, Any]) -> dict[str, Any]:
        """Return the options of the model in a checkpoint, for `RetNetConfig`.

        Args:
            tensors: its tensors under this library's names.
            given: options that the weights do not determine, under their names or this library's.
        Raises: ValueError for an unknown option, one that contradicts the weights or has no counterpart here, or a
            missing one.
        """
        given = {name: value for name, value in given.items() if value is not None or name not in self.options}
        self._check_allowed(given)
        facts = described(tensors)
        facts |= positions(tensors, facts, self.defaults.get("retention.decay", "paper"))
        if not facts.pop("final_norm") and self.defaults.get("final_norm", True):
            facts["norm_before"] = False  # a model with norms after the sums has no final norm
        else:
            facts["deepnorm"] = False
        told: dict[str, Any] = {}
        warn_of_former(given, self._former, stacklevel=4)
        for name, value in current_options(flat(given), self._former, FORMER_FLAGS).items():
            for ours, told_value in self.option_to_ours(name, value).items():
                told[ours] = told_value
                if ours in facts and ours != "retention.decay" and facts[ours] != told[ours]:
                    got = one_line(repr(value))
                    raise ValueError(f"{name} {got} contradicts the weights, which have {ours} {facts[ours]!r}")
        merged = {**self.defaults, **told, **facts}
        self._check_complete(merged)
        merged = shared_heads(tensors, merged["num_heads"]) | merged
        layer = {name[10:]: value for name, value in merged.items() if name.startswith("retention.")}
        return {name: merged[name] for name in merged if not name.startswith("retention.")} | {"retention": layer}

    @property
    def _former(self) -> dict[str, str]:
        """The former names of this library's options that are no options of the implementation."""
        return {former: new for former, new in FORMER.items() if former not in self.options}

    def _meaning(self, name: str) -> tuple[str, ...]:
        if name in self.options:
            return self.options[name]
        if name in OPTIONS:
            return (name,)
        known = ", ".join(sorted({*self.options} | OPTIONS))
        raise ValueError(f"unknown option {name!r} for {self.name}; known are {known}")

    def _check_allowed(self, given: dict[str, Any]) -> None:
        for name, values in self.allowed.items():
            if name in given and not any(_equal(value, given[name]) for value in values):
                raise ValueError(
                    f"{name} of {self.name} must be {' or '.join(map(repr, values)) or 'None'}, as nothing else has a "
                    f"counterpart here; got {one_line(repr(given[name]))}"
                )

    def _check_complete(self, config: dict[str, Any]) -> None:
        if "num_heads" not in config:
            name = next((name for name, ours in self.options.items() if "num_heads" in ours), "num_heads")
            raise ValueError(f'these weights do not tell how many heads there are; give a config: {{"{name}": N}}')
        if not config["norm_before"] and "deepnorm" not in config:
            raise ValueError(
                "this model has its norms after the sums, and its weights do not tell whether it scales the residuals; "
                'give a config: {"deepnorm": true} or {"deepnorm": false}'
            )


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with those in `retention` moved to the top level, under the prefix `retention.`.

    Raises: ValueError if `retention` is not a dict.
    """
    layer = options.get("retention") or {}
    if not isinstance(layer, dict):
        raise ValueError(f"retention must hold options of the layer, by name; got retention {one_line(repr(layer))}")
    return {k: v for k, v in options.items() if k != "retention"} | {f"retention.{k}": v for k, v in layer.items()}


def _equal(x: Any, y: Any) -> bool:
    return type(x) is type(y) and x == y


@lru_cache
def _pattern(text: str) -> re.Pattern[str]:
    inner = "([^.]+)".join(re.escape(part) for part in text.removesuffix("*").split("*"))
    return re.compile(inner + "(.+)" if text.endswith("*") else inner)


def _renamed(key: str, rules: _Rules) -> str | None:
    for old, new in rules:
        if found := _pattern(old).fullmatch(key):
            for part in found.groups():
                new = new.replace("*", part, 1)
            return new
    return None
