"""The settings of a training run and checks of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from transformers import AutoConfig

from retention.former import current_options
from retention.model import FORMER_FLAGS, PRESETS

from ...files import read_json
from ..compat import MIXED_WEIGHTS, TESTED, get_available_reporting_integrations, versions
from ..configuration import FORMER, RetNetConfig
from .codec import ByteCodec, Codec, load_codec
from .saving import write_text

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DEVICES",
    "DTYPES",
    "Kept",
    "Settings",
    "check_device",
    "check_dtype",
    "check_report_to",
    "codec_of",
    "read_config",
]

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16")

_CHANGED = {
    "vocabulary": "the tokenizer has changed since the run began; restore it, or begin a new run",
    "weights": "the weights of the model have changed since the run began; restore them, or begin a new run in another "
    "folder",
    "corpus": "the corpus has changed since the run began; restore its files, or begin a new run",
}


@dataclass
class Kept:
    """Base of settings that are stored beside the checkpoints of a run, so that `--resume` finds them."""

    FILE: ClassVar[str]
    FORMER: ClassVar[dict[str, str]] = {}  # former names of settings, and the new ones
    FREE: ClassVar[tuple[str, ...]] = ()  # settings that a resumed run may change

    @classmethod
    def read(cls, out: Path) -> Self:
        """Read the settings of the run in `out`.

        Raises: ValueError if there are none, or the file holds unknown settings or values of a wrong type.
        """
        file = out / cls.FILE
        if not file.is_file():
            raise ValueError(f"nothing to resume in {out}: it has no {cls.FILE}")
        try:
            options = read_json(file, "the settings of a run")
        except ValueError as error:
            raise ValueError(f"{error}; begin a new run in another folder") from error
        options = {cls.FORMER.get(name, name): value for name, value in options.items()}
        hints = get_type_hints(cls)
        unknown = sorted(options.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"{file} has settings that this version does not know: {', '.join(unknown)}; "
                "install the newer version of multiscale-retention that began the run, or begin a new one"
            )
        for name, value in options.items():
            if not _is_a(value, hints[name]):
                raise ValueError(f"{name} in {file} must be {cls.__annotations__[name]}; got {value!r}")
        return cls(**options)

    def write(self, out: Path) -> None:
        """Write the settings to `out`. Raises: NotSavedError."""
        write_text(out / self.FILE, json.dumps(asdict(self), indent=2) + "\n")

    def check_same(self, **found: Any) -> None:
        """Check that a resumed run finds what it began with.

        Args:
            found: the current values of settings.
        Raises: ValueError if one differs from the stored value.
        """
        for name, value in found.items():
            begun = getattr(self, name)
            if begun and value != begun:
                raise ValueError(_CHANGED[name].format(begun=begun, found=value))

    def check_counts(self, *names: str) -> None:
        """Check the settings of these names. Raises: ValueError for a number below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {name} {getattr(self, name)}")


@dataclass
class Settings(Kept):
    """The settings of a training; each field is an option of `retention train`, whose help explains it."""

    FILE: ClassVar[str] = "training.json"
    FREE: ClassVar[tuple[str, ...]] = ("context_parallel",)

    files: list[str] = field(default_factory=list)  # []: the source of the Python standard library
    text_column: str = "text"
    tokenizer: str = ""  # "": bytes
    preset: str = "tiny"
    config: dict[str, Any] = field(default_factory=dict)  # options of RetNetConfig; replaces the preset
    steps: int = 1200
    batch: int = 16
    accumulate: int = 1
    context: int = 128
    lr: float = 4e-3
    warmup: int | None = None
    weight_decay: float = 0.01
    seed: int = 0
    eval_every: int = 250
    save_every: int = 250
    gradient_checkpointing: bool = False
    context_parallel: int = 1
    tensor_parallel: int = 1
    fsdp: bool = False
    device: str = "auto"
    dtype: str = "float32"
    backend: str = "auto"
    form: str = "auto"
    report_to: str = "none"  # an experiment tracker
    # Set when the run begins; a resumed run must find the same values.
    corpus: str = ""  # SHA-256 of the corpus
    vocabulary: str = ""  # SHA-256 of the tokenizer
    unit: str = ""  # unit of the corpus: bytes or tokens
    processes: int = 0  # with different rows, when the run began; `batch` is that of one of them

    def check(self) -> None:
        """Raises: ValueError that names the option."""
        if not self.config and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got preset {self.preset!r}")
        check_dtype(self.dtype)
        self.check_counts("steps", "batch", "accumulate", "eval_every", "save_every")
        self.check_counts("context_parallel", "tensor_parallel")
        if self.context < 2:
            raise ValueError(f"context must be at least 2; got context {self.context}")
        if self.context < self.context_parallel:
            raise ValueError(
                "context must have a token for each process of context_parallel; "
                f"got context {self.context}, context_parallel {self.context_parallel}"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0; got lr {self.lr}")
        if self.warmup is not None and not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be between 0 and steps, {self.steps}; got warmup {self.warmup}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0; got weight_decay {self.weight_decay}")
        if self.dtype == "float16" and (self.fsdp or self.tensor_parallel > 1):
            raise ValueError("fsdp and tensor_parallel need dtype float32 or bfloat16; got dtype 'float16'")
        if self.tensor_parallel > 1 and not MIXED_WEIGHTS:
            raise ValueError(
                "tensor_parallel needs a transformers whose optimiser takes divided weights beside whole ones; "
                f"got {versions()}; install {TESTED[-1]}, or leave tensor_parallel out"
            )
        check_device(self.device)
        check_report_to(self.report_to)

    def model_config(self, codec: Codec, least: int) -> RetNetConfig:
        """Return the config of the model.

        Args:
            codec: gives the number of tokens and the special tokens.
            least: the smallest vocab_size that covers the corpus.
        Raises: ValueError for a smaller vocab_size.
        """
        size = {"vocab_size": codec.size}
        options = size | self.config if self.config else PRESETS[self.preset] | size
        config = RetNetConfig(**current_options(options | codec.specials, FORMER, FORMER_FLAGS))
        if config.vocab_size < least:
            raise ValueError(
                f"vocab_size must be at least {least}, the number of tokens; got {config.vocab_size}; "
                "raise it in the config, or name the --tokenizer and leave it out"
            )
        return config


def _is_a(value: Any, kind: Any) -> bool:
    """Tell whether a value read from JSON has the annotated type of a field."""
    if kind is Any:
        return True
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, *get_args(kind)) for item in value)
    if get_origin(kind) is not None and get_origin(kind) is not dict:
        return any(_is_a(value, one) for one in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


def check_dtype(dtype: str) -> None:
    """Raises: ValueError for an unknown dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got dtype {dtype!r}")


def check_device(device: str) -> None:
    """Raises: ValueError for a device that is unknown or not available."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got device {device!r}")
    here = torch.accelerator.current_accelerator(check_available=True)
    if device not in ("auto", "cpu") and (here is None or here.type != device):
        raise ValueError(f"device {device!r} is not available here; use --device cpu")


def check_report_to(tracker: str) -> None:
    """Raises: ValueError for an experiment tracker that transformers does not know or that is not installed."""
    known = ("none", "all", *get_available_reporting_integrations())
    if tracker not in known:
        raise ValueError(
            f"report_to must be one of {', '.join(known)}, or another tracker of transformers once it is installed; "
            f"got report_to {tracker!r}"
        )


def codec_of(folder: Path) -> Codec:
    """Return the codec of the model in a folder.

    Raises: ValueError if the model was trained on tokens and its tokenizer is missing.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return load_codec(str(folder))
    unit = Settings.read(folder).unit if (folder / Settings.FILE).is_file() else ""
    if unit == "tokens":
        raise ValueError(f"{folder} must hold the model's tokenizer, for it was trained on token ids; put it there")
    if not unit and (size := _vocabulary(folder)) > ByteCodec.size:
        raise ValueError(
            f"{folder} must hold the model's tokenizer, for it knows {size} tokens, which are no bytes; put it there"
        )
    return load_codec("")


def _vocabulary(folder: Path) -> int:
    read_json(folder / "config.json")
    return AutoConfig.from_pretrained(folder).get_text_config().vocab_size


def read_config(path: Path) -> dict[str, Any]:
    """Read the options of `RetNetConfig` from a JSON file, or from a folder's config.json.

    Raises: ValueError for a missing file, a file without a JSON object, or an unknown option.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no such config: {file}")
    wanted = 'options of a RetNet, such as {"dim": 256, "num_layers": 6}'
    options = read_json(file, wanted)
    if not options:
        raise ValueError(f"{file} must hold {wanted}")
    RetNetConfig.strictly_from(options, file)
    return options
