"""Names of objects that are elsewhere: former names, and names that a package offers without importing them at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from pkgutil import resolve_name
from typing import Any, ParamSpec, TypeVar

__all__ = ["former_names", "former_options", "lazy_names"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def lazy_names(module: str, places: dict[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that imports some of its names at first use.

    Args:
        module: `__name__` of the module.
        places: the full name, "package.module:object", of each such name.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return resolve_name(places[name])

    return find


def former_names(module: str, places: dict[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose names have moved; it warns with the new place.

    Args: as in `lazy_names`.
    """
    lazy = lazy_names(module, places)

    def find(name: str) -> Any:
        found = lazy(name)
        new = places[name].replace(":", ".")
        message = f"{module}.{name} is deprecated and will be removed in 0.2; use {new}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return found

    return find


def former_options(names: dict[str, str]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that lets a function take options by their former names too; it warns with the new name.

    Args:
        names: the new name of each option, by its former name.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for former in names.keys() & kwargs.keys():
                new = names[former]
                if new in kwargs:
                    raise TypeError(f"{former} is a former name of {new}; got both; leave {former} out")
                message = f"the option {former} is deprecated and will be removed in 0.2; use {new}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(former)
            return function(*args, **kwargs)

        return call

    return decorate
