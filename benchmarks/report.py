"""Writes figures and pictures of the documents from the recorded runs in benchmarks/results."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer

from benchmarks.measure import Quartiles, ratio
from benchmarks.pictures import Line, draw_pictures, file_name, measured, pictures, read, times
from benchmarks.plot import with_unit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PICTURE_FOLDER = ROOT / "docs/pages/pictures"
BLOCK = re.compile(r"(<!-- recorded: (\S+) -->\n).*?(<!-- end of recorded -->)", re.DOTALL)


def report() -> None:
    """Write the recorded results into the documents, between their `recorded` marks, and draw the pictures."""
    for file in sorted(RESULTS.glob("*.jsonl")):
        draw_pictures(file, PICTURE_FOLDER)
    for file in documents():
        text = file.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            file.write_text(filled, encoding="utf-8")
            typer.echo(f"written: {file.relative_to(ROOT)}")


def documents() -> list[Path]:
    """Return the documents that have `recorded` marks."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs/pages").rglob("*.md"))]
    return [file for file in files if BLOCK.search(file.read_text(encoding="utf-8"))]


def fill(text: str) -> str:
    """Return a text whose blocks hold the recorded results."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{recorded(block[2])}\n{block[3]}", text)


def recorded(name: str) -> str:
    """Return the figures of the README, or all tables and pictures of a file of results."""
    if name == "figures":
        return figures()
    lines = read(RESULTS / f"{name}.jsonl")
    return "\n".join([source(lines[0]), *images(name, lines), *tables(name, lines)])


def source(header: Line) -> str:
    """Return the command of a run, its machine and its versions."""
    changed = " **It was recorded with uncommitted changes.**" if header["changed"] else ""
    versions = ", ".join(
        f"{name} {version.partition('+')[0]}" for name, version in list(header["versions"].items())[:3]
    )
    return (
        f"```bash\npython -m benchmarks {shlex.join(header['command'])}\n```\n\n{header['machine']}, "
        f"{header['threads']} thread{'s' if header['threads'] > 1 else ''}, {versions}; {header['time'][:10]}, "
        f"commit {header['commit'][:10]}.{changed}\n"
    )


def images(name: str, lines: Sequence[Line]) -> list[str]:
    """Return links to the pictures of a file; for `decode` only the last, which contains the first."""
    found = [(file_name(name, number), picture.title) for number, picture in enumerate(pictures(lines))]
    return [f"![{title}](pictures/{file})\n" for file, title in (found[-1:] if name == "decode" else found)]


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(name: str, lines: Sequence[Line]) -> list[str]:
    own = OWN.get(name.partition("-")[0])
    if own:
        return list(own(lines))
    return [f"{line['title']}:\n\n{table(line['columns'], line['rows'])}" for line in lines if line["kind"] == "table"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def spread(value: Quartiles | None, digits: int = 3) -> str:
    if value is None:
        return ""
    middle, low, high = (f"{x:#.{digits}g}".rstrip(".") for x in value)
    return middle if low == middle == high else f"{middle} ({low} to {high})"


def compared(
    lines: Sequence[Line], above: str | None, below: str | None, x: str = "length", **wanted: object
) -> Callable[[str], dict[tuple[str, int], Quartiles]]:
    """Return ratios by way and x: the time of `above` over the side's own, or the side's own over that of `below`."""
    seconds = {(line["way"], line[x], line["side"]): line["seconds"] for line in measured(lines, **wanted)}

    def of(side: str) -> dict[tuple[str, int], Quartiles]:
        found = {}
        for way, length, name in seconds:
            first, second = seconds.get((way, length, above or side)), seconds.get((way, length, below or side))
            if name == side and first and second:
                found[way, length] = ratio(first, second)
        return found

    return of


def rows_of(columns: Sequence[dict[tuple[str, int], Quartiles]]) -> list[list[str]]:
    """Return a row for each way and length that some column has."""
    keys = sorted({key for column in columns for key in column})
    return [[way, f"{length:,}", *(spread(column.get((way, length))) for column in columns)] for way, length in keys]


def op_tables(lines: Sequence[Line]) -> Iterator[str]:
    base = next(line["side"] for line in lines if line.get("side") == line.get("yardstick", ""))
    sides = [side for side in dict.fromkeys(line["side"] for line in measured(lines)) if side != base]
    against = compared(lines, above=base, below=None)
    floor = {
        (line["way"], line["length"]): tuple(x / line["floor"] for x in times(line))
        for line in measured(lines, side="chunked, chunkwise")
    }
    columns = [*map(against, sides), floor]
    yield table(["", "tokens", *sides, "chunked / estimate"], rows_of(columns))


def layer_tables(lines: Sequence[Line]) -> Iterator[str]:
    sides = [side for side in dict.fromkeys(line["side"] for line in measured(lines)) if side.startswith("retention")]
    columns = [*map(compared(lines, above="attention", below=None), sides)]
    columns.append(compared(lines, above=None, below="projections")(sides[0]))
    names = [side.removeprefix("retention, ") for side in sides]
    yield table(["", "tokens", *names, f"{names[0]} / projections"], rows_of(columns))


def peers_tables(lines: Sequence[Line]) -> Iterator[str]:
    for base, others in (("retention", ("torchscale", "attention")), ("retention, values of 512", ("yet-another",))):
        sides = [s for s in dict.fromkeys(line["side"] for line in measured(lines)) if s.startswith(others)]
        columns = [compared(lines, above=None, below=base)(side) for side in sides]
        yield table(["", "tokens", *(f"{side} / {base}" for side in sides)], rows_of(columns))
    yield "What is aimed at:\n"
    rows = [
        [
            line["name"],
            spread(tuple(line["value"])),
            f"{line['sign']} {line['bound']:g}",
            "" if line["holds"] else "missed",
        ]
        for line in lines
        if line["kind"] == "result"
    ]
    yield table(["", "measured", "aim", ""], rows)


def decode_tables(lines: Sequence[Line]) -> Iterator[str]:
    for kind in dict.fromkeys(line["kind_of"] for line in lines if line["kind"] == "case"):
        cases = [line for line in lines if line["kind"] == "case" and line["kind_of"] == kind]
        ours, theirs = dict.fromkeys(line["side"] for line in cases)
        rows = []
        for batch, context in dict.fromkeys((line["batch"], line["context"]) for line in cases):
            a, b = (pick(cases, side, batch=batch, context=context) for side in (ours, theirs))
            faster = spread(ratio(b["seconds"], a["seconds"])) if a["seconds"] and b["seconds"] else ""
            cells = [time_of(a), time_of(b), faster, with_unit(a["cache"], "B"), with_unit(b["cache"], "B")]
            rows.append([str(batch), f"{context:,}", *cells])
        columns = ["batch", "tokens before", ours, theirs, "times faster", f"state, {ours}", f"cache, {theirs}"]
        yield table(columns, rows)


def pick(cases: Sequence[Line], side: str, **wanted: object) -> Line:
    return next(line for line in cases if line["side"] == side and all(line[k] == v for k, v in wanted.items()))


def time_of(line: Line) -> str:
    return with_unit(float(f"{times(line)[0]:.3g}"), "s") if line["seconds"] else line["failure"].partition(":")[0]


def model_tables(lines: Sequence[Line]) -> Iterator[str]:
    cases = [line for line in lines if line["kind"] == "case"]
    rows = []
    for way, length in dict.fromkeys((line["way"], line["length"]) for line in cases):
        sides = {side: pick(cases, side, way=way, length=length) for side in ("RetNet", "GPT-2", "Llama")}
        speeds = [f"{length * x['batch'] / times(x)[0]:,.0f}" if x["seconds"] else "" for x in sides.values()]
        ours = sides["RetNet"]["seconds"]
        faster = [
            spread(ratio(sides[name]["seconds"], ours)) if ours and sides[name]["seconds"] else ""
            for name in ("GPT-2", "Llama")
        ]
        rows.append([way, f"{length:,}", *speeds, *faster])
    yield table(["", "tokens", "RetNet", "GPT-2", "Llama", "than GPT-2", "than Llama"], rows)


def vision_tables(lines: Sequence[Line]) -> Iterator[str]:
    found = [line for line in lines if line["kind"] == "table" and line["columns"][1] != "pixels"]
    shown = [f"{line['title']}:\n\n{table(line['columns'], line['rows'])}" for line in found]
    yield shown[0]
    sides = [side for side in dict.fromkeys(line["side"] for line in measured(lines)) if side != "attention"]
    columns = [compared(lines, above="attention", below=None, x="size")(side) for side in sides]
    yield "How many times as fast as with attention, on images of so many pixels a side:\n"
    yield table(["", "pixels", *sides], rows_of(columns))
    yield from shown[1:]


OWN = {
    "op": op_tables,
    "layer": layer_tables,
    "peers": peers_tables,
    "decode": decode_tables,
    "model": model_tables,
    "vision": vision_tables,
}


# --- the README -------------------------------------------------------------------------------------------------------


def figures() -> str:
    """Return the five rows of the README: RetNet beside GPT-2, and the loss after replacing attention."""
    models, decoding, swapped = (read(RESULTS / f"{name}.jsonl") for name in ("model", "decode", "swap-gpt2"))
    rows = [
        ["prompt of 2,048 tokens", *speeds(models, "prompt"), command(models)],
        ["training step on 2,048 tokens", *speeds(models, "training step"), command(models)],
        ["one more token after 1,024 / 8,192 / 65,536", *over_contexts(decoding, time_of), command(decoding)],
        ["state or cache after as many", *over_contexts(decoding, size_of), command(decoding)],
        ["loss with all attention replaced", *losses(swapped), command(swapped)],
    ]
    note = "\n\\* recorded with uncommitted changes\n" if any("*" in row[-1] for row in rows) else ""
    return table(["", "retention", "attention (GPT-2)", "measured by `python -m benchmarks`"], rows) + note


def command(lines: Sequence[Line]) -> str:
    words = re.sub(r"--results [^ ]+ ", "", shlex.join(lines[0]["command"]))
    return f"`{words}`{' *' if lines[0]['changed'] else ''}"


def speeds(lines: Sequence[Line], way: str) -> list[str]:
    cases = [line for line in lines if line["kind"] == "case"]
    ours, theirs = (pick(cases, side, way=way, length=2048) for side in ("RetNet", "GPT-2"))
    mine, others = (f"{2048 / times(line)[0]:,.0f} tokens/s" for line in (ours, theirs))
    return [f"{mine}, {ratio(theirs['seconds'], ours['seconds'])[0]:.2f} times as fast", others]


def over_contexts(lines: Sequence[Line], cell: Callable[[Line], str]) -> list[str]:
    """Return a cell for each model: the text after 1k, 8k and 64k tokens, or one text if all are equal."""
    cases = [line for line in lines if line["kind"] == "case" and line["kind_of"] == "models"]
    found = ([cell(pick(cases, side, batch=1, context=n)) for n in (1024, 8192, 65536)] for side in ("RetNet", "GPT-2"))
    return [" / ".join(dict.fromkeys(cells)) for cells in found]


def size_of(line: Line) -> str:
    return with_unit(float(f"{line['cache']:.2g}"), "B")


def losses(lines: Sequence[Line]) -> list[str]:
    """Return the losses relative to the teacher's after a tenth of its training, without and with a window."""
    rows = {row[0]: row[-1] for row in next(line["rows"] for line in lines if line["kind"] == "table")}
    alone = next(name for name in rows if re.fullmatch(r"all layers(, sinks \d+)?", name))
    near = next(name for name in rows if re.fullmatch(r"all layers, window \d+(, sinks \d+)?", name))
    window = re.findall(r"\d+", near)[0]
    return [
        f"{rows[alone]}; beside exact attention to the last {window} tokens {rows[near]}",
        "0 % (the teacher)",
    ]
