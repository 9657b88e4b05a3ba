"""Decay schedules: how fast each head forgets.

A schedule gives one decay gamma in (0, 1] per head. It is kept as `log_decay`, the natural logarithm of gamma per
token, as Python floats computed in double precision. In float32, 1 - 2^-25 rounds to 1 and a slow head would
never forget; log(gamma) stays exact.

Source: Sun et al. 2023, arXiv:2307.08621: "paper" is Eq. 8, "log_linear" that of its language-model experiments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .constants import as_tensor, kept
from .options import check_device, check_dtype, check_flags, check_number, check_whole, number, shown


def paper(num_heads: int) -> tuple[float, ...]:
    """Log-decays of gamma_h = 1 - 2^(-5 - h). Raises: ValueError for a wrong number of heads."""
    check_whole("num_heads", num_heads)
    return tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads))


def log_linear(num_heads: int, first: float = 1 / 32, last: float = 1 / 512) -> tuple[float, ...]:
    """Log-decays of 1 - gamma_h from `first` to `last` in equal ratios; the defaults are the paper's.

    A head remembers some 1 / (1 - gamma) tokens: for short contexts, or where neighbours matter most, take larger ones.
    Raises: ValueError that names the argument.
    """
    check_whole("num_heads", num_heads)
    for name, gap in (("first", first), ("last", last)):
        check_number(name, gap, 0 < number(gap) < 1, "above 0 and below 1")
    low, high = math.log(first), math.log(last)
    return tuple(math.log1p(-math.exp(low + (high - low) * h / max(num_heads - 1, 1))) for h in range(num_heads))


def short(num_heads: int) -> tuple[float, ...]:
    """`log_linear` from 1/2 to 1/128: from the neighbour to some hundred tokens back."""
    return log_linear(num_heads, 1 / 2, 1 / 128)


SCHEDULES = {"paper": paper, "log_linear": log_linear, "short": short}


def log_decays(decay: str | Tensor | Sequence[float], num_heads: int) -> tuple[float, ...]:
    """The log-decay of each head, in double precision.

    decay: a name in SCHEDULES, or a tensor or sequence of `num_heads` log-decays, which is taken as it is.
    Raises: ValueError for an unknown schedule, another number of heads, or a log-decay above 0 or not finite;
        TypeError for what is no schedule.
    """
    check_whole("num_heads", num_heads)
    if isinstance(decay, str):
        if decay not in SCHEDULES:
            names = ", ".join(map(repr, SCHEDULES))
            raise ValueError(f"decay must be one of {names} or {num_heads} log-decays; got decay {decay!r}")
        return SCHEDULES[decay](num_heads)
    if not isinstance(decay, Tensor | Sequence) or isinstance(decay, bytes):
        raise TypeError(f"decay must be a name, a tensor or a sequence of log-decays; got decay {shown(decay)}")
    if isinstance(decay, Tensor):
        if not decay.is_floating_point() or decay.device.type == "meta":
            raise TypeError(f"decay must hold numbers of a floating dtype; got decay {shown(decay)}")
        values = decay.double().tolist()
    else:
        for x in decay:
            if not isinstance(x, int | float) or isinstance(x, bool):
                raise TypeError(f"decay must hold numbers; got {shown(x)} in decay {shown(decay)}")
        values = [number(x) for x in decay]
    shape = tuple(decay.shape) if isinstance(decay, Tensor) else (len(values),)
    if shape != (num_heads,):
        raise ValueError(f"decay must hold one log-decay per head, ({num_heads},); got decay {shape}")
    wrong = [x for x in values if not -math.inf < x <= 0]
    if wrong:
        raise ValueError(
            f"decay must hold log-decays, finite and at most 0; got {wrong[0]:g}; pass log(gamma), not gamma"
        )
    return tuple(values)


def check_decay(decay: object) -> None:
    """Refuse what is a decay for no number of heads. Raises: as `log_decays`."""
    listed = isinstance(decay, Sequence) and not isinstance(decay, str)
    count = len(decay) if listed else decay.numel() if isinstance(decay, Tensor) else 1  # type: ignore[arg-type]
    log_decays(decay, max(count, 1))  # type: ignore[arg-type]


@kept(32)
def decay_factors(log_decay: Tensor) -> Tensor:
    """gamma of each head, (H, 1, 1)."""
    return log_decay.exp()[:, None, None]


@kept(16, longest=200)  # as long as form="auto" takes the parallel form for
def decay_matrix(log_decay: Tensor, length: int, causal: bool) -> Tensor:
    """D_nm = gamma^|n - m| of each head, (H, length, length); 0 for m > n if causal.

    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5.
    """
    index = torch.arange(length, device=log_decay.device, dtype=log_decay.dtype)
    decay = (log_decay[:, None, None] * (index[:, None] - index).abs()).exp()
    return decay.tril() if causal else decay


class HeadDecay(nn.Module):
    """The log-decay of each head, fixed or learnt.

    decay: as `log_decays`. learnable: train `shift`, which is added to the schedule's log(1 - gamma): there, half
        precision keeps slow heads apart, and weight decay pulls toward the schedule.
    pairs: log-decays of the pairs of channels inside a head, which are added to the head's.
    Raises: ValueError for a schedule that does not fit, or is too fast to be learnt.
    """

    def __init__(
        self,
        decay: str | Tensor | Sequence[float],
        num_heads: int,
        *,
        learnable: bool = False,
        pairs: tuple[float, ...] | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_flags(learnable=learnable)
        check_device(device)
        check_dtype(dtype)
        if pairs is not None and not (isinstance(pairs, tuple) and all(-math.inf < number(x) <= 0 for x in pairs)):
            raise ValueError(f"pairs must be a tuple of log-decays, finite and at most 0; got pairs {shown(pairs)}")
        self.values, self.pairs = log_decays(decay, num_heads), pairs
        if learnable and min(self.values) < math.log(1e-4):
            raise ValueError(f"a learnable decay keeps gamma above 1e-4; got a log-decay of {min(self.values):g}")
        self.log_gaps = tuple(math.log(max(-math.expm1(x), 1e-12)) for x in self.values)
        self.shift = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if learnable else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    def forward(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """(num_heads,), or with pairs (num_heads * len(pairs),), pair by pair."""
        if self.shift is None:
            heads = as_tensor(self.values, device, dtype)
        else:
            log_gap = as_tensor(self.log_gaps, device, dtype) + self.shift.to(dtype)
            # gamma stays above 0. The gradient is that without the bound: at the bound it would be 0, for good.
            log_gap = log_gap + (log_gap.clamp(max=-1e-4) - log_gap).detach()
            heads = torch.log1p(-log_gap.exp())
        if self.pairs is None:
            return heads
        return (heads[:, None] + as_tensor(self.pairs, device, dtype)).flatten()

    def extra_repr(self) -> str:
        return f"{len(self.values)}, learnable={self.shift is not None}"


def geometric_sum(log_decay: Tensor, count: Tensor) -> Tensor:
    """sum over i < count of exp(i log_decay): the total weight of `count` tokens. The shapes broadcast.

    With x = count log_decay it is expm1(x) / expm1(log_decay). The derivative of that is a difference of two terms,
    which cancel where |x| is small. There count phi(x) / phi(log_decay) is the same, with phi(x) = expm1(x) / x by its
    series, whose derivatives do not cancel.
    """
    x = count * log_decay
    small = x.abs() < 1
    series = count * _phi(torch.where(small, x, 0)) / _phi(torch.where(small, log_decay, 0))
    # Outside of its zone each formula gets a harmless argument: 0 * inf is NaN in the gradient of `where`.
    closed = _expm1(torch.where(small, -1.0, x)) / _expm1(torch.where(small, -1.0, log_decay))
    return torch.where(small, series, closed)


def _phi(x: Tensor) -> Tensor:
    """expm1(x) / x = sum of x^n / (n + 1)! for |x| < 1."""
    terms = 19 if x.dtype == torch.float64 else 11  # the first that is left out is below the rounding error
    total = torch.ones_like(x)
    for n in range(terms, 1, -1):
        total = 1 + x / n * total
    return total


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1. torch takes expm1(x) + 1 for the derivative of expm1, which has no digits left far below 0."""
    far = x <= -1
    return torch.where(far, x.exp() - 1, torch.expm1(torch.where(far, 0, x)))
