"""Rotate queries and keys by an angle that grows with the time of the token, so that q . k depends on the distance.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 3 to 5 (the factor e^(i n theta)); RoPE, Su et al. 2021,
    arXiv:2104.09864; xPos, Sun et al. 2022, arXiv:2212.10554.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .constants import as_tensor, kept
from .errors import ShapeError
from .options import check_dtype, check_factor, check_flags, check_is, check_whole, shown

__all__ = ["frequencies", "pair_decays", "rotate", "rotation", "rotation_table", "turned"]

_ROTARIES = ("paper", "rope", "xpos")


def frequencies(rotary: str, key_dim: int, base: float = 10000.0) -> tuple[float, ...]:
    """Return the angle per token, in radians, of each of the key_dim / 2 pairs of channels, in double precision.

    Args:
        rotary: "paper": base^(-linspace(0, 1, key_dim / 2)), with both end points; "rope": base^(-arange(key_dim / 2) /
            (key_dim / 2)); "xpos": as "rope", and each pair also has a decay, see `pair_decays`.
        key_dim: channels of a head, even.
        base: ratio of the largest and the smallest angle of "paper".
    Raises: ValueError for an unknown schedule, an odd key_dim, or a base that is not above 0.
    Source: "paper": Sun et al. 2023, arXiv:2307.08621, as in the authors' code; "rope": Su et al. 2021,
        arXiv:2104.09864.
    Examples:
        >>> from retention.rotary import frequencies
        >>> frequencies("rope", 4), frequencies("paper", 4)
        ((1.0, 0.01), (1.0, 0.0001))
    """
    if not isinstance(rotary, str) or rotary not in _ROTARIES:
        raise ValueError(f"rotary must be one of {', '.join(map(repr, _ROTARIES))} or None; got rotary {shown(rotary)}")
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
    """Return the log-decay per token of each of the key_dim / 2 pairs of channels under xPos, in double precision.

    xPos multiplies q by ((i + 0.4 d) / (1.4 d))^(n / 512) and divides k by the same factor. On long inputs these
    factors leave the range of floats. Only the product of both counts, and it is a decay of the distance.

    Raises: ValueError unless key_dim is an even integer of at least 2.
    Source: Sun et al. 2022, arXiv:2212.10554. Differs: without causality the decay acts in both directions, instead of
        growing toward later tokens.
    Examples:
        >>> from retention.rotary import pair_decays
        >>> [round(512 * x, 4) for x in pair_decays(4)]
        [-1.2528, -0.4418]
    """
    check_whole("key_dim", key_dim, 2)
    if key_dim % 2:
        raise ValueError(f"key_dim must be even; got key_dim {key_dim}")
    return tuple(math.log((i + 0.4 * key_dim) / (1.4 * key_dim)) / 512 for i in range(0, key_dim, 2))


def rotation(times: Tensor, freqs: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the cosine and sine of the angle times * freqs of each token and pair.

    The angle is computed in double precision: in float32 an angle of 100 000 radians has an error of 0.004.

    Shapes: times (..., T), integers; returns (..., T, key_dim / 2, 2), cosine first.
    Args:
        times: the time of each token; see `retention.times`.
        freqs: angles per token, from `frequencies`.
        dtype: dtype of the result, a float.
    Raises: TypeError unless times is a tensor of integers, freqs a tuple and dtype a float.
    Source: Su et al. 2021, arXiv:2104.09864.
    Examples:
        >>> import torch
        >>> from retention.rotary import frequencies, rotation
        >>> rotation(torch.tensor([0, 1]), frequencies("rope", 2))[:, 0]
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    check_dtype(dtype, optional=False)
    if not isinstance(times, Tensor) or times.is_floating_point() or times.is_complex() or times.dtype == torch.bool:
        raise TypeError(f"times must be a tensor of integers; got times {shown(times)}")
    return _rotation(_exact(freqs, times.device), times, dtype)


def rotation_table(length: int, freqs: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `rotation` of the times 0, 1, ..., length - 1, (length, key_dim / 2, 2).

    The result is kept for the next call, unless it has more than 8192 tokens; do not write to it.

    Raises: ValueError unless length is an integer of at least 0; TypeError for another type of device, freqs or dtype.
    Examples:
        >>> import torch
        >>> from retention.rotary import frequencies, rotation_table
        >>> rotation_table(3, frequencies("rope", 8), torch.device("cpu"), torch.float32).shape
        torch.Size([3, 4, 2])
    """
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
    """Rotate each pair of channels of x by the angle of its token.

        (a, b) -> (a cos - b sin, a sin + b cos)

    Shapes: x (..., T, key_dim); rotation (..., T, key_dim / 2, 2), which broadcasts. Returns the shape of x.
    Dtypes: computed in the dtype of `rotation`, returned in that of x.
    Args:
        rotation: cosines and sines, from `rotation` or `rotation_table`.
        interleaved: True: the pairs are channels (0, 1), (2, 3), ... as in the paper's code; False: (0, key_dim / 2),
            (1, key_dim / 2 + 1), ... as in Llama.
    Raises: TypeError for tensors that are not floats; ShapeError for shapes that do not fit; ValueError unless
        interleaved is True or False.
    Source: Su et al. 2021, arXiv:2104.09864.
    Examples:
        >>> import torch
        >>> from retention.rotary import frequencies, rotate, rotation
        >>> rotate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), rotation(torch.tensor([0, 1]), frequencies("rope", 2)))
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    _check_rotated(x, rotation, interleaved)
    return turned(x, rotation, interleaved)


def turned(x: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """Run `rotate` for tensors that have been checked."""
    if x.dtype != rotation.dtype:
        return turned(x.to(rotation.dtype), rotation, interleaved).to(x.dtype)
    if interleaved and x.device.type == "cpu" and not torch.compiler.is_compiling():
        # (a + b i) (cos + i sin): one pass over memory instead of six. Compilers fuse the real formula below instead.
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
    except RuntimeError:  # the strides do not allow a complex view
        return torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
