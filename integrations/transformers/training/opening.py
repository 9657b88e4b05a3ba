"""Opens the language model that a command works on: a folder, a GGUF file, or a name on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ...files import refused
from ..compat import logging
from .codec import GGUF, Codec, check_gguf, load_codec
from .settings import codec_of

__all__ = ["bars_of_transformers", "open_model"]


def open_model(name: str) -> tuple[PreTrainedModel, Codec]:
    """Open a causal language model in float32, and its tokenizer.

    Args:
        name: a folder, a GGUF file, or a name on the Hugging Face Hub. The weights of a GGUF file are unpacked into a
            plain model of its class, which `save_pretrained` can write.
    Raises: ValueError if there is no such model; ImportError if the file needs gguf, which is not installed.
    """
    path = Path(name)
    if path.suffix == GGUF:
        return _from_gguf(path), load_codec(name)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob(f"*{GGUF}"))
        hint = f"; name its file: {files[0]}" if files else ""
        raise ValueError(f"no model in {path}: it has no config.json{hint}")
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"model must be a folder, a GGUF file or a name on the hub; {name!r} cannot be loaded: {error}"
        ) from error
    with bars_of_transformers():
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    return model, codec_of(path) if path.is_dir() else load_codec(name)


@contextmanager
def bars_of_transformers() -> Iterator[None]:
    """Show transformers' progress bars for download, loading and saving, which `quiet` hides."""
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        yield
    finally:
        if not shown:
            logging.disable_progress_bar()


def _from_gguf(file: Path) -> PreTrainedModel:
    check_gguf(file)
    tqdm.write(f"reading {file}; this takes about a minute for each 100 MB")
    with bars_of_transformers(), refused(f"{file} holds no language model that transformers can read"):
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers counts the model as quantised although its weights are unpacked, and refuses to save it.
    options = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    config = type(loaded.config).from_dict(options)
    return type(loaded).from_pretrained(None, config=config, state_dict=loaded.state_dict(), dtype=torch.float32)
