"""Whether xformers can be used here: a small test of what is used of it, not a look at its version."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ...errors import BackendError
from .blocks import SMALLEST, library
from .operator import block_sparse

TESTED = "0.0.35"
INSTALL = f'pip install "xformers=={TESTED}"'
REINSTALL = f'pip install --force-reinstall --no-deps "xformers=={TESTED}"'
Trial = Callable[[str], None]  # uses a part of xformers on a device, and raises whatever goes wrong
_causes: dict[tuple[Trial, str], BaseException] = {}


def products(device: str) -> None:
    """The block-sparse products in both forms, and their gradients, against the formula."""
    library()
    index = torch.arange(40.0, device=device)
    inputs = [(index[:, None] * (i + 1) + torch.arange(2.0, device=device)).sin()[None, None] for i in range(3)]
    inputs = [x.requires_grad_() for x in (*inputs, torch.tensor([-0.1], device=device))]
    q, k, v, log_decay = inputs
    decay = (log_decay * (index[:, None] - index).clamp(min=0)).exp().tril()
    want = ((q @ k.mT) * decay) @ v
    for form in ("chunkwise", "parallel"):
        got, _ = block_sparse(*inputs, None, None, None, form, SMALLEST, 1.0, True, (), 0.0, False, q.dtype)
        grads = [torch.autograd.grad(x.square().sum(), inputs, retain_graph=True) for x in (got, want)]
        expect("its block-sparse products, or their gradients, are wrong", (got, *grads[0]), (want, *grads[1]))


def expect(otherwise: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...], within: float = 1e-3) -> None:
    """Raises: ArithmeticError unless they are that close; any kernel's float32 is."""
    if not all(torch.allclose(a, b, rtol=within, atol=within) for a, b in zip(got, want, strict=True)):
        raise ArithmeticError(otherwise)


def trouble(device: str, trial: Trial = products) -> str | None:
    """What keeps a part of xformers from running on a device, and the command that mends it; None if nothing does."""
    return _trouble(trial, device)


# What `torch.compiler.assume_constant_result` does; that function would import the whole compiler, which takes seconds.
trouble._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require(what: str, device: str, trial: Trial) -> None:
    """Raises: BackendError, from its cause, if a part of xformers does not run on a device."""
    reason = trouble(device, trial)
    if reason:
        raise BackendError(f"{what} cannot run on {device}: {reason}") from cause(trial)


@functools.cache
def _trouble(trial: Trial, device: str) -> str | None:
    log = logging.getLogger("xformers")
    before, log.disabled = log.disabled, True  # it warns of a compiled library that most parts do not need; see `found`
    try:
        import xformers  # noqa: F401 -- first, so that a library that is not there has that name

        with ThreadPoolExecutor(1) as thread:  # which knows of no autocast, no_grad, tracing or transform of the caller
            thread.submit(trial, device).result()
    except Exception as error:  # a broken installation may fail in any way
        _causes[trial, device] = error
        if isinstance(error, ModuleNotFoundError) and error.name == "xformers":
            return f"needs xformers, which is not installed: {INSTALL}"
        return f"xformers {_version()} does not work ({line(error)}); {TESTED} was tested: {REINSTALL}"
    finally:
        log.disabled = before
    return None


def cause(trial: Trial = products) -> BaseException | None:
    """The first exception that `trouble` met in a trial."""
    return next((error for (tried, _), error in _causes.items() if tried is trial), None)


def found(device: str) -> str | None:
    """The version, whether the compiled library was loaded, and which attention operators take a call on a device."""
    if trouble(device):
        return None
    parts: dict[str, Callable[[], str]] = {
        "compiled library": _compiled,
        "attention operators": lambda: ", ".join(attention_operators(device)) or f"none takes a call on {device}",
    }
    lines = [f"xformers {_version()}"]
    for name, look in parts.items():
        try:
            lines.append(f"{name}: {look()}")
        except Exception as error:  # these are its inner names, which may change; nothing here depends on them
            lines.append(f"{name}: unknown ({line(error)})")
    return "; ".join(lines)


def attention_operators(device: str, dtype: torch.dtype = torch.float16) -> list[str]:
    """The names of xformers' forward operators of `memory_efficient_attention` that take a plain call on a device."""
    from xformers.ops import fmha

    q = torch.empty(1, 64, 2, 64, device=device, dtype=dtype)
    return [op.NAME for op in fmha.ALL_FW_OPS if not op.not_supported_reasons(fmha.Inputs(q, q, q))]


def _compiled() -> str:
    error: BaseException | None = library().package._cpp_lib._cpp_library_load_exception
    return "loaded" if error is None else f"not loaded ({line(_root(error))})"


def _root(error: BaseException) -> BaseException:
    deeper = error.__cause__ or error.__context__
    return error if deeper is None else _root(deeper)


def _version() -> str:
    try:
        return version("xformers")
    except PackageNotFoundError:
        return "of unknown version"


def line(error: BaseException) -> str:
    """An exception as a message can hold it."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")
