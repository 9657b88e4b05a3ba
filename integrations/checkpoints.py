"""Load checkpoints of other RetNet implementations, and write them in the format of this library, torchscale or fla.

`formats` lists the supported formats. Loading is strict: each tensor must have a parameter of its shape, and each
parameter a tensor. All of it is checked before anything is written, and existing files are not overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from retention.arguments import number

from . import torchscale
from .files import listed, one_line, read_json, refused
from .foreign import NONE_DROPPED, Model, fla_options, fla_tensors, torchscale_options, torchscale_tensors
from .formats import FORMATS, Format, Tensors, described, detect, tied
from .transformers import RetNetConfig, RetNetForCausalLM, RetNetModel
from .transformers.sharing import CODE
from .weights import SUFFIXES, read, write

__all__ = [
    "Model",
    "convert",
    "fla_options",
    "fla_tensors",
    "load",
    "read_json",
    "torchscale_options",
    "torchscale_tensors",
]

_TENSORS = {"torchscale": torchscale_tensors, "fla": fla_tensors}
_TARGETS = ("retention", *_TENSORS)

# Files beside the weights: those with weights of other formats are not copied, as they could contradict the new ones.
_WEIGHTS = {*SUFFIXES, ".h5", ".msgpack", ".onnx", ".gguf", ".npz"}
_FOLDERS = ("additional_chat_templates",)
_TOKENIZER = re.compile(r"^(tokenizer.*|special_tokens_map|added_tokens|vocab.*|merges|.*\.(model|spm|tiktoken)$)")


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
        target: "retention", a folder for `from_pretrained`; "fla", a folder for its `from_pretrained`, without the
            source's README.md; or "torchscale", a file of tensors, .safetensors or .pt. Default: "torchscale" if the
            source is in this library's format, else "retention".
        config: as in `load`.
    Returns: the model.
    Raises: as `load`; FileExistsError if `out` exists; ValueError for a model that the target cannot compute.
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
    tensors = _TENSORS[target](model) if target in _TENSORS else None
    if target == "torchscale" and out.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"torchscale's weights go into a file, .safetensors or .pt; got {out.name}")
    beside = [] if target == "torchscale" else _files_beside(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder, out.name)
        if tensors is None:
            model.save_pretrained(made)
        elif target == "torchscale":
            write(tensors, made)
        else:
            made.mkdir()
            write(tensors, made / "model.safetensors")
            (made / "config.json").write_text(json.dumps(fla_options(model), indent=2) + "\n")
            beside = [file for file in beside if file.name != "README.md"]  # it tells how to load the source
        _copy(beside, made)
        os.rename(made, out)  # the rename is atomic
    return model


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
    has_head = any(key.startswith("model.") for key in tensors)
    if len(ours) + len(unknown) < len(tensors):
        places = Counter(map(found.to_ours, tensors))
        twice = [key for key in tensors if (place := found.to_ours(key)) is not None and places[place] > 1]
        raise ValueError(f"these weights have two tensors for one place: {listed(sorted(twice))}")
    del tensors  # so that `_filled` frees the tensors that it converts
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
        _check_own(config, ours, has_head=has_head)
    return _filled(config, ours, unknown, found), found


def _check_own(config: RetNetConfig, ours: Tensors, *, has_head: bool) -> None:
    """Check that the model is safe to build and its head rightly tied; `_filled` compares all shapes."""
    facts = described(ours)
    if has_head and "lm_head.weight" not in ours:
        raise ValueError("these weights are not a whole retention checkpoint: missing tensors: lm_head.weight")
    names = ["num_layers", *(["moe_num_experts"] if config.moe_every else [])]
    if "lm_head.weight" in ours and config.tie_word_embeddings:
        names.append("tie_word_embeddings")
    for name in names:
        if (value := getattr(config, name)) != facts[name]:
            raise ValueError(
                f"config.json contradicts the weights: {name} {value!r}, of which the weights have {facts[name]!r}"
            )


def _warn_of_dropped_tokens(config: RetNetConfig, found: Format, told: dict[str, Any]) -> None:
    if not config.moe_every or not NONE_DROPPED.keys() <= found.options.keys():
        return
    usual = torchscale.RetNetConfig()
    theirs = {name: told.get(name, getattr(usual, name)) for name in NONE_DROPPED}
    fraction, policy = theirs.values()
    if number(fraction) >= 1 and (policy == "all" or config.moe_top_k == 1):
        return
    warnings.warn(
        f"these experts had {_spelt(theirs)}{'' if told.keys() & theirs.keys() else ', by default'}, with which "
        f"{found.name} leaves tokens out, by their number or by chance; here none is left out: the logits are those "
        f"of {found.name}, in evaluation, with {_spelt(NONE_DROPPED)}",
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
    for key in [key for key in ours if key.startswith("constant.")]:
        del ours[key]
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
    # Each tensor is released as soon as it is converted: a large model is never held in two dtypes.
    state = {places[key][0]: ours.pop(key).to(config.dtype) for key in list(ours)}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()
