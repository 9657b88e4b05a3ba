"""The tensors and options of a model under the names of another implementation, if that computes the same function."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from retention.decay import SCHEDULES
from retention.layer import MultiScaleRetention

from . import torchscale
from .files import one_line
from .formats import FLA, TORCHSCALE, Tensors, constants, described, flat
from .transformers import RetNetConfig, RetNetForCausalLM, RetNetModel

__all__ = ["NONE_DROPPED", "Model", "fla_options", "fla_tensors", "torchscale_options", "torchscale_tensors"]

Model = RetNetForCausalLM | RetNetModel

# Options with which torchscale, in evaluation, drops no token at its experts, as this library.
NONE_DROPPED = {"moe_eval_capacity_token_fraction": 1.0, "moe_second_expert_policy": "all"}

# The fixed choices of the others for options of this library. Most are those of the paper, like the layer's defaults.
# Sizes, and options that change the initial weights, the training or the speed only, are free.
_FREE: tuple[str, ...] = ("key_dim", "value_dim", "num_kv_heads", "scale", "dropout", "init_gain", "init_scale")
_FREE += ("backend", "form", "chunk_size", "decay")
_LAYER = {
    f"retention.{name}": option.default
    for name, option in inspect.signature(MultiScaleRetention).parameters.items()
    if name not in ("dim", "num_heads", "device", "dtype", *_FREE)
}
_BOTH: dict[str, Any] = {
    **dict(norm="rms", gated=True, ffn_bias=False, activate_output=False, final_norm=True, lm_head_bias=False),
    **_LAYER,
}
_TORCHSCALES = _BOTH | {name: TORCHSCALE.defaults[name] for name in _LAYER if name in TORCHSCALE.defaults}
_FLAS = {
    **dict(norm_before=True, deepnorm=False, subln=False, norm_embedding=False, scale_embedding=False, moe_every=0),
    **{name: FLA.defaults.get(name, default) for name, default in _BOTH.items()},
    "activation": "silu",
}
_WIDEST_KEYS = 256  # per head in fla


def torchscale_tensors(model: Model) -> Tensors:
    """Return the state dict of torchscale's RetNetDecoder for this model.

    Raises: ValueError for a model that torchscale cannot compute.
    """
    config, layer = model.config, _layer(model)
    wrong = _differences(model, _TORCHSCALES | {"retention.norm_eps": config.norm_eps, "subln": _experts_norm(config)})
    if config.activation not in torchscale.ACTIVATIONS.values():
        wrong.append(f"activation must be gelu, relu or silu, is {config.activation!r}")
    if config.moe_every and config.moe_top_k not in (1, 2):
        wrong.append(f"moe_top_k must be 1 or 2, is {config.moe_top_k}")
    wrong += _other_sizes(layer, key_dim=config.dim, num_kv_heads=config.num_heads)
    if wrong:
        raise ValueError(f"torchscale's RetNet cannot compute what this model does: {'; '.join(wrong)}")
    ours = _tensors(model) | constants(layer.head_key_dim, layer.decay.values)
    return {str(TORCHSCALE.to_theirs(key)): x.contiguous() for key, x in ours.items()}


def torchscale_options(model: Model) -> dict[str, Any]:
    """Return the options of torchscale's RetNetConfig for this model that differ from its defaults."""
    said = {name: value for name, value in flat(model.config.to_dict()).items() if value is not None}
    ours = described(_tensors(model)) | said
    told = {
        name: TORCHSCALE.value_to_theirs(name, ours.get(targets[0]))
        for name, targets in TORCHSCALE.options.items()
        if targets
    }
    told |= {field.name: ours[field.name] for field in fields(torchscale.RetNetConfig) if field.name in ours}
    told |= {"subln": bool(ours["subln"]), "share_decoder_input_output_embed": ours["tie_word_embeddings"]}
    if told["moe_freq"]:
        told |= NONE_DROPPED
    usual = {field.name: field.default for field in fields(torchscale.RetNetConfig)}
    return {name: value for name, value in told.items() if value is not None and value != usual[name]}


def fla_tensors(model: Model) -> Tensors:
    """Return the state dict of fla's RetNet for this model, without the head if it is tied.

    Raises: ValueError for a model that fla cannot compute.
    """
    config, layer = model.config, _layer(model)
    free = {"retention.gate": (None, "silu"), "retention.norm_affine": (False, "shared")}
    wrong = _differences(model, _FLAS | {"retention.norm_eps": config.norm_eps}, free)
    wrong += _other_sizes(layer)
    if layer.decay.values != SCHEDULES["paper"](config.num_heads):
        decay = (config.retention or {}).get("decay")
        wrong.append(f"retention.decay must be 'paper', is {one_line(repr(decay))}")
    if layer.head_key_dim > _WIDEST_KEYS:
        wrong.append(f"a head must have at most {_WIDEST_KEYS} key channels, has {layer.head_key_dim}")
    if not config.vocab_size:
        wrong.append("the model must have an embedding, has none")
    if wrong:
        raise ValueError(f"fla's RetNet cannot compute what this model does: {'; '.join(wrong)}")
    tensors = {str(FLA.to_theirs(key)): x.contiguous() for key, x in _tensors(model).items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if layer.g_proj is None:
        tensors = {key.replace(".g_norm_swish_gate.", ".g_norm."): x for key, x in tensors.items()}
    return tensors


def fla_options(model: Model) -> dict[str, Any]:
    """Return the contents of a config.json with which fla loads the tensors of `fla_tensors`."""
    config, layer = model.config, _layer(model)
    return {
        "architectures": [type(model).__name__],
        "model_type": "retnet",
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "expand_k": layer.key_dim / config.dim,
        "expand_v": layer.value_dim / config.dim,
        "intermediate_size": described(_tensors(model))["ffn_dim"],
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "elementwise_affine": bool(getattr(layer.norm, "affine", False)),
        "use_output_gate": layer.g_proj is not None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        **{name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def _tensors(model: Model) -> Tensors:
    return {key.removeprefix("model."): x for key, x in model.state_dict().items()}


def _layer(model: Model) -> MultiScaleRetention:
    base: Any = getattr(model, "model", model)
    return base.backbone.blocks[0].retention


def _experts_norm(config: RetNetConfig) -> bool | str:
    """Return the norm inside the feed-forwards that torchscale has; it has one in experts only."""
    return config.subln if config.moe_every and config.subln in (True, "layer") else False


def _differences(model: Model, wanted: dict[str, Any], free: dict[str, tuple[Any, ...]] | None = None) -> list[str]:
    """Describe the options of a model that differ from the wanted ones; `free` lists the values of some others."""
    ours = _LAYER | flat(model.config.to_dict())
    choices = {name: (value,) for name, value in wanted.items()} | (free or {})
    return [
        f"{name} must be {' or '.join(map(repr, values))}, is {one_line(repr(ours[name]))}"
        for name, values in choices.items()
        if ours[name] not in values
    ]


def _other_sizes(layer: MultiScaleRetention, **wanted: int) -> list[str]:
    """Describe the sizes of a layer that differ from the wanted ones, and a scale other than the usual one."""
    scale = layer.head_key_dim**-0.5
    return [
        f"retention.{name} must be {value}, is {getattr(layer, name)}"
        for name, value in ({"scale": scale} | wanted).items()
        if getattr(layer, name) != value
    ]
