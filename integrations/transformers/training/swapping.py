"""Replaces the attention of a trained model with retention and trains it further; `retention swap` runs this."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from retention.options import check_choice, check_factor, check_whole

from ...swap import SwapReport, plan_replacement
from ...swap.retention import FORMER
from ..compat import TRAINER_STATE_NAME, TrainerState
from ..replaced_config import marked_layers
from .choosing import LayerCosts, choose_layers
from .codec import Codec
from .corpus import Corpus, read_corpus
from .distill import CONTEXT, TRANSFER, TUNE, TUNING, Recovery, replace_in_parts, sequences_per_step
from .lora import peft
from .opening import bars_of_transformers, open_model
from .plot import draw_layers, draw_recovery
from .progress import PLOT, Batch, Progress, SaveOnInterrupt, progress_bar
from .saving import alone_in, check_folder, checkpoints, written_whole
from .settings import Kept, check_device, check_dtype, check_report_to
from .train import device_arguments

__all__ = ["Picture", "StageProgress", "Swap", "SwapSettings", "swap"]

_LAYER_COSTS, _LAYER_PLOT = "layers.json", "layers.png"
_RECOVERY = "recovery.json"  # the losses before, between and after the stages


@dataclass
class SwapSettings(Kept):
    """The settings of a replacement; each field is an option of `retention swap`, whose help explains it."""

    FILE: ClassVar[str] = "swap.json"
    FORMER: ClassVar[dict[str, str]] = FORMER

    model: str = ""  # a folder, a GGUF file, or a name on the Hugging Face Hub
    files: list[str] = field(default_factory=list)  # []: the source of the Python standard library
    text_column: str = "text"
    layers: list[int] | None = None  # None: all
    choose: int | None = None  # number of layers, the cheapest to replace; None: those of `layers`
    allow_lost: bool = False
    decay: str | None = None  # None: log_linear with a window, else short
    features: bool = True
    window: int | None = None  # in tokens; None: no window of exact attention
    sinks: int = 0
    gate: str | None = "silu"
    num_decays: int | None = None  # None: 2 with features, else 1
    parts: int = 1
    transfer_steps: int = 600
    tuning_steps: int = 1400
    batch: int = 4
    context: int | None = None  # in tokens; None: 256, or fewer if the model has fewer positions
    longer: list[int] = field(default_factory=list)  # contexts of further stages, in tokens
    longer_steps: int = 200  # for each of them
    transfer_lr: float | None = None  # None: found by a short search, as is tuning_lr
    tuning_lr: float | None = None
    tune: str = "all"
    rank: int = 16  # of low-rank updates, with tune "lora"
    patience: int | None = None  # in evaluations; None: no early stop
    label_weight: float = 0.0
    seed: int = 0
    eval_every: int = 100
    save_every: int = 100
    device: str = "auto"
    dtype: str = "float32"
    backend: str = "auto"
    form: str = "auto"
    report_to: str = "none"  # an experiment tracker
    # Set when the run begins; a resumed run must find the same values.
    weights: str = ""  # SHA-256 of the model's weights
    corpus: str = ""  # SHA-256 of the corpus
    vocabulary: str = ""  # SHA-256 of the tokenizer

    @property
    def replacement(self) -> dict[str, Any]:
        """The options of `replace_attention`, except the layers."""
        names = ("allow_lost", "num_decays", "decay", "features", "window", "sinks", "gate")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Raises: ValueError that names the option."""
        if self.choose is not None and self.layers is not None:
            raise ValueError(
                f"choose and layers must not both be given; got choose {self.choose}, layers {self.layers}"
            )
        check_whole("choose", self.choose, optional=True)
        self.check_counts("parts", "batch", "eval_every", "save_every", "longer_steps", "rank")
        for name in ("transfer_steps", "tuning_steps"):
            if getattr(self, name) < 0 or getattr(self, name) % self.parts:
                raise ValueError(
                    f"{name} must be a multiple of parts, {self.parts}, at least 0; got {name} {getattr(self, name)}"
                )
        if self.context is not None and self.context < 2:
            raise ValueError(f"context must be at least 2; got context {self.context}")
        if self.longer != sorted(set(self.longer)):
            raise ValueError(f"longer must be different contexts, from short to long; got longer {self.longer}")
        check_choice("tune", self.tune, TUNE)
        if self.tune == "lora":
            peft()
        check_whole("patience", self.patience, optional=True)
        for name in ("transfer_lr", "tuning_lr"):
            if getattr(self, name) is not None:
                check_factor(name, getattr(self, name))
        check_dtype(self.dtype)
        check_device(self.device)
        check_report_to(self.report_to)


@dataclass
class Swap:
    """The result of a replacement.

    Attributes:
        model: the trained model.
        codec: encodes and decodes its text.
        corpus: the data it was trained on.
        report: the report of the replacement.
        recovery: the losses.
        longer: the losses of each further stage by its context.
    """

    model: Any
    codec: Codec
    corpus: Corpus
    report: SwapReport
    recovery: Recovery
    longer: dict[int, Recovery]

    def __str__(self) -> str:
        lines = [f"{self.report}", f"{self.recovery}"]
        lines += [f"context {context}: {found}" for context, found in self.longer.items()]
        return "\n".join(lines)


def swap(settings: SwapSettings, out: Path, *, resume: bool = False) -> Swap:
    """Run or continue a replacement; write checkpoints, the model, its tokenizer and a plot of the losses to `out`.

    Args:
        settings: the settings of the run.
        out: the folder of the run.
        resume: continue from the last complete checkpoint in `out`, or start anew if there is none.
    Returns: the model and the losses.
    Raises: ValueError, OSError, ImportError or BackendError for settings that cannot run, before anything is written to
        `out`. Stopped, a KeyboardInterrupt, if Ctrl-C or another signal ends the run. FloatingPointError if the
        training diverges. NotSavedError if the disk is full.
    """
    settings.check()
    check_folder(out)
    with SaveOnInterrupt() as stop, alone_in(out):
        return _swap(settings, out, stop, resume)


def _swap(settings: SwapSettings, out: Path, stop: SaveOnInterrupt, resume: bool) -> Swap:
    model, codec = open_model(settings.model)
    if marked_layers(model.config):
        raise ValueError(f"{settings.model} has retention already; name the model as it was before")
    plan = plan_replacement(model, layers=settings.layers, **settings.replacement)
    layers = settings.choose or len(plan.replaced)
    if layers > len(plan.replaced):
        raise ValueError(f"choose must be at most {len(plan.replaced)}, the layers of the model; got choose {layers}")
    if settings.parts > layers:
        raise ValueError(f"parts must be at most {layers}, the layers to replace; got parts {settings.parts}")
    context = _context(settings, model)
    longest = max([context, *settings.longer])
    corpus = read_corpus(settings.files, codec, longest, column=settings.text_column, skip=out)
    if corpus.vocabulary > model.config.vocab_size:
        raise ValueError(
            f"{settings.model} must know all {corpus.vocabulary} tokens of the corpus; it knows "
            f"{model.config.vocab_size}; put the tokenizer it was trained with into its folder"
        )
    found: dict[str, Any] = {"vocabulary": codec.digest, "corpus": corpus.digest, "weights": _digest(model)}
    if resume:
        settings.check_same(**found)
    replace(settings, **found).write(out)

    contexts = {length: corpus.cut(length) for length in (context, *settings.longer)}
    set_seed(settings.seed)
    if settings.choose is not None:
        settings = replace(settings, layers=_chosen(model, settings, contexts[context], out))
        plan = plan_replacement(model, layers=settings.layers, **settings.replacement)
    first, *others = _recovered(model, settings, plan, contexts, out, stop)
    longer = dict(zip(settings.longer, others, strict=True))
    with written_whole(out, "the model") as folder, bars_of_transformers():
        model.save_pretrained(folder)
        if codec.tokenizer is not None:
            codec.tokenizer.save_pretrained(folder)
        losses = asdict(first) | {"longer": {context: asdict(found) for context, found in longer.items()}}
        (folder / _RECOVERY).write_text(json.dumps(losses, indent=2) + "\n")
    return Swap(model, codec, corpus, plan, first, longer)


def _digest(model: Any) -> str:
    """Return the SHA-256 of the model's weights."""
    whole, weights = hashlib.sha256(), model.state_dict()
    with progress_bar("digest of the weights", total=len(weights), unit="tensor") as bar:
        for name, weight in weights.items():
            whole.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            whole.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            bar.update()
    return whole.hexdigest()


def _context(settings: SwapSettings, model: Any) -> int:
    """Return the context of the first two stages. Raises: ValueError for one that the model does not have."""
    longest = getattr(model.config, "max_position_embeddings", math.inf)
    context = int(min(256, longest)) if settings.context is None else settings.context
    for name, length in [("context", context), *(("longer", length) for length in settings.longer)]:
        if length > longest:
            raise ValueError(
                f"{name} must be at most {longest}, the positions of {settings.model}; got {name} {length}"
            )
    if settings.longer and settings.longer[0] <= context:
        raise ValueError(f"longer must be above context, {context}; got longer {settings.longer[0]}")
    return context


def _chosen(model: Any, settings: SwapSettings, corpus: Corpus, out: Path) -> list[int]:
    """Return the layers to replace, from an earlier start of the run if it has chosen them."""
    assert settings.choose is not None
    if not (out / _LAYER_COSTS).is_file():
        options = settings.replacement | {"backend": settings.backend, "form": settings.form}
        costs = choose_layers(model, corpus.train, corpus.valid, settings.choose, options=options, batch=settings.batch)
        costs.write(out / _LAYER_COSTS)
        draw_layers(costs, out / _LAYER_PLOT)
        tqdm.write(str(costs))
    return LayerCosts.read(out / _LAYER_COSTS).chosen


def _recovered(
    model: Any, settings: SwapSettings, plan: SwapReport, contexts: dict[int, Corpus], out: Path, stop: SaveOnInterrupt
) -> list[Recovery]:
    """Replace and train in all stages; return the losses of the first context, then those of each longer one."""
    context, *longer = contexts
    corpus = contexts[context]
    batch = Batch(settings.batch, 1, 1, context, corpus.unit)
    layers = range(len(plan.replaced)) if settings.layers is None else settings.layers
    size = f"{model.num_parameters():,} parameters, with retention in {len(plan.replaced)} layers"
    seen = f"{batch.tokens * (settings.transfer_steps + settings.tuning_steps):,} {batch.unit}"
    title = f"{Path(settings.model).name}, {size}; training on {seen}"
    title += "".join(f", then on sequences of {length}" for length in longer)
    found = replace_in_parts(
        model,
        [part.tolist() for part in np.array_split(np.array(layers), settings.parts)],
        corpus.train,
        corpus.valid,
        out=out,
        options=settings.replacement | {"backend": settings.backend, "form": settings.form},
        longer=[(contexts[length].train, contexts[length].valid) for length in longer],
        longer_steps=settings.longer_steps,
        transfer_steps=settings.transfer_steps // settings.parts,
        tuning_steps=settings.tuning_steps // settings.parts,
        batch=settings.batch,
        transfer_lr=settings.transfer_lr,
        tuning_lr=settings.tuning_lr,
        tune=settings.tune,
        rank=settings.rank,
        patience=settings.patience,
        label_weight=settings.label_weight,
        callbacks=[StageProgress(batch, corpus), Picture(batch, out, title), stop],
        logging_nan_inf_filter=False,
        report_to=settings.report_to,
        disable_tqdm=False,  # else a callback prints each log as well
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_steps=settings.save_every,
        seed=settings.seed,
        **device_arguments(settings.device, settings.dtype),
    )
    parts, others = found[: settings.parts], found[settings.parts :]
    whole = replace(parts[-1], replaced=parts[0].replaced, tokens=sum(part.tokens for part in parts))
    return [whole, *others]


class StageProgress(Progress):
    """The progress bar and report lines of each stage."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Open the bar, for the batch of this stage."""
        context = len(kwargs["train_dataloader"].dataset[0]["input_ids"])
        self.batch = replace(self.batch, sequences=args.train_batch_size, context=context)
        super().on_train_begin(args, state, control, model, **kwargs)

    def headline(self, args: Any, model: Any) -> str:
        """Return the first line of a stage: its name, its number of trained parameters, its batch."""
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"{_stage(args)}: {learning:,} parameters learn; {self.batch}"

    def report(self, args: Any, loss: float) -> str:
        """Describe the validation loss: in the first stage, the relative error of the layers."""
        if Path(args.output_dir).name == TRANSFER:
            return f"relative error of the layers {loss:.4f}"
        return super().report(args, loss)


class Picture(TrainerCallback):
    """Plots the losses of all stages so far whenever a checkpoint is written."""

    def __init__(self, batch: Batch, out: Path, title: str):
        self.batch, self.out, self.title = batch, out, title

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the plot."""
        parts = {}
        for number, folder in _numbered(self.out, "part"):
            parts[f"part {number}"] = _history(folder / TRANSFER), _history(folder / TUNING)
        for context, folder in _numbered(self.out, CONTEXT):
            tokens = sequences_per_step(self.batch.tokens, context) * context
            parts[f"context {context}"] = [], _history(folder / TUNING, tokens / self.batch.tokens)
        draw_recovery(parts, self.batch.tokens, self.batch.unit, self.out / PLOT, self.title)


def _numbered(out: Path, name: str) -> list[tuple[int, Path]]:
    """Return the folders "name-1", "name-2", ... with their numbers, in order."""
    return sorted((int(folder.name.split("-")[1]), folder) for folder in out.glob(f"{name}-*"))


def _stage(args: Any) -> str:
    """Return the name of a stage, such as "part-1/transfer"."""
    return "/".join(Path(args.output_dir).parts[-2:])


def _history(stage: Path, length: float = 1.0) -> list[dict[str, Any]]:
    """Return the log of the newest readable checkpoint, complete or not, as it is only plotted.

    length: of a step, in steps of the plot.
    """
    for checkpoint in checkpoints(stage):
        with suppress(OSError, ValueError, TypeError):
            log = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history
            return [entry | {"step": entry["step"] * length} for entry in log]
    return []
