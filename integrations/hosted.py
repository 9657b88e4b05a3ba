"""The retention that stands where the softmax of an attention layer was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retention.arguments import check_choice
from retention.backends import check_name
from retention.decay import HeadDecay
from retention.functional import retain, step
from retention.layer import ACTIVATIONS, HeadNorm
from retention.state import RetentionState, state_dtype

# The bias at which a gate is 1, or as near as it comes.
_OPEN = {"silu": 1.2784645, "gelu": 1.1444507, "relu": 1.0, "sigmoid": 6.0}


@dataclass(frozen=True)
class Heads:
    """What retention needs to know of an attention layer. dim: of its input; key_dim, value_dim: of one head."""

    dim: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    causal: bool = True


class FeatureMap(nn.Module):
    """A learnable map of each head's q or k to features above 0: softmax of W x and of -W x. W starts as the identity.

    Source: Zhang et al. 2024, arXiv:2402.04347 (Hedgehog).
    """

    def __init__(self, num_heads: int, key_dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, key_dim, key_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, T, K) -> (B, H, T, 2 K)."""
        y = x @ self.weight
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


class HostedRetention(nn.Module):
    """Retention of the q, k and v of an attention layer, at the scale of that layer's output.

    decay, learnable_decay, backend, form, chunk_size: as `MultiScaleRetention`.
    features: True maps q and k by a `FeatureMap` each and divides by the sum of the scores, as a softmax does; False
        takes them as they are and divides by the root mean square of each head.
    gate: "silu", "sigmoid", ... times gate(W x + b), which is 1 at the start; None: no gate.
    grid: where the tokens are an image, decay by the distance in rows plus that in columns; False: along its rows, one
        after another.
    causal: True: each token sees those before it only, an image along its rows; no token may then be without a place.
        None: as the layer does.
    The output of each channel is multiplied by `gain`, 1 at the start.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        decay: Any = "short",
        learnable_decay: bool = True,
        features: bool = True,
        gate: str | None = None,
        grid: bool = True,
        causal: bool | None = None,
        backend: str = "auto",
        form: str = "auto",
        chunk_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.options = dict(
            decay=decay, learnable_decay=learnable_decay, features=features, gate=gate, grid=grid, causal=causal
        )
        check_choice("features", features, (True, False))
        check_choice("gate", gate, (*_OPEN, None))
        check_choice("grid", grid, (True, False))
        check_choice("causal", causal, (True, None))
        check_name(backend)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.causal, self.features = heads.causal or causal is True, features
        self.grid = grid and not self.causal
        self.backend, self.form, self.chunk_size = backend, form, chunk_size
        self.decay = HeadDecay(decay, heads.num_heads, learnable=learnable_decay, **dd)
        self.q_map = FeatureMap(heads.num_heads, heads.key_dim, **dd) if features else nn.Identity()
        self.k_map = FeatureMap(heads.num_kv_heads, heads.key_dim, **dd) if features else nn.Identity()
        self.norm = nn.Identity() if features else HeadNorm(heads.num_heads, heads.value_dim, "rms", False, 1e-6)
        self.gain = nn.Parameter(torch.empty(heads.num_heads, heads.value_dim, **dd))
        self.gate = nn.Linear(heads.dim, heads.num_heads * heads.value_dim, **dd) if gate else None
        self.activation = gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As at the start."""
        self.decay.reset_parameters()
        for features in (self.q_map, self.k_map):
            if isinstance(features, FeatureMap):
                features.reset_parameters()
        nn.init.ones_(self.gain)
        if self.gate is not None and self.activation is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, _OPEN[self.activation])

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: RetentionState | None = None,
        return_state: bool = False,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
    ) -> tuple[Tensor, RetentionState | None]:
        """What the heads gather, (B, T, H, V), and with return_state the state after the last token.

        Shapes: x (B, T, dim), the layer's input; q (B, H, T, K); k, v (B, Hkv, T, K or V); mask (B, T), True = real.
        grid: (rows, columns) of the image that the tokens are, but for the first `prefix`: these stand at no place,
            they see all tokens and are seen by all without decay. For layers that are not causal.
        For one token without gradients, `state` is overwritten.
        """
        if prefix and self.causal:
            raise ValueError(f"causal retention has no tokens without a place; got prefix {prefix}; leave causal out")
        q, k = (z * abs(scale) ** 0.5 for z in (q, k))
        q, k = self.q_map(q), self.k_map(k)
        if self.features:  # the sum of the scores is what values of 1 gather
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        log_decay = self.decay(q.device, state_dtype(q.dtype))
        after: RetentionState | None = state
        if state is not None and q.shape[2] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            out = step(q, k, v, log_decay, state, scale=1.0, mask=mask)
        else:
            found = retain(
                q[:, :, prefix:],
                k[:, :, prefix:],
                v[:, :, prefix:],
                log_decay,
                scale=1.0,
                mask=mask,
                cu_seqlens=cu_seqlens,
                state=state,
                causal=self.causal,
                grid=grid if self.grid else None,
                backend=self.backend,
                form=self.form,
                chunk_size=self.chunk_size,
                return_state=return_state,
            )
            out, after = (found, None) if isinstance(found, Tensor) else found
            out = _with_prefix(q, k, v, prefix, out) if prefix else out
        if self.features:
            out = out[..., :-1] / out[..., -1:].clamp(min=1e-6)
        y = self.norm(out.transpose(1, 2)) * self.gain
        if self.gate is not None and self.activation is not None:
            y = y * ACTIVATIONS[self.activation](self.gate(x)).view_as(y)
        return y, after


def _with_prefix(q: Tensor, k: Tensor, v: Tensor, prefix: int, placed: Tensor) -> Tensor:
    """placed (B, H, T - prefix, V): what the tokens behind the first `prefix` gather from each other. (B, H, T, V)."""
    wide, groups = state_dtype(q.dtype), q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):  # sums over the image
        parts = (x.to(wide).tensor_split((prefix,), dim=2) for x in (k, v))
        first, rest = ((k_i.mT @ v_i).repeat_interleave(groups, dim=1) for k_i, v_i in zip(*parts, strict=True))
        q_first, q_rest = q.to(wide).tensor_split((prefix,), dim=2)
        return torch.cat([q_first @ (first + rest), placed + q_rest @ first], dim=2).to(placed.dtype)
