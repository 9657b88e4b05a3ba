"""RMT, registered with timm as rmt_{tiny,small,base,large}: its own attention, and files of its published weights.

RMT's attention is no retention but a softmax that adds the logarithm of the decay to the scores. In the first stages it
runs along rows and columns in turn, in the others over the whole image.

Source: Fan et al. 2024, arXiv:2309.11523 (RMT: Retentive Networks Meet Vision Transformers), and its published code.
Example:
    import retention.integrations.timm
    published = dict(file="RMT-S.pth")
    model = timm.create_model("rmt_small", pretrained=True, pretrained_cfg_overlay=published)
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor

from .pyramid import SIZES, ManhattanAttention, Pyramid, build_pyramid, pyramid_cfgs

__all__ = ["checkpoint_filter_fn", "default_cfgs"]  # and the models, which register_model adds

default_cfgs = pyramid_cfgs("rmt")

_OWN: dict[str, dict[str, Any]] = {
    "tiny": dict(by_axis=(True, True, False, False), drop_path_rate=0.1),
    "small": dict(by_axis=(True, True, True, False), drop_path_rate=0.15),
    "base": dict(by_axis=(True, True, True, False), drop_path_rate=0.4),
    "large": dict(by_axis=(True, True, True, False), drop_path_rate=0.5),
}

# Published names, as patterns, and the names here.
_NAMES = {
    r"patch_embed\.proj\.(.+)": r"stem.\1",
    r"layers\.(\d+)\.blocks\.(.+)": r"stages.\1.blocks.\2",
    r"proj\.(.+)": r"head.pre_logits.fc.\1",
    r"norm\.(.+)": r"head.pre_logits.norm.\1",
    r"head\.(.+)": r"head.fc.\1",
    r"aux_head\.(.+)": r"aux_head.\1",
    r"extra_norms\.(.+)": r"feature_norms.\1",
}
_IN_BLOCKS = {
    "pos.conv.": "local.",
    "retention_layer_norm.": "norm1.",
    "retention.lepe.conv.": "mixer.local.",
    "retention.out_proj.": "mixer.proj.",
    "final_layer_norm.": "norm2.",
    "ffn.dwconv.conv.": "mlp.local.",
    "ffn.": "mlp.",
}
_CLASSIFIER = {"head.fc.weight", "head.fc.bias"}  # a model without classes lacks it
# Parts that a file may have beside the trunk: their prefix here, and the option that builds them.
_PARTS = {"head.": "conv_head", "aux_head.": "use_aux_head", "feature_norms.": "feature_norms"}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Pyramid) -> dict[str, Any]:
    """Rename the weights of a published file of RMT: for classification, token labelling or detection.

    Args:
        state_dict: content of the file; that of a whole detector has the prefix "backbone.". Weights with the names of
            `Pyramid` are returned as they are.
        model: the model that will load the weights.
    Returns: weights with the names of `Pyramid`.
    Raises: ValueError if the file is none of RMT, of another size, or has parts that the model lacks; the error names
        the option that builds them.
    """
    for wrapped in ("state_dict", "model"):
        state_dict = state_dict.get(wrapped, state_dict)
    if any(name.startswith("backbone.") for name in state_dict):
        state_dict = {name[9:]: x for name, x in state_dict.items() if name.startswith("backbone.")}
    if "stem.0.weight" in state_dict:
        return state_dict
    if "patch_embed.proj.0.weight" not in state_dict:
        raise ValueError(
            f"the file must hold weights of RMT or of a Pyramid; got {', '.join(list(state_dict)[:3])}, ..."
        )
    _check_decays(state_dict, model)
    kept = {name: x for name, x in state_dict.items() if ".Relpos." not in name}
    renamed = {_renamed(name): x for name, x in _joined(kept).items()}
    renamed = _without_other_classes(renamed, model)
    _check_parts(renamed, model)
    return renamed


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put q_proj, k_proj and v_proj of each block together as qkv, and flatten the factors of the branches."""
    joined = {}
    for name, x in weights.items():
        if ".retention.q_proj." in name:
            parts = (weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv")
            joined[name.replace("retention.q_proj.", "mixer.qkv.")] = torch.cat(list(parts))
        elif ".gamma_" in name:
            joined[re.sub(r"gamma_(\d)$", r"ls\1.gamma", name)] = x.flatten()
        elif not re.search(r"\.retention\.[kv]_proj\.", name):
            joined[name] = x
    return joined


def _renamed(name: str) -> str:
    stage = re.fullmatch(r"layers\.(\d+)\.downsample\.(reduction|norm)\.(.+)", name)
    if stage:  # theirs ends a stage, ours begins the next
        return f"stages.{int(stage[1]) + 1}.downsample.{0 if stage[2] == 'reduction' else 1}.{stage[3]}"
    for pattern, here in _NAMES.items():
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, here, name)
            break
    block = re.fullmatch(r"(stages\.\d+\.blocks\.\d+\.)(.+)", name)
    if block is None:
        return name
    theirs = next((prefix for prefix in _IN_BLOCKS if block[2].startswith(prefix)), "")
    return block[1] + _IN_BLOCKS.get(theirs, "") + block[2].removeprefix(theirs)


def _check_decays(weights: dict[str, Tensor], model: Pyramid) -> None:
    """Raises: ValueError if a stage of the file has other decays than that of the model."""
    for i, stage in enumerate(model.stages):
        theirs, attention = weights.get(f"layers.{i}.Relpos.decay"), _attention(stage)
        if theirs is None or attention is None:
            continue
        ours = torch.tensor(attention.decay.values, device="cpu")
        if theirs.shape != ours.shape or not torch.allclose(theirs.float().cpu(), ours, rtol=1e-3):
            raise ValueError(
                f"stage {i} of the file has the log-decays {theirs.tolist()}, that of the model {ours.tolist()}; "
                "build the model of the file's size"
            )


def _attention(stage: Any) -> ManhattanAttention | None:
    return next((m for m in stage.modules() if isinstance(m, ManhattanAttention)), None)


def _check_parts(weights: dict[str, Tensor], model: Pyramid) -> None:
    """Raises: ValueError if the trunk is of another size, or the file has a part that the model lacks."""
    parts = tuple(_PARTS)
    ours, theirs = model.state_dict(), weights
    missing = {name for name in ours if not name.startswith(parts)} - theirs.keys()
    unknown = {name for name in theirs if not name.startswith(parts)} - ours.keys()
    if missing or unknown:
        example = min(missing or unknown)
        whose = "the file lacks" if missing else "the model lacks"
        raise ValueError(f"the file is of another size than the model: {whose} {example}; build the model of its size")
    for prefix, option in _PARTS.items():
        lacking = {name for name in theirs if name.startswith(prefix)} - ours.keys() - _CLASSIFIER
        if lacking:
            raise ValueError(f"the file has {min(lacking)}, which the model lacks; build it with {option}=True")


def _without_other_classes(weights: dict[str, Tensor], model: Pyramid) -> dict[str, Tensor]:
    """Leave out the second classifier if the model has another number of classes, as timm does with the first."""
    bias = weights.get("aux_head.bias")
    if bias is None or not model.use_aux_head or len(bias) == model.num_classes:
        return weights
    return {name: x for name, x in weights.items() if not name.startswith("aux_head.")}


def _build(name: str, pretrained: bool, **kwargs: Any) -> Pyramid:
    size = name.rpartition("_")[2]
    own = {**SIZES[size], **_OWN[size], "softmax": True, "conv_head": True}
    return build_pyramid(name, pretrained, own, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def rmt_tiny(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """RMT of the tiny size; kwargs as in `Pyramid`."""
    return _build("rmt_tiny", pretrained, **kwargs)


@register_model
def rmt_small(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """RMT of the small size; kwargs as in `Pyramid`."""
    return _build("rmt_small", pretrained, **kwargs)


@register_model
def rmt_base(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """RMT of the base size; kwargs as in `Pyramid`."""
    return _build("rmt_base", pretrained, **kwargs)


@register_model
def rmt_large(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """RMT of the large size; kwargs as in `Pyramid`."""
    return _build("rmt_large", pretrained, **kwargs)
