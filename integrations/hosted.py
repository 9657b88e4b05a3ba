"""The retention that stands where the softmax of an attention layer was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retention.arguments import check_choice
from retention.backends import check_name
from retention.decay import HeadDecay
from retention.functional import retain, step
from retention.layer import ACTIVATIONS, HasBackend, HeadNorm
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


class FeatureMap(nn.Module):
    """A learnable map of each head's q or k to features above 0: softmax of W x and of -W x. W starts as the identity.

    Source: Zhang et al. 2024, arXiv:2402.04347 (Hedgehog).
    """

    def __init__(self, num_heads: int, key_dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(key_dim, device=device, dtype=dtype).repeat(num_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, T, K) -> (B, H, T, 2 K)."""
        y = x @ self.weight
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


class HostedRetention(HasBackend):
    """Retention of the q, k and v of an attention layer, at the scale of that layer's output.

    decay, learnable_decay, backend, form, chunk_size: as `MultiScaleRetention`.
    features: True maps q and k by a `FeatureMap` each and divides by the sum of the scores, as a softmax does; False
        takes them as they are and divides by the root mean square of each head.
    gate: "silu", "sigmoid", ... times gate(W x + b), which is 1 at the start; None: no gate.
    The output of each channel is multiplied by `gain`, 1 at the start. While `calibrating`, it gives the softmax's
    output, and sets the gain of each head to what brings its own to the same root mean square.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        decay: Any = "short",
        learnable_decay: bool = True,
        features: bool = True,
        gate: str | None = None,
        backend: str = "auto",
        form: str = "auto",
        chunk_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_choice("features", features, (True, False))
        check_choice("gate", gate, (*_OPEN, None))
        check_name(backend)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.features, self.calibrating = features, False
        self.backend, self.form, self.chunk_size = backend, form, chunk_size
        self.decay = HeadDecay(decay, heads.num_heads, learnable=learnable_decay, **dd)
        schedule = decay if isinstance(decay, str) else list(self.decay.values)
        self.options = dict(decay=schedule, learnable_decay=learnable_decay, features=features, gate=gate)
        self.q_map = FeatureMap(heads.num_heads, heads.key_dim, **dd) if features else nn.Identity()
        self.k_map = FeatureMap(heads.num_kv_heads, heads.key_dim, **dd) if features else nn.Identity()
        self.norm = nn.Identity() if features else HeadNorm(heads.num_heads, heads.value_dim, "rms", False, 1e-6)
        self.gain = nn.Parameter(torch.ones(heads.num_heads, heads.value_dim, **dd))
        self.gate = nn.Linear(heads.dim, heads.num_heads * heads.value_dim, **dd) if gate else None
        self.activation = gate
        if self.gate is not None and gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, _OPEN[gate])

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
    ) -> tuple[Tensor, RetentionState | None]:
        """What the heads gather, (B, T, H, V), and with return_state the state after the last token.

        Shapes: x (B, T, dim), the layer's input; q (B, H, T, K); k, v (B, Hkv, T, K or V); mask (B, T), True = real.
        For one token without gradients, `state` is overwritten.
        """
        wanted = softmax(q, k, v, scale, causal, mask, cu_seqlens) if self.calibrating else None
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
                q,
                k,
                v,
                log_decay,
                scale=1.0,
                mask=mask,
                cu_seqlens=cu_seqlens,
                state=state,
                causal=causal,
                backend=self.backend,
                form=self.form,
                chunk_size=self.chunk_size,
                return_state=return_state,
            )
            out, after = (found, None) if isinstance(found, Tensor) else found
        if self.features:
            out = out[..., :-1] / out[..., -1:].clamp(min=1e-6)
        y = self.norm(out.transpose(1, 2))
        if wanted is not None:
            self._calibrate(y, wanted)
            return wanted, after
        y = y * self.gain
        if self.gate is not None and self.activation is not None:
            y = y * ACTIVATIONS[self.activation](self.gate(x)).view_as(y)
        return y, after

    @torch.no_grad()
    def _calibrate(self, y: Tensor, wanted: Tensor) -> None:
        have, want = (z.float().square().mean(dim=(0, 1, 3)).sqrt() for z in (y, wanted))
        self.gain.copy_((want / have.clamp(min=1e-6))[:, None].expand_as(self.gain))


def softmax(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """What attention gathers from the same q, k and v, (B, T, H, V). Arguments as `HostedRetention.forward`."""
    length = q.shape[2]
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    if cu_seqlens is not None:
        segment = torch.bucketize(torch.arange(length, device=q.device), cu_seqlens, right=True)
        seen = seen & (segment[:, None] == segment)
    y = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return y.transpose(1, 2)
