"""`HostedRetention`, the module that replaces the softmax of an attention layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from retention.arguments import check_contents, check_places, refuse_torchscript
from retention.backends import FORMS, check_name
from retention.decay import HeadDecay, log_decays
from retention.errors import ShapeError
from retention.former import former_options
from retention.functional import retain, step
from retention.heads import check_heads
from retention.layer import ACTIVATIONS, HasBackend, HeadNorm
from retention.local import local
from retention.options import (
    check_choice,
    check_device,
    check_dtype,
    check_flags,
    check_is,
    check_number,
    check_whole,
    number,
    shown,
)
from retention.sharding import active, refuse
from retention.state import RetentionState, state_dtype

from .adapter import Heads
from .features import FeatureMap
from .window import Rows, Tiles, WindowState, around_part, in_order, real_last, rows, score_of, tiles

__all__ = ["FORMER", "HostedRetention"]

FORMER = {"scales": "num_decays", "grid": "grid_decay"}  # former names of options, and the new ones

_LEAST = 1e-20  # of a sum of scores; unimportant keys that are far away have sums of about 1e-10

# The bias at which a gate is 1, or nearly 1 for the sigmoid.
_OPEN = {"silu": 1.2784645, "gelu": 1.1444507, "relu": 1.0, "sigmoid": 6.0}


class _Call(NamedTuple):
    """The options of a call of `HostedRetention.forward`, checked."""

    scale: float
    causal: bool
    mask: Tensor | None
    cu_seqlens: Tensor | None
    state: RetentionState | None
    return_state: bool
    grid: tuple[int, int] | None
    prefix: int


class HostedRetention(HasBackend):
    """Retention over the q, k and v of an attention layer, scaled to the output of that layer.

        out = gain * norm(sum_s retain(q_map(q)_s, k_map(k)_s, v)) * gate(W x + b)

    The sum goes over the decays of a head. With features, `norm` divides by the sum of the scores, like a softmax;
    without features, it divides by the head's root mean square. `gain` has one value per channel, 1 at the start.

    Args:
        heads: sizes of the layer's heads.
        num_decays: number of decays of each head; the scores of all are added. Default: 2 with features, else 1.
        decay: "paper", "log_linear", "short", or num_decays * num_heads log-decays (natural logarithm per token):
            first the first one of all heads, then the second one of all heads, and so on. Default: "log_linear" with a
            window, since retention then covers what is farther away than the memory of "short"; else "short".
        learnable_decay: train the decays.
        features: True maps q and k by a `FeatureMap` each; False uses them as they are.
        key_importance: learn how much each key counts; see `FeatureMap`. Needs features. Default: as features.
        window: number of the newest tokens, the token itself included, that each token attends to exactly, with the
            layer's own exp(scale q . k). Default None: no window.
        sinks: number of the first tokens of each sequence that all later tokens attend to exactly. Default 0.
            Retention covers the tokens that are neither in the window nor sinks. One sum of scores divides all parts.
            The scores of retention are multiplied by the learnt weight exp(W x + b); at the start, it makes
            uninformative q and k count equally in all parts. The output for a sequence of at most window + sinks tokens
            is that of the original attention, up to gain and gate. Window and sinks need features and causal calls.
        gate: "silu", "gelu", "relu" or "sigmoid" multiplies the output by gate(W x + b), 1 at the start; None: no gate.
        causal: True: each token sees only the tokens before it, in an image along its rows; a call may have no prefix
            tokens then. None: each call decides.
        grid_decay: True: where the tokens form an image, the decay depends on the distance in rows plus that in
            columns; False: on the distance along the rows, one after another. Only for calls that are not causal.
        backend, form, chunk_size: as in `retain`.
        device, dtype: of the parameters.
    Raises: TypeError or ValueError that names the option.
    Example:
        heads = Heads(dim=64, num_heads=4, num_kv_heads=2, key_dim=16, value_dim=16)
        retention = HostedRetention(heads, window=32, sinks=4)
        y, state = retention(x, q, k, v, scale=16**-0.5, return_state=True)  # y (B, T, 4, 16)
    """

    @former_options(FORMER)
    def __init__(
        self,
        heads: Heads,
        *,
        num_decays: int | None = None,
        decay: Any = None,
        learnable_decay: bool = True,
        features: bool = True,
        key_importance: bool | None = None,
        window: int | None = None,
        sinks: int = 0,
        gate: str | None = "silu",
        causal: bool | None = None,
        grid_decay: bool = True,
        backend: str = "auto",
        form: str = "auto",
        chunk_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_is("heads", heads, Heads, "Heads")
        check_flags(features=features, learnable_decay=learnable_decay, grid_decay=grid_decay)
        check_device(device)
        check_dtype(dtype)
        num_decays = (2 if features else 1) if num_decays is None else num_decays
        check_whole("num_decays", num_decays)
        key_importance = features if key_importance is None else key_importance
        check_flags(key_importance=key_importance)
        if key_importance and not features:
            raise ValueError("key_importance needs features=True; got features False, key_importance True")
        check_whole("window", window, optional=True)
        check_whole("chunk_size", chunk_size, optional=True)
        check_whole("sinks", sinks, 0)
        if (window is not None or sinks) and not features:
            given = f"window {window}" if window is not None else f"sinks {sinks}"
            raise ValueError(f"window and sinks need features=True, whose scores have a sum; got {given}")
        check_choice("form", form, (*FORMS, "auto"))
        check_choice("causal", causal, (True, None))
        check_choice("gate", gate, (*_OPEN, None))
        check_name(backend)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.num_decays, self.features = heads, num_decays, features
        self.window, self.sinks, self.causal, self.grid_decay = window, sinks, causal, grid_decay
        self.backend, self.form, self.chunk_size = backend, form, chunk_size
        decay = ("log_linear" if window else "short") if decay is None else decay
        values = log_decays(decay, num_decays * heads.num_heads)
        schedule = decay if isinstance(decay, str) else list(values)
        self.options: dict[str, Any] = dict(
            num_decays=num_decays,
            decay=schedule,
            learnable_decay=learnable_decay,
            features=features,
            key_importance=key_importance,
            window=window,
            sinks=sinks,
            gate=gate,
            causal=causal,
            grid_decay=grid_decay,
        )
        by_rank = torch.tensor(values, dtype=torch.float64, device="cpu")  # the meta device holds no values
        ordered = rearrange(by_rank, "(s n g) -> (n s g)", s=num_decays, n=heads.num_kv_heads)  # the order of `_heads`
        self.decay = HeadDecay(ordered, len(values), learnable=learnable_decay, **dd)
        if features:
            self.q_map = FeatureMap(heads.num_heads, num_decays, heads.key_dim, **dd)
            self.k_map = FeatureMap(heads.num_kv_heads, num_decays, heads.key_dim, importance=key_importance, **dd)
        self.rest = nn.Linear(heads.dim, heads.num_heads, **dd) if window or sinks else None
        self.norm = nn.Identity() if features else HeadNorm(heads.num_heads, heads.value_dim, "rms", False, 1e-6)
        self.gain = nn.Parameter(torch.empty(heads.num_heads, heads.value_dim, **dd))
        self.gate = nn.Linear(heads.dim, heads.num_heads * heads.value_dim, **dd) if gate else None
        self.activation = ACTIVATIONS[gate] if gate else None
        self.reset_parameters()

    def divide_heads(self, processes: int) -> None:
        """Leave the layer the heads of one of `processes` processes, which then pass it their own heads of q, k and v.

        Parameters are not touched.
        Raises: ShapeError for heads that cannot be divided.
        """
        heads = self.heads
        check_heads(processes, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads)
        counts = {name: getattr(heads, name) // processes for name in ("num_heads", "num_kv_heads")}
        self.heads = replace(heads, **counts)

    def state_bytes(self) -> dict[str, int]:
        """Return the memory in bytes of the state of one sequence, for each of its parts.

        Keys and values are counted in the dtype of the parameters.
        """
        heads, dtype = self.heads, self.gain.dtype
        exact = heads.num_kv_heads * (heads.key_dim + heads.value_dim) * dtype.itemsize
        kv = (2 * heads.key_dim, heads.value_dim + 1) if self.features else (heads.key_dim, heads.value_dim)
        return {
            "window": (self.window or 0) * exact,
            "sinks": self.sinks * exact,
            "retention": heads.num_heads * self.num_decays * math.prod(kv) * state_dtype(dtype).itemsize,
        }

    def reset_parameters(self) -> None:
        """Set all parameters to their initial values."""
        self.decay.reset_parameters()
        if self.features:
            self.q_map.reset_parameters()
            self.k_map.reset_parameters()
        if self.rest is not None:
            nn.init.zeros_(self.rest.weight)
            nn.init.constant_(self.rest.bias, math.log(self.num_decays * 2 * self.k_map.weight.shape[-1]))
        nn.init.ones_(self.gain)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, _OPEN[self.options["gate"]])

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool = True,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: RetentionState | None = None,
        return_state: bool = False,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
    ) -> tuple[Tensor, RetentionState | None]:
        """Compute the heads' outputs from the layer's input and its q, k and v.

        Shapes: x (B, T, dim) or an image (B, rows, columns, dim); q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V).
            Returns (B, T, H, V), before the layer's output projection.
        Dtypes: x, q, k, v of any float dtype; the output has the dtype of v; states are float32 at least.
        Args:
            x: the input of the attention layer, read by the gate and the window's weight only.
            scale: factor of q . k in the original attention.
            causal: False: each token also sees later tokens; not with a state.
            mask: (B, T) bool, True = real token.
            cu_seqlens: (N + 1,) int32, borders of N sequences packed into one row (B = 1), as in `retain`.
            state: the state that an earlier call returned. For a single token without gradients, it is updated in
                place.
            return_state: also return the state after the last token.
            grid: (rows, columns) of the image that the tokens after the prefix form, row by row. Only if not causal.
            prefix: number of prefix tokens, such as a class token, in front of the image. They see all tokens and are
                seen by all, without decay. Only if not causal.
        Returns: the output, and the state or None.
        Raises: TypeError, ValueError or ShapeError for arguments that do not fit.
        """
        if torch.jit.is_tracing():
            refuse_torchscript()
        self._check_shapes(x, q, k, v)
        check_number("scale", scale, abs(number(scale)) < math.inf, "finite")
        check_flags(causal=causal, return_state=return_state)
        check_whole("prefix", prefix, 0)
        check_places(q.shape[0], q.shape[2], q.device, mask=mask, cu_seqlens=cu_seqlens)
        check_contents(q.shape[2], mask, cu_seqlens)
        if state is not None:
            check_is("state", state, RetentionState, "a RetentionState, as this layer returned it")
        causal = causal or self.causal is True
        if prefix and causal:
            raise ValueError(f"causal retention has no tokens without a place; got prefix {prefix}; leave causal out")
        if prefix:
            refuse("a prefix token, which sees all tokens,", "split the batch instead")
        if self.rest is not None:
            self._check_exact(causal, state, q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
            if state is not None or cu_seqlens is not None:
                refuse("a state before, or a packed batch, with a window or sinks", "use rows without a state")
        call = _Call(scale, causal, mask, cu_seqlens, state, return_state, grid, prefix)
        after: RetentionState | None
        if self.rest is not None:
            y, after = self._beside_exact(self.rest(x), q, k, v, call)
        else:
            y, after = self._retained(q, k, v, call)
            y = _divided(y) if self.features else y
        y = self.norm(y.transpose(1, 2)).to(v.dtype) * local(self.gain)
        if self.gate is not None and self.activation is not None:
            y = y * self.activation(self.gate(x)).view_as(y)
        return y, after

    def _check_shapes(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        for name, z in (("x", x), ("q", q), ("k", k), ("v", v)):
            if not isinstance(z, Tensor) or not z.is_floating_point():
                raise TypeError(f"{name} must be a tensor of a floating dtype; got {name} {shown(z)}")
        if q.dim() != 4:
            raise ShapeError(f"q must be (batch, heads, length, key_dim); got q {tuple(q.shape)}")
        batch, _, length, _ = q.shape
        heads = self.heads
        shapes = (
            ("q", q, (batch, heads.num_heads, length, heads.key_dim)),
            ("k", k, (batch, heads.num_kv_heads, length, heads.key_dim)),
            ("v", v, (batch, heads.num_kv_heads, length, heads.value_dim)),
        )
        for name, given, wanted in shapes:
            if given.shape != wanted:
                raise ShapeError(
                    f"{name} must be {wanted}, for q {tuple(q.shape)} and {heads}; got {name} {tuple(given.shape)}; "
                    "pass what belongs to the tokens of q, earlier ones are in state"
                )
        reads_x = self.gate is not None or self.rest is not None
        sizes = (batch, heads.dim, batch * length * heads.dim)
        if reads_x and (x.dim() < 2 or (x.shape[0], x.shape[-1], x.numel()) != sizes):
            raise ShapeError(
                f"x must be ({batch}, {length}, {heads.dim}), or an image of as many cells; got x {tuple(x.shape)}"
            )

    def _check_exact(self, causal: bool, state: RetentionState | None, count: int) -> None:
        """Check what a window and sinks need of a call; count: the number of its sequences."""
        if not causal:
            raise ValueError(
                "window and sinks need causal retention; got causal False; leave them out, or pass causal=True"
            )
        if state is None:
            return
        if not isinstance(state, WindowState):
            raise TypeError(f"state must be a WindowState; got {type(state).__name__}; pass what this layer returned")
        heads, kept = self.heads, self.sinks + (self.window or 0)
        shapes = (
            ("time", state.time, (count,)),
            ("keys", state.keys, (count, heads.num_kv_heads, kept, heads.key_dim)),
            ("values", state.values, (count, heads.num_kv_heads, kept, heads.value_dim)),
        )
        for name, x, shape in shapes:
            if not isinstance(x, Tensor) or x.shape != shape:
                got = tuple(x.shape) if isinstance(x, Tensor) else shown(x)
                raise ShapeError(
                    f"state.{name} must be {shape}, for {count} sequences, window {self.window} and sinks "
                    f"{self.sinks}; got state.{name} {got}; pass what this layer returned"
                )

    def _retained(
        self, q: Tensor, k: Tensor, v: Tensor, call: _Call, taken: Tensor | None = None
    ) -> tuple[Tensor, RetentionState | None]:
        """The sums of retention, (B, H, T, V); with features (B, H, T, V + 1), whose last channel is the sum of scores.

        Sums are float32 at least: half precision may not hold a sum, though it holds the quotient of two sums.
        taken (B or 1, T): True for the keys and values that retention takes; default: all.
        """
        kv_heads, prefix, state = k.shape[1], call.prefix, call.state
        q, k, v = self._heads(q, k, v, abs(call.scale) ** 0.5)
        if taken is not None:
            v = v * taken[:, None, :, None]
        wide = state_dtype(q.dtype)
        log_decay = self.decay(q.device, wide)
        after: RetentionState | None = state
        if state is not None and q.shape[2] == 1 and call.cu_seqlens is None and not torch.is_grad_enabled():
            out = step(q, k, v, log_decay, state, scale=1.0, mask=call.mask, out_dtype=wide)
        else:
            found = retain(
                q[:, :, prefix:],
                k[:, :, prefix:],
                v[:, :, prefix:],
                log_decay,
                scale=1.0,
                mask=call.mask,
                out_dtype=wide,
                cu_seqlens=call.cu_seqlens,
                state=state,
                causal=call.causal,
                grid=call.grid if self.grid_decay and not call.causal else None,
                backend=self.backend,
                form=self.form,
                chunk_size=self.chunk_size,
                return_state=call.return_state,
            )
            out, after = (found, None) if isinstance(found, Tensor) else found
            out = _with_prefix(q, k, v, prefix, out) if prefix else out
        return reduce(out, "b (n s g) t v -> b (n g) t v", "sum", n=kv_heads, s=self.num_decays), after

    def _beside_exact(
        self, weight: Tensor, q: Tensor, k: Tensor, v: Tensor, call: _Call
    ) -> tuple[Tensor, WindowState | None]:
        """Attention to the window and the sinks, and retention of the other tokens, (B, H, T, V).

        weight (B, T, H): logarithm of the factor of retention's scores.
        """
        weight, mask, places = rearrange(weight, "b t h -> b h t 1"), call.mask, None
        if mask is not None:  # padding first: a window's tokens are adjacent
            order, places = real_last(mask)
            q, k, v, weight = (in_order(_zero_at_padding(z, mask), order) for z in (q, k, v, weight))
            mask = mask.gather(1, order)
            call = call._replace(mask=mask)
        shard = active()
        before, end = cast("WindowState | None", call.state), None
        sizes = (self.window or 0, self.sinks)
        if shard is not None:
            before, end = around_part(shard, k, v, *sizes, mask)
        if call.cu_seqlens is None:
            exact: Rows | Tiles = rows(k, v, *sizes, mask, before)
        else:
            exact = tiles(k, v, *sizes, call.cu_seqlens, before)
        k, v, taken = exact.leaving()
        sums, after = self._retained(q, k, v, call, taken)
        y, share = exact.attend(q, call.scale, score_of(sums[..., -1:], weight))
        y = torch.addcmul(y, share, _divided(sums)).to(v.dtype)
        if mask is not None and places is not None:
            y = in_order(_zero_at_padding(y, mask), places)
        if after is not None and end is not None:
            return y, WindowState(kv=after.kv, time=after.time, keys=end.keys, values=end.values)
        return y, None if after is None else exact.state(after)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, root: float) -> tuple[Tensor, Tensor, Tensor]:
        """Rearrange attention's heads into retention's: each decay of each key head, with its query heads.

        root: factor of q and of k.
        """
        if self.features:
            q, k = self.q_map(q, root), self.k_map(k, root)
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # ones give the sum of scores
        else:
            q, k = (root * z[:, :, None].expand(-1, -1, self.num_decays, -1, -1) for z in (q, k))
        q = rearrange(q, "b (n g) s t k -> b (n s g) t k", n=k.shape[1])
        return q, rearrange(k, "b n s t k -> b (n s) t k"), repeat(v, "b n t v -> b (n s) t v", s=self.num_decays)


def _zero_at_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Return x (B, H, T, D) with zeros at padding, even where it is NaN; mask (B, T), True = real token."""
    return x.masked_fill(~mask[:, None, :, None], 0)


def _divided(sums: Tensor) -> Tensor:
    """Divide by the sum of scores, which is the last channel; 0 where the sum is 0."""
    return sums[..., :-1] / sums[..., -1:].clamp(min=_LEAST)


def _with_prefix(q: Tensor, k: Tensor, v: Tensor, prefix: int, placed: Tensor) -> Tensor:
    """Add the prefix tokens to `placed` (B, H, T - prefix, V), the output among all other tokens; (B, H, T, V)."""
    wide, groups = state_dtype(q.dtype), q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):  # sums over the image need full precision
        parts = (x.to(wide).tensor_split((prefix,), dim=2) for x in (k, v))
        first, rest = ((k_i.mT @ v_i).repeat_interleave(groups, dim=1) for k_i, v_i in zip(*parts, strict=True))
        q_first, q_rest = q.to(wide).tensor_split((prefix,), dim=2)
        return torch.cat([q_first @ (first + rest), placed + q_rest @ first], dim=2).to(placed.dtype)
