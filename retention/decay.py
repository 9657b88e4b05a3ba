"""Decay schedules: how fast each head forgets.

A schedule gives one decay gamma in (0, 1] per head. It is kept as `log_decay`, the natural logarithm of gamma per
token, in Python floats of double precision. In float32, 1 - 2^-25 rounds to 1 and a slow head would never forget;
log(gamma) keeps its digits.

To add a schedule, write a function of the number of heads and enter it in `SCHEDULES`.
Source: Sun et al. 2023, arXiv:2307.08621: "paper" is Eq. 8, "log_linear" is the schedule of its language models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .constants import as_tensor, kept
from .local import local
from .options import check_device, check_dtype, check_flags, check_number, check_whole, number, shown

__all__ = [
    "SCHEDULES",
    "HeadDecay",
    "check_decay",
    "decay_factors",
    "decay_matrix",
    "geometric_sum",
    "log_decays",
    "log_linear",
    "paper",
    "short",
]


def paper(num_heads: int) -> tuple[float, ...]:
    """Return the log-decays of the paper, gamma_h = 1 - 2^(-5 - h) for heads h = 0, 1, ...

    Raises: ValueError unless num_heads is an integer of at least 1.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 8.
    Examples:
        >>> import math
        >>> from retention.decay import paper
        >>> [round(1 - math.exp(x), 9) for x in paper(3)]
        [0.03125, 0.015625, 0.0078125]
    """
    check_whole("num_heads", num_heads)
    return tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads))


def log_linear(num_heads: int, first: float = 1 / 32, last: float = 1 / 512) -> tuple[float, ...]:
    """Return log-decays for which 1 - gamma_h goes from `first` to `last` in equal ratios.

    A head remembers about 1 / (1 - gamma) tokens. Larger values of `first` and `last` suit short contexts, and tasks
    where the nearest tokens matter most.

    Args:
        num_heads: number of heads.
        first: 1 - gamma of the first head, above 0 and below 1; the default is the paper's.
        last: 1 - gamma of the last head, above 0 and below 1; the default is the paper's.
    Returns: num_heads natural logarithms of gamma per token.
    Raises: ValueError that names the argument.
    Source: Sun et al. 2023, arXiv:2307.08621, the language-model experiments.
    Examples:
        >>> import math
        >>> from retention.decay import log_linear
        >>> [round(1 - math.exp(x), 6) for x in log_linear(3, 1 / 2, 1 / 8)]
        [0.5, 0.25, 0.125]
    """
    check_whole("num_heads", num_heads)
    for name, gap in (("first", first), ("last", last)):
        check_number(name, gap, 0 < number(gap) < 1, "above 0 and below 1")
    low, high = math.log(first), math.log(last)
    return tuple(math.log1p(-math.exp(low + (high - low) * h / max(num_heads - 1, 1))) for h in range(num_heads))


def short(num_heads: int) -> tuple[float, ...]:
    """Return `log_linear` from 1/2 to 1/128: heads that remember about 2 to 128 tokens.

    Raises: ValueError unless num_heads is an integer of at least 1.
    Examples:
        >>> import math
        >>> from retention.decay import short
        >>> [round(1 / (1 - math.exp(x))) for x in short(7)]
        [2, 4, 8, 16, 32, 64, 128]
    """
    return log_linear(num_heads, 1 / 2, 1 / 128)


SCHEDULES = {"paper": paper, "log_linear": log_linear, "short": short}


def log_decays(decay: str | Tensor | Sequence[float], num_heads: int) -> tuple[float, ...]:
    """Return the log-decay of each head, in double precision.

    Args:
        decay: a name in SCHEDULES, or a tensor or sequence of num_heads natural logarithms of gamma per token, which is
            returned unchanged.
        num_heads: number of heads.
    Raises: ValueError for an unknown schedule, another number of heads, or a log-decay that is above 0 or not finite;
        TypeError for another type.
    Examples:
        >>> from retention.decay import log_decays
        >>> log_decays([-0.5, -0.25], 2)
        (-0.5, -0.25)
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
    """Refuse a decay that no number of heads accepts. Raises: the errors of `log_decays`."""
    listed = isinstance(decay, Sequence) and not isinstance(decay, str)
    count = len(decay) if listed else decay.numel() if isinstance(decay, Tensor) else 1  # type: ignore[arg-type]
    log_decays(decay, max(count, 1))  # type: ignore[arg-type]


@kept(32)
def decay_factors(log_decay: Tensor) -> Tensor:
    """Return gamma of each head, (H, 1, 1), from log_decay (H,)."""
    return log_decay.exp()[:, None, None]


@kept(16, longest=200)  # form="auto" chooses the parallel form up to this length
def decay_matrix(log_decay: Tensor, length: int, causal: bool) -> Tensor:
    """Return D_nm = gamma^|n - m| of each head, (H, length, length); 0 for m > n if causal.

    Shapes: log_decay (H,).
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5.
    """
    index = torch.arange(length, device=log_decay.device, dtype=log_decay.dtype)
    decay = (log_decay[:, None, None] * (index[:, None] - index).abs()).exp()
    return decay.tril() if causal else decay


class HeadDecay(nn.Module):
    """The log-decay of each head, fixed or learnt.

    A learnable decay trains `shift`, which is added to log(1 - gamma) of the schedule. On that scale half precision
    still tells slow heads apart, and weight decay pulls toward the schedule.

    Args:
        decay: as `log_decays`.
        num_heads: number of heads.
        learnable: make `shift` (num_heads,) a parameter; it starts at 0.
        pairs: log-decays of the pairs of channels inside a head, which are added to that of the head; default: none.
        device, dtype: of the parameter.
    Shapes: `forward` returns (num_heads,), or (num_heads * len(pairs),) with pairs.
    Raises: ValueError or TypeError for a schedule that does not fit, for pairs that are not finite or above 0, and for
        a learnable decay of gamma below 1e-4.
    Examples:
        >>> import torch
        >>> from retention.decay import HeadDecay
        >>> HeadDecay([-0.5, -0.25], 2)(torch.device("cpu"))
        tensor([-0.5000, -0.2500])
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
        """Set the decays back to the schedule."""
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    def forward(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return log(gamma) in `dtype` on `device`: (num_heads,), or (num_heads * len(pairs),), head by head."""
        if self.shift is None:
            heads = as_tensor(self.values, device, dtype)
        else:
            log_gap = as_tensor(self.log_gaps, device, dtype) + local(self.shift).to(dtype)
            # The bound keeps gamma above 0. The gradient ignores the bound, since a gradient of 0 would never leave it.
            log_gap = log_gap.detach().clamp(max=-1e-4) + (log_gap - log_gap.detach())  # the bracket is exactly 0
            heads = torch.log1p(-log_gap.exp())
        if self.pairs is None:
            return heads
        return (heads[:, None] + as_tensor(self.pairs, device, dtype)).flatten()

    def extra_repr(self) -> str:
        return f"{len(self.values)}, learnable={self.shift is not None}"


def geometric_sum(log_decay: Tensor, count: Tensor) -> Tensor:
    """Return the sum over i < count of exp(i log_decay), the total weight of `count` tokens.

    With x = count log_decay the sum is expm1(x) / expm1(log_decay). The derivative of this quotient is a difference of
    two terms that cancel where |x| is small. There the same value is computed as count phi(x) / phi(log_decay), where
    phi(x) = expm1(x) / x is a series whose derivatives do not cancel.

    Shapes: log_decay and count broadcast against each other, and to the result.
    Dtypes: float32 or float64, the same for both.
    Source: the geometric series; sum_i D_ni in Sun et al. 2023, arXiv:2307.08621, Section 2.2, is one.
    Examples:
        >>> import torch
        >>> from retention.decay import geometric_sum
        >>> geometric_sum(torch.tensor(0.5).log(), torch.tensor([1.0, 2.0, 3.0]))
        tensor([1.0000, 1.5000, 1.7500])
    """
    x = count * log_decay
    small = x.abs() < 1
    series = count * _phi(torch.where(small, x, 0)) / _phi(torch.where(small, log_decay, 0))
    # `where` multiplies the gradient of the other branch by 0, and 0 * inf is NaN: each branch gets a safe argument.
    closed = _expm1(torch.where(small, -1.0, x)) / _expm1(torch.where(small, -1.0, log_decay))
    return torch.where(small, series, closed)


def _phi(x: Tensor) -> Tensor:
    """Return expm1(x) / x = sum over n >= 0 of x^n / (n + 1)! for |x| < 1."""
    terms = 19 if x.dtype == torch.float64 else 11  # the next term is below the rounding error
    total = torch.ones_like(x)
    for n in range(terms, 1, -1):
        total = 1 + x / n * total
    return total


def _expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1. The derivative of torch.expm1 is expm1(x) + 1, which has no digits left far below 0."""
    far = x <= -1
    return torch.where(far, x.exp() - 1, torch.expm1(torch.where(far, 0, x)))
