"""Rotation of queries and keys by an angle that grows with the token's time, so that q . k depends on the distance.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 3 to 5 (e^(i n theta)); RoPE, Su et al. 2021, arXiv:2104.09864; xPos, Sun
et al. 2022, arXiv:2212.10554.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .decay import as_tensor

SCHEDULES = ("paper", "rope", "xpos")


def frequencies(schedule: str, key_dim: int, base: float = 10000.0) -> tuple[float, ...]:
    """The angle per token of each of the key_dim / 2 pairs, in double precision.

    "paper": base^(-linspace(0, 1, key_dim / 2)), end point included
    "rope":  base^(-arange(key_dim / 2) / (key_dim / 2))
    "xpos":  as "rope"; each pair also decays at its own pace, `pair_decays`

    Raises: ValueError for an unknown schedule or an odd key_dim.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"rotary must be one of {', '.join(map(repr, SCHEDULES))} or None; got rotary {schedule!r}")
    if key_dim % 2:
        raise ValueError(
            f"rotation needs an even key dim per head; got key_dim {key_dim}; pass rotary=None to go without"
        )
    pairs = key_dim // 2
    steps = max(pairs - 1, 1) if schedule == "paper" else pairs
    return tuple(base ** (-i / steps) for i in range(pairs))


def pair_decays(key_dim: int) -> tuple[float, ...]:
    """The log-decay per token of each of the key_dim / 2 pairs under xPos, in double precision.

    Source: Sun et al. 2022, arXiv:2212.10554: q is multiplied by ((i + 0.4 d) / (1.4 d))^(n / 512) and k divided by it.
    These factors leave every bound on long inputs; their product, which is what counts, is a decay. Differs: without
    causality it decays both ways, instead of growing toward what lies ahead.
    """
    return tuple(math.log((i + 0.4 * key_dim) / (1.4 * key_dim)) / 512 for i in range(0, key_dim, 2))


def rotation(times: Tensor, freqs: tuple[float, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of times * freqs, each (..., length, key_dim / 2). times: integers (..., length).

    The angle is taken in double precision: in float32 one of 100 000 radians is off by 0.004.
    """
    exact = torch.float32 if times.device.type == "mps" else torch.float64  # MPS has no float64
    angle = times[..., None].to(exact) * as_tensor(freqs, times.device, exact)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """Turn each pair of channels of x (..., length, key_dim) by its angle; cos, sin (..., length, key_dim / 2).

    interleaved: the pairs are channels (0, 1), (2, 3), ... as in the paper's code; else (0, K/2), (1, K/2 + 1), ...
    as in Llama. Computed in the precision of cos and sin, returned in that of x.
    """
    if not interleaved:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass instead of six, and the layout stays; compilers fuse the real formula but not the complex one.
        turned = _as_complex(x.to(cos.dtype)) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def _as_complex(x: Tensor) -> Tensor:
    even = x.stride(-1) == 1 and not any(step % 2 for step in (x.storage_offset(), *x.stride()[:-1]))
    return torch.view_as_complex((x if even else x.contiguous()).unflatten(-1, (-1, 2)))
