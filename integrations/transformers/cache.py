"""Retention states in transformers' `Cache`, and retention's reading of padding masks and packed batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache

from retention.errors import ShapeError
from retention.options import shown
from retention.state import RetentionState, state_dtype

from .compat import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    create_recurrent_attention_mask,
)

__all__ = [
    "LAYER_TYPE",
    "RetentionCacheLayer",
    "StaticRetentionCacheLayer",
    "cache_layer",
    "packed_borders",
    "token_mask",
]

LAYER_TYPE = "retention"


class RetentionCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """The state of one retention layer, as a layer of transformers' `Cache`; its size does not grow with the length.

    The tensors of `state` are updated in place for as long as their shape stays the same, as compiled code requires.

    Attributes:
        state: the `RetentionState` after the tokens so far; None before the first.
        columns: number of columns of the batch so far, padding included; a 0-dimensional int64 tensor.
    """

    _layer_type: str | None = LAYER_TYPE  # registers the class with `DynamicCache`
    keys = values = None
    is_compileable = False  # else `generate` would pass masks that other layers misread
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    record_past = False

    def __init__(self, **_: Any) -> None:  # ignores the capacity that a static cache passes
        self._state: RetentionState | None = None
        self.columns = torch.zeros((), dtype=torch.long)  # padding included; an int would cause recompiles

    @property
    def state(self) -> RetentionState | None:
        """The state after the tokens so far; None before the first."""
        if self._state is not None and _foreign(self._state.kv):
            self._state, self.columns = self._state.clone(), self.columns.clone()
        return self._state

    def state_for(self, retention: Any) -> RetentionState | None:
        """Return the state in the shape that `retention`, a `MultiScaleRetention`, uses; None before any token."""
        return self.state

    def store(self, after: RetentionState, columns: int) -> None:
        """Store the state after `columns` more tokens."""
        before = self.state
        if before is None or before.kv.shape != after.kv.shape or after.kv.requires_grad or before.kv.requires_grad:
            self._state = after
            self.columns = self.columns.to(after.kv.device)
            self._mark_static()
        elif before is not after:
            before.copy_(after)
        self.columns.add_(columns)

    def _mark_static(self) -> None:
        if self._state is not None and not torch.compiler.is_compiling():
            self._state.map(torch._dynamo.mark_static_address)
            torch._dynamo.mark_static_address(self.columns)

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """True once a state is stored."""
        return self._state is not None

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether a state is stored, in the form that transformers' layers of linear attention use."""
        return {0: self._state is not None}

    @property
    def batch_size(self) -> int:
        """The number of sequences; -1 before the first token."""
        return -1 if self._state is None else len(self._state)

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, padding included."""
        return int(self.columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns of a mask that covers all tokens so far, and its offset 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the length is unlimited."""
        return -1  # no limit

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences by beam_idx (B,), as beam search does."""
        if self.state is not None:
            self.state.copy_(self.state[beam_idx.to(self.state.kv.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times in a row."""
        if self.state is not None:
            self._state = self.state.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        if self.state is not None:
            self._state = self.state[indices]

    def reset(self) -> None:
        """Set state and token count to 0."""
        self.columns.zero_()
        if self.state is not None:
            self.state.map(Tensor.zero_)

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._state = None if self.state is None else self.state.to("cpu")

    def prefetch(self) -> None:
        """Move the state back to its device."""
        self._state = None if self.state is None else self.state.to(self.columns.device)

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing for 0 tokens.

        Raises: ValueError for any other number, as a state cannot drop its last tokens.
        """
        if tokens_to_remove:
            raise ValueError(
                "a retention state cannot forget its last tokens; what needs that, such as assisted decoding, "
                f"does not work with it; got crop({tokens_to_remove})"
            )

    def update(self, *_: Any, **__: Any) -> Any:
        """Raises: TypeError, as the layer stores a state and no keys and values."""
        raise TypeError("a RetentionCacheLayer holds a state, not keys and values; it takes one by `store`")

    lazy_initialization = update_conv_state = update_recurrent_state = update


class StaticRetentionCacheLayer(RetentionCacheLayer):
    """A `RetentionCacheLayer` for `StaticCache`, whose tensors keep their addresses for compiled code.

    `early_initialization`, which exports use, allocates the memory before the model has given the shape of a state.
    That memory is flat, an export starts a new sequence by setting the token count to 0, and no gradients flow through
    it.
    """

    _layer_type = None  # leaves RetentionCacheLayer registered
    is_compileable = True
    supports_early_init = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._flat = False

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The flat memory of the state after an early initialisation, else None."""
        return self._state.kv if self._flat and self._state is not None else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The time of the state after an early initialisation, else None."""
        return self._state.time if self._flat and self._state is not None else None

    @property
    def cumulative_length(self) -> Tensor:  # type: ignore[override]
        """The token count, under the name that exports use."""
        return self.columns

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:  # type: ignore[override]
        """Allocate the flat memory; keys (B, num_heads, 0, head_dim) has the sizes of the config."""
        batch, heads, _, numbers = keys.shape
        kv = keys.new_zeros(batch, heads, numbers, dtype=state_dtype(keys.dtype))
        self._state = RetentionState(kv, torch.zeros(batch, dtype=torch.long, device=keys.device))
        self.columns, self._flat = self.columns.to(keys.device), True
        self._mark_static()

    def state_for(self, retention: Any) -> RetentionState | None:
        """Return the state in the shape that `retention` uses, or zeros while the token count is 0."""
        if not self._flat:
            return self.state
        begun = self.columns != 0
        return self._shaped(retention.initial_state(1)).map(lambda x: x * begun)

    def store(self, after: RetentionState, columns: int) -> None:
        """Store the state after `columns` more tokens, detached if the memory is flat."""
        if not self._flat:
            return super().store(after, columns)
        self._shaped(after).copy_(after.detach())
        self.columns.add_(columns)

    def _shaped(self, like: RetentionState) -> RetentionState:
        """Views of the flat memory in the shapes of `like`, for any batch size."""
        assert self.state is not None
        flat, (heads, key_dim, value_dim) = self.state.kv, like.kv.shape[1:]
        size = heads * key_dim * value_dim // flat.shape[1]
        kv = flat[..., :size].unflatten(-1, (-1, key_dim, value_dim)).flatten(1, 2)
        return RetentionState(kv, self.state.time, None if like.k_sum is None else flat[..., size:])


STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = StaticRetentionCacheLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[LAYER_TYPE] = create_recurrent_attention_mask


def cache_layer(cache: Cache, index: int) -> RetentionCacheLayer:
    """Return the cache layer at `index`, after turning an empty layer into one for retention.

    Raises: TypeError if the layer holds keys and values.
    """
    kind = StaticRetentionCacheLayer if isinstance(cache, StaticCache) else RetentionCacheLayer
    while len(cache.layers) <= index:  # a cache without a config grows with use
        cache.layers.append(kind())
    layer: Any = cache.layers[index]
    if isinstance(layer, RetentionCacheLayer):
        return layer
    # A layer may be initialised and still empty; compiled code cannot read its length.
    if getattr(layer, "is_initialized", False) and (torch.compiler.is_compiling() or int(layer.get_seq_length())):
        raise TypeError(f"the cache holds keys and values in layer {index}, where a retention state is needed")
    cache.layers[index] = new = kind()
    return new


def token_mask(attention_mask: Tensor | dict[str, Tensor | None] | None, x: Tensor, cached: bool) -> Tensor | None:
    """Return which tokens of x are real, (B, T) bool; None if all are.

    Args:
        attention_mask: (B, T), or with a cache (B, tokens so far + T), 0 = padding; or the dict of masks that
            `generate` makes for compiled steps.
        x: (B, T, dim), the input.
        cached: True if the call continues from a cache.
    Raises: TypeError or ShapeError for any other mask, such as one of four dimensions.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask[LAYER_TYPE]
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor (batch, length); got attention_mask {shown(attention_mask)}")
    batch, length = x.shape[:2]
    columns = attention_mask.shape[-1] if attention_mask.dim() == 2 else -1
    longer = columns >= length if cached else columns == length
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or not longer:
        want = f"at least {length}, with those in the cache" if cached else length
        raise ShapeError(
            f"attention_mask must be (batch, length) ({batch}, {want}); got {tuple(attention_mask.shape)}; "
            "retention has no pairs of tokens to mask, only padding"
        )
    return attention_mask[:, -length:].bool()


def packed_borders(
    x: Tensor, cu_seq_lens: Tensor | None, position_ids: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """Return the borders of the sequences packed into x, row after row, (N + 1,) int32; None if there are none.

    The arguments are those that `DataCollatorWithFlattening` makes; the first one given counts.

    Args:
        x: (B, T, dim), the input.
        cu_seq_lens: (N + 1,), the borders themselves.
        position_ids: (B, T); a sequence begins where they do not increase by 1.
        seq_idx: (B, T), the number of each token's sequence.

    Compiled code reads only cu_seq_lens, as it cannot search the others for borders.
    """
    if cu_seq_lens is not None:
        return torch.as_tensor(cu_seq_lens, dtype=torch.int32, device=x.device).flatten()
    if torch.compiler.is_compiling() or x.shape[1] < 2:
        return None
    if position_ids is not None:
        starts = position_ids.diff(dim=1) != 1
    elif seq_idx is not None:
        starts = seq_idx.diff(dim=1) != 0
    else:
        return None
    if not starts.any():
        return None
    first = torch.ones_like(starts[:, :1])
    starts = torch.cat([first, starts], dim=1).expand(x.shape[0], -1).flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([x.shape[0] * x.shape[1]])]).int()


def _foreign(x: Tensor) -> bool:
    """Tell whether x was made in inference mode and may not be overwritten now, outside of it."""
    return not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled()
