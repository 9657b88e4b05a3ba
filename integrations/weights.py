"""Tensors by name, from files and to files: safetensors, or torch's own without the code that those can hold."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

_NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPED_IN = ("model", "state_dict")  # fairseq, Lightning
_PREFIXES = ("module.", "decoder.")  # DistributedDataParallel, fairseq


def read(source: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors in a file, or in the file or shards of a folder, and the config.json beside them, empty if none is.

    Raises: OSError, or ValueError for what is not a file of tensors.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    file = _file_in(source) if source.is_dir() else source
    tensors = _unwrapped(_shards(file) if file.suffix == ".json" else _one(file), file)
    config = file.parent / "config.json"
    return tensors, read_config(config) if config.is_file() else {}


def read_config(file: Path) -> dict[str, Any]:
    """Raises: OSError, or ValueError if the file does not hold a JSON object."""
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold options by name, {{...}}; got {type(config).__name__}")
    return config


def write(tensors: Tensors, file: Path) -> None:
    """As safetensors if the file is named so, else as torch.save does."""
    if file.suffix == ".safetensors":
        save_file({name: x.clone() for name, x in tensors.items()}, file, metadata={"format": "pt"})  # none may share
    else:
        torch.save(tensors, file)


def _file_in(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{folder} must hold one file of weights, or shards with their index; got {names}")
    return found[0]


def _shards(index: Path) -> dict[str, Any]:
    names = read_config(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} must hold a weight_map, tensors to files")
    tensors: dict[str, Any] = {}
    for name in sorted(set(names.values())):
        tensors |= _one(index.parent / Path(name).name)
    return tensors


def _one(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a file of safetensors: {error}") from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(f"{file} is not a file of tensors") from error
        raise ValueError(
            f"{file} runs code when it is loaded ({code[1]}), and that is refused; if you trust it, load it where that "
            "code is and save its state dict alone: torch.save(model.state_dict(), ...)"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{file} is not a file that torch can load: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a state dict; got {type(found).__name__}")
    return found


def _unwrapped(found: dict[str, Any], file: Path) -> Tensors:
    """The state dict in what a trainer saved, with names that begin at the model."""
    while inner := next((found[key] for key in _WRAPPED_IN if isinstance(found.get(key), dict)), None):
        found = inner
    others = [f"{key} ({type(x).__name__})" for key, x in found.items() if not _is_weight(x)]
    if others or not found:
        raise ValueError(f"{file} must hold floating-point tensors by name; got {', '.join(others[:10]) or 'nothing'}")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): x for key, x in found.items()}
    return found


def _is_weight(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
