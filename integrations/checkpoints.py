"""Load checkpoints of other RetNet implementations, and write them in this library's or torchscale's format.

`formats` lists the supported formats. Loading is strict: each tensor must have a parameter of its shape, and each
parameter a tensor. All of it is checked before anything is written, and existing files are not overwritten.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from retention.arguments import number
from retention.layer import MultiScaleRetention

from . import torchscale
from .files import listed, one_line, read_json, refused
from .formats import FORMATS, TORCHSCALE, Format, Tensors, constants, described, detect, flat, tied
from .transformers import RetNetConfig, RetNetForCausalLM, RetNetModel
from .transformers.sharing import CODE
from .weights import SUFFIXES, read, write

__all__ = ["Model", "convert", "load", "read_json", "torchscale_options", "torchscale_tensors"]

Model = RetNetForCausalLM | RetNetModel
_TARGETS = ("retention", "torchscale")

# Options with which torchscale, in evaluation, drops no token at its experts, as this library.
_NONE_DROPPED = {"moe_eval_capacity_token_fraction": 1.0, "moe_second_expert_policy": "all"}

# Files beside the weights: those with weights of other formats are not copied, as they could contradict the new ones.
_WEIGHTS = {*SUFFIXES, ".h5", ".msgpack", ".onnx", ".gguf", ".npz"}
_FOLDERS = ("additional_chat_templates",)
_TOKENIZER = re.compile(r"^(tokenizer.*|special_tokens_map|added_tokens|vocab.*|merges|.*\.(model|spm|tiktoken)$)")

# torchscale's fixed choices for options of this library. Most are those of the paper, like the layer's defaults.
_FREE = ("value_dim", "decay", "dropout", "init_gain", "init_scale", "backend", "form", "chunk_size")
_LAYER = {
    f"retention.{name}": option.default
    for name, option in inspect.signature(MultiScaleRetention).parameters.items()
    if name not in ("dim", "num_heads", "device", "dtype", *_FREE)
}
_THEIRS: dict[str, Any] = {
    **dict(norm="rms", use_glu=True, ffn_bias=False, activate_output=False, final_norm=True, lm_head_bias=False),
    **{name: TORCHSCALE.defaults.get(name, default) for name, default in _LAYER.items()},
}


def load(source: str | Path, format: str | None = None, config: dict[str, Any] | None = None) -> Model:
    """Load a checkpoint as a transformers model in evaluation mode.

    Args:
        source: a safetensors or torch file, or a folder with one such file, or with shards and their index.
        format: a name in `formats.FORMATS`. Default: recognised by the names of the tensors.
        config: options that the weights do not determine, under the implementation's names or this library's. They
            override a config.json beside the weights, which overrides the implementation's defaults.
    Returns: a `RetNetForCausalLM`, or a `RetNetModel` if the checkpoint has no head.
    Raises: OSError or ValueError that names the fault of the checkpoint, or the missing option.
    Warns: UserWarning if the original model drops tokens at its experts, which this library does not.
    Example:
        model = load("torchscale.pt", config={"decoder_retention_heads": 4})
    """
    return _load(Path(source), format, config)[0]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    target: str | None = None,
    config: dict[str, Any] | None = None,
) -> Model:
    """Load a checkpoint and write it to `out` in another format.

    Args:
        source: as in `load`. Its companion files are copied into the new folder: all files of a model's folder except
            weights and hidden files; of a folder without config.json around a single file, those of a tokenizer.
        out: the folder or file to write; it must not exist.
        format: the source's format, as in `load`.
        target: "retention", a folder for `from_pretrained`; or "torchscale", a file of tensors, .safetensors or .pt.
            Default: "torchscale" if the source is in this library's format, else "retention".
        config: as in `load`.
    Returns: the model.
    Raises: as `load`; FileExistsError if `out` exists; ValueError for a model that torchscale cannot compute.
    Warns: as `load`.
    Example:
        convert("torchscale.pt", "runs/converted", config={"decoder_retention_heads": 4})
    """
    source, out = Path(source), Path(out)
    if target not in (*_TARGETS, None):
        raise ValueError(f"the target must be one of {', '.join(_TARGETS)}; got {target!r}")
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists; name another place")
    model, found = _load(source, format, config)
    if target is None:
        target = "torchscale" if found.name == "retention" else "retention"
    tensors = torchscale_tensors(model) if target == "torchscale" else None
    if tensors is not None and out.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"torchscale's weights go into a file, .safetensors or .pt; got {out.name}")
    beside = _files_beside(source) if tensors is None else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder, out.name)
        if tensors is None:
            model.save_pretrained(made)
            _copy(beside, made)
        else:
            write(tensors, made)
        os.rename(made, out)  # the rename is atomic
    return model


def torchscale_tensors(model: Model) -> Tensors:
    """Return the state dict of torchscale's RetNetDecoder for this model.

    Raises: ValueError for a model that torchscale cannot compute.
    """
    _check_torchscale_can(model.config)
    base: Any = getattr(model, "model", model)
    layer = base.backbone.blocks[0].retention
    ours = _tensors(model) | constants(layer.head_key_dim, layer.decay.values)
    return {str(TORCHSCALE.to_theirs(key)): x.contiguous() for key, x in ours.items()}


def torchscale_options(model: Model) -> dict[str, Any]:
    """Return the options of torchscale's RetNetConfig for this model that differ from its defaults."""
    said = {name: value for name, value in flat(model.config.to_dict()).items() if value is not None}
    ours = described(_tensors(model)) | said
    told = {name: ours.get(targets[0]) for name, targets in TORCHSCALE.options.items() if targets}
    told |= {field.name: ours[field.name] for field in fields(torchscale.RetNetConfig) if field.name in ours}
    told |= {"subln": bool(ours["subln"]), "share_decoder_input_output_embed": ours["tie_word_embeddings"]}
    if told["moe_freq"]:
        told |= _NONE_DROPPED
    if told["activation_fn"] == "silu":
        told["activation_fn"] = "swish"
    usual = {field.name: field.default for field in fields(torchscale.RetNetConfig)}
    return {name: value for name, value in told.items() if value is not None and value != usual[name]}


def _tensors(model: Model) -> Tensors:
    return {key.removeprefix("model."): x for key, x in model.state_dict().items()}


def _check_torchscale_can(config: RetNetConfig) -> None:
    ours = _LAYER | flat(config.to_dict())
    wanted = _THEIRS | {"retention.norm_eps": config.norm_eps}
    wanted["subln"] = config.subln if config.moe_freq and config.subln in (True, "layer") else False
    wrong = [f"{name} must be {value!r}, is {ours[name]!r}" for name, value in wanted.items() if ours[name] != value]
    if config.activation_fn not in torchscale.ACTIVATIONS.values():
        wrong.append(f"activation_fn must be gelu, relu or silu, is {config.activation_fn!r}")
    if wrong:
        raise ValueError(f"torchscale's RetNet cannot compute what this model does: {'; '.join(wrong)}")


def _load(source: Path, name: str | None, given: dict[str, Any] | None) -> tuple[Model, Format]:
    if name not in (*FORMATS, None):
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}; got {name!r}")
    tensors, beside = read(source)
    found = detect(tensors) if name is None else FORMATS[name]
    if found.name == "retention" and beside.get("tie_word_embeddings", True):
        tensors = tied(tensors)
    tensors = found.prepare(tensors)
    ours = {known: x for key, x in tensors.items() if (known := found.to_ours(key)) is not None}
    unknown = [key for key in tensors if found.to_ours(key) is None]
    if found.name != "retention":
        told = {**found.known(beside), **(given or {})}
        config = RetNetConfig.from_dict(found.config(ours, told))
        _warn_of_dropped_tokens(config, found, told)
    elif given or not beside:
        raise ValueError(
            "a model of ours has its own config.json beside its weights, and takes no other config; "
            f"{source} has {'one' if beside else 'none'}, and the config given is {one_line(repr(given))}"
        )
    else:
        config = RetNetConfig.strictly_from(beside, source)
        _check_own(config, ours, has_head=any(key.startswith("model.") for key in tensors))
    return _filled(config, ours, unknown, found), found


def _check_own(config: RetNetConfig, ours: Tensors, *, has_head: bool) -> None:
    """Check that the model is safe to build and its head rightly tied; `_filled` compares all shapes."""
    facts = described(ours)
    if has_head and "lm_head.weight" not in ours:
        raise ValueError("these weights are not a whole retention checkpoint: missing tensors: lm_head.weight")
    names = ["num_layers", *(["moe_expert_count"] if config.moe_freq else [])]
    if "lm_head.weight" in ours and config.tie_word_embeddings:
        names.append("tie_word_embeddings")
    for name in names:
        if (value := getattr(config, name)) != facts[name]:
            raise ValueError(
                f"config.json contradicts the weights: {name} {value!r}, of which the weights have {facts[name]!r}"
            )


def _warn_of_dropped_tokens(config: RetNetConfig, found: Format, told: dict[str, Any]) -> None:
    if not config.moe_freq or not _NONE_DROPPED.keys() <= found.options.keys():
        return
    usual = torchscale.RetNetConfig()
    theirs = {name: told.get(name, getattr(usual, name)) for name in _NONE_DROPPED}
    fraction, policy = theirs.values()
    if number(fraction) >= 1 and (policy == "all" or config.moe_top1_expert):
        return
    warnings.warn(
        f"these experts had {_spelt(theirs)}{'' if told.keys() & theirs.keys() else ', by default'}, with which "
        f"{found.name} leaves tokens out, by their number or by chance; here none is left out: the logits are those "
        f"of {found.name}, in evaluation, with {_spelt(_NONE_DROPPED)}",
        stacklevel=4,
    )


def _spelt(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _files_beside(source: Path) -> list[Path]:
    """The companion files of the weights: all files of a model's folder, or a tokenizer's beside a single file."""
    folder = source if source.is_dir() else source.parent
    whole = source.is_dir() or (folder / "config.json").exists()
    found = [path for path in sorted(folder.iterdir()) if _goes_along(path) and (whole or _TOKENIZER.search(path.name))]
    for path in found:
        if not path.exists() or path.is_fifo() or path.is_socket():
            raise ValueError(f"{path} stands beside the weights and cannot be copied; remove it")
    return found


def _goes_along(path: Path) -> bool:
    written = ("config.json", CODE)  # written anew
    if path.is_dir():
        return path.name in _FOLDERS
    left_out = path.name.startswith(".") or path.name in written or path.name.endswith(".index.json")
    return not left_out and path.suffix not in _WEIGHTS


def _copy(files: list[Path], folder: Path) -> None:
    for file in files:
        if file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)


def _filled(config: RetNetConfig, ours: Tensors, unknown: list[str], found: Format) -> Model:
    """Build the model of `config` with these tensors as parameters, in the widest dtype among them."""
    ours = {key: x for key, x in ours.items() if not key.startswith("constant.")}
    config.dtype = reduce(torch.promote_types, {x.dtype for x in ours.values()})
    with refused("the config makes no model"), torch.device("meta"):  # the initial weights are replaced
        model: Model = (RetNetForCausalLM if "lm_head.weight" in ours else RetNetModel)(config)
    places = {key.removeprefix("model."): (key, x.shape) for key, x in model.state_dict().items()}
    unknown += [str(found.to_theirs(key)) for key in ours.keys() - places.keys()]
    missing = [str(found.to_theirs(key)) for key in places.keys() - ours.keys()]
    misfits = [
        f"{found.to_theirs(key)} must be {tuple(shape)}, is {tuple(ours[key].shape)}"
        for key, (_, shape) in places.items()
        if key in ours and ours[key].shape != shape
    ]
    for what, names in (("unknown tensors", unknown), ("missing tensors", missing), ("wrong shapes", misfits)):
        if names:
            raise ValueError(f"these weights are not a whole {found.name} checkpoint: {what}: {listed(sorted(names))}")
    state = {places[key][0]: x.to(config.dtype) for key, x in ours.items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()
