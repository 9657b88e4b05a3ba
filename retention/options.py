"""Checks of options. Each error gives the name of the option, the value that came and the values that are allowed.

True does not pass as a number, and 1 does not pass as True. The checks look at types and numbers only, so that
compilers fold them away. A check that passes takes about a tenth of a microsecond.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "check_choice",
    "check_device",
    "check_dtype",
    "check_eps",
    "check_factor",
    "check_flags",
    "check_is",
    "check_number",
    "check_rates",
    "check_whole",
    "is_whole",
    "number",
    "shown",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether value is an int, or a symbolic size while its program is exported."""
    return type(value) is int or (isinstance(value, int | torch.SymInt) and not isinstance(value, bool))


def number(value: object) -> float:
    """Return value as a float; NaN, which no bound admits, if it is not a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an int larger than the largest float
        return math.inf


def shown(value: object) -> str:
    """Return a short text for value in an error message; a tensor is shown by its shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}" if value.is_nested else f"a tensor {tuple(value.shape)} of {value.dtype}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_whole(name: str, value: object, least: int = 1, *, optional: bool = False) -> None:
    """Check that value is an integer of at least `least`, or None if it is optional. Raises: ValueError if not."""
    if (is_whole(value) and value >= least) or (optional and value is None):
        return
    also = ", or None" if optional else ""
    raise ValueError(f"{name} must be an integer of at least {least}{also}; got {name} {shown(value)}")


def check_number(name: str, value: object, sound: bool, allowed: str) -> None:
    """Check a number by `sound`, which the caller computes from `number(value)`. Raises: ValueError if it is False."""
    if not sound:
        raise ValueError(f"{name} must be a number, {allowed}; got {name} {shown(value)}")


def check_rates(**rates: object) -> None:
    """Check that all values are at least 0 and below 1. Raises: ValueError if not."""
    for name, rate in rates.items():
        check_number(name, rate, 0 <= number(rate) < 1, "at least 0 and below 1")


def check_eps(name: str, value: object) -> None:
    """Check that value is at least 0 and finite. Raises: ValueError if not."""
    check_number(name, value, 0 <= number(value) < math.inf, "at least 0")


def check_factor(name: str, value: object) -> None:
    """Check that value is above 0 and finite. Raises: ValueError if not."""
    check_number(name, value, 0 < number(value) < math.inf, "above 0")


def check_flags(**flags: object) -> None:
    """Check that all values are True or False. Raises: ValueError if not."""
    for name, value in flags.items():
        if value is not True and value is not False:
            raise ValueError(f"{name} must be True or False; got {name} {shown(value)}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Check that value is one of those allowed, of the same type. Raises: ValueError if not."""
    if not any(value is x or (type(value) is type(x) and value == x) for x in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {name} {shown(value)}")


def check_is(name: str, value: object, kind: Any, what: str) -> None:
    """Check that value is an instance of `kind`, which the error calls `what`. Raises: TypeError if not."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}; got {name} {shown(value)}")


def check_dtype(dtype: object, *, optional: bool = True) -> None:
    """Check that dtype is one of DTYPES, or None if it is optional. Raises: TypeError if not."""
    if not any(dtype is x for x in DTYPES) and not (optional and dtype is None):
        also = ", or None" if optional else ""
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}{also}; got dtype {shown(dtype)}")


def check_device(device: object, *, optional: bool = True) -> None:
    """Check that torch accepts device, or that it is None and optional. Raises: ValueError if not."""
    if isinstance(device, torch.device) or (optional and device is None):
        return
    try:
        torch.device(None if isinstance(device, bool) else device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one of torch, such as 'cpu'; got device {shown(device)}") from error
