"""Draws the pictures of each benchmark from its recorded lines, without measuring again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Quartiles, quartiles, ratio
from benchmarks.plot import Panel, Picture, draw

Line = dict[str, Any]  # a JSON line of `record`
BOTH = "forward+backward"


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def pictures(lines: Sequence[Line]) -> list[Picture]:
    """Return the pictures of a recorded run; none for commands without curves."""
    header = lines[0]
    words = [header["benchmark"]] if "benchmark" in header else header["command"]
    make = next((PICTURES[word] for word in words if word in PICTURES), None)
    return list(make(lines)) if make else []


def draw_pictures(file: Path, folder: Path | None = None) -> list[Path]:
    """Draw the pictures of a recorded run, beside its lines or in `folder`."""
    drawn = []
    for number, picture in enumerate(pictures(read(file))):
        drawn.append((folder or file.parent) / file_name(file.stem, number))
        draw(picture, drawn[-1])
    return drawn


def file_name(stem: str, number: int) -> str:
    return f"{stem}{f'-{number + 1}' if number else ''}.png"


def corner(header: Line) -> str:
    """Return the text of the corner: machine, versions, date and commit of the recorded lines."""
    changed = ", with uncommitted changes" if header["changed"] else ""
    threads = f"{header['threads']} thread{'s' if header['threads'] > 1 else ''}"
    torch = f"torch {header['versions']['torch'].partition('+')[0]}"
    commit = f"commit {header['commit'][:8]}{changed}"
    return f"{header['machine']}, {threads}, {torch}, {header['time'][:10]}, {commit}; line: median, band: quartiles"


def measured(lines: Sequence[Line], **wanted: Any) -> Iterator[Line]:
    """Yield the cases that ran and have these values."""
    for line in lines:
        ran = line["kind"] == "case" and line["seconds"] and not line["failure"]
        if ran and all(line[name] == value for name, value in wanted.items()):
            yield line


def put(panel: Panel, line: Line, x: str, value: Quartiles, side: str = "") -> None:
    panel.curves.setdefault(side or line["side"], {})[line[x]] = value


def times(line: Line, factor: float = 1.0) -> Quartiles:
    return quartiles([factor * second for second in line["seconds"]])


def flat(value: float) -> Quartiles:
    """Return the quartiles of a single value."""
    return value, value, value


# --- commands ---------------------------------------------------------------------------------------------------------


def op(lines: Sequence[Line]) -> Iterator[Picture]:
    """Yield a picture for each dtype, batch and head size: time and memory per token."""
    sizes = ("dtype", "batch", "heads", "key_dim", "value_dim")
    for group in dict.fromkeys(tuple(line[name] for name in sizes) for line in measured(lines)):
        dtype, batch, heads, key_dim, value_dim = group
        found = list(measured(lines, **dict(zip(sizes, group, strict=True))))
        panels = []
        for way in dict.fromkeys(line["way"] for line in found):
            panel = Panel(way, "tokens", "time per token", "s")
            floor = panel.dashed.setdefault("chunkwise form's operations at the rate of large products", {})
            for line in found:
                if line["way"] == way:
                    tokens = line["batch"] * line["length"]
                    put(panel, line, "length", times(line, 1 / tokens))
                    floor[line["length"]] = flat(line["floor"] / tokens)
            panels.append(panel)
        memory = Panel(f"{BOTH}, memory", "tokens", "extra memory at the peak", "B")
        for line in found:
            if line["way"] == BOTH and line["memory"]:
                put(memory, line, "length", flat(line["memory"]))
        title = (
            f"retain, backend by backend: {dtype}, batch {batch}, {heads} heads of {key_dim} x {value_dim}; "
            f"SDPA: values of {key_dim}"
        )
        yield Picture(title, [[*panels, memory]], corner(lines[0]))


def layer(lines: Sequence[Line]) -> Iterator[Picture]:
    """Yield the picture of the speeds relative to the attention layer."""
    title = (
        "Layers of width 512, 8 heads; retention has values of 1,024 and five projections, attention has four of 512"
    )
    sides = [line["side"] for line in measured(lines) if line["side"] != "projections"]
    yield Picture(title, [_relative(lines, "attention", sides)], corner(lines[0]))


def _relative(lines: Sequence[Line], base: str, sides: Sequence[str]) -> list[Panel]:
    """Return the panels of the speed of `sides` relative to `base`, and of their memory."""
    seconds = {(line["way"], line["length"]): line["seconds"] for line in measured(lines, side=base)}
    panels = []
    for way in dict.fromkeys(line["way"] for line in measured(lines)):
        panel = Panel(way, "tokens", f"speed relative to {base}", "x")
        for line in measured(lines, way=way):
            if line["side"] in sides and (way, line["length"]) in seconds:
                put(panel, line, "length", ratio(seconds[way, line["length"]], line["seconds"]))
        panels += [panel] if panel.curves and way in ("forward", BOTH) else []
    memory = Panel(f"{BOTH}, memory", "tokens", "extra memory at the peak", "B")
    for line in measured(lines, way=BOTH):
        if line["side"] in sides and line["memory"]:
            put(memory, line, "length", flat(line["memory"]))
    return [*panels, memory]


def peers(lines: Sequence[Line]) -> Iterator[Picture]:
    """Yield the picture of the peers beside our layer of the same width: 1,024 for torchscale, 512 for the other."""
    rows = []
    for base, theirs in (("retention", "torchscale"), ("retention, values of 512", "yet-another-retnet")):
        sides = [line["side"] for line in measured(lines) if line["side"].startswith(theirs)]
        row = _relative(lines, base, [base, *sides, "attention"])
        for panel in row:
            panel.title += ", values of 1,024" if base == "retention" else ", values of 512"
        rows.append(row)
    title = "Layers of width 512, 8 heads: other implementations and attention beside retention of the same width"
    yield Picture(title, rows, corner(lines[0]))


def decode(lines: Sequence[Line]) -> Iterator[Picture]:
    """Yield the pictures of a decoding step: first whole models with batch 1, then all cases."""
    batches = list(dict.fromkeys(line["batch"] for line in measured(lines)))
    kinds = {
        "layers": "layers of width 512, 8 heads",
        "models": "RetNet of 28 M parameters, GPT-2 of 25 M and its learnt positions",
        "replaced": "Llama of 135 M parameters, with attention and with retention",
    }
    rows = {
        kind: [_step_time(lines, kind, batch) for batch in batches] + [_cache_size(lines, kind, batches[-1])]
        for kind in kinds
        if any(measured(lines, kind_of=kind))
    }
    if "models" in rows:
        first = [rows["models"][0], _cache_size(lines, "models", batches[0])]
        yield Picture(f"One more token: {kinds['models']}", [first], corner(lines[0]))
    title = "One more token: " + "; ".join(kinds[kind] for kind in rows)
    yield Picture(title, list(rows.values()), corner(lines[0]))


def _step_time(lines: Sequence[Line], kind: str, batch: int) -> Panel:
    panel = Panel(f"time of one more token, batch {batch}", "tokens before it", "time", "s")
    for line in measured(lines, kind_of=kind, batch=batch):
        put(panel, line, "context", times(line))
    return panel


def _cache_size(lines: Sequence[Line], kind: str, batch: int) -> Panel:
    panel = Panel(f"memory between tokens, batch {batch}", "tokens before it", "cache or state", "B")
    for line in lines:
        if line["kind"] == "case" and line["kind_of"] == kind and line["batch"] == batch and "cache" in line:
            put(panel, line, "context", flat(line["cache"]))
    return panel


def model(lines: Sequence[Line]) -> Iterator[Picture]:
    panels = []
    for way in dict.fromkeys(line["way"] for line in measured(lines)):
        panel = Panel(way, "tokens", "speed", "tokens/s", linear=True)
        for line in measured(lines, way=way):
            seconds = [line["batch"] * line["length"] / second for second in line["seconds"]]
            put(panel, line, "length", quartiles(seconds))
        panels.append(panel)
    memory = Panel("training step, memory", "tokens", "extra memory at the peak", "B")
    for line in measured(lines, way="training step"):
        put(memory, line, "length", flat(line["memory"]))
    title = "Language models of width 512: RetNet 28 M parameters, GPT-2 26 M, Llama 29 M; batch 1"
    yield Picture(title, [[*panels, memory]], corner(lines[0]))


def vision(lines: Sequence[Line]) -> Iterator[Picture]:
    if not any(measured(lines)):
        return
    panels = []
    for way in dict.fromkeys(line["way"] for line in measured(lines)):
        panel = Panel(way, "pixels a side", "time of an image", "s")
        for line in measured(lines, way=way):
            put(panel, line, "size", times(line))
        panels.append(panel)
    memory = Panel(f"{BOTH}, memory", "pixels a side", "extra memory at the peak", "B")
    for line in measured(lines, way=BOTH):
        put(memory, line, "size", flat(line["memory"]))
    yield Picture("timm's vit_tiny_patch16_224 on larger images, batch 1", [[*panels, memory]], corner(lines[0]))


def pretrained(lines: Sequence[Line]) -> Iterator[Picture]:
    """Yield a picture of the loss of a pretrained model by the tokens trained on after the replacement."""
    panels = []
    curves = [line for line in lines if line["kind"] == "curve"]
    for context in dict.fromkeys(line["context"] for line in curves):
        panel = Panel(f"context {context}", "tokens trained on", "loss per token", "nats")
        mine = [line for line in curves if line["context"] == context]
        for line in mine:
            panel.curves[line["side"]] = {tokens: flat(loss) for tokens, loss in line["points"] if tokens}
        ends = sorted({tokens for line in mine for tokens, _ in line["points"] if tokens})
        panel.dashed["original"] = {tokens: flat(mine[0]["teacher"]) for tokens in ends}
        panels.append(panel)
    if panels:
        yield Picture("A pretrained model with retention, on held-out Python source", [panels], corner(lines[0]))


def distributed(lines: Sequence[Line]) -> Iterator[Picture]:
    """Bytes by the number of tokens, and modelled throughput by the number of processes."""
    sent = [line for line in lines if line["kind"] == "sent"]
    modelled = [line for line in lines if line["kind"] == "modelled"]
    bytes_by_length = Panel(f"sent, {sent[0]['ranks']} processes", "tokens", "bytes a process and layer", "B")
    for line in sent:
        curve = bytes_by_length.curves.setdefault(line["side"].partition(",")[0], {})
        curve[line["length"]] = flat(line["bytes"])
    panels = [bytes_by_length]
    for scaling, title in (("weak", "weak scaling, modelled"), ("strong", "strong scaling, modelled")):
        panel = Panel(f"{title}: 1.3b", "processes", "tokens a second and process", "tokens/s")
        for line in modelled:
            if line["scaling"] == scaling and line["preset"] == "1.3b":
                put(panel, line, "ranks", flat(line["tokens_per_second"] / line["ranks"]))
        panels.append(panel)
    yield Picture("A sequence in parts: retention beside attention", [panels], corner(lines[0]))


PICTURES: dict[str, Callable[[Sequence[Line]], Iterator[Picture]]] = {
    "op": op,
    "layer": layer,
    "decode": decode,
    "model": model,
    "peers": peers,
    "pretrained": pretrained,
    "vision": vision,
    "distributed": distributed,
}
