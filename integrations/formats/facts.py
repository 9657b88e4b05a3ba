"""Derives the options of a model from the names, shapes and buffers in its checkpoint."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from retention.decay import SCHEDULES
from retention.rotary import frequencies, pair_decays

from ..files import listed

__all__ = ["Tensors", "constants", "described", "positions", "same", "shared_heads"]

Tensors = dict[str, Tensor]


def described(tensors: Tensors) -> dict[str, Any]:
    """Return the options that follow from the names and shapes of tensors.

    Args:
        tensors: tensors under this library's names.
    Raises: ValueError unless they are the tensors of a RetNet.
    """
    _check_dimensions(tensors)
    norm = _shapes(tensors, r"retention_norm\.weight")
    q_proj, out_proj = (_shapes(tensors, rf"retention\.{name}_proj\.weight") for name in ("q", "out"))
    if not (norm and q_proj and out_proj and _shapes(tensors, r"ffn\..*fc1\.weight")):
        raise ValueError(f"these tensors have no norm, retention or feed-forward that is known; got {listed(tensors)}")
    embedding, head = tensors.get("embed_tokens.weight"), tensors.get("lm_head.weight")
    affine = _shapes(tensors, r"retention\.norm\.weight")
    per_channel = bool(affine) and len(affine[0]) == 2
    facts: dict[str, Any] = {
        "vocab_size": 0 if embedding is None else len(embedding),
        "dim": norm[0][0],
        "num_layers": _count(_blocks(tensors), "backbone.blocks"),
        "norm": "layer" if _shapes(tensors, r"retention_norm\.bias") else "rms",
        "norm_before": True,
        "final_norm": "backbone.norm.weight" in tensors,
        "norm_embedding": "backbone.embedding_norm.weight" in tensors,
        "retention.key_dim": q_proj[0][0],
        "retention.value_dim": out_proj[0][-1],  # v_proj is narrower if heads share their values
        "retention.bias": bool(_shapes(tensors, r"retention\.q_proj\.bias")),
        "retention.norm_affine": "channel" if per_channel else "shared" if affine else False,
        "tie_word_embeddings": embedding is not None and head is not None and _equal(embedding, head),
        "lm_head_bias": "lm_head.bias" in tensors,
    }
    if affine:
        facts["num_heads"] = affine[0][0] if per_channel else out_proj[0][-1] // affine[0][0]
    if not _shapes(tensors, r"retention\.g_proj\.weight"):
        facts["retention.gate"] = None
    return facts | _feed_forward(tensors)


def shared_heads(tensors: Tensors, num_heads: Any) -> dict[str, int]:
    """Return the number of key and value heads, as an option, if the weights have fewer of them than of queries."""
    (q, *_), (k, *_) = (_shapes(tensors, rf"retention\.{name}_proj\.weight")[0] for name in "qk")
    if k == q or not isinstance(num_heads, int) or num_heads * k % q:
        return {}
    return {"retention.num_kv_heads": num_heads * k // q}


def _feed_forward(tensors: Tensors) -> dict[str, Any]:
    routers = _routers(tensors)
    norm = [_shapes(tensors, rf"ffn\.(experts\.\d+\.)?norm\.{part}") for part in ("weight", "bias")]
    facts: dict[str, Any] = {
        "ffn_dim": _shapes(tensors, r"ffn\..*fc1\.weight")[0][0],
        "subln": False if not norm[0] else "layer" if norm[1] else "rms",
        "moe_every": min(routers, default=-1) + 1,
        "moe_num_experts": next(iter(routers.values()), 0),
    }
    if len(routers) < len(_blocks(tensors)):  # some blocks have no experts
        facts["gated"] = bool(_shapes(tensors, r"ffn\.gate\.weight"))
        facts["ffn_bias"] = bool(_shapes(tensors, r"ffn\.fc1\.bias"))
    return facts


def positions(tensors: Tensors, facts: dict[str, Any], usual: str) -> dict[str, Any]:
    """Return the number of heads and the decays that follow from the buffers in a checkpoint.

    Args:
        tensors: tensors under this library's names; buffers begin with `constant.`.
        facts: the result of `described`.
        usual: the schedule to compare the decays with first.
    Raises: ValueError if buffers contradict each other, or hold angles other than this library computes.
    """
    heads, decays = {facts["num_heads"]} if "num_heads" in facts else set(), set()
    for name, x in tensors.items():
        kind = name.split(".")[1] if _is_constant(name) else None
        if kind is not None and x.numel() > facts["dim"]:
            raise ValueError(f"{kind} must have at most dim {facts['dim']} values; these weights have {x.numel():,}")
        if kind in ("log_decays", "gammas"):
            heads.add(x.numel())
            decays.add(_decay(x.flatten(), usual, gammas=kind == "gammas"))
        elif kind is not None:
            key_dim = x.numel() * (2 if kind == "pair_scales" else 1)
            heads.add(facts["retention.key_dim"] // key_dim)
            if not same(x.flatten(), _rotation(kind, key_dim)):
                raise ValueError(f"the rotation in these weights is another than ours; got {kind} {x.flatten()[:4]}")
    if len(heads) > 1 or len(decays) > 1:
        raise ValueError(f"the buffers in these weights contradict each other; got heads {heads}, decays {decays}")
    found: dict[str, Any] = {"num_heads": heads.pop()} if heads else {}
    for decay in decays:
        found["retention.decay"] = decay if isinstance(decay, str) else list(decay)
    return found


def constants(key_dim: int, decays: tuple[float, ...]) -> Tensors:
    """Return the angles and log-decays that torchscale stores as buffers, with its float32 rounding.

    Args:
        key_dim: channels of one head of q and k.
        decays: log-decay of each head.
    """
    angles = (1.0 / 10000 ** torch.linspace(0, 1, key_dim // 2)).repeat_interleave(2)
    paper = torch.log(1 - 2 ** (-5 - torch.arange(len(decays), dtype=torch.float32)))
    is_paper = decays == SCHEDULES["paper"](len(decays))
    return {"constant.angles": angles, "constant.log_decays": paper if is_paper else torch.tensor(decays)}


def same(x: Tensor, exact: Tensor) -> bool:
    """Tell whether x equals `exact` up to the rounding of float32 and of the dtype of x."""
    return x.shape == exact.shape and torch.allclose(
        x.double().cpu(), exact.double(), rtol=1e-5 + 2 * torch.finfo(x.dtype).eps, atol=2e-7
    )


def _rotation(kind: str, key_dim: int) -> Tensor:
    if kind == "angles":  # one angle per channel
        return torch.tensor(frequencies("paper", key_dim), dtype=torch.float64).repeat_interleave(2)
    # pair_scales: the scale of xPos, one per pair of channels
    return (512 * torch.tensor(pair_decays(key_dim), dtype=torch.float64)).exp()


def _decay(x: Tensor, usual: str, *, gammas: bool) -> str | tuple[float, ...]:
    """Return the schedule whose decays a buffer holds, or the log-decays if no schedule fits."""
    for name in dict.fromkeys((usual, *SCHEDULES)):
        exact = torch.tensor(SCHEDULES[name](len(x)), dtype=torch.float64)
        if same(x, exact.exp() if gammas else exact):
            return name
    return tuple((x.double().log() if gammas else x.double()).tolist())


def _check_dimensions(tensors: Tensors) -> None:
    wrong = [f"{name} {tuple(x.shape)}" for name, x in tensors.items() if not _is_constant(name) and x.dim() > 2]
    if wrong:
        raise ValueError(f"weights must have one or two dimensions; got {listed(wrong)}")


def _is_constant(name: str) -> bool:
    return name.startswith("constant.")


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)


def _count(numbers: set[int], what: str) -> int:
    """Return how many numbers there are. Raises: ValueError unless they run from 0 without a gap."""
    if absent := set(range(len(numbers))) - numbers:
        raise ValueError(f"missing tensors: there is a {what}.{max(numbers)} but no {what}.{min(absent)}")
    return len(numbers)


def _routers(tensors: Tensors) -> dict[int, int]:
    """Return the number of experts by block. Raises: ValueError if experts and routers disagree."""
    rows = {
        int(found[1]): len(x)
        for name, x in tensors.items()
        if (found := re.fullmatch(r"backbone\.blocks\.(\d+)\.ffn\.router\.weight", name))
    }
    experts: dict[int, set[int]] = {}
    for name in tensors:
        if found := re.match(r"backbone\.blocks\.(\d+)\.ffn\.experts\.(\d+)\.", name):
            experts.setdefault(int(found[1]), set()).add(int(found[2]))
    for block in rows.keys() | experts.keys():
        if set(range(rows.get(block, 0))) != experts.get(block, set()):
            raise ValueError(
                f"a router must have one row for each expert; in block {block} it has {rows.get(block, 0)}, "
                f"for {len(experts.get(block, ()))} experts"
            )
    return rows


def _blocks(tensors: Tensors) -> set[int]:
    return {int(found[1]) for key in tensors if (found := re.match(r"backbone\.blocks\.(\d+)\.", key))}


def _shapes(tensors: Tensors, pattern: str) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors whose name within a block matches the pattern."""
    return [tuple(x.shape) for key, x in tensors.items() if re.fullmatch(rf"backbone\.blocks\.\d+\.{pattern}", key)]
