"""What stands in the place of the attention function and of the cache while the forward of a replaced layer runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

from retention.errors import ShapeError

from .cache import retention_layer
from .compat import HARMLESS, INPUT, OTHER_TOKENS, swap_cache, versions
from .masks import as_one_row, borders_of, real_tokens, refuse_other_masks
from .recognise import cap_of, window_of


@dataclass
class HostedCall:
    """One call of a replaced layer, in the place of its cache: its own keys and values are all that retention needs.

    x (B, T, dim): the layer's input. cache: its own. index: its place there, which the layer says where it would write.
    """

    x: Tensor
    cache: Cache | None
    index: int | None = None
    done: bool = False

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.index = layer_idx
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens came before, for what depends on the position."""
        return 0 if self.cache is None else self.cache.get_seq_length(layer_idx)


def hosted_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], HostedCall]:
    """The arguments of a layer's call with a `HostedCall` in the place of the cache, and that call.

    Raises: ValueError if there are other tokens to attend to than its own.
    """
    others = [name for name in OTHER_TOKENS if kwargs.get(name) is not None]
    if others:
        raise ValueError(
            f"this layer has retention and takes its own tokens only; got {', '.join(others)}, as cross-attention has"
        )
    call = HostedCall(args[0] if args else kwargs[INPUT], None)
    args, kwargs, call.cache = swap_cache(args, kwargs, call)
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
    """What transformers calls in the place of the softmax: q (B, H, T, K), k, v (B, Hkv, T, K or V) -> (B, T, H, V).

    hosted: the call of the layer. is_causal: None: as the layer says. cu_seq_lens_q: borders of packed sequences.
    others: a sliding window and a soft cap count only if the layer is known to have lost them; dropout of weights has
        no counterpart; the rest must be known to change nothing.
    Raises: ValueError for what retention cannot do, ShapeError for what is not the keys of the layer's own tokens.
    """
    call = _checked(attention, hosted, q, k, others)
    causal = bool(getattr(attention, "is_causal", True) if is_causal is None else is_causal)
    layer = None if call.cache is None or call.index is None else retention_layer(call.cache, call.index)
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
        layer.store(after, call.x.shape[1])
    return y.reshape(*call.x.shape[:2], *y.shape[2:]).contiguous(), None  # some hosts view it in another shape


def _borders(given: Tensor | None, attention_mask: Tensor | None, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Of packed sequences, (N + 1,) int32: those that are given, or those in the mask."""
    return borders_of(attention_mask, mask, x) if given is None else given.int().flatten()


def _checked(attention: Any, call: HostedCall | None, q: Tensor, k: Tensor, others: dict[str, Any]) -> HostedCall:
    """The call, if it is one that retention can do."""
    name = attention.host.__name__
    if call is None:
        raise ValueError(f"{name} does not hand its keywords on to the attention function, so its input is not known")
    if call.done:
        raise ValueError(f"{name} calls the attention function twice in one forward, and retention stands for one")
    call.done = True
    if call.x.dim() != 3 or k.shape[2] != call.x.shape[1]:
        raise ShapeError(
            f"{name} must hand on the keys of its tokens, {tuple(call.x.shape)[:-1]}; got {k.shape[2]} in a row, "
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
