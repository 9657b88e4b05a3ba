"""RetNet, a language model of retention layers: embedding, blocks, final norm, head.

Source: Sun et al. 2023, arXiv:2307.08621, Section 2.3: Y = MSR(LN(X)) + X, X' = FFN(LN(Y)) + Y.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, cast, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .arguments import check_token_ids
from .decoding import stream
from .errors import ShapeError
from .ffn import FeedForward, MixtureOfExperts
from .former import Flags, former_options
from .layer import ACTIVATIONS, ForwardOptions, MultiScaleRetention
from .norm import BACKENDS, NORMS
from .options import (
    check_choice,
    check_device,
    check_dtype,
    check_eps,
    check_factor,
    check_flags,
    check_is,
    check_rates,
    check_whole,
    shown,
)
from .state import RetentionState

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "FORMER",
    "FORMER_FLAGS",
    "PRESETS",
    "BackboneOutput",
    "BlockOutput",
    "DropPath",
    "RetNet",
    "RetNetBackbone",
    "RetNetBlock",
]

# Sizes for RetNet.from_preset. The small presets are for trials on a CPU; `python -m benchmarks quality` compares their
# options. Their heads look back about 2 to 128 tokens, those of the paper 32 and more. The large presets have the
# paper's widths, heads of 256 key and 512 value channels, plain feed-forwards of width 2 dim, decays and norms.
_SMALL: dict[str, Any] = dict(
    num_heads=8,
    retention={"decay": "short", "learnable_decay": True, "rotary": "rope", "init_gain": 1.0},
)
_PAPER: dict[str, Any] = dict(vocab_size=50304, gated=False, norm="layer", retention={"decay": "log_linear"})
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(dim=128, num_layers=4, **_SMALL),
    "small": dict(dim=256, num_layers=6, **_SMALL),
    "medium": dict(dim=512, num_layers=12, **_SMALL),
    "300m": dict(dim=1024, num_layers=24, num_heads=4, **_PAPER),
    "1.3b": dict(dim=2048, num_layers=24, num_heads=8, **_PAPER),
    "2.7b": dict(dim=2560, num_layers=32, num_heads=10, **_PAPER),
    "6.7b": dict(dim=4096, num_layers=32, num_heads=16, **_PAPER),
}


# Former names of options of RetNetBackbone, and the new ones; the new values of those that were flags.
FORMER = {
    "use_glu": "gated",
    "activation_fn": "activation",
    "layernorm_embedding": "norm_embedding",
    "no_scale_embedding": "scale_embedding",
    "moe_freq": "moe_every",
    "moe_expert_count": "moe_num_experts",
    "moe_top1_expert": "moe_top_k",
}
FORMER_FLAGS: Flags = {"no_scale_embedding": {True: False, False: True}, "moe_top1_expert": {True: 1, False: 2}}

# The option `retention` of a model may hold every option of MultiScaleRetention but these.
_OF_THE_MODEL = ("dim", "num_heads", "device", "dtype")
_RETENTION_OPTIONS = tuple(
    name for name in inspect.signature(MultiScaleRetention).parameters if name not in _OF_THE_MODEL
)


class BlockOutput(NamedTuple):
    """The output of a block.

    Attributes:
        hidden: (B, T, dim).
        state: the state of the retention layer, or None.
        aux_loss: the loss that balances the experts, or None without experts.
    """

    hidden: Tensor
    state: RetentionState | None
    aux_loss: Tensor | None


class BackboneOutput(NamedTuple):
    """The output of `RetNetBackbone`; state, layers and scores are None unless asked for.

    Attributes:
        hidden: (B, T, dim), after the final norm.
        state: the state of each block.
        layers: the input of the first block and the output of each, (B, T, dim).
        scores: the retention scores R of each block, (B, num_heads, T, T).
        aux_losses: the loss of each block that balances its experts, None for a block without experts.
    """

    hidden: Tensor
    state: list[RetentionState] | None
    layers: list[Tensor] | None
    scores: list[Tensor] | None
    aux_losses: list[Tensor | None]

    @property
    def aux_loss(self) -> Tensor | None:
        """The mean of aux_losses over the blocks with experts; None if no block has them."""
        losses = [loss for loss in self.aux_losses if loss is not None]
        return torch.stack(losses).mean() if losses else None


class DropPath(nn.Module):
    """Drop a residual branch, in training, for a random part of the sequences, and scale the branch up for the others.

    Shapes: x (B, ...) -> the same.
    Args:
        rate: probability that the branch of a sequence is dropped, at least 0 and below 1.
    Raises: ValueError for another rate.
    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, rate: float):
        super().__init__()
        check_rates(rate=rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the branch of each dropped sequence set to 0 and the others divided by 1 - rate."""
        if self.rate == 0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class RetNetBlock(nn.Module):
    """A residual block of a retention layer and a feed-forward, with norms before both, or after the residual sums.

        norm_before=True:   y = alpha x + retention(norm(x)),    z = alpha y + ffn(norm(y))
        norm_before=False:  y = norm(alpha x + retention(x)),    z = norm(alpha y + ffn(y))

    Shapes: x (B, T, dim) -> z (B, T, dim).
    Args:
        dim, num_heads: width and heads of the retention layer.
        ffn: the feed-forward, a module (..., dim) -> (..., dim), or a `MixtureOfExperts`.
        retention: further options of `MultiScaleRetention` by name.
        norm, norm_eps: "rms" or "layer", and its eps.
        norm_before: False puts the norms after the residual sums.
        alpha: factor of the residual; 1 without DeepNorm.
        dropout: rate after the retention layer, in training.
        drop_path: rate of `DropPath` for both branches.
        device, dtype: of the parameters.
    Raises: ValueError, ShapeError or TypeError that names the option.
    Source: Sun et al. 2023, arXiv:2307.08621, Section 2.3; alpha is from DeepNorm, Wang et al. 2022, arXiv:2203.00555.
    Examples:
        >>> import torch
        >>> from retention.model import RetNetBackbone  # which makes the blocks
        >>> block = RetNetBackbone(dim=16, num_layers=1, num_heads=2).blocks[0]
        >>> block(torch.ones(2, 3, 16)).hidden.shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn: nn.Module,
        retention: dict[str, Any],
        norm: str,
        norm_eps: float,
        norm_before: bool,
        alpha: float,
        dropout: float,
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_whole("dim", dim)
        check_is("ffn", ffn, nn.Module, "an nn.Module")
        check_is("retention", retention, dict, "options of MultiScaleRetention by name")
        if unknown := [name for name in retention if name not in _RETENTION_OPTIONS]:
            names = ", ".join(_RETENTION_OPTIONS)
            raise TypeError(f"retention must hold options of MultiScaleRetention, {names}; got {shown(unknown)}")
        check_choice("norm", norm, NORMS)
        check_eps("norm_eps", norm_eps)
        check_flags(norm_before=norm_before)
        check_factor("alpha", alpha)
        check_rates(dropout=dropout, drop_path=drop_path)
        check_device(device)
        check_dtype(dtype)
        dd = {"device": device, "dtype": dtype}
        self.retention_norm = NORMS[norm](dim, eps=norm_eps, **dd)
        self.retention = MultiScaleRetention(dim, num_heads, **{"dropout": dropout, **retention}, **dd)
        self.ffn_norm = NORMS[norm](dim, eps=norm_eps, **dd)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)
        self.norm_before, self.alpha = norm_before, alpha

    def forward(self, x: Tensor, *, return_state: bool = False, **options: Unpack[ForwardOptions]) -> BlockOutput:
        """Map x (B, T, dim) to the output of the block.

        Args:
            x: (B, T, dim).
            return_state: fill the state of the output.
            options: the further options of `MultiScaleRetention.forward`, by name.
        Returns: a `BlockOutput`.
        Raises: the errors of `MultiScaleRetention.forward`.
        """
        self.retention.check_inputs(x, x, x, return_state=return_state, **options)
        y = self.retention(self.retention_norm(x) if self.norm_before else x, return_state=return_state, **options)
        y, state = (y, None) if isinstance(y, Tensor) else y
        return self._after_retention(x, y, state, options.get("mask"))

    def step(self, x: Tensor, state: RetentionState, **options: Any) -> BlockOutput:
        """Map one token, x (B, 1, dim), and update `state` in place. No gradients in the retention layer.

        Args:
            x, state: as in `MultiScaleRetention.step`.
            options: its further options, by name.
        Returns: a `BlockOutput` with the given state.
        Raises: the errors of `MultiScaleRetention.step`.
        """
        self.retention.check_step_inputs(x, state, **options)
        return self._checked_step(x, state, **options)

    def _checked_step(self, x: Tensor, state: RetentionState, **options: Any) -> BlockOutput:
        """Run `step` for inputs that have been checked."""
        y = self.retention._checked_step(self.retention_norm(x) if self.norm_before else x, state, **options)
        return self._after_retention(x, y, state, options.get("mask"))

    def _after_retention(self, x: Tensor, y: Tensor, state: RetentionState | None, mask: Tensor | None) -> BlockOutput:
        """Add the output y of the retention layer to x, then the output of the feed-forward."""
        x = self._add(x, y, self.retention_norm)
        y = self.ffn_norm(x) if self.norm_before else x
        y, aux_loss = self.ffn(y, mask) if isinstance(self.ffn, MixtureOfExperts) else (self.ffn(y), None)
        return BlockOutput(self._add(x, y, self.ffn_norm), state, aux_loss)

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        """Return alpha x + y, normalised if the norms follow the sums."""
        x = (x if self.alpha == 1 else x * self.alpha) + self.drop_path(y)
        return x if self.norm_before else norm(x)

    def scores(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the scores (B, num_heads, T, T) of the retention layer for x (B, T, dim), the input of the block."""
        self.retention.check_inputs(x, x, x, mask=mask)
        return self.retention.scores(self.retention_norm(x) if self.norm_before else x, mask=mask)


class RetNetBackbone(nn.Module):
    """All layers of a RetNet between the embedding and the head: embeddings in, hidden states out.

    Shapes: x (B, T, dim) -> hidden (B, T, dim).
    Args:
        dim, num_layers, num_heads: width, number of blocks, heads of each block.
        ffn_dim: width inside the feed-forward; default 4/3 dim with a gate (rounded up to a multiple of 16), 2 dim
            without.
        gated, ffn_bias, activation, activate_output, ffn_backend: gated, bias, activation, activate_output and
            backend of `FeedForward`; experts run on "torch" only.
        norm, norm_eps: "rms" or "layer", and its eps, of each sublayer and the final norm.
        norm_before: False puts the norms after the residual sums, without a final norm.
        final_norm: False leaves out the norm after the last block.
        deepnorm: norms after the sums, residuals times (2 num_layers)^(1/4), and smaller initial weights
            (arXiv:2203.00555).
        subln: "rms", "layer" or True (which means "layer") for a norm before fc2 in feed-forwards without a gate
            (arXiv:2210.06423); default False.
        norm_embedding: normalise the embeddings.
        scale_embedding: multiply the embeddings by sqrt(dim), before that norm.
        dropout: rate after the embedding and each sublayer, in training.
        activation_dropout: rate inside the feed-forward, in training.
        drop_path_rate: rate of `DropPath`, which grows from 0 in the first block to this value in the last.
        moe_every: the feed-forward of every moe_every-th block is a mixture of experts; 0: no mixtures.
        moe_num_experts, moe_top_k: num_experts and top_k of `MixtureOfExperts`.
        retention: further options of `MultiScaleRetention`, the same for all blocks, such as {"decay": "log_linear"}.
        device, dtype: of the parameters.
    Raises: ValueError, ShapeError or TypeError that names the option; BackendError if ffn_backend cannot run.
    Source: Sun et al. 2023, arXiv:2307.08621, Section 2.3.
    Examples:
        >>> import torch
        >>> from retention.model import RetNetBackbone
        >>> RetNetBackbone(dim=16, num_layers=2, num_heads=2)(torch.ones(1, 3, 16)).hidden.shape
        torch.Size([1, 3, 16])
    """

    block_class: type[RetNetBlock] = RetNetBlock

    @former_options(FORMER, FORMER_FLAGS)
    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        ffn_dim: int | None = None,
        gated: bool = True,
        ffn_bias: bool = False,
        activation: str = "gelu",
        activate_output: bool = False,
        ffn_backend: str = "torch",
        norm: str = "rms",
        norm_eps: float = 1e-6,
        norm_before: bool = True,
        final_norm: bool = True,
        deepnorm: bool = False,
        subln: bool | str = False,
        norm_embedding: bool = False,
        scale_embedding: bool = False,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        moe_every: int = 0,
        moe_num_experts: int = 0,
        moe_top_k: int = 2,
        retention: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        for name, size in (("dim", dim), ("num_layers", num_layers), ("num_heads", num_heads)):
            check_whole(name, size)
        check_whole("ffn_dim", ffn_dim, optional=True)
        check_flags(gated=gated, ffn_bias=ffn_bias, activate_output=activate_output, norm_before=norm_before)
        check_flags(final_norm=final_norm, deepnorm=deepnorm)
        check_flags(norm_embedding=norm_embedding, scale_embedding=scale_embedding)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("ffn_backend", ffn_backend, BACKENDS)
        check_eps("norm_eps", norm_eps)
        check_rates(dropout=dropout, activation_dropout=activation_dropout, drop_path_rate=drop_path_rate)
        check_is("retention", retention, dict | None, "options of MultiScaleRetention by name, or None")
        check_device(device)
        check_dtype(dtype)
        _check_blocks(gated, norm, deepnorm, subln, moe_every, moe_num_experts, moe_top_k)
        if ffn_backend == "xformers" and (not gated or activation != "silu" or activation_dropout or moe_every):
            raise ValueError(
                "ffn_backend 'xformers' computes a feed-forward with gated=True and activation='silu' alone; got "
                f"gated {gated}, activation {activation!r}, activation_dropout {activation_dropout}, "
                f"moe_every {moe_every}; change them, or use ffn_backend 'torch'"
            )
        if ffn_dim is None:  # the gate does not change the number of parameters: 3 (4/3) dim^2 = 2 (2 dim^2)
            ffn_dim = math.ceil(dim * 4 / 3 / 16) * 16 if gated else 2 * dim

        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_before = norm_before and not deepnorm
        hidden_norm = "layer" if subln is True else subln or None
        init_scale = (8 * num_layers) ** -0.25 if deepnorm else math.log(2 * num_layers) ** 0.5 if subln else 1.0
        inside = {"activation": activation, "dropout": dropout, "activation_dropout": activation_dropout}
        inside |= {"norm_eps": norm_eps, "init_scale": init_scale, "backend": ffn_backend, **dd}
        experts = dict(num_experts=moe_num_experts, top_k=moe_top_k, bias=True, hidden_norm=hidden_norm)
        dense: dict[str, Any] = dict(gated=gated, bias=ffn_bias, activate_output=activate_output)
        dense["hidden_norm"] = None if gated else hidden_norm

        def block(depth: int) -> RetNetBlock:
            mixed = moe_every and (depth + 1) % moe_every == 0
            ffn: Any = MixtureOfExperts if mixed else FeedForward
            return self.block_class(
                dim,
                num_heads,
                ffn=ffn(dim, ffn_dim, **(experts if mixed else dense), **inside),
                retention={"init_scale": init_scale, **(retention or {})},
                norm=norm,
                norm_eps=norm_eps,
                norm_before=norm_before,
                alpha=(2 * num_layers) ** 0.25 if deepnorm else 1.0,
                dropout=dropout,
                drop_path=drop_path_rate * depth / max(num_layers - 1, 1),
                **dd,
            )

        self.blocks = nn.ModuleList(block(depth) for depth in range(num_layers))
        self.embedding_scale = dim**0.5 if scale_embedding else 1.0
        self.embedding_norm = NORMS[norm](dim, eps=norm_eps, **dd) if norm_embedding else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.norm = NORMS[norm](dim, eps=norm_eps, **dd) if final_norm and norm_before else nn.Identity()
        # Gradient checkpointing: the backward pass computes each block again instead of storing its activations.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: list[RetentionState] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        return_layers: bool = False,
        return_scores: bool = False,
        form: str | None = None,
        backend: str | None = None,
    ) -> BackboneOutput:
        """Map the embeddings x (B, T, dim) to hidden states.

        Args:
            x: (B, T, dim).
            state: the states of all blocks from an earlier call, whose sequence x continues.
            mask, cu_seqlens, form, backend: as in `MultiScaleRetention.forward`.
            return_state, return_layers, return_scores: fill state, layers and scores of the output. Scores need the
                parallel form, without state and cu_seqlens.
        Returns: a `BackboneOutput`.
        Raises: ShapeError, ValueError or TypeError that names the argument; BackendError if no backend can run the
            call.
        """
        check_flags(return_state=return_state, return_layers=return_layers, return_scores=return_scores)
        first, *_ = all_layers = self._layers()
        if state is not None:
            self._check_number(state)
        options: dict[str, Any] = dict(mask=mask, cu_seqlens=cu_seqlens, return_state=return_state, backend=backend)
        first.check_inputs(x, x, x, state=None if state is None else state[0], form=form, here=False, **options)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        for layer, before in () if state is None else zip(all_layers, state, strict=True):
            layer.check_state(before, rows, x.dtype)
        if return_scores and (state is not None or cu_seqlens is not None or form not in (None, "auto", "parallel")):
            raise ValueError(
                "scores exist only in the parallel form, without state and cu_seqlens; "
                f"got form {form!r}, state {state and 'given'}, cu_seqlens {cu_seqlens is not None and 'given'}"
            )
        x = self._embedded(x)
        start = None if state is None else state[0]
        options["rotation"] = first.rotation(x, mask=mask, cu_seqlens=cu_seqlens, state=start)  # equal in all layers
        options["form"] = "parallel" if return_scores else form
        layers, scores, states, losses = [x], [], [], []
        for i, block in enumerate(self.blocks):
            if return_scores:
                scores.append(cast(RetNetBlock, block).scores(x, mask=mask))
            x, after, loss = self._run(block, x, state=None if state is None else state[i], **options)
            layers.append(x)
            states.append(after)
            losses.append(loss)
        return BackboneOutput(
            self.norm(x),
            cast(list[RetentionState], states) if return_state else None,
            layers if return_layers else None,
            scores if return_scores else None,
            losses,
        )

    @torch.no_grad()
    def step(self, x: Tensor, state: list[RetentionState], *, mask: Tensor | None = None) -> BackboneOutput:
        """Map one token for each row, as embeddings x (B, 1, dim), and update every state in place. No gradients.

        Args:
            x: (B, 1, dim).
            state: a list of one state for each block.
            mask: (B, 1) bool, True = real token.
        Returns: a `BackboneOutput` with the given states and the layers.
        Raises: ShapeError, ValueError or TypeError that names the argument, before any state changes.
        """
        first, *others = self._layers()
        self._check_number(state)
        first.check_step_inputs(x, state[0], mask=mask)
        for layer, before in zip(others, state[1:], strict=True):  # check all states before any of them changes
            layer.check_state(before, x.shape[0], x.dtype)
        x = self._embedded(x)
        rotation = first.rotation(x, mask=mask, state=state[0])
        layers, losses = [x], []
        for block, before in zip(self.blocks, state, strict=True):
            x, _, loss = cast(RetNetBlock, block)._checked_step(x, before, mask=mask, rotation=rotation)
            layers.append(x)
            losses.append(loss)
        return BackboneOutput(self.norm(x), state, layers, None, losses)

    def _embedded(self, x: Tensor) -> Tensor:
        return self.dropout(self.embedding_norm(x if self.embedding_scale == 1 else x * self.embedding_scale))

    def _layers(self) -> list[MultiScaleRetention]:
        return [cast(RetNetBlock, block).retention for block in self.blocks]

    def _check_number(self, state: Any) -> None:
        check_is("state", state, list | tuple, "a list of one RetentionState per block")
        if len(state) != len(self.blocks):
            raise ValueError(f"state must hold one RetentionState per block, {len(self.blocks)}; got {len(state)}")

    def _run(self, block: nn.Module, x: Tensor, **options: Any) -> BlockOutput:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(partial(block, **options), x)
        return block(x, **options)


class _Options(TypedDict, total=False):
    """The types of the options of `RetNet.forward` but return_state, which decides its result."""

    state: list[RetentionState] | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    form: str | None
    backend: str | None


class RetNet(nn.Module):
    """A language model: token indices in, logits out.

    Shapes: tokens (B, T) int32 or int64 -> logits (B, T, vocab_size).
    Args:
        vocab_size: number of token indices.
        dim: width.
        num_layers: number of blocks.
        num_heads: query heads of each block.
        tie_embeddings: let the head use the weight of the embedding.
        device: of the parameters.
        dtype: of the parameters.
        backbone: the further options of `RetNetBackbone`, by name.
    Raises: ValueError, ShapeError or TypeError that names the option; BackendError if ffn_backend cannot run.
    Source: Sun et al. 2023, arXiv:2307.08621, Section 2.3.
    Examples:
        >>> import torch, retention
        >>> model = retention.RetNet(vocab_size=256, dim=16, num_layers=1, num_heads=2)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 256])
    """

    @former_options(FORMER, FORMER_FLAGS)
    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 256,
        num_layers: int = 6,
        num_heads: int = 4,
        *,
        tie_embeddings: bool = True,
        device: Any = None,
        dtype: Any = None,
        **backbone: Any,
    ):
        super().__init__()
        check_whole("vocab_size", vocab_size)
        check_whole("dim", dim)
        check_flags(tie_embeddings=tie_embeddings)
        check_device(device)
        check_dtype(dtype)
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
        self.backbone = RetNetBackbone(dim, num_layers, num_heads, device=device, dtype=dtype, **backbone)
        self.head = nn.Linear(dim, vocab_size, bias=False, device=device, dtype=dtype)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self._reset_embedding()

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as after `to_empty` has moved the model from the meta device."""
        for module in reversed(list(self.modules())):  # a layer initialises its children after they did themselves
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self._reset_embedding()

    def _reset_embedding(self) -> None:
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=self.embedding.embedding_dim**-0.5)

    @classmethod
    @former_options(FORMER, FORMER_FLAGS)
    def from_preset(cls, preset: str, **changes: Any) -> RetNet:
        """Make a model with the sizes of a preset.

        Args:
            preset: a name in `retention.model.PRESETS`: "tiny", "small", "medium", "300m", "1.3b", "2.7b" or "6.7b".
            changes: options of `RetNet` that replace those of the preset.
        Raises: ValueError for an unknown preset; the errors of `RetNet`.
        Source: Sun et al. 2023, arXiv:2307.08621, for the sizes "1.3b", "2.7b" and "6.7b".
        Examples:
            >>> import retention
            >>> retention.RetNet.from_preset("tiny", num_layers=1).backbone.blocks[0].retention.num_heads
            8
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got preset {shown(preset)}")
        return cls(**{**PRESETS[preset], **changes})

    @overload
    def forward(
        self, tokens: Tensor, *, return_state: Literal[False] = False, **options: Unpack[_Options]
    ) -> Tensor: ...
    @overload
    def forward(
        self, tokens: Tensor, *, return_state: Literal[True], **options: Unpack[_Options]
    ) -> tuple[Tensor, list[RetentionState]]: ...
    @overload
    def forward(
        self, tokens: Tensor, *, return_state: bool, **options: Unpack[_Options]
    ) -> Tensor | tuple[Tensor, list[RetentionState]]: ...
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
    ) -> Tensor | tuple[Tensor, list[RetentionState]]:
        """Return the logits of tokens, and with return_state also the state after the last token.

        Shapes: tokens (B, T); logits (B, T, vocab_size); mask (B, T) bool; cu_seqlens (N + 1,) int32 with B = 1.
        Args:
            tokens: int32 or int64 indices below vocab_size.
            state: the states of all blocks from an earlier call, whose sequence the tokens continue.
            mask: True = real token; padding may stand anywhere.
            cu_seqlens: borders of N sequences that are packed into one row, as in `retain`.
            return_state: return the states too.
            form: of this call; default: that of each layer.
            backend: of this call; default: that of each layer.
        Returns: logits; with return_state, the pair (logits, list of one `RetentionState` per block).
        Raises: ShapeError, ValueError or TypeError that names the argument; BackendError if no backend can run the
            call.
        """
        check_token_ids(tokens, self.vocab_size)
        options: dict[str, Any] = dict(
            mask=mask, cu_seqlens=cu_seqlens, return_state=return_state, form=form, backend=backend
        )
        out = self.backbone(self.embedding(tokens), state=state, **options)
        return (self.head(out.hidden), out.state) if return_state else self.head(out.hidden)

    if TYPE_CHECKING:
        __call__ = forward  # calls of the model have its types

    @torch.no_grad()
    def step(self, tokens: Tensor, state: list[RetentionState], *, mask: Tensor | None = None) -> Tensor:
        """Return the logits (B, 1, vocab_size) of one token for each row, and update every state in place.

        Args:
            tokens: (B, 1) int32 or int64.
            state: a list of one state for each block, from `forward` with return_state=True.
            mask: (B, 1) bool, True = real token.
        Returns: the logits, without gradients.
        Raises: ShapeError, ValueError or TypeError that names the argument, before any state changes.
        """
        check_token_ids(tokens, self.vocab_size)
        if tokens.shape[1] != 1:
            raise ShapeError(f"step takes one token for each row, tokens (batch, 1); got tokens {tuple(tokens.shape)}")
        return self.head(self.backbone.step(self.embedding(tokens), state, mask=mask).hidden)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Return tokens (B, T) followed by `max_new_tokens` new ones, (B, T + max_new_tokens).

        Args:
            tokens: (B, T) int32 or int64, T at least 1.
            max_new_tokens: tokens to add to each row.
            options: temperature, top_k, mask and generator of `retention.decoding.stream`.
        Raises: ShapeError, ValueError or TypeError that names the argument.
        Examples:
            >>> import torch, retention
            >>> model = retention.RetNet(vocab_size=256, dim=16, num_layers=1, num_heads=2)
            >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape
            torch.Size([1, 7])
        """
        check_token_ids(tokens, self.vocab_size)
        return torch.cat([tokens, *stream(self._prompt, self.step, tokens, max_new_tokens, **options)], dim=1)

    def _prompt(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, list[RetentionState]]:
        out = self.backbone(self.embedding(tokens), mask=mask, return_state=True)
        return self.head(out.hidden[:, -1:]), out.state  # decoding needs the logits of the last token only


def _check_blocks(
    gated: bool, norm: str, deepnorm: bool, subln: bool | str, moe_every: int, moe_num_experts: int, moe_top_k: int
) -> None:
    check_choice("norm", norm, NORMS)
    check_choice("subln", subln, (*NORMS, True, False))
    check_whole("moe_every", moe_every, 0)
    check_whole("moe_num_experts", moe_num_experts, 0)
    check_whole("moe_top_k", moe_top_k)
    if deepnorm and subln:
        raise ValueError(f"deepnorm and subln exclude each other; got deepnorm True, subln {subln!r}")
    if subln and gated and not moe_every:
        raise ValueError("subln is a norm in feed-forwards without a gate; pass gated=False, or leave it out")
    if moe_every and moe_num_experts < moe_top_k:
        raise ValueError(
            f"with moe_every, moe_num_experts must be at least moe_top_k; got moe_every {moe_every}, "
            f"moe_num_experts {moe_num_experts}, moe_top_k {moe_top_k}"
        )
