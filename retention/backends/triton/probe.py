"""Whether the kernels can be used here, by a small test of what they compute. The version of Triton decides nothing."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import torch

from .operator import fused

__all__ = ["cause", "found", "trouble"]

_INSTALL = "pip install triton"
_OLDEST = 8, 0  # compute capability: products of bfloat16
_answers: dict[str, str | None] = {}
_causes: dict[str, BaseException] = {}


def trouble(device: str) -> str | None:
    """Return why the kernels cannot run on `device`, with the remedy; None if they can. They are tested once."""
    if device not in _answers:
        if device == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return "was not tried before this CUDA graph is captured; run the call once before the capture"
        _answers[device] = _trouble(device)
    return _answers[device]


# `torch.compiler.assume_constant_result` sets this too, but imports the whole compiler, which takes seconds.
trouble._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cause() -> BaseException | None:
    """Return the first exception that a trial raised, on any device; None if it raised none."""
    return next(iter(_causes.values()), None)


def found(device: str) -> str | None:
    """Return a line on the version and on how the kernels run; None if they cannot."""
    if trouble(device):
        return None
    try:
        return f"triton {version('triton')}{'' if device == 'cuda' else ', in its interpreter'}"
    except PackageNotFoundError:
        return "triton of unknown version"


def _trouble(device: str) -> str | None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs an NVIDIA GPU; TRITON_INTERPRET=1 in the environment runs it in Triton's interpreter"
    if device not in ("cpu", "cuda") or (device == "cuda" and torch.version.hip is not None):
        return f"needs an NVIDIA GPU, not {'ROCm' if device == 'cuda' else device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    if (
        device == "cuda"
        and min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) < _OLDEST
    ):
        return f"needs GPUs of compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer"
    try:
        import triton  # noqa: F401 -- first, so that a missing library raises ModuleNotFoundError with this name

        with ThreadPoolExecutor(1) as thread:  # another thread has no autocast, no_grad, tracing or transform
            thread.submit(_trial, device).result()
    except Exception as error:  # a broken installation may fail in any way
        _causes[device] = error
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return f"needs Triton, which is not installed: {_INSTALL}"
        what = f"{type(error).__name__}: {error}".replace("\n", " ")
        return f"does not work here ({what})"
    return None


def _trial(device: str) -> None:
    """Compare a call of a few chunks, and its gradients, with the formula. Raises: ArithmeticError if they differ."""
    index = torch.arange(40.0, device=device)
    inputs = [(index[:, None] * (i + 1) + torch.arange(16.0, device=device)).sin()[None, None] for i in range(3)]
    inputs = [x.requires_grad_() for x in (*inputs, torch.tensor([-0.1], device=device))]
    q, k, v, log_decay = inputs
    decay = (log_decay * (index[:, None] - index).clamp(min=0)).exp().tril()
    want = ((q @ k.mT) * decay) @ v
    got, _ = fused(*inputs, None, None, None, False, True, 1.0, 16, False, q.dtype)
    pairs = [(got, want)]
    pairs += zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (got, want)), strict=True)
    if not all(torch.allclose(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item()) for a, b in pairs):
        raise ArithmeticError("its results, or their gradients, are wrong")
