"""Former names of options: they work for one release, with a warning that names the new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .options import check_flags

__all__ = ["Flags", "current_options", "former_options", "warn_of_former"]

Flags = Mapping[str, Mapping[bool, Any]]  # the new value for True and for False of a former flag, by its former name

_P = ParamSpec("_P")
_R = TypeVar("_R")


def current_options(options: Mapping[str, Any], names: Mapping[str, str], flags: Flags | None = None) -> dict[str, Any]:
    """Return the options by their new names, with new values where a flag became another option. It does not warn.

    Args:
        options: values by new or former names.
        names: the new name of each option, by its former name.
        flags: the new values of a former flag; options without an entry keep their values.
    Raises: TypeError for an option under both names; ValueError for a former flag that is not True or False.
    """
    current: dict[str, Any] = {name: value for name, value in options.items() if name not in names}
    for former in options.keys() & names.keys():
        if names[former] in options:
            raise TypeError(f"{former} is a former name of {names[former]}; got both; leave {former} out")
        current[names[former]] = _current_value(former, options[former], flags or {})
    return current


def warn_of_former(options: Mapping[str, Any], names: Mapping[str, str], *, stacklevel: int = 2) -> None:
    """Warn of each former name in options.

    Args:
        options: values by new or former names.
        names: the new name of each option, by its former name.
        stacklevel: as in `warnings.warn`; 1 is the caller.
    """
    for former in names.keys() & options.keys():
        message = f"the option {former} is deprecated and will be removed in 0.2; use {names[former]}"
        warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def former_options(
    names: Mapping[str, str], flags: Flags | None = None
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that lets a function take options by their former names too; it warns with the new name.

    Args: as in `current_options`.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not names.keys() & kwargs.keys():
                return function(*args, **kwargs)
            current: Any = current_options(kwargs, names, flags)
            warn_of_former(kwargs, names)
            return function(*args, **current)

        return call

    return decorate


def _current_value(former: str, value: Any, flags: Flags) -> Any:
    if former not in flags:
        return value
    check_flags(**{former: value})
    return flags[former][value]
