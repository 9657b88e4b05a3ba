"""Train a byte-level RetNet language model on text files with transformers' Trainer."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging as transformers_logging

from retention.layer import set_backend
from retention.model import PRESETS

from .modeling import RetNetConfig, RetNetForCausalLM

SETTINGS = "training.json"
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Settings:
    """What a run is made of; kept beside its checkpoints, so that it can be resumed without being told again."""

    files: list[str] = field(default_factory=list)  # none: the Python standard library
    preset: str = "tiny"
    steps: int = 1200
    batch: int = 16
    context: int = 128
    lr: float = 4e-3
    seed: int = 0
    eval_every: int = 250
    save_every: int = 250
    device: str = "auto"
    dtype: str = "float32"
    backend: str = "auto"
    form: str = "auto"
    corpus: str = ""  # its SHA-256, once it has been read

    def check(self) -> None:
        """Raises: ValueError that names the option."""
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got preset {self.preset!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got dtype {self.dtype!r}")
        for name in ("steps", "batch", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {name} {getattr(self, name)}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2; got context {self.context}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0; got lr {self.lr}")
        check_device(self.device)


def quiet() -> None:
    """No bars and notices of transformers' own between what a command prints."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check_device(device: str) -> None:
    """Raises: ValueError for a device that is unknown or not here."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got device {device!r}")
    here = torch.accelerator.current_accelerator(check_available=True)
    if device not in ("auto", "cpu") and (here is None or here.type != device):
        raise ValueError(f"device {device!r} is not available here; use --device cpu")


def train(settings: Settings, out: Path, *, resume: bool = False) -> tuple[RetNetForCausalLM, float | None]:
    """Run or continue a training; checkpoints and the model go to `out`.

    resume: go on from the last checkpoint in `out`, or from the beginning if there is none yet.
    Returns: the model and its validation loss in nats; None for the loss if Ctrl-C came before the end.
    Raises: ValueError or BackendError for what cannot be, before anything is written.
    """
    settings.check()
    train_text, valid_text = corpus(settings.files, skip=out)
    digest = hashlib.sha256(train_text + valid_text).hexdigest()
    if resume and settings.corpus not in ("", digest):
        raise ValueError("the corpus is not what it was when the run began; put its files back, or begin a new run")
    settings = replace(settings, corpus=digest)
    train_set = Blocks("training", train_text, settings.context)
    valid_set = Blocks("validation", valid_text, settings.context)

    checkpoint = last_checkpoint(out) if resume else None
    finished = checkpoint is not None and int(checkpoint.name.split("-")[1]) >= settings.steps
    set_seed(settings.seed)
    if finished:
        model = RetNetForCausalLM.from_pretrained(checkpoint)
    else:
        model = RetNetForCausalLM(RetNetConfig(**PRESETS[settings.preset] | {"vocab_size": 256}))
    set_backend(model, settings.backend, settings.form)
    with torch.no_grad():
        model(train_set[0]["input_ids"][None, :2])  # raises here if no backend can
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS).write_text(json.dumps(asdict(settings), indent=2) + "\n")

    trainer = Trainer(
        model=model,
        args=_arguments(settings, out),
        train_dataset=train_set,
        eval_dataset=valid_set,
        callbacks=[SaveOnInterrupt()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(settings.batch * settings.context))
    if not finished:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.state.global_step < settings.steps:
            return model, None
    trainer.save_model(str(out))
    return model, trainer.evaluate()["eval_loss"]


def last_checkpoint(out: Path) -> Path | None:
    """Of the complete ones: the trainer's state is written last."""
    found = [path.parent for path in out.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _arguments(settings: Settings, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, settings.steps // 10),
        weight_decay=0.01,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        logging_steps=10,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=False,  # or a callback would print what the bar shows
    )


class Blocks(Dataset):
    """A text cut into examples of `context` bytes. part: what it is for, to be named in errors."""

    def __init__(self, part: str, text: bytes, context: int):
        if len(text) < context:
            raise ValueError(
                f"the {part} part of the corpus must hold at least context bytes; got {len(text)}, context {context}"
            )
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return len(self.bytes) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.bytes[index * self.context : (index + 1) * self.context].long()
        return {"input_ids": tokens, "labels": tokens}


def corpus(
    files: Sequence[str | Path] = (), *, skip: Path | None = None, validation_limit: int = 100_000
) -> tuple[bytes, bytes]:
    """Training and validation text, the documents ended by a zero byte.

    files: text files, or folders of them; none: the source of the Python standard library. What is hidden, holds zero
    bytes or lies in the folder `skip` is left out. Of 20 documents or more
    every 20th is held out for validation, of fewer the last 5 % of each. It is cut to `validation_limit` bytes.
    Raises: ValueError for a path that does not exist or holds no text.
    """
    paths = list(_documents(files)) if files else _standard_library()
    paths = [path for path in paths if skip is None or not path.resolve().is_relative_to(skip.resolve())]
    texts = [text for text in (path.read_bytes() for path in paths) if b"\0" not in text]
    if not texts:
        raise ValueError(f"the corpus must hold at least one text; got none in {', '.join(map(str, files))}")
    documents = [text + b"\0" for text in texts]
    if len(documents) >= 20:
        held_out = documents[::20]
        kept = [text for i, text in enumerate(documents) if i % 20]
    else:
        cuts = [len(text) * 19 // 20 for text in documents]
        held_out = [text[cut:] for text, cut in zip(documents, cuts, strict=True)]
        kept = [text[:cut] for text, cut in zip(documents, cuts, strict=True)]
    return b"".join(kept), b"".join(held_out)[:validation_limit]


def _documents(files: Iterable[str | Path]) -> Iterable[Path]:
    for file in map(Path, files):
        if file.is_dir():
            yield from sorted(
                path for path in file.rglob("*") if path.is_file() and not _hidden(path.relative_to(file))
            )
        elif file.is_file():
            yield file
        else:
            raise ValueError(f"no such file or folder: {file}")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


class Progress(ProgressCallback):
    """Loss and tokens per second on the progress bar; a line for each evaluation."""

    def __init__(self, tokens_per_step: int):
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.last = (0.0, 0)  # time and step of the last report

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step  # not 0 in a resumed run
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 20,  # seconds; a log file wants few lines
        )
        self.last = time.perf_counter(), state.global_step

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """No second bar: an evaluation takes seconds."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        if "eval_loss" in logs:
            loss = logs["eval_loss"]
            line = f"step {state.global_step}: validation {loss:.4f} nats, {loss / math.log(2):.4f} bits per byte"
            self.training_bar.write(line)
        elif "loss" in logs:
            now, (then, step) = time.perf_counter(), self.last
            speed = (state.global_step - step) * self.tokens_per_step / (now - then)
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.last = time.perf_counter(), state.global_step


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C ends the current step, saves and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = signal.signal(signal.SIGINT, self._ask)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, self.before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
