"""Whether xformers can be used here, by a small test of the functions that are used. Its version decides nothing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ..errors import BackendError
from . import library

__all__ = ["INSTALL", "TESTED", "attention_operators", "cause", "expect", "found", "line", "require", "trouble"]

TESTED = "0.0.35"
INSTALL = f'pip install "xformers=={TESTED}"'
_REINSTALL = f'pip install --force-reinstall --no-deps "xformers=={TESTED}"'
_Trial = Callable[[str], None]  # tests a part of xformers on a device, and raises an exception if it fails
_causes: dict[tuple[_Trial, str], BaseException] = {}


def expect(otherwise: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...], within: float = 1e-3) -> None:
    """Check that results are within a tolerance that float32 of any kernel meets. Raises: ArithmeticError if not."""
    if not all(torch.allclose(a, b, rtol=within, atol=within) for a, b in zip(got, want, strict=True)):
        raise ArithmeticError(otherwise)


def trouble(device: str, trial: _Trial) -> str | None:
    """Return why a part of xformers cannot run on `device`, with the command that repairs it; None if it can."""
    return _trouble(trial, device)


# `torch.compiler.assume_constant_result` sets this too, but imports the whole compiler, which takes seconds.
trouble._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require(what: str, device: str, trial: _Trial) -> None:
    """Check that a part of xformers runs on `device`. Raises: BackendError, from its cause, if it does not."""
    reason = trouble(device, trial)
    if reason:
        raise BackendError(f"{what} cannot run on {device}: {reason}") from cause(trial)


@functools.cache
def _trouble(trial: _Trial, device: str) -> str | None:
    """Run a trial once for each device, in a thread of its own, and return the reason of its failure."""
    log = logging.getLogger("xformers")
    before, log.disabled = log.disabled, True  # xformers warns of a compiled library that most parts do not need
    try:
        library.package()  # first, so that a missing library raises ModuleNotFoundError with this name
        with ThreadPoolExecutor(1) as thread:  # another thread has no autocast, no_grad, tracing or transform
            thread.submit(trial, device).result()
    except Exception as error:  # a broken installation may fail in any way
        _causes[trial, device] = error
        if isinstance(error, ModuleNotFoundError) and error.name == "xformers":
            return f"needs xformers, which is not installed: {INSTALL}"
        return f"xformers {_version()} does not work ({line(error)}); {TESTED} was tested: {_REINSTALL}"
    finally:
        log.disabled = before
    return None


def cause(trial: _Trial) -> BaseException | None:
    """Return the first exception that a trial raised, on any device; None if it raised none."""
    return next((error for (tried, _), error in _causes.items() if tried is trial), None)


def found(device: str) -> str:
    """Return a line on the version, the compiled library and the attention operators for `device`."""
    parts: dict[str, Callable[[], str]] = {
        "compiled library": _compiled,
        "attention operators": lambda: ", ".join(attention_operators(device)) or f"none takes a call on {device}",
    }
    lines = [f"xformers {_version()}"]
    for name, look in parts.items():
        try:
            lines.append(f"{name}: {look()}")
        except Exception as error:  # these are private names of xformers, which may change, and only inform people
            lines.append(f"{name}: unknown ({line(error)})")
    return "; ".join(lines)


def attention_operators(device: str, dtype: torch.dtype = torch.float16) -> list[str]:
    """Return the names of xformers' forward operators of attention that take a plain call on `device`."""
    fmha = library.attention()
    q = torch.empty(1, 64, 2, 64, device=device, dtype=dtype)
    return [op.NAME for op in fmha.ALL_FW_OPS if not op.not_supported_reasons(fmha.Inputs(q, q, q))]


def _compiled() -> str:
    error: BaseException | None = library.package()._cpp_lib._cpp_library_load_exception
    return "loaded" if error is None else f"not loaded ({line(_root(error))})"


def _root(error: BaseException) -> BaseException:
    """Return the exception at the end of the chain of causes."""
    deeper = error.__cause__ or error.__context__
    return error if deeper is None else _root(deeper)


def _version() -> str:
    try:
        return version("xformers")
    except PackageNotFoundError:
        return "of unknown version"


def line(error: BaseException) -> str:
    """Return an exception as one line of text."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")
