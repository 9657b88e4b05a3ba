"""Rotation of queries and keys by an angle that grows with the token's time, so that q . k depends on the distance.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 3 to 5 (e^(i n theta)); RoPE, Su et al. 2021, arXiv:2104.09864; xPos, Sun
et al. 2022, arXiv:2212.10554.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .constants import as_tensor, kept

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


def rotation(times: Tensor, freqs: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """cos and sin of times * freqs side by side, (..., length, key_dim / 2, 2). times: integers (..., length).

    The angle is taken in double precision: in float32 one of 100 000 radians is off by 0.004.
    """
    return _rotation(_exact(freqs, times.device), times, dtype)


def rotation_table(length: int, freqs: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`rotation` of the times 0, 1, ..., length - 1, (length, key_dim / 2, 2); unless very long, made once."""
    return _table(_exact(freqs, device), length, dtype)


@kept(8, longest=8192)
def _table(freqs: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    return _rotation(freqs, torch.arange(length, device=freqs.device), dtype)


def _rotation(freqs: Tensor, times: Tensor, dtype: torch.dtype) -> Tensor:
    angle = times.unsqueeze(-1) * freqs
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype)


def _exact(freqs: tuple[float, ...], device: torch.device) -> Tensor:
    return as_tensor(freqs, device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64


def rotate(x: Tensor, rotation: Tensor, *, interleaved: bool = True) -> Tensor:
    """Turn each pair of channels of x (..., length, key_dim) by its angle; rotation (..., length, key_dim / 2, 2).

    interleaved: the pairs are channels (0, 1), (2, 3), ... as in the paper's code; else (0, K/2), (1, K/2 + 1), ...
    as in Llama. Computed in the precision of `rotation`, returned in that of x.
    """
    if x.dtype != rotation.dtype:
        return rotate(x.to(rotation.dtype), rotation, interleaved=interleaved).to(x.dtype)
    if interleaved and x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass instead of six, and the layout stays; compilers fuse the real formula but not the complex one.
        return torch.view_as_real(_as_complex(x) * torch.view_as_complex(rotation)).flatten(-2)
    cos, sin = rotation.unbind(-1)
    if not interleaved:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _as_complex(x: Tensor) -> Tensor:
    try:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    except RuntimeError:  # pairs that do not lie side by side, or at odd places
        return torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
