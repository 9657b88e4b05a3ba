"""Runs the forward of a replaced layer with retention as attention function and a `HostedCall` as cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

from retention.errors import ShapeError
from retention.sharding import refuse, whole_length

from .cache import cache_layer
from .compat import HARMLESS, INPUT, OTHER_TOKENS, replace_cache, versions
from .masks import as_one_row, borders_of, real_tokens, refuse_other_masks
from .parts import check_parts
from .recognise import cap_of, window_of

__all__ = ["HostedCall", "hosted_call", "hosted_retention"]


@dataclass
class HostedCall:
    """Stands in for the cache in one call of a replaced layer.

    `update` returns only the call's own keys and values, as retention keeps those before in its state.

    Attributes:
        x: (B, T, dim), the layer's input.
        cache: the real cache, or None.
        index: the layer's index in the cache, as the layer passes it to `update`; None before.
        done: True after the attention function was called.
    """

    x: Tensor
    cache: Cache | None
    index: int | None = None
    done: bool = False

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record the layer's index; return k and v unchanged."""
        self.index = layer_idx
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of earlier tokens, from which the layer computes positions."""
        return 0 if self.cache is None else self.cache.get_seq_length(layer_idx)


def hosted_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], HostedCall]:
    """Replace the cache in the arguments of a layer's call by a `HostedCall`.

    Returns: the new positional arguments, the new keyword arguments, and the `HostedCall`.
    Raises: ValueError if the arguments bring other tokens to attend to, as in cross-attention; TypeError if the cache
        is not a `transformers.Cache`.
    """
    others = [name for name in OTHER_TOKENS if kwargs.get(name) is not None]
    if others:
        raise ValueError(
            f"this layer has retention and takes its own tokens only; got {', '.join(others)}, as cross-attention has"
        )
    check_parts(kwargs.get("position_ids"))
    call = HostedCall(args[0] if args else kwargs[INPUT], None)
    args, kwargs, call.cache = replace_cache(args, kwargs, call)
    return args, kwargs, call


def hosted_retention(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    hosted: HostedCall | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute retention in place of the softmax; transformers calls it as its attention function.

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V). Returns (B, T, H, V), and None for the attention
        weights.
    Args:
        attention: the replaced layer.
        attention_mask: (B, T), or (B, 1, T, keys), bool or added to the scores.
        hosted: the `HostedCall` of the layer's call.
        scaling: factor of q . k; default K^-0.5.
        is_causal: default: the layer's own `is_causal`, or True.
        cu_seq_lens_q: (N + 1,), borders of packed sequences.
        others: further keywords of transformers. A sliding window and a soft cap are ignored if the layer declares them
            as lost; dropout of attention weights is ignored; any other keyword must be known to be harmless.
    Raises: ValueError if retention cannot do what the call asks for; ShapeError if the keys are not those of the
        layer's own tokens.
    """
    call = _checked(attention, hosted, k, others)
    causal = bool(getattr(attention, "is_causal", True) if is_causal is None else is_causal)
    layer = None if call.cache is None or call.index is None else cache_layer(call.cache, call.index)
    state = None if layer is None else layer.state
    columns = None if layer is None else layer.columns
    mask = None if attention_mask is None else real_tokens(attention_mask, call.x, columns)
    refuse_other_masks(attention_mask, mask, None if attention.retention.causal else causal, columns)
    borders = None if state is not None else _borders(cu_seq_lens_q, attention_mask, mask, call.x)
    y, after = attention.retention(
        *as_one_row(borders, call.x, q, k, v),
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal,
        mask=mask if borders is None else None,
        cu_seqlens=borders,
        state=state,
        return_state=layer is not None and borders is None,
    )
    if layer is not None and after is not None:
        layer.store(after, whole_length(call.x.shape[1]))
    return y.reshape(*call.x.shape[:2], *y.shape[2:]).contiguous(), None  # some hosts call `view` on it


def _borders(given: Tensor | None, attention_mask: Tensor | None, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the borders of packed sequences, (N + 1,) int32: the given ones, or those read from the mask."""
    if given is not None:
        check_parts(packed_rows=x.shape[0])
        return given.int().flatten()
    found = borders_of(attention_mask, mask, x)
    if found is not None:
        refuse("an attention mask of packed sequences", "pass cu_seq_lens_q, the borders of the whole sequence")
    return found


def _checked(attention: Any, call: HostedCall | None, k: Tensor, others: dict[str, Any]) -> HostedCall:
    """Return the call after checking that retention can compute it."""
    name = attention.host.__name__
    if call is None:
        raise ValueError(f"{name} does not hand its keywords on to the attention function, so its input is not known")
    if call.done:
        raise ValueError(f"{name} calls the attention function twice in one forward, and retention stands for one")
    call.done = True
    if call.x.dim() != 3:
        raise ShapeError(f"{name} must take tokens in rows, (batch, length, channels); got {tuple(call.x.shape)}")
    if k.shape[2] != call.x.shape[1]:
        raise ShapeError(
            f"{name} must hand on the keys of its {call.x.shape[1]} tokens; got {k.shape[2]}, "
            f"so it keeps them in a cache that was not found among its arguments, or rearranges them ({versions()})"
        )
    if call.cache is not None and call.index is None:
        raise ValueError(f"{name} got a cache and has not said its place there, so its state has none ({versions()})")
    unknown = {key: value for key, value in others.items() if value is not None and not _harmless(attention, key)}
    if unknown:
        given = ", ".join(f"{key}={_short(value)}" for key, value in unknown.items())
        raise ValueError(f"retention has nothing for what {name} hands to its attention: {given}")
    return call


def _harmless(attention: Any, keyword: str) -> bool:
    if keyword == "sliding_window":
        return window_of(attention) is not None
    if keyword == "softcap":
        return cap_of(attention) is not None
    return keyword in HARMLESS


def _short(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
