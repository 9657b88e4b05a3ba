"""Reads and writes files of tensors: safetensors, and torch's format without executing code in it."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retention.arguments import DTYPES

from .files import check_file, listed, one_line, read_json, refused

__all__ = ["SUFFIXES", "Tensors", "read", "write"]

Tensors = dict[str, Tensor]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WRAPPED_IN = ("model", "state_dict")  # keys of fairseq and Lightning
_MOST_WRAPPERS = 8
_PREFIXES = ("module.", "decoder.")  # of DistributedDataParallel and fairseq


def read(source: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read the tensors of a checkpoint and the config.json beside them.

    Args:
        source: a file, or a folder with one file of weights or with shards and their index.
    Returns: the tensors by name, and the contents of config.json, {} without one.
    Raises: OSError, or ValueError unless the source holds finite floating-point tensors by name.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    file = _file_in(source) if source.is_dir() else source
    beside = file.parent / "config.json"
    config = read_json(beside) if os.path.lexists(beside) and beside != file else {}
    tensors = _unwrapped(_shards(file) if file.suffix == ".json" else _loaded(file), file)
    _check_finite(tensors, file)
    return tensors, config


def write(tensors: Tensors, file: Path) -> None:
    """Write tensors as safetensors if the file's suffix is .safetensors, else with torch.save."""
    if file.suffix == ".safetensors":
        save_file(_apart(tensors), file, metadata={"format": "pt"})
    else:
        torch.save(tensors, file)


def _apart(tensors: Tensors) -> Tensors:
    """Return the tensors with a copy of each that shares memory with another, as safetensors refuses these."""
    places, apart = set(), {}
    for name, x in tensors.items():
        place = x.untyped_storage().data_ptr()
        apart[name] = x.clone() if place in places else x
        places.add(place)
    return apart


def _file_in(folder: Path) -> Path:
    for name in _NAMES:
        if os.path.lexists(folder / name):
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold one file of weights, or shards with their index; "
            f"got {listed(file.name for file in found) or 'none'}"
        )
    return found[0]


def _shards(index: Path) -> dict[str, Any]:
    """Read all files that an index names; each must hold exactly the tensors that the index assigns to it."""
    tensors: dict[str, Any] = {}
    for name, expected in _names_by_file(index).items():
        if not os.path.lexists(index.parent / name):
            raise ValueError(f"{index} names {name}, which is not there")
        found = _loaded(index.parent / name)
        if astray := sorted(map(str, found.keys() ^ expected)):
            raise ValueError(f"{index} and {name} must name the same tensors; only one of them has {listed(astray)}")
        tensors |= found
    return tensors


def _names_by_file(index: Path) -> dict[str, set[str]]:
    wanted = "a weight_map, tensors to files"
    names = read_json(index, wanted).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} must hold {wanted}; got weight_map {one_line(repr(names), 40)}")
    files: dict[str, set[str]] = {}
    for tensor, file in names.items():
        if not isinstance(file, str) or file in ("", ".", "..") or not file.isprintable() or {"/", "\\"} & {*file}:
            raise ValueError(
                f"{index} must name files beside itself; got {one_line(repr(file))} for {listed([tensor])}"
            )
        files.setdefault(file, set()).add(tensor)
    return files


def _loaded(file: Path) -> dict[Any, Any]:
    check_file(file)
    with refused(f"{file} is not a file of weights that can be read"):
        found = load_file(file) if file.suffix == ".safetensors" else _torch_loaded(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a state dict; got {type(found).__name__}")
    return found


def _check_zip(file: Path) -> None:
    """Check a zip file beyond torch's own checks: its checksums, and that its content is not compressed."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its content is compressed, as torch.save never does")
        has_checksums = any(entry.CRC for entry in entries)  # torch.save can be told to leave them out
        if has_checksums and (damaged := archive.testzip()):
            raise ValueError(f"{damaged} inside is damaged")


def _torch_loaded(file: Path) -> Any:
    with file.open("rb") as begun:
        is_zip = begun.read(4) == b"PK\3\4"
    if is_zip:
        _check_zip(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings concern kinds of tensors that are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError("its pickle is damaged, or of another kind than torch.save writes") from error
        raise ValueError(
            f"it runs code when it is loaded ({code[1]}), and that is refused; if you trust it, load it where that "
            "code is and save its state dict alone: torch.save(model.state_dict(), ...)"
        ) from error


def _unwrapped(found: dict[Any, Any], file: Path) -> Tensors:
    """Return the state dict inside a trainer's checkpoint, without prefixes of wrappers in its names."""
    for _ in range(_MOST_WRAPPERS):
        inner = next((found[key] for key in _WRAPPED_IN if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    others = [f"{key} ({what})" for key, x in found.items() if (what := _other_than_weight(key, x))]
    if others or not found:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{file} must hold floating-point tensors by name; got {listed(others) or 'nothing'}; "
            f"tensors must be dense and of {allowed}"
        )
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): x for key, x in found.items()}
    return found


def _other_than_weight(name: Any, x: Any) -> str | None:
    """Describe an entry that is not a tensor of weights; None for a tensor of weights."""
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}"
    if type(x) not in (Tensor, nn.Parameter):
        return type(x).__name__
    if x.is_nested or x.layout != torch.strided:
        return "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
    if x.dtype not in DTYPES:
        return str(x.dtype).removeprefix("torch.")
    if x.device.type != "cpu":
        return f"without values, on {x.device.type}"
    if not x.dim() or not x.numel():
        return f"of shape {tuple(x.shape)}"
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        return f"{x.numel()} values of fewer that are stored"
    return None


def _check_finite(tensors: Tensors, file: Path) -> None:
    wrong = [name for name, x in tensors.items() if not all(map(torch.isfinite, x.aminmax()))]
    if wrong:
        raise ValueError(f"{file} must hold finite values; it has NaN or infinity in {listed(wrong)}")
