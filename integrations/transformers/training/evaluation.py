"""Judges language models side by side on held-out text, by tests that are hard for a state of constant size.

The tests are made from the text itself:
    text: the loss by position, and the share of next tokens that the model predicts.
    copy: a passage is followed by itself; the share of the repeated tokens that the model predicts.
    needle: a key and a value stand somewhere in a text that ends with the key; the share of the value's tokens that the
        model predicts.
    continuations: what the model writes by its likeliest tokens: how many texts end in a loop, and how many tokens are
        those of the teacher.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...swap import Swapped, replace_attention
from ...swap.retention import HostedRetention
from ..decoding import stream
from .codec import Codec
from .corpus import read_corpus
from .opening import open_model
from .progress import progress_bar
from .saving import write_text
from .settings import check_device
from .tasks import find_tasks, run_tasks

__all__ = ["Items", "Judged", "evaluate", "judge", "make_items", "table", "without_retention", "write"]

_DEPTHS = (0.1, 0.35, 0.6, 0.85)  # of needles, as shares of the context
_PART = 8  # tokens of a needle's key, and of its value
_NEW = 48  # tokens of a continuation
_PERIOD = 16  # longest piece, in tokens, whose repetition counts as a loop
_BUCKETS = 4  # of positions
_EXACT = "window and sinks alone"  # name of a column
_SILENT = -1e4  # logarithm of the factor of retention's scores; its exponential is 0


@dataclass
class Items:
    """The tests: rows of token ids, and where the tokens that count begin.

    Shapes: text (N, C); copies (N, C), of which the last C / 2 - 8 tokens count; needles (N, C), of which the last 8
        count; prompts (N, C / 4).
    """

    text: Tensor
    copies: Tensor
    needles: Tensor

    @property
    def prompts(self) -> Tensor:
        return self.text[:, : self.text.shape[1] // 4]


@dataclass
class Judged:
    """What a model did in the tests.

    Attributes:
        values: the rows of the table by name.
        scores: by test, the share of right tokens of each item (N,).
        choices: the likeliest next tokens (N, C - 1) in the text.
        written: the continuations (N, 48).
    """

    values: dict[str, float]
    scores: dict[str, Tensor]
    choices: Tensor
    written: Tensor


def make_items(blocks: Sequence[Mapping[str, Tensor]], count: int) -> Items:
    """Make the tests from the first `count` examples {"input_ids": (C,)} of held-out text; C is at least 64.

    Raises: ValueError if there are fewer than two examples, or they are shorter.
    """
    text = torch.stack([blocks[i]["input_ids"] for i in range(min(count, len(blocks)))])
    length = text.shape[1]
    if len(text) < 2 or length < 64:
        raise ValueError(
            f"the tests need at least 2 sequences of 64 tokens of held-out text; got {len(text)} of {length}; "
            "give more text, or another context"
        )
    half = text[:, : length // 2]
    copies = torch.cat([half, half], dim=1)
    needles = [_needle(row, text[i - 1], _DEPTHS[i % len(_DEPTHS)]) for i, row in enumerate(text)]
    return Items(text, copies, torch.stack(needles))


def _needle(text: Tensor, other: Tensor, depth: float) -> Tensor:
    """Put a key and its value, both from another text, into a text; then the key again, and the value to predict."""
    middle = len(other) // 2
    key, value = other[middle : middle + _PART], other[middle + _PART : middle + 2 * _PART]
    hay = text[: len(text) - 4 * _PART]
    place = int(depth * len(hay))
    return torch.cat([hay[:place], key, value, hay[place:], key, value])


def evaluate(
    model: str,
    files: Sequence[str] = (),
    *,
    teacher: str = "",
    against: Sequence[str] = (),
    column: str = "text",
    context: int = 512,
    count: int = 32,
    batch: int = 4,
    device: str = "auto",
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
) -> dict[str, Judged]:
    """Judge a saved model beside its teacher and others on held-out text.

    Beside a teacher, the teacher with exact attention to the model's window and sinks, without retention, is judged
    too: what the model has beyond it is the merit of retention.

    Args:
        model: a folder, a GGUF file, or a name on the Hugging Face Hub.
        files, column: the text, as in `read_corpus`; its validation part is used.
        teacher: the model before its attention was replaced; "" for none.
        against: further models.
        context: tokens of a test.
        count: number of items of each test.
        batch: sequences at a time.
        device: auto, cpu, cuda or mps.
        tasks, include_path: tasks of lm-eval to run too, and a folder with further ones, as in `find_tasks`.
    Returns: the results by name, first the teacher's.
    Raises: ValueError for a model that cannot be opened, another tokenizer, too little text, an unknown task, or tasks
        for a model without a tokenizer; ImportError for tasks without lm-eval.
    """
    check_device(device)
    if include_path is not None and not tasks:
        raise ValueError(f"include_path has tasks of lm-eval, so that tasks must name some; got {include_path} alone")
    manager = find_tasks(tasks, include_path) if tasks else None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    place = (accelerator or "cpu") if device == "auto" else device
    student, codec = open_model(model)
    if tasks and codec.tokenizer is None:
        raise ValueError(f"tasks of lm-eval need a model with a tokenizer; {model} reads bytes")
    models: dict[str, Any] = {}
    if teacher:
        models[teacher] = _opened_beside(model, codec, teacher)
        if (twin := _exact_only(models[teacher], student)) is not None:
            models[_EXACT] = twin
    models[model] = student
    models |= {name: _opened_beside(model, codec, name) for name in against}
    corpus = read_corpus(files, codec, context, column=column)
    items = make_items(cast(Any, corpus.valid), count)
    for opened in models.values():
        opened.to(place)
    found = judge(models, items, teacher=teacher, batch=batch)
    if tasks:
        for name, metrics in run_tasks(models, codec.tokenizer, tasks, manager, batch=batch).items():
            found[name].values |= metrics
    return found


def _opened_beside(model: str, codec: Codec, name: str) -> PreTrainedModel:
    """Open another model. Raises: ValueError if it has another tokenizer."""
    other, theirs = open_model(name)
    if theirs.digest != codec.digest:
        raise ValueError(f"{name} must have the tokenizer of {model}, since all models read the same tokens")
    return other


def _exact_only(teacher: Any, student: Any) -> Any:
    """Return the teacher with the exact attention of the student's layers alone; None if they have none."""
    layers = {name: m.retention for name, m in student.named_modules() if isinstance(m, Swapped)}
    exact = {name: layer for name, layer in layers.items() if layer.rest is not None}
    if not exact:
        return None
    twin = copy.deepcopy(teacher)
    by_size: dict[tuple[Any, int], set[str]] = {}
    for name, layer in exact.items():
        by_size.setdefault((layer.window, layer.sinks), set()).add(name)
    for (window, sinks), names in by_size.items():
        where = _one_of(names)
        replace_attention(twin, where=where, allow_lost=True, window=window, sinks=sinks, gate=None)
    without_retention(twin)
    return twin


def _one_of(names: set[str]) -> Callable[[str, torch.nn.Module], bool]:
    return lambda name, _: name in names


def judge(
    models: Mapping[str, Any], items: Items, *, teacher: str = "", batch: int = 4, hidden: bool = False
) -> dict[str, Judged]:
    """Run the tests on models.

    Args:
        models: language models by name, all with the same tokenizer.
        items: the tests.
        teacher: the name of the model that the others are compared with, which must be the first; "" for none.
        batch: sequences at a time.
        hidden: show no progress bar.
    Returns: the results by name.
    """
    found: dict[str, Judged] = {}
    steps = len(models) * 4
    with progress_bar("judging", total=steps, unit="test", disable=hidden) as bar:
        for name, model in models.items():
            model.eval()
            found[name] = _judged(model, items, found.get(teacher), batch, bar)
    return found


def _judged(model: Any, items: Items, teacher: Judged | None, batch: int, bar: tqdm) -> Judged:
    losses, choices = _read(model, items.text, batch, bar)
    scores = {"text": _right(choices, items.text).mean(1)}
    for name, rows, counted in (
        ("copy", items.copies, items.copies.shape[1] // 2 - _PART),
        ("needle", items.needles, _PART),
    ):
        scores[name] = _right(_read(model, rows, batch, bar)[1], rows)[:, -counted:].mean(1)
    room = getattr(model.config, "max_position_embeddings", None) or items.text.shape[1] + _NEW
    new = min(_NEW, room - items.prompts.shape[1])
    parts = [list(stream(model, part.to(model.device), new, temperature=0)) for part in items.prompts.split(batch)]
    written = torch.cat([torch.cat(part, 1).cpu() for part in parts])
    bar.update()

    values = {"loss": losses.mean().item()}
    edges = [n * items.text.shape[1] // _BUCKETS for n in range(_BUCKETS + 1)]
    for low, high in itertools.pairwise(edges):
        values[f"loss, tokens {max(low, 1)} to {high - 1}"] = losses[:, max(low - 1, 0) : high - 1].mean().item()
    values |= {f"right, {name}": score.mean().item() for name, score in scores.items()}
    values["loops"] = sum(map(_loops, written)) / len(written)
    if teacher is not None:
        values["next token as the teacher's"] = (choices == teacher.choices).float().mean().item()
        same = (written == teacher.written).cumprod(dim=1).sum(dim=1)
        values["tokens written as the teacher"] = same.float().mean().item()
        values |= {f"wins or ties, {name}": _wins(scores[name], teacher.scores[name]) for name in scores}
    return Judged(values, scores, choices, written)


@torch.no_grad()
def _read(model: Any, rows: Tensor, batch: int, bar: tqdm) -> tuple[Tensor, Tensor]:
    """Return the loss of each token but the first, and the likeliest token in its place, both (N, C - 1)."""
    losses, choices = [], []
    for ids in rows.split(batch):
        ids = ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu())
        choices.append(logits.argmax(-1).cpu())
    bar.update()
    return torch.cat(losses), torch.cat(choices)


def _right(choices: Tensor, rows: Tensor) -> Tensor:
    return (choices == rows[:, 1:]).float()


def _wins(mine: Tensor, theirs: Tensor) -> float:
    """The share of items on which a model does no worse than its teacher."""
    return (mine >= theirs).float().mean().item()


def _loops(row: Tensor) -> bool:
    """Tell whether the last tokens are one piece again and again."""
    end = row[-3 * _PERIOD :]
    return any(torch.equal(end[period:], end[:-period]) for period in range(1, _PERIOD + 1))


def table(found: Mapping[str, Judged]) -> str:
    """Return the results as a table, a column for each model."""
    names = list(dict.fromkeys(name for judged in found.values() for name in judged.values))
    lines = [["", *found]]
    for name in names:
        values = (judged.values.get(name) for judged in found.values())
        lines.append([name, *("" if value is None else _shown(name, value) for value in values)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(_row(line, widths) for line in lines)


def write(found: Mapping[str, Judged], file: Path) -> None:
    """Write the values of all models as JSON."""
    values = {name: judged.values for name, judged in found.items()}
    write_text(file, json.dumps(values, indent=2) + "\n")


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    others = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([f"{cells[0]:<{widths[0]}}", *others]).rstrip()


def _shown(name: str, value: float) -> str:
    if name.startswith(("loss", "task")):
        return f"{value:.4f}"
    return f"{value:.1f}" if name.startswith("tokens") else f"{100 * value:.1f} %"


@torch.no_grad()
def without_retention(model: torch.nn.Module) -> None:
    """Silence the retention of all replaced layers, in place: exact attention to window and sinks remains.

    The weight of retention's scores becomes 0 and is not trained any more, so its other parameters get no gradients.

    Raises: ValueError if a layer has neither window nor sinks.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, HostedRetention)]
    if not layers or any(layer.rest is None for layer in layers):
        raise ValueError("without retention, a layer needs a window or sinks; pass window= or sinks= to it")
    for layer in layers:
        assert layer.rest is not None
        layer.rest.weight.zero_()
        layer.rest.bias.fill_(_SILENT)
        layer.rest.requires_grad_(False)
