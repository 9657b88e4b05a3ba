"""torchscale's RetNet on this library's blocks: code written for torchscale only changes its import.

    from retention.integrations.torchscale import RetNetConfig, RetNetDecoder

The results and the names in the state dict are those of torchscale 0.3.0, so checkpoints can be exchanged in both
directions. Needs torch only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

from torch import Tensor, nn

from retention.arguments import check_input, check_token_ids
from retention.layer import MultiScaleRetention
from retention.model import RetNetBackbone
from retention.options import check_eps, check_flags, check_is, check_rates, check_whole
from retention.state import RetentionState

from .formats import TORCHSCALE, constants, same

__all__ = ["ACTIVATIONS", "RetNetConfig", "RetNetDecoder"]

_ABSENT = ("multiway", "use_xmoe", "xpos_rel_pos", "rel_pos_buckets", "max_rel_pos", "fsdp")
_RATES = ("dropout", "activation_dropout", "drop_path_rate")
_SAME_NAME = (*_RATES, "no_scale_embedding", "layernorm_embedding", "moe_freq", "moe_expert_count", "moe_top1_expert")
_NEEDED = (  # the attributes that a config must have
    *("decoder_embed_dim", "decoder_value_embed_dim", "decoder_retention_heads", "decoder_ffn_embed_dim"),
    *(
        "decoder_layers",
        "decoder_normalize_before",
        "activation_fn",
        "deepnorm",
        "subln",
        "layernorm_eps",
        "vocab_size",
    ),
    *("share_decoder_input_output_embed", "no_output_layer", "chunkwise_recurrent", "recurrent_chunk_size"),
    *("checkpoint_activations", *_SAME_NAME),
)
ACTIVATIONS = {"swish": "silu", "gelu": "gelu", "relu": "relu"}


@dataclass(kw_only=True)
class RetNetConfig:
    """The options of torchscale's RetNetConfig with its defaults; an unknown option is a TypeError.

    Args:
        decoder_value_embed_dim: total width of v. Default: 2 decoder_embed_dim, as in the paper; torchscale's default,
            1280, does not divide by its 3 heads.
        moe_*: as in torchscale, but no token is dropped and the second expert always takes part, so the options of
            capacities and of random choices have no effect.
        multiway, use_xmoe, xpos_rel_pos, rel_pos_buckets, max_rel_pos, fsdp: not supported; must be off.
    Raises: ValueError or TypeError that names the option.
    Example:
        config = RetNetConfig(vocab_size=256, decoder_embed_dim=64, decoder_retention_heads=4, decoder_layers=2)
        logits, extra = RetNetDecoder(config)(tokens)  # tokens (B, T) int64
    """

    decoder_embed_dim: int = 768
    decoder_value_embed_dim: int | None = None
    decoder_retention_heads: int = 3
    decoder_ffn_embed_dim: int = 1280
    decoder_layers: int = 12
    decoder_normalize_before: bool = True
    activation_fn: str = "gelu"
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    activation_dropout: float = 0.0
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    moe_freq: int = 0
    moe_top1_expert: bool = False
    moe_expert_count: int = 0
    moe_gating_use_fp32: bool = True
    moe_eval_capacity_token_fraction: float = 0.25
    moe_second_expert_policy: str = "random"
    moe_normalize_gate_prob_before_dropping: bool = False
    use_xmoe: bool = False
    rel_pos_buckets: int = 0
    max_rel_pos: int = 0
    deepnorm: bool = False
    subln: bool = True
    multiway: bool = False
    share_decoder_input_output_embed: bool = False
    max_target_positions: int = 1024
    no_output_layer: bool = False
    layernorm_eps: float = 1e-6
    chunkwise_recurrent: bool = False
    recurrent_chunk_size: int = 512
    vocab_size: int = -1
    checkpoint_activations: bool = False
    fsdp: bool = False
    ddp_rank: int = 0
    xpos_rel_pos: bool = False
    xpos_scale_base: int = 512

    def __post_init__(self) -> None:
        for option in fields(self):
            _check_kind(option.name, getattr(self, option.name), option.default)
        if self.decoder_value_embed_dim is None:
            self.decoder_value_embed_dim = 2 * self.decoder_embed_dim
        if self.deepnorm:
            self.decoder_normalize_before = self.subln = False
        if self.subln:
            self.decoder_normalize_before = True

    def override(self, args: Any) -> None:
        """Take each option from the attribute of `args` with its name, if that is set and not None; check again."""
        if self.decoder_value_embed_dim == 2 * self.decoder_embed_dim:
            self.decoder_value_embed_dim = None  # recomputed from the width below
        for name in vars(self):
            if getattr(args, name, None) is not None:
                setattr(self, name, getattr(args, name))
        self.__post_init__()


class RetNetDecoder(nn.Module):
    """Embedding, blocks and head: tokens (B, T) in, logits (B, T, vocab_size) out.

    Args:
        args: a `RetNetConfig`, or an object with its attributes.
        embed_tokens: Default: a new embedding if args.vocab_size is above 0.
        output_projection: Default: a new head unless args.no_output_layer; with args.share_decoder_input_output_embed,
            it uses the embedding's weight.
    Raises: ValueError for options that are not supported; TypeError if args lacks an option.
    """

    def __init__(self, args: Any, embed_tokens: nn.Module | None = None, output_projection: nn.Module | None = None):
        super().__init__()
        _check(args)
        self.args = args
        self.embed_dim, self.num_layers = args.decoder_embed_dim, args.decoder_layers
        if embed_tokens is None and args.vocab_size > 0:
            embed_tokens = nn.Embedding(args.vocab_size, self.embed_dim)
            nn.init.normal_(embed_tokens.weight, std=self.embed_dim**-0.5)
        if output_projection is None and not args.no_output_layer and args.vocab_size > 0:
            output_projection = nn.Linear(self.embed_dim, args.vocab_size, bias=False)
            nn.init.normal_(output_projection.weight, std=self.embed_dim**-0.5)
            if args.share_decoder_input_output_embed:
                output_projection.weight = cast(Any, embed_tokens).weight
        self.embed_tokens, self.output_projection = embed_tokens, output_projection
        self.backbone = _backbone(args)
        self.backbone.gradient_checkpointing = args.checkpoint_activations
        self.register_state_dict_post_hook(_to_theirs)
        self.register_load_state_dict_pre_hook(_to_ours)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.backbone.blocks

    def forward(
        self,
        prev_output_tokens: Tensor,
        incremental_state: dict[Any, Any] | None = None,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        token_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute logits, or hidden states with features_only, and a dict of further outputs.

        Shapes: prev_output_tokens (B, T) int64. Returns (B, T, vocab_size), or (B, T, dim) with features_only.
        Args:
            incremental_state: a dict that the caller keeps, empty at first. Each call takes all tokens from the start,
                computes in one pass those that are new, and returns logits for these only. The dict then holds, for
                each block, tensors by name with the batch as first dimension. {"is_first_step": True} starts again.
            features_only: return hidden states.
            return_all_hiddens: ignored; all hidden states are returned anyway.
            token_embeddings: (B, T, dim), used instead of the embedding; of all tokens or of the new ones.
            kwargs: ignored; fairseq passes them.
        Returns: the output and a dict with inner_states (input of the first block, output of each), l_aux (the loss of
            each block's experts, None without experts) and attn (None).
        Raises: ValueError if no token is new; TypeError or ShapeError for a wrong input.
        """
        check_token_ids(prev_output_tokens, name="prev_output_tokens")
        check_is("incremental_state", incremental_state, dict | None, "a dict, or None")
        check_flags(features_only=features_only)
        if token_embeddings is not None:
            check_input("token_embeddings", token_embeddings, self.embed_dim)
        state = self._state(incremental_state)
        tokens = prev_output_tokens[:, _seen(state) :]
        if not tokens.shape[1]:
            raise ValueError(
                f"there must be more tokens than the {_seen(state)} in incremental_state; "
                f"got tokens {tuple(prev_output_tokens.shape)}"
            )
        x = self._embedded(tokens) if token_embeddings is None else token_embeddings[:, -tokens.shape[1] :]
        out = self.backbone(x, state=state, return_state=incremental_state is not None, return_layers=True)
        if incremental_state is not None:
            for i, after in enumerate(out.state):
                incremental_state[i] = {name: value for name, value in vars(after).items() if value is not None}
        y = out.hidden if features_only else self.output_layer(out.hidden)
        return y, {"inner_states": out.layers, "l_aux": out.aux_losses, "attn": None}

    def forward_embedding(
        self, tokens: Tensor, token_embedding: Tensor | None = None, incremental_state: dict[Any, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the input of the first block, and the scaled embedding before norm and dropout, (B, T, dim) each."""
        if token_embedding is None:
            token_embedding = self._embedded(tokens[:, _seen(self._state(incremental_state)) :])
        scaled = token_embedding * self.backbone.embedding_scale
        return self.backbone.dropout(self.backbone.embedding_norm(scaled)), scaled

    def output_layer(self, features: Tensor) -> Tensor:
        """Map hidden states (B, T, dim) to logits (B, T, vocab_size). Raises: ValueError without a head."""
        if self.output_projection is None:
            raise ValueError("this decoder has no output layer; pass features_only=True, or a vocab_size to its config")
        return self.output_projection(features)

    def is_first_step(self, incremental_state: dict[Any, Any] | None) -> bool:
        """Tell whether incremental_state asks to start again."""
        return incremental_state is not None and bool(incremental_state.get("is_first_step", False))

    def reorder_incremental_state(self, incremental_state: dict[Any, Any], new_order: Tensor) -> None:
        """Select the rows `new_order` of the batch in incremental_state, in place, for beam search."""
        for i in range(self.num_layers):
            for name, x in incremental_state.get(i, {}).items():
                incremental_state[i][name] = x.index_select(0, new_order)

    def _state(self, incremental_state: dict[Any, Any] | None) -> list[RetentionState] | None:
        """Return the state of each block in incremental_state; None at the first step."""
        if not incremental_state or not incremental_state.get(0) or self.is_first_step(incremental_state):
            return None
        return [RetentionState(**incremental_state[i]) for i in range(self.num_layers)]

    def _embedded(self, tokens: Tensor) -> Tensor:
        if self.embed_tokens is None:
            raise ValueError("this decoder has no embedding; pass token_embeddings, or a vocab_size to its config")
        return self.embed_tokens(tokens)


def _check_kind(name: str, value: object, default: object) -> None:
    """Raises: ValueError or TypeError unless value has the type of the default, and a possible size."""
    if isinstance(default, bool):
        check_flags(**{name: value})
    elif isinstance(default, str):
        check_is(name, value, str, "a string")
    elif isinstance(default, float):
        check_eps(name, value)
    elif default is None:
        check_whole(name, value, optional=True)
    else:
        check_whole(name, value, 1 if name.startswith("decoder_") else min(cast(int, default), 0))


def _check(args: Any) -> None:
    missing = [name for name in _NEEDED if not hasattr(args, name)]
    if missing:
        raise TypeError(f"args must be a RetNetConfig, or have its attributes; got args without {', '.join(missing)}")
    check_rates(**{name: getattr(args, name) for name in _RATES})
    active = [f"{name} {getattr(args, name)!r}" for name in _ABSENT if getattr(args, name, None)]
    if active:
        raise ValueError(f"these options of torchscale are not there; leave them off; got {', '.join(active)}")
    if args.activation_fn not in ACTIVATIONS:
        raise ValueError(f"activation_fn must be one of {', '.join(ACTIVATIONS)}; got {args.activation_fn!r}")
    if args.deepnorm and args.decoder_normalize_before:
        raise ValueError("deepnorm has its norms after the sums; with it set decoder_normalize_before=False")


def _seen(state: list[RetentionState] | None) -> int:
    """Return how many tokens the state holds; all rows hold the same number."""
    return 0 if state is None else int(state[0].time[0])


def _backbone(args: Any) -> RetNetBackbone:
    layer = {name.removeprefix("retention."): x for name, x in TORCHSCALE.defaults.items() if "." in name}
    layer |= {"value_dim": args.decoder_value_embed_dim, "norm_eps": args.layernorm_eps}
    if args.chunkwise_recurrent:
        layer |= {"form": "chunkwise", "chunk_size": args.recurrent_chunk_size}
    return RetNetBackbone(
        args.decoder_embed_dim,
        args.decoder_layers,
        args.decoder_retention_heads,
        ffn_dim=args.decoder_ffn_embed_dim,
        activation_fn=ACTIVATIONS[args.activation_fn],
        norm_eps=args.layernorm_eps,
        norm_before=args.decoder_normalize_before,
        deepnorm=args.deepnorm,
        subln=bool(args.subln and args.moe_freq),  # in experts only
        retention=layer,
        **{name: getattr(args, name) for name in _SAME_NAME},
    )


def _buffers(decoder: Any) -> dict[str, Tensor]:
    layer: MultiScaleRetention = decoder.backbone.blocks[0].retention
    return constants(layer.head_key_dim, layer.decay.values)


def _to_theirs(decoder: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook after `state_dict`: use torchscale's names and add its buffers."""
    for key in [key for key in state if key.startswith(prefix)]:
        ours = key.removeprefix(prefix)
        state[prefix + (TORCHSCALE.to_theirs(ours) or ours)] = state.pop(key)
    device = decoder.backbone.blocks[0].retention.q_proj.weight.device
    for ours, x in _buffers(decoder).items():
        state[f"{prefix}{TORCHSCALE.to_theirs(ours)}"] = x.to(device)


def _to_ours(
    decoder: Any,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Hook before `load_state_dict`: use this library's names, and compare the buffers with computed values."""
    computed = _buffers(decoder)
    for key in [key for key in state if key.startswith(prefix)]:
        theirs = key.removeprefix(prefix)
        ours = TORCHSCALE.to_ours(theirs) or theirs
        value = state.pop(key)
        if ours not in computed:
            state[prefix + ours.replace("lm_head.", "output_projection.")] = value
        elif not same(value, computed[ours]):
            errors.append(f"{key} holds other values than this decoder computes; got {value[:4]}")
