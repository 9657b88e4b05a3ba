"""Rotation of queries and keys by an angle that grows with the token's time, so that q . k depends on the distance.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 3 to 5 (e^(i n theta)); RoPE, Su et al. 2021, arXiv:2104.09864; xPos, Sun
et al. 2022, arXiv:2212.10554.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .constants import as_tensor, kept
from .errors import ShapeError
from .options import check_dtype, check_factor, check_flags, check_is, check_whole, shown

SCHEDULES = ("paper", "rope", "xpos")


def frequencies(rotary: str, key_dim: int, base: float = 10000.0) -> tuple[float, ...]:
    """The angle per token of each of the key_dim / 2 pairs, in double precision.

    "paper": base^(-linspace(0, 1, key_dim / 2)), end point included
    "rope":  base^(-arange(key_dim / 2) / (key_dim / 2))
    "xpos":  as "rope"; each pair also decays at its own pace, `pair_decays`

    Raises: ValueError for an unknown schedule or an odd key_dim.
    """
    if not isinstance(rotary, str) or rotary not in SCHEDULES:
        raise ValueError(f"rotary must be one of {', '.join(map(repr, SCHEDULES))} or None; got rotary {shown(rotary)}")
    check_whole("key_dim", key_dim)
    check_factor("base", base)
    if key_dim % 2:
        raise ValueError(
            f"rotation needs an even key dim per head; got key_dim {key_dim}; pass rotary=None to go without"
        )
    pairs = key_dim // 2
    steps = max(pairs - 1, 1) if rotary == "paper" else pairs
    return tuple(base ** (-i / steps) for i in range(pairs))


def pair_decays(key_dim: int) -> tuple[float, ...]:
    """The log-decay per token of each of the key_dim / 2 pairs under xPos, in double precision.

    Source: Sun et al. 2022, arXiv:2212.10554: q is multiplied by ((i + 0.4 d) / (1.4 d))^(n / 512) and k divided by it.
    These factors leave every bound on long inputs; their product, which is what counts, is a decay. Differs: without
    causality it decays both ways, instead of growing toward what lies ahead.
    Raises: ValueError for a key_dim that is no even number above 0.
    """
    check_whole("key_dim", key_dim, 2)
    if key_dim % 2:
        raise ValueError(f"key_dim must be even; got key_dim {key_dim}")
    return tuple(math.log((i + 0.4 * key_dim) / (1.4 * key_dim)) / 512 for i in range(0, key_dim, 2))


def rotation(times: Tensor, freqs: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """cos and sin of times * freqs side by side, (..., length, key_dim / 2, 2). times: integers (..., length).

    The angle is taken in double precision: in float32 one of 100 000 radians is off by 0.004.
    Raises: TypeError for times that are no tensor of integers.
    """
    check_dtype(dtype, optional=False)
    if not isinstance(times, Tensor) or times.is_floating_point() or times.is_complex() or times.dtype == torch.bool:
        raise TypeError(f"times must be a tensor of integers; got times {shown(times)}")
    return _rotation(_exact(freqs, times.device), times, dtype)


def rotation_table(length: int, freqs: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`rotation` of the times 0, 1, ..., length - 1, (length, key_dim / 2, 2); unless very long, made once."""
    check_whole("length", length, 0)
    check_is("device", device, torch.device, "a torch.device")
    check_dtype(dtype, optional=False)
    return _table(_exact(freqs, device), length, dtype)


@kept(8, longest=8192)
def _table(freqs: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    return _rotation(freqs, torch.arange(length, device=freqs.device), dtype)


def _rotation(freqs: Tensor, times: Tensor, dtype: torch.dtype) -> Tensor:
    angle = times.unsqueeze(-1) * freqs
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype)


def _exact(freqs: tuple[float, ...], device: torch.device) -> Tensor:
    check_is("freqs", freqs, tuple, "a tuple, as `frequencies` returns it")
    return as_tensor(freqs, device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64


def rotate(x: Tensor, rotation: Tensor, *, interleaved: bool = True) -> Tensor:
    """Turn each pair of channels of x (..., length, key_dim) by its angle; rotation (..., length, key_dim / 2, 2).

    interleaved: the pairs are channels (0, 1), (2, 3), ... as in the paper's code; else (0, K/2), (1, K/2 + 1), ...
    as in Llama. Computed in the precision of `rotation`, returned in that of x.
    Raises: TypeError or ShapeError for tensors that do not go together.
    """
    _check_rotated(x, rotation, interleaved)
    return turned(x, rotation, interleaved)


def turned(x: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """`rotate` for tensors that have been checked."""
    if x.dtype != rotation.dtype:
        return turned(x.to(rotation.dtype), rotation, interleaved).to(x.dtype)
    if interleaved and x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass instead of six, and the layout stays; compilers fuse the real formula but not the complex one.
        return torch.view_as_real(_as_complex(x) * torch.view_as_complex(rotation)).flatten(-2)
    cos, sin = rotation.unbind(-1)
    if not interleaved:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _check_rotated(x: Tensor, rotation: Tensor, interleaved: bool) -> None:
    for name, z in (("x", x), ("rotation", rotation)):
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"{name} must be a tensor of a floating dtype; got {name} {shown(z)}")
    check_flags(interleaved=interleaved)
    turns = rotation.shape
    if x.dim() < 2 or turns[-1:] != (2,) or turns[-3:-1] != (x.shape[-2], x.shape[-1] // 2) or x.shape[-1] % 2:
        want = "x must be (..., length, key_dim) with an even key_dim, rotation (..., length, key_dim / 2, 2)"
        raise ShapeError(f"{want}; got x {tuple(x.shape)}, rotation {tuple(turns)}")


def _as_complex(x: Tensor) -> Tensor:
    try:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    except RuntimeError:  # pairs that do not lie side by side, or at odd places
        return torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
