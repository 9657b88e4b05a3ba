"""Checks of options: each refuses what is not allowed, and says the name of the option, what came and what is allowed.

True is no number here, and 1 is not True. The checks look at types and numbers only, so that compilers fold them away,
and one that passes takes a tenth of a microsecond or so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether value is an int, or the size of something while its program is exported."""
    return type(value) is int or (isinstance(value, int | torch.SymInt) and not isinstance(value, bool))


def number(value: object) -> float:
    """NaN, which no bound admits, for what is not a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats
        return math.inf


def shown(value: object) -> str:
    """What came, for an error: short, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}" if value.is_nested else f"a tensor {tuple(value.shape)} of {value.dtype}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_whole(name: str, value: object, least: int = 1, *, optional: bool = False) -> None:
    """Raises: ValueError unless value is an integer of at least `least`, or None if it is optional."""
    if (is_whole(value) and value >= least) or (optional and value is None):
        return
    also = ", or None" if optional else ""
    raise ValueError(f"{name} must be an integer of at least {least}{also}; got {name} {shown(value)}")


def check_number(name: str, value: object, sound: bool, allowed: str) -> None:
    """Raises: ValueError unless it is sound. Bounds on `number(value)` say whether it is."""
    if not sound:
        raise ValueError(f"{name} must be a number, {allowed}; got {name} {shown(value)}")


def check_rates(**rates: object) -> None:
    """Raises: ValueError unless all are from 0 to below 1."""
    for name, rate in rates.items():
        check_number(name, rate, 0 <= number(rate) < 1, "at least 0 and below 1")


def check_eps(name: str, value: object) -> None:
    """Raises: ValueError unless value is at least 0 and finite."""
    check_number(name, value, 0 <= number(value) < math.inf, "at least 0")


def check_factor(name: str, value: object) -> None:
    """Raises: ValueError unless value is above 0 and finite."""
    check_number(name, value, 0 < number(value) < math.inf, "above 0")


def check_flags(**flags: object) -> None:
    """Raises: ValueError unless all are True or False."""
    for name, value in flags.items():
        if value is not True and value is not False:
            raise ValueError(f"{name} must be True or False; got {name} {shown(value)}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises: ValueError unless it is one of those allowed."""
    if not any(value is x or (type(value) is type(x) and value == x) for x in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {name} {shown(value)}")


def check_is(name: str, value: object, kind: Any, what: str) -> None:
    """Raises: TypeError unless value is an instance of `kind`, for which `what` is the word."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}; got {name} {shown(value)}")


def check_dtype(dtype: object, *, optional: bool = True) -> None:
    """Raises: TypeError unless dtype is one of DTYPES, or None if it is optional."""
    if not any(dtype is x for x in DTYPES) and not (optional and dtype is None):
        also = ", or None" if optional else ""
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}{also}; got dtype {shown(dtype)}")


def check_device(device: object, *, optional: bool = True) -> None:
    """Raises: ValueError unless torch takes device as one, or it is None and optional."""
    if isinstance(device, torch.device) or (optional and device is None):
        return
    try:
        torch.device(None if isinstance(device, bool) else device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one of torch, such as 'cpu'; got device {shown(device)}") from error
