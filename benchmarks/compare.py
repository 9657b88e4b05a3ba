"""Differences between two recorded runs of the same benchmark."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measure import Quartiles, ratio
from benchmarks.record import console, duration, megabytes, show

MEASURED = ("kind", "seconds", "memory", "failure", "deviation", "floor", "cache", "yardstick")
LEAST = 0.1  # a smaller change is noise, however narrow the quartiles: two runs of the same code differ that much


@dataclass(frozen=True)
class Entry:
    """One side of a case, or a ratio that has a bound.

    Attributes:
        text: the value as it is shown.
        value: median and quartiles of the seconds or of the ratio; None if the side failed.
        relative: median and quartiles of the seconds relative to those of the yardstick in the same rounds.
        words: the verdicts on a smaller and on a larger value.
        memory: peak of extra memory, in bytes.
    """

    text: str
    value: Quartiles | None
    relative: Quartiles | None = None
    words: tuple[str, str] = ("faster", "slower")
    memory: int | None = None


Key = tuple[tuple[str, Any], ...]
Entries = dict[Key, Entry]


def compare(
    before: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON lines of the earlier run.")],
    after: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON lines of the later run.")],
    everything: Annotated[bool, typer.Option("--all", help="Also show the cases that did not change.")] = False,
) -> None:
    """Show the differences of two runs that exceed the noise: quartiles do not overlap, and medians differ by 10 %.

    Times are compared relative to those of another library's side, such as attention, which was measured in the same
    rounds, so that the speed of the machine cancels. Without such a side, the times themselves are compared.
    """
    (header, old), (new_header, new) = read(before), read(after)
    warn(header, new_header)
    rows = []
    for key in dict.fromkeys([*old, *new]):
        verdict, cells = judge(old.get(key), new.get(key))
        if everything or verdict:
            rows.append([describe(key), *cells, verdict])
    columns = ["", "before", "after", "after / before", "memory", ""]
    show(f"{before} -> {after}", columns, rows)
    both = [values for key in old if key in new and (values := comparable(old[key], new[key]))]
    if both:
        middle = statistics.median(after[0] / before[0] for before, after in both)
        console.print(f"{len(both)} in both; the middle one is {middle:.2f} of what it was, in the terms of the table")


def read(file: Path) -> tuple[dict[str, Any], Entries]:
    """Return the header, and each measured case or ratio by its key.

    Raises: typer.BadParameter if the file is not one of these benchmarks'.
    """
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        header = next(line for line in lines if line["kind"] == "run")
        found = _cases([line for line in lines if line["kind"] == "case"])
        found |= _results([line for line in lines if line["kind"] == "result"])
    except (json.JSONDecodeError, KeyError, TypeError, StopIteration) as error:
        raise typer.BadParameter(f"{file} must hold the JSON lines that a benchmark wrote; {error!r}") from error
    if not found:
        raise typer.BadParameter(f"{file} must hold times or ratios; got none, only tables")
    return header, found


def _cases(lines: list[dict[str, Any]]) -> Entries:
    seconds = {_key(line): line["seconds"] for line in lines}
    found = {}
    for line in lines:
        key, own = _key(line), line["seconds"]
        if line["failure"] or not own:
            found[key] = Entry(line["failure"], None)
            continue
        yardstick = seconds.get(tuple((k, line.get("yardstick") if k == "side" else v) for k, v in key))
        value, relative = ratio(own, [1.0] * len(own)), ratio(own, yardstick) if yardstick else None
        found[key] = Entry(duration(value[0]), value, relative, memory=line["memory"])
    return found


def _key(line: dict[str, Any]) -> Key:
    return tuple((k, v) for k, v in line.items() if k not in MEASURED)


def _results(lines: list[dict[str, Any]]) -> Entries:
    words = {">=": ("worse", "better"), "<=": ("better", "worse")}
    return {
        (("ratio", line["name"]),): Entry(f"{line['value'][0]:.2f}", tuple(line["value"]), words=words[line["sign"]])
        for line in lines
    }


def warn(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("command", "machine", "threads", "versions"):
        if before[name] != after[name]:
            console.print(f"{name} differs: {before[name]} -> {after[name]}", style="yellow")
    console.print(f"commit {_commit(before)} -> {_commit(after)}", style="dim")


def _commit(header: dict[str, Any]) -> str:
    return f"{header['commit'][:10]}{' with changes' if header['changed'] else ''}"


def judge(before: Entry | None, after: Entry | None) -> tuple[str, list[str]]:
    """Return a word for the change, "" without one, and the cells of the row."""
    if before is None or after is None:
        there = before or after
        assert there is not None
        return ("is new", ["", there.text, "", ""]) if before is None else ("is gone", [there.text, "", "", ""])
    values = comparable(before, after)
    if values is None:
        word = "" if before.value is after.value else "runs now" if before.value is None else "FAILS now"
        return word, [before.text, after.text, "", ""]
    old, new = values
    change = new[0] / old[0]
    words = []
    if abs(change - 1) > LEAST and _apart(old, new):
        words.append(after.words[change > 1])
    memory = ""
    if before.memory and after.memory:
        memory = f"{megabytes(before.memory)} -> {megabytes(after.memory)}"
        if abs(after.memory / before.memory - 1) > 0.01:
            words.append("more memory" if after.memory > before.memory else "less memory")
    return ", ".join(words), [before.text, after.text, f"{change:.2f}", memory]


def comparable(before: Entry, after: Entry) -> tuple[Quartiles, Quartiles] | None:
    """Return both values, relative to the yardstick if both entries have one; None if one failed."""
    if before.relative and after.relative:
        return before.relative, after.relative
    return (before.value, after.value) if before.value and after.value else None


def _apart(a: Quartiles, b: Quartiles) -> bool:
    """Tell whether the quartiles do not overlap."""
    (_, low_a, high_a), (_, low_b, high_b) = a, b
    return high_a < low_b or high_b < low_a


def describe(key: Key) -> str:
    return ", ".join(
        str(value) if name in ("way", "side", "dtype", "ratio") else f"{name} {value}" for name, value in key
    )
