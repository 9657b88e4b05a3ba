"""RetNet, a language model of retention layers: embedding, blocks, final norm, head.

Source: Sun et al. 2023, arXiv:2307.08621, Section 2.3: Y = MSR(LN(X)) + X, X' = FFN(LN(Y)) + Y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ShapeError
from .layer import MultiScaleRetention
from .state import RetentionState

# Sizes for RetNet.from_preset. The small ones are for trials on a CPU, with options chosen by `python -m benchmarks
# quality`: their heads look back some 2 to 128 tokens, the paper's 32 and more. The others are the paper's in width, in
# heads of 256 key and 512 value channels, in a plain feed-forward of width 2 dim, in decays and norms.
_SMALL: dict[str, Any] = dict(
    num_heads=8,
    retention={"decay": "short", "learnable_decay": True, "rotary": "rope", "init_gain": 1.0},
)
_PAPER: dict[str, Any] = dict(vocab_size=50304, gated_ffn=False, norm="layer", retention={"decay": "log_linear"})
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(dim=128, num_layers=4, **_SMALL),
    "small": dict(dim=256, num_layers=6, **_SMALL),
    "medium": dict(dim=512, num_layers=12, **_SMALL),
    "300m": dict(dim=1024, num_layers=24, num_heads=4, **_PAPER),
    "1.3b": dict(dim=2048, num_layers=24, num_heads=8, **_PAPER),
    "2.7b": dict(dim=2560, num_layers=32, num_heads=10, **_PAPER),
    "6.7b": dict(dim=4096, num_layers=32, num_heads=16, **_PAPER),
}
NORMS: dict[str, type[nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x) * gate x), or without the gate fc2(gelu(fc1 x)); no bias."""

    def __init__(
        self, dim: int, hidden_dim: int, *, gated: bool, dropout: float, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        dd = {"bias": False, "device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.gate = nn.Linear(dim, hidden_dim, **dd) if gated else None
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for proj in (self.fc1, self.gate, self.fc2):
            if proj is not None:
                nn.init.xavier_uniform_(proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc1(x))
        if self.gate is not None:
            y = y * self.gate(x)
        return self.dropout(self.fc2(y))


class RetNetBlock(nn.Module):
    """x + retention(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        gated_ffn: bool,
        norm: str,
        norm_eps: float,
        dropout: float,
        retention: dict[str, Any],
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.retention_norm = NORMS[norm](dim, eps=norm_eps, **dd)
        self.retention = MultiScaleRetention(dim, num_heads, **{"dropout": dropout, **retention}, **dd)
        self.ffn_norm = NORMS[norm](dim, eps=norm_eps, **dd)
        self.ffn = FeedForward(dim, ffn_dim, gated=gated_ffn, dropout=dropout, **dd)

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, RetentionState | None]:
        """x (B, T, dim) -> x, and the state if asked for; options as `MultiScaleRetention.forward`."""
        y = self.retention(self.retention_norm(x), **options)
        y, state = y if options.get("return_state") else (y, None)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), state

    def step(self, x: Tensor, state: RetentionState, **options: Any) -> Tensor:
        """x (B, 1, dim) -> x; `state` is updated in place."""
        x = x + self.retention.step(self.retention_norm(x), state, **options)
        return x + self.ffn(self.ffn_norm(x))


class RetNetBackbone(nn.Module):
    """The blocks and the final norm: embeddings in, hidden states out. Arguments as for `RetNet`."""

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        ffn_dim: int | None = None,
        gated_ffn: bool = True,
        norm: str = "rms",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        retention: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}; got norm {norm!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1; got num_layers {num_layers}")
        if ffn_dim is None:  # as many parameters with the gate as without
            ffn_dim = math.ceil(dim * 4 / 3 / 16) * 16 if gated_ffn else 2 * dim
        options: dict[str, Any] = dict(
            gated_ffn=gated_ffn, norm=norm, norm_eps=norm_eps, dropout=dropout, device=device, dtype=dtype
        )
        blocks = (
            RetNetBlock(dim, num_heads, ffn_dim, retention=dict(retention or {}), **options) for _ in range(num_layers)
        )
        self.blocks = nn.ModuleList(blocks)
        self.norm = NORMS[norm](dim, eps=norm_eps, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        state: list[RetentionState] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        form: str | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, list[RetentionState] | None]:
        """x (B, T, dim) -> hidden states (B, T, dim), and with return_state the state of each block."""
        self._check_state(state)
        before = [None] * len(self.blocks) if state is None else state
        options: dict[str, Any] = dict(
            mask=mask, cu_seqlens=cu_seqlens, return_state=return_state, form=form, backend=backend
        )
        options["rotation"] = self._rotation(x, state, mask=mask, cu_seqlens=cu_seqlens)
        after = []
        for block, block_state in zip(self.blocks, before, strict=True):
            x, new = block(x, state=block_state, **options)
            after.append(new)
        return self.norm(x), after if return_state else None

    @torch.no_grad()
    def step(self, x: Tensor, state: list[RetentionState], *, mask: Tensor | None = None) -> Tensor:
        """One token, x (B, 1, dim) -> (B, 1, dim); every state is updated in place."""
        self._check_state(state)
        rotation = self._rotation(x, state, mask=mask)
        for block, block_state in zip(self.blocks, state, strict=True):
            x = cast(RetNetBlock, block).step(x, block_state, mask=mask, rotation=rotation)
        return self.norm(x)

    def _rotation(
        self, x: Tensor, state: list[RetentionState] | None, **places: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The same for all blocks."""
        first = cast(RetNetBlock, self.blocks[0]).retention
        return first.rotation(x, state=None if state is None else state[0], **places)

    def _check_state(self, state: list[RetentionState] | None) -> None:
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state must hold one RetentionState per block, {len(self.blocks)}; got {len(state)}")


class RetNet(nn.Module):
    """A language model: token indices (B, T) in, logits (B, T, vocab_size) out.

    Args:
        dim, num_layers, num_heads: width, blocks, heads in each.
        ffn_dim: inner width of the feed-forward; default 4/3 dim with gate (rounded up to 16), 2 dim without.
        gated_ffn: fc2(gelu(fc1 x) * gate x) instead of fc2(gelu(fc1 x)).
        norm, norm_eps: "rms" or "layer", before each sublayer and at the end.
        tie_embeddings: the head uses the embedding's weight.
        dropout: of the embedding and of each sublayer's output, in training.
        retention: further options of `MultiScaleRetention`, the same for all blocks, e.g. {"decay": "log_linear"}.
    Raises: ValueError or ShapeError that names the option.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 256,
        num_layers: int = 6,
        num_heads: int = 4,
        *,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **backbone: Any,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.backbone = RetNetBackbone(
            dim, num_layers, num_heads, dropout=dropout, device=device, dtype=dtype, **backbone
        )
        self.head = nn.Linear(dim, vocab_size, bias=False, device=device, dtype=dtype)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=dim**-0.5)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> RetNet:
        """A model of the sizes in `PRESETS`, with any option changed. Raises: ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got preset {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def forward(
        self,
        tokens: Tensor,
        *,
        state: list[RetentionState] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        form: str | None = None,
        backend: str | None = None,
    ) -> Any:
        """Logits (B, T, vocab_size) of tokens (B, T); with return_state, also one state for each block.

        The options are those of `MultiScaleRetention.forward`.
        """
        if tokens.dim() != 2:
            raise ShapeError(f"tokens must be (batch, length); got tokens {tuple(tokens.shape)}")
        options: dict[str, Any] = dict(
            mask=mask, cu_seqlens=cu_seqlens, return_state=return_state, form=form, backend=backend
        )
        x, new = self.backbone(self.dropout(self.embedding(tokens)), state=state, **options)
        return (self.head(x), new) if return_state else self.head(x)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: list[RetentionState], *, mask: Tensor | None = None) -> Tensor:
        """Logits (B, 1, vocab_size) of one token for each row, tokens (B, 1); every state is updated in place."""
        return self.head(self.backbone.step(self.embedding(tokens), state, mask=mask))

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """tokens (B, T) and what follows, (B, T + max_new_tokens). Options as `stream`."""
        return torch.cat([tokens, *stream(self._prompt, self.step, tokens, max_new_tokens, **options)], dim=1)

    def _prompt(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, list[RetentionState]]:
        x, state = self.backbone(self.embedding(tokens), mask=mask, return_state=True)
        return self.head(x[:, -1:]), state  # the other logits are not needed


@torch.inference_mode()
def stream(
    prompt: Callable[[Tensor, Tensor | None], tuple[Tensor, list[RetentionState]]],
    step: Callable[[Tensor, list[RetentionState]], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens (B, 1) that follow `tokens` (B, T): the prompt in one pass, then one token at a time.

    prompt: tokens (B, T) and mask to the last token's logits (B, 1, vocab_size) and the state.
    step: tokens (B, 1) and state, to be updated in place, to logits (B, 1, vocab_size).
    temperature: 0 takes the likeliest token. top_k: draw among the likeliest k only. mask: (B, T), for padded prompts,
    whose last column must be real. generator: where the chance comes from.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ShapeError(f"tokens must be (batch, length) with at least one token; got tokens {tuple(tokens.shape)}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0; got temperature {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got top_k {top_k}")
    if mask is not None and not mask[:, -1].all():
        raise ValueError("the last column of mask must be real tokens; got padding there; pad prompts on the left")
    logits, state = prompt(tokens, mask)
    for n in range(max_new_tokens):
        new = _pick(logits[:, -1], temperature, top_k, generator)
        yield new
        if n + 1 < max_new_tokens:
            logits = step(new, state)


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token (B, 1) from logits (B, vocab_size)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
