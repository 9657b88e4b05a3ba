"""MultiScaleRetention, the layer that takes the place of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends
from .arguments import (
    check_contents,
    check_form,
    check_input,
    check_places,
    check_state,
    described,
    refuse_torchscript,
    weight_of,
)
from .call import FORMS, Inputs, Options, ScoreNorm
from .decay import HeadDecay
from .errors import ShapeError
from .functional import initial_state, retain, scores, stepped
from .norm import HEAD_NORMS, HeadNorm
from .options import (
    check_choice,
    check_device,
    check_dtype,
    check_eps,
    check_factor,
    check_flags,
    check_is,
    check_number,
    check_rates,
    check_whole,
    number,
)
from .rotary import frequencies, pair_decays, rotation, rotation_table, turned
from .sharding import active
from .state import RetentionState, state_dtype
from .times import token_times

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ACTIVATIONS", "GATED_AT_ONCE", "ForwardOptions", "HasBackend", "MultiScaleRetention", "set_backend"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}
GATED_AT_ONCE = 2**18  # elements, on CPU without gradients: 10 % faster from 2048 tokens on


class ForwardOptions(TypedDict, total=False):
    """The types of the options of `MultiScaleRetention.forward` but return_state, which decides its result."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    state: RetentionState | None
    grid: tuple[int, int] | None
    rotation: Tensor | None
    form: str | None
    backend: str | None


class HasBackend(nn.Module):
    """A module that computes retention itself.

    Attributes:
        backend, form: as in `retain`; `set_backend` sets both.
    """

    backend: str
    form: str

    def __prepare_scriptable__(self) -> None:
        """Refuse `torch.jit.script`, which asks for this first. Raises: TypeError that names torch.export."""
        refuse_torchscript()


class MultiScaleRetention(HasBackend):
    """Multi-scale retention: projections, rotation, retention, norm of each head, gate, output projection.

        y = (gate(x W_g) * norm(retain(rotate(x W_q), rotate(x W_k), x W_v))) W_o

    Shapes: x (B, T, dim) -> y (B, T, dim). The state is (B, num_heads, key_dim / num_heads, value_dim / num_heads) at
        any length; with "xpos" it is (B, num_heads * P, 2, value_dim / num_heads) for P = key_dim / num_heads / 2
        pairs.
    Dtypes: x has the dtype of the weights, or any under autocast; decays, angles and states are float32, or float64 for
        float64 inputs.
    Args:
        dim: width of input and output.
        num_heads: query heads, each with its own decay.
        num_kv_heads: key and value heads; divides num_heads; default num_heads.
        key_dim: total width of q over all heads; default dim, as in the paper.
        value_dim: total width of the outputs of all heads; default 2 dim, as in the paper.
        decay: "paper", "log_linear", "short", or num_heads log-decays; see `retention.decay`.
        learnable_decay: train the decay; see `retention.decay.HeadDecay`.
        rotary: "paper", "rope", "xpos" or None; see `retention.rotary`. With "xpos" each pair of channels has its own
            decay, which multiplies the cost of retention by key_dim / num_heads / 2.
        interleaved: whether neighbouring channels form the pairs that are rotated; see `retention.rotary.rotate`.
        scale: factor of q . k; default 1 / sqrt(key_dim / num_heads).
        bias: give all five projections a bias.
        gate: "silu", "gelu", "relu", "sigmoid" or None.
        norm: "group" or "rms", the kind of the `HeadNorm` that follows retention; None: no norm.
        norm_affine: False, "shared" or "channel", the weights of that norm.
        norm_eps: its eps.
        causal: False, for encoders, gives gamma^|distance| and no state.
        decay_norm: a normaliser of the paper, see `retain`; a norm cancels it but for its eps.
        score_norm: the other normaliser of the paper, likewise.
        dropout: rate of dropout of the output, in training.
        init_gain: gain of the Xavier initialisation of all projections but the last, whose gain is 1/2; the default is
            that of the authors' code, for deep models.
        init_scale: further factor for v_proj and out_proj, as in DeepNorm.
        backend: of `forward`, as in `retain`; the attribute may be changed later. `step` always uses "auto".
        form: of `forward`, as in `retain`; the attribute may be changed later.
        chunk_size: of `forward`, as in `retain`; the attribute may be changed later.
        device: of the parameters.
        dtype: of the parameters.
    Raises: ValueError, ShapeError or TypeError that names the option.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 8. Decays and angles are not buffers but come from Python
        numbers, so `.to(bfloat16)`, a checkpoint or the meta device cannot change them.
    Examples:
        >>> import torch, retention
        >>> layer = retention.MultiScaleRetention(dim=16, num_heads=2)
        >>> y, state = layer(torch.ones(1, 5, 16), return_state=True)  # five tokens
        >>> y.shape, layer.step(torch.ones(1, 1, 16), state).shape  # and one more
        (torch.Size([1, 5, 16]), torch.Size([1, 1, 16]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        decay: str | Tensor | Sequence[float] = "paper",
        learnable_decay: bool = False,
        rotary: str | None = "paper",
        interleaved: bool = True,
        scale: float | None = None,
        bias: bool = False,
        gate: str | None = "silu",
        norm: str | None = "group",
        norm_affine: bool | str = False,
        norm_eps: float = 1e-6,
        causal: bool = True,
        decay_norm: bool = False,
        score_norm: ScoreNorm = False,
        dropout: float = 0.0,
        init_gain: float = 2**-2.5,
        init_scale: float = 1.0,
        backend: str = "auto",
        form: str = "auto",
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole("dim", dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        key_dim = dim if key_dim is None else key_dim
        value_dim = 2 * dim if value_dim is None else value_dim
        _check_sizes(num_heads=num_heads, num_kv_heads=num_kv_heads, key_dim=key_dim, value_dim=value_dim)
        check_choice("gate", gate, (*ACTIVATIONS, None))
        check_choice("norm", norm, (*HEAD_NORMS, None))
        check_choice("norm_affine", norm_affine, (False, "shared", "channel"))
        check_choice("score_norm", score_norm, (False, True, "absolute"))
        check_choice("form", form, (*FORMS, "auto"))
        check_flags(learnable_decay=learnable_decay, interleaved=interleaved, bias=bias)
        check_flags(causal=causal, decay_norm=decay_norm)
        check_rates(dropout=dropout)
        check_eps("norm_eps", norm_eps)
        check_factor("init_gain", init_gain)
        check_factor("init_scale", init_scale)
        check_number("scale", scale, scale is None or abs(number(scale)) < math.inf, "finite, or None")
        check_whole("chunk_size", chunk_size, optional=True)
        check_device(device)
        check_dtype(dtype)
        if rotary == "xpos" and (decay_norm or score_norm):
            raise ValueError("decay_norm and score_norm are sums over whole heads, which rotary 'xpos' has not")
        if not causal and form == "recurrent":
            raise ValueError("the recurrent form is causal; got causal False, form 'recurrent'")
        if score_norm == "absolute" and form not in ("auto", "parallel"):
            raise ValueError(f"score_norm 'absolute' exists only in the parallel form; got form {form!r}")
        backends.check_name(backend)

        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        self.head_key_dim, self.head_value_dim = key_dim // num_heads, value_dim // num_heads
        self.freqs = None if rotary is None else frequencies(rotary, self.head_key_dim)
        self.pairs = self.head_key_dim // 2 if rotary == "xpos" else 1  # pairs of channels with their own decays
        self.interleaved, self.causal = interleaved, causal
        self.scale = self.head_key_dim**-0.5 if scale is None else scale
        self.decay_norm, self.score_norm = decay_norm, score_norm
        self.init_gain, self.init_scale = init_gain, init_scale
        self.backend, self.form, self.chunk_size = backend, form, chunk_size

        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        pairs = pair_decays(self.head_key_dim) if rotary == "xpos" else None
        self.decay = HeadDecay(decay, num_heads, learnable=learnable_decay, pairs=pairs, **dd)
        self.q_proj = nn.Linear(dim, key_dim, bias, **dd)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_key_dim, bias, **dd)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_value_dim, bias, **dd)
        self.g_proj = nn.Linear(dim, value_dim, bias, **dd) if gate else None
        self.out_proj = nn.Linear(value_dim, dim, bias, **dd)
        self.gate_activation = ACTIVATIONS[gate] if gate else None
        self.norm = (
            HeadNorm(num_heads, self.head_value_dim, norm, norm_affine, norm_eps, **dd) if norm else nn.Identity()
        )
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections again, as the authors' code does, and reset biases, norms and decays."""
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.out_proj):
            if proj is not None:
                gain = 0.5 if proj is self.out_proj else self.init_gain
                scale = self.init_scale if proj is self.out_proj or proj is self.v_proj else 1.0
                nn.init.xavier_uniform_(proj.weight, gain * scale)
                if proj.bias is not None:
                    nn.init.zeros_(proj.bias)
        if isinstance(self.norm, HeadNorm):
            self.norm.reset_parameters()
        self.decay.reset_parameters()

    @overload
    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        return_state: Literal[False] = False,
        **options: Unpack[ForwardOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        return_state: Literal[True],
        **options: Unpack[ForwardOptions],
    ) -> tuple[Tensor, RetentionState]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        return_state: bool,
        **options: Unpack[ForwardOptions],
    ) -> Tensor | tuple[Tensor, RetentionState]: ...
    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: RetentionState | None = None,
        return_state: bool = False,
        grid: tuple[int, int] | None = None,
        rotation: Tensor | None = None,
        form: str | None = None,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, RetentionState]:
        """Compute retention of the tokens of x; with `state`, x continues the sequence of the state.

        Shapes: x, key and value (B, T, dim); mask (B, T) bool; cu_seqlens (N + 1,) int32 with B = 1; y (B, T, dim).
        Args:
            x: input of the queries and the gate.
            key: input of the keys; default: x.
            value: input of the values; default: key.
            mask: True = real token; padding may stand anywhere.
            cu_seqlens: borders of N sequences that are packed into one row, as in `retain`.
            state: the state that an earlier call returned; default: the beginning of a sequence.
            return_state: return the state after the last token too.
            grid: (rows, columns) of the image whose cells are the tokens, row by row, as in `retain`; needs
                causal=False. Rotary positions still count the tokens one by one.
            rotation: the result of `self.rotation`, so that many layers can share it; default: computed here.
            form: of this call; default: that of the layer.
            backend: of this call; default: that of the layer.
        Returns: y; with return_state, the pair (y, state).
        Raises: ShapeError, ValueError or TypeError that names the argument; BackendError if no backend can run the
            call.
        """
        key = x if key is None else key
        value = key if value is None else value
        self.check_inputs(
            x,
            key,
            value,
            mask=mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            grid=grid,
            rotation=rotation,
            form=form,
            backend=backend,
        )
        if rotation is None:
            rotation = self._rotation(x, mask=mask, cu_seqlens=cu_seqlens, state=state)
        q, k, v = self._project(x, key, value, rotation)
        retained = retain(
            q,
            k,
            v,
            self.decay(q.device, state_dtype(q.dtype)),
            scale=self.scale,
            mask=mask,
            decay_norm=self.decay_norm,
            score_norm=self.score_norm,
            out_dtype=self._sum_dtype(v),
            state=state,
            cu_seqlens=cu_seqlens,
            causal=self.causal,
            grid=grid,
            chunk_size=self.chunk_size,
            backend=backend or self.backend,
            form=form or self.form,
            return_state=return_state,
        )
        if isinstance(retained, Tensor):
            return self._output(retained, x, v.dtype)
        out, new = retained
        return self._output(out, x, v.dtype), new

    if TYPE_CHECKING:
        __call__ = forward  # calls of the layer have its types

    def step(
        self, x: Tensor, state: RetentionState, *, mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """Decode one token and update `state` in place, at a cost that does not depend on the position. No gradients.

        Shapes: x (B, 1, dim) -> y (B, 1, dim).
        Args:
            x: input of one token for each row.
            state: the state before the token, from `forward` or `initial_state`; it is overwritten.
            mask: (B, 1) bool, True = real token. A row with padding keeps its state.
            rotation: as in `forward`.
        Returns: y.
        Raises: ValueError if the layer is not causal; ShapeError, ValueError or TypeError for inputs that do not fit.
        Source: Sun et al. 2023, arXiv:2307.08621, Eq. 6.
        """
        self.check_step_inputs(x, state, mask=mask, rotation=rotation)
        return self._checked_step(x, state, mask=mask, rotation=rotation)

    def _checked_step(
        self, x: Tensor, state: RetentionState, *, mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """Run `step` without its checks, for a caller that has checked the inputs of all its layers."""
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():  # entering no_grad takes 3 % of a step
            if rotation is None:
                rotation = self._rotation(x, mask=mask, state=state)
            q, k, v = self._project(x, x, x, rotation)
            inputs = Inputs(q, k, v, self.decay(q.device, state_dtype(q.dtype)), state, mask)
            options = Options(
                scale=self.scale,
                decay_norm=self.decay_norm,
                score_norm=self.score_norm,
                out_dtype=self._sum_dtype(v),
                form="recurrent",
                in_place=True,
            )
            return self._output(stepped(described(inputs, options), inputs, options), x, v.dtype)

    def scores(self, x: Tensor, *, mask: Tensor | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the retention scores R by which the parallel form weighs the values, (B, num_heads, T, T).

        They are for inspection: their memory grows with T^2.

        Args:
            x: (B, T, dim).
            mask: (B, T) bool, True = real token.
            grid: as in `forward`.
        Raises: ShapeError, ValueError or TypeError that names the argument.
        Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5.
        """
        self.check_inputs(x, x, x, mask=mask, grid=grid)
        q, k, _ = self._project(x, x, x, self._rotation(x, mask=mask))
        log_decay = self.decay(q.device, state_dtype(q.dtype))
        options: dict[str, Any] = dict(decay_norm=self.decay_norm, score_norm=self.score_norm, grid=grid)
        found = scores(q, k, log_decay, scale=self.scale, mask=mask, causal=self.causal, **options)
        return found if self.pairs == 1 else reduce(found, "b (h p) n m -> b h n m", "sum", h=self.num_heads)

    def initial_state(self, batch: int) -> RetentionState:
        """Make the state before the first token of `batch` rows, for `step`. Raises: ValueError unless causal."""
        self._check_causal()
        check_whole("batch", batch, 0)
        device, dtype = _place(self.q_proj)
        options: dict[str, Any] = dict(device=device, dtype=state_dtype(dtype))
        return initial_state(batch, *self._state_shape(), score_norm=bool(self.score_norm), **options)

    def rotation(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: RetentionState | None = None,
    ) -> Tensor | None:
        """Return the cosines and sines for the tokens of x, which `forward` takes as `rotation`; None without rotary.

        Shapes: x (B, T, dim); mask (B, T); cu_seqlens (N + 1,). Returns (T, key_dim / num_heads / 2, 2), or with a
            mask, segments or a state (B or 1, 1, T, key_dim / num_heads / 2, 2).
        Raises: ShapeError, ValueError or TypeError that names the argument.
        """
        self.check_inputs(x, x, x, mask=mask, cu_seqlens=cu_seqlens, state=state, here=False)
        return self._rotation(x, mask=mask, cu_seqlens=cu_seqlens, state=state)

    def _rotation(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: RetentionState | None = None,
    ) -> Tensor | None:
        if self.freqs is None:
            return None
        if mask is None and cu_seqlens is None and state is None and active() is None:
            return rotation_table(x.shape[1], self.freqs, x.device, state_dtype(x.dtype))
        times = token_times(x.shape[0], x.shape[1], x.device, state, mask, cu_seqlens)
        return rotation(times.unsqueeze(1), self.freqs, state_dtype(x.dtype))

    def _project(self, x: Tensor, key: Tensor, value: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated q, k and v, (B, heads, T, D); with "xpos" each pair of channels is a head."""
        q, k, v = self.q_proj(x), self.k_proj(key), self.v_proj(value)
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (z.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2) for z in (k, v))
        if rotation is not None:
            q, k = (turned(z, rotation, self.interleaved) for z in (q, k))
        if self.pairs > 1:
            return self._heads_of_pairs(q, k, v)
        return q, k, v

    def _heads_of_pairs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make each pair of channels a head, since a head has one decay; their outputs add up to that of the head."""
        pattern = "b h t (p c) -> b (h p) t c" if self.interleaved else "b h t (c p) -> b (h p) t c"
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        q, k = (rearrange(z, pattern, c=2) for z in (q, k))
        return q, k, v.repeat_interleave(q.shape[1] // self.num_kv_heads, dim=1)

    def _sum_dtype(self, v: Tensor) -> torch.dtype:
        """Return the dtype of the output of retention: its sums may exceed half precision until a norm follows."""
        return state_dtype(v.dtype) if self.pairs > 1 or isinstance(self.norm, HeadNorm) else v.dtype

    def _output(self, out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum out (B, num_heads * pairs, T, D) over pairs, norm, gate and project it to y (B, T, dim), in `dtype`."""
        if self.pairs > 1:
            out = reduce(out, "b (h p) t d -> b h t d", "sum", h=self.num_heads)
        y = self.out_proj(self._gated(out.transpose(1, 2), x, dtype).flatten(2))
        return y if self.dropout is None else self.dropout(y)

    def _gated(self, out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return gate(x W_g) * norm(out), (B, T, num_heads, value_dim / num_heads), in `dtype`."""
        if self.gate_activation is None or self.g_proj is None:
            return self.norm(out).to(dtype)
        gate = self.g_proj(x).view_as(out)
        few = out.numel() <= GATED_AT_ONCE
        if few or torch.is_grad_enabled() or torch.compiler.is_compiling() or out.device.type != "cpu":
            return (self.gate_activation(gate) * self.norm(out)).to(dtype)
        # A part of the tokens at a time, written over `out`: the intermediate results stay in the processor's cache.
        gated = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
        tokens = max(1, GATED_AT_ONCE * out.shape[1] // out.numel())
        for parts in zip(*(z.split(tokens, dim=1) for z in (out, gate, gated)), strict=True):
            out_i, gate_i, gated_i = parts
            torch.mul(self.gate_activation(gate_i), self.norm(out_i), out=gated_i)
        return gated

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError("a state needs causal retention; this layer has causal=False; use forward without a state")

    def check_inputs(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        return_state: bool = False,
        here: bool = True,
        **options: Unpack[ForwardOptions],
    ) -> None:
        """Check the inputs of `forward`. Raises: ShapeError, ValueError or TypeError that names the argument.

        here: whether x must have the device and dtype of the weights; False if a hook may still move x there.
        """
        self._check_tensors(x, key, value, here)
        check_flags(return_state=return_state)
        mask, cu_seqlens, state = options.get("mask"), options.get("cu_seqlens"), options.get("state")
        grid, rotation = options.get("grid"), options.get("rotation")
        form, backend = options.get("form"), options.get("backend")
        if form is not None:
            check_form(form)
        if backend is not None:
            backends.check_name(backend)
        if state is not None or return_state:
            self._check_causal()
        check_places(x.shape[0], x.shape[1], x.device, mask=mask, cu_seqlens=cu_seqlens, grid=grid, causal=self.causal)
        if state is not None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            self.check_state(state, rows, x.dtype, x.device)
        if rotation is None:
            check_contents(x.shape[1], mask, cu_seqlens)
        else:  # `rotation` has checked the values
            self._check_rotation(rotation, x.shape[1])

    def check_step_inputs(
        self, x: Tensor, state: RetentionState, *, mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> None:
        """Check the inputs of `step`. Raises: ShapeError, ValueError or TypeError that names the argument."""
        self._check_causal()
        self._check_tensors(x, x, x)
        if x.shape[1] != 1:
            raise ShapeError(f"step takes one token, x (batch, 1, dim {self.dim}); got x {tuple(x.shape)}; use forward")
        if mask is not None:
            check_places(x.shape[0], 1, x.device, mask=mask)
        self.check_state(state, x.shape[0], x.dtype, x.device)
        if rotation is not None:
            self._check_rotation(rotation, 1)

    def _check_tensors(self, x: Tensor, key: Tensor, value: Tensor, here: bool = True) -> None:
        check_input("x", x, self.dim, weight_of(self.q_proj) if here else None)
        if x is key is value:
            return
        for name, z in (("key", key), ("value", value)):
            check_input(name, z, self.dim)
            if z.shape != x.shape:
                raise ShapeError(
                    f"x, key and value must agree in (batch, length); got x {tuple(x.shape)}, {name} {tuple(z.shape)}"
                )
            if z.dtype != x.dtype or z.device != x.device:
                raise TypeError(f"{name} must be {x.dtype} on {x.device}, as x is; got {name} {z.dtype} on {z.device}")

    def check_state(
        self, state: RetentionState, rows: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        """Check a state for `rows` sequences and inputs of `dtype` on `device`, where None is any device.

        Raises: ShapeError, ValueError or TypeError that names the part of the state.
        """
        check_state(state, (rows, *self._state_shape()), dtype, device, self.score_norm)

    def _check_rotation(self, rotation: Tensor, length: int) -> None:
        if self.freqs is None:
            raise ValueError("rotation must be None for a layer with rotary=None; got one")
        check_is("rotation", rotation, Tensor, "a tensor, as `rotation` of the layer returns it")
        shape = (length, len(self.freqs), 2)
        if rotation.shape[-3:] != shape:
            raise ShapeError(f"rotation must be (..., length, pairs, 2) {shape}; got rotation {tuple(rotation.shape)}")

    def _state_shape(self) -> tuple[int, int, int]:
        """Return the shape of kv for one row."""
        return self.num_heads * self.pairs, self.head_key_dim // self.pairs, self.head_value_dim

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, key_dim={self.key_dim}, "
            f"value_dim={self.value_dim}, causal={self.causal}, backend={self.backend!r}, form={self.form!r}"
        )


def set_backend(model: nn.Module, backend: str = "auto", form: str = "auto") -> nn.Module:
    """Set the backend and the form of `forward` for every module in `model` that computes retention; return the model.

    Args:
        model: it is changed in place.
        backend: "auto" or a registered name, as in `retain`.
        form: "auto", "parallel", "chunkwise" or "recurrent".
    Raises: TypeError unless model is an nn.Module; ValueError for unknown names.
    Examples:
        >>> import retention
        >>> model = retention.set_backend(retention.RetNet(dim=16, num_layers=1), "eager", "recurrent")
        >>> model.backbone.blocks[0].retention.form
        'recurrent'
    """
    check_is("model", model, nn.Module, "an nn.Module")
    backends.check_name(backend)
    check_choice("form", form, (*FORMS, "auto"))
    for module in model.modules():
        if isinstance(module, HasBackend):
            module.backend, module.form = backend, form
    return model


def _place(module: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Return the device and the floating dtype of a module's tensors; float32 if no tensor is floating.

    A quantised layer may hold integers, or no parameter at all, in place of a weight.
    """
    tensors = [*module.parameters(), *module.buffers()]
    floating = (x.dtype for x in tensors if x.is_floating_point())
    return tensors[0].device if tensors else None, next(floating, torch.float32)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_whole(name, size)
    heads = sizes["num_heads"]
    for name in ("key_dim", "value_dim"):
        if sizes[name] % heads:
            raise ShapeError(f"num_heads must divide {name}; got num_heads {heads}, {name} {sizes[name]}")
    if heads % sizes["num_kv_heads"]:
        raise ShapeError(
            f"num_kv_heads must divide num_heads; got num_kv_heads {sizes['num_kv_heads']}, num_heads {heads}"
        )
