"""The checkpoint formats of other RetNet implementations: names of tensors and options, and fixed choices.

A format is a table. To add one, write a `Format` like those below and add it to FORMATS; `detect`, `checkpoints` and
`retention convert` then support it. This library's names of tensors are those of `RetNetForCausalLM` without the prefix
`model.`; its names of options are those of `RetNetBackbone`, and those of `MultiScaleRetention` with the prefix
`retention.`. Needs torch only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ..files import listed
from .facts import Tensors, constants, described, same
from .format import Format, flat

__all__ = [
    "FLA",
    "FORMATS",
    "TORCHSCALE",
    "Format",
    "Tensors",
    "constants",
    "described",
    "detect",
    "flat",
    "same",
    "tied",
]


def _todays(tensors: Tensors) -> Tensors:
    """Refuse torchscale's earliest layers, which compute something else under the same names."""
    if any(key.endswith("wg_reduction.weight") for key in tensors):
        raise ValueError("this is a mixture of experts with X-MoE routing (use_xmoe), which has no counterpart here")
    if any(key.endswith("q_proj.bias") for key in tensors):
        raise ValueError(
            "these weights have biases in their projections, as those of torchscale before 2023-09-28 and of models "
            "made from it, whose layers compute something else; train anew, or run them with the code that wrote them"
        )
    return dict(tensors)


def _gated(tensors: Tensors) -> Tensors:
    """Refuse torchscale's earliest feed-forwards, which have no gate; then do the checks of `_todays`."""
    if any(".ffn.fc1." in key for key in tensors) and not any(".ffn.gate." in key for key in tensors):
        raise ValueError(
            "these weights have no ffn.gate: they are of torchscale before 2023-09-28, whose layers compute something "
            "else; if they are syncdoth's with use_glu=False, name the format syncdoth"
        )
    return _todays(tensors)


def tied(tensors: Tensors, name: str = "model.embed_tokens.weight") -> Tensors:
    """Add the head that shares the weight of the embedding `name` and is therefore not in the file."""
    embedding = tensors.get(name)
    return dict(tensors) if embedding is None else {"lm_head.weight": embedding, **tensors}


def _one_matrix_for_all_heads(tensors: Tensors) -> Tensors:
    """Join Jamie Stirling's W_Q, W_K, W_V of all heads to one matrix each, and transpose all W to (out, in)."""
    whole = dict(tensors)
    heads: dict[str, dict[int, Tensor]] = {}
    for key in tensors:
        if found := re.fullmatch(r"(retentions\.\d+\.)retentions\.(\d+)\.(W_[QKV])", key):
            heads.setdefault(found[1] + found[3], {})[int(found[2])] = whole.pop(key)
    for key, parts in heads.items():
        if len({x.shape for x in parts.values()}) > 1:
            raise ValueError(f"{key} must have one shape in all heads; got {[tuple(x.shape) for x in parts.values()]}")
        whole[key] = torch.stack([parts[i] for i in sorted(parts)])
    count = {key.removesuffix("W_Q"): len(x) for key, x in whole.items() if key.endswith("W_Q")}
    for key, x in whole.items():
        if re.fullmatch(r"retentions\.\d+\.W_.", key):
            if x.dim() not in (2, 3):
                raise ValueError(f"{key} must have two dimensions, or three with the heads; got {tuple(x.shape)}")
            whole[key] = x.mT.flatten(0, -2).contiguous()
        elif ".group_norm." in key and len(x) % (n := count.get(key.partition("group_norm.")[0], 1)) == 0:
            whole[key] = x.view(n, -1)
    return whole


def _of_plain_retention(tensors: Tensors) -> Tensors:
    """Refuse fla's models with layers that a RetNet does not have; then add a tied head."""
    for part, layers in (("_conv1d.", "short convolutions"), ("_res_proj.", "attention over residuals")):
        if any(part in key for key in tensors):
            raise ValueError(f"these weights have {layers}, which have no counterpart here")
    return tied(tensors, "model.embeddings.weight")


_BLOCK = "backbone.blocks.*."

TORCHSCALE = Format(
    "torchscale",
    marks=("layers.*.retention_layer_norm.weight",),
    rules=(
        ("embed_tokens.*", "embed_tokens.*"),
        ("layernorm_embedding.*", "backbone.embedding_norm.*"),
        ("layers.*.retention.*", _BLOCK + "retention.*"),
        ("layers.*.retention_layer_norm.*", _BLOCK + "retention_norm.*"),
        ("layers.*.final_layer_norm.*", _BLOCK + "ffn_norm.*"),
        ("layers.*.moe_layer.gate.wg.*", _BLOCK + "ffn.router.*"),
        ("layers.*.moe_layer.experts.*.ffn_layernorm.*", _BLOCK + "ffn.experts.*.norm.*"),
        ("layers.*.moe_layer.experts.*.*", _BLOCK + "ffn.experts.*.*"),
        ("layers.*.ffn.ffn_layernorm.*", _BLOCK + "ffn.norm.*"),
        ("layers.*.ffn.*", _BLOCK + "ffn.*"),
        ("layer_norm.*", "backbone.norm.*"),
        ("output_projection.*", "lm_head.*"),
        ("retnet_rel_pos.angle", "constant.angles"),
        ("retnet_rel_pos.decay", "constant.log_decays"),
    ),
    defaults={
        "norm_eps": 1e-6,
        "activation": "gelu",
        "scale_embedding": False,
        "retention.decay": "paper",
        "retention.norm": "rms",
        "retention.norm_eps": 1e-6,
        "retention.decay_norm": True,
        "retention.score_norm": True,
    },
    options={
        "decoder_embed_dim": ("dim",),
        "decoder_value_embed_dim": ("retention.value_dim",),
        "decoder_ffn_embed_dim": ("ffn_dim",),
        "decoder_layers": ("num_layers",),
        "decoder_retention_heads": ("num_heads",),
        "decoder_normalize_before": ("norm_before",),
        "layernorm_eps": ("norm_eps", "retention.norm_eps"),
        "recurrent_chunk_size": ("retention.chunk_size",),
        "activation_fn": ("activation",),
        "no_scale_embedding": ("scale_embedding",),
        "layernorm_embedding": ("norm_embedding",),
        "moe_freq": ("moe_every",),
        "moe_expert_count": ("moe_num_experts",),
        "moe_top1_expert": ("moe_top_k",),
        **dict.fromkeys(("vocab_size", "share_decoder_input_output_embed", "no_output_layer", "subln"), ()),
        **dict.fromkeys(("chunkwise_recurrent", "checkpoint_activations", "fsdp", "ddp_rank", "multiway"), ()),
        **dict.fromkeys(("max_target_positions", "rel_pos_buckets", "max_rel_pos", "use_xmoe"), ()),
        **dict.fromkeys(("xpos_rel_pos", "xpos_scale_base", "moe_gating_use_fp32", "moe_second_expert_policy"), ()),
        **dict.fromkeys(("moe_eval_capacity_token_fraction", "moe_normalize_gate_prob_before_dropping"), ()),
    },
    values={
        "activation_fn": {"swish": "silu", "gelu": "gelu", "relu": "relu"},
        "no_scale_embedding": {True: False, False: True},
        "moe_top1_expert": {True: 1, False: 2},
    },
    prepare=_gated,
)

_SYNCDOTH = Format(
    "syncdoth",
    marks=("model.layers.*.retention_layer_norm.weight",),
    rules=(
        ("lm_head.*", "lm_head.*"),
        *((f"model.{theirs}", ours) for theirs, ours in TORCHSCALE.rules),
        *TORCHSCALE.rules,  # for a checkpoint of its RetNetModel, which has no prefix
    ),
    defaults=TORCHSCALE.defaults,
    options=TORCHSCALE.options
    | {"use_lm_decay": ("retention.decay",), "use_glu": ("gated",)}
    | dict.fromkeys(("tie_word_embeddings", "use_ffn_rms_norm", "disable_fused_ops", "forward_impl"), ()),
    values=TORCHSCALE.values | {"use_lm_decay": {True: "log_linear", False: "paper"}},
    prepare=lambda tensors: tied(_todays(tensors)),
)

_YET_ANOTHER_RETNET = Format(
    "yet-another-retnet",
    marks=("decoder.layers.*.linear1.weight",),
    rules=(
        ("embedding.*", "embed_tokens.*"),
        ("decoder.layers.*.retention.thetas", "constant.angles.*"),
        ("decoder.layers.*.retention.*", _BLOCK + "retention.*"),
        ("decoder.layers.*.norm1.*", _BLOCK + "retention_norm.*"),
        ("decoder.layers.*.norm2.*", _BLOCK + "ffn_norm.*"),
        ("decoder.layers.*.linear1.*", _BLOCK + "ffn.fc1.*"),
        ("decoder.layers.*.linear2.*", _BLOCK + "ffn.fc2.*"),
        ("out.*", "lm_head.*"),
    ),
    defaults={
        "norm_eps": 1e-6,
        "final_norm": False,
        "activation": "silu",
        "retention.decay": "log_linear",
        "retention.gate": "silu",
        "retention.norm": "group",
        "retention.norm_eps": 1e-6,
    },
    options={
        "num_tokens": ("vocab_size",),
        "d_model": ("dim",),
        "nhead": ("num_heads",),
        "dim_feedforward": ("ffn_dim",),
        "activation": ("activation", "retention.gate"),
        "layer_norm_eps": ("norm_eps",),
        "norm_first": ("norm_before",),
    },
)

_JAMIE_STIRLING = Format(
    "jamie-stirling",
    marks=("retentions.*.W_G",),
    rules=(
        *((f"retentions.*.W_{letter}", f"{_BLOCK}retention.{letter.lower()}_proj.weight") for letter in "QKVG"),
        ("retentions.*.W_O", _BLOCK + "retention.out_proj.weight"),
        ("retentions.*.group_norm.*", _BLOCK + "retention.norm.*"),
        ("retentions.*.gammas", "constant.gammas.*"),
        ("retentions.*.xpos.scale", "constant.pair_scales.*"),
        ("retentions.*.retentions.*.xpos.scale", "constant.pair_scales.*.*"),
        ("layer_norms_1.*.*", _BLOCK + "retention_norm.*"),
        ("layer_norms_2.*.*", _BLOCK + "ffn_norm.*"),
        ("ffns.*.0.*", _BLOCK + "ffn.fc1.*"),
        ("ffns.*.2.*", _BLOCK + "ffn.fc2.*"),
    ),
    defaults={
        "norm_eps": 1e-5,
        "final_norm": False,
        "activation": "gelu",
        "retention.decay": "log_linear",
        "retention.rotary": "xpos",
        "retention.scale": 1.0,
        "retention.norm": "group",
        "retention.norm_eps": 1e-5,
    },
    options={"layers": ("num_layers",), "hidden_dim": ("dim",), "ffn_size": ("ffn_dim",), "heads": ("num_heads",)}
    | {"double_v_dim": ()},
    prepare=_one_matrix_for_all_heads,
)

_RETNET_PYTORCH = Format(
    "retnet-pytorch",
    marks=("layers.*.0.o_proj.weight",),
    rules=(
        ("layers.*.0.angle", "constant.angles.*"),
        ("layers.*.0.decay", "constant.log_decays.*"),
        ("layers.*.0.pre_norm.*", _BLOCK + "retention_norm.*"),
        ("layers.*.0.o_proj.*", _BLOCK + "retention.out_proj.*"),
        ("layers.*.0.*", _BLOCK + "retention.*"),
        ("layers.*.1.net.0.*", _BLOCK + "ffn_norm.*"),
        ("layers.*.1.net.1.1.*", _BLOCK + "ffn.fc1.*"),
        ("layers.*.1.net.2.1.*", _BLOCK + "ffn.fc2.*"),
    ),
    defaults={
        "norm_eps": 1e-5,
        "final_norm": False,
        "activation": "gelu",
        "activate_output": True,
        "retention.decay": "paper",
        "retention.gate": "gelu",
        "retention.norm": "group",
        "retention.norm_eps": 1e-5,
    },
    options={
        "num_layer": ("num_layers",),
        "dim_model": ("dim",),
        "msr_gate_fn": ("retention.gate",),
        "mlp_gate_fn": ("activation",),
        "mlp_bias": ("ffn_bias",),
        **dict.fromkeys(("value_factor", "mlp_mult"), ()),
    },
)

_OF_FLA = (
    ("embeddings.*", "embed_tokens.*"),
    ("layers.*.attn_norm.*", _BLOCK + "retention_norm.*"),
    *((f"layers.*.attn.{letter}_proj.*", f"{_BLOCK}retention.{letter}_proj.*") for letter in "qkvg"),
    ("layers.*.attn.o_proj.*", _BLOCK + "retention.out_proj.*"),
    ("layers.*.attn.g_norm_swish_gate.*", _BLOCK + "retention.norm.*"),
    ("layers.*.attn.g_norm.*", _BLOCK + "retention.norm.*"),  # the name if the gate is not fused with the norm
    ("layers.*.mlp_norm.*", _BLOCK + "ffn_norm.*"),
    ("layers.*.mlp.gate_proj.*", _BLOCK + "ffn.fc1.*"),
    ("layers.*.mlp.up_proj.*", _BLOCK + "ffn.gate.*"),
    ("layers.*.mlp.down_proj.*", _BLOCK + "ffn.fc2.*"),
    ("norm.*", "backbone.norm.*"),
)

FLA = Format(
    "fla",
    marks=("model.layers.*.attn.o_proj.weight", "layers.*.attn.o_proj.weight"),
    rules=(
        ("lm_head.*", "lm_head.*"),
        *((f"model.{theirs}", ours) for theirs, ours in _OF_FLA),
        *_OF_FLA,  # for a checkpoint of its RetNetModel, which has no prefix
    ),
    defaults={
        "norm_eps": 1e-6,
        "activation": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "retention.decay": "paper",
        "retention.rotary": "rope",
        "retention.interleaved": False,
        "retention.gate": "silu",
        "retention.norm": "rms",
        "retention.norm_eps": 1e-6,
    },
    options={
        "hidden_size": ("dim",),
        "intermediate_size": ("ffn_dim",),
        "num_hidden_layers": ("num_layers",),
        "num_heads": ("num_heads",),
        "num_kv_heads": ("retention.num_kv_heads",),
        "norm_eps": ("norm_eps", "retention.norm_eps"),
        "hidden_act": ("activation",),
        "use_output_gate": ("retention.gate",),
        "elementwise_affine": ("retention.norm_affine",),
        "tie_word_embeddings": ("tie_word_embeddings",),
        **dict.fromkeys(("model_type", "expand_k", "expand_v", "hidden_ratio", "fuse_norm"), ()),
        **dict.fromkeys(("feature_map", "use_short_conv", "attn", "attnres_block_size"), ()),
    },
    allowed={
        "model_type": ("retnet",),
        "hidden_act": ("swish", "silu"),
        "use_short_conv": (False,),
        **dict.fromkeys(("feature_map", "attn", "attnres_block_size"), ()),  # None is an option that is not given
    },
    values={"use_output_gate": {True: "silu", False: None}, "elementwise_affine": {True: "shared", False: False}},
    prepare=_of_plain_retention,
)

_RETENTION = Format(
    "retention",
    marks=("model.backbone.blocks.*.retention.q_proj.weight", "backbone.blocks.*.retention.q_proj.weight"),
    rules=(
        ("model.embed_tokens.*", "embed_tokens.*"),
        ("model.backbone.*", "backbone.*"),
        ("embed_tokens.*", "embed_tokens.*"),
        ("backbone.*", "backbone.*"),
        ("lm_head.*", "lm_head.*"),
    ),
)

FORMATS = {
    known.name: known
    for known in (TORCHSCALE, _SYNCDOTH, FLA, _YET_ANOTHER_RETNET, _JAMIE_STIRLING, _RETNET_PYTORCH, _RETENTION)
}


def detect(keys: Iterable[str]) -> Format:
    """Return the format of a checkpoint.

    Args:
        keys: names of its tensors.
    Raises: ValueError if no format in FORMATS has such names.
    """
    keys = list(keys)
    for known in FORMATS.values():
        if known.detects(keys):
            return known
    raise ValueError(f"these tensors are of none of the formats {', '.join(FORMATS)}; got {listed(keys)}")
