"""What moved between two runs of the same benchmark."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import console, duration, megabytes, show

MEASURED = ("kind", "seconds", "memory", "failure", "deviation", "floor", "cache")
LEAST = 0.05  # a smaller change of time is noise, however narrow the quartiles


def compare(
    before: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON lines of a run.")],
    after: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON lines of another.")],
    everything: Annotated[bool, typer.Option("--all", help="Show what did not move, too.")] = False,
) -> None:
    """What of AFTER is beyond the noise of BEFORE: quartiles that do not overlap, medians 5 % apart."""
    (header, old), (new_header, new) = read(before), read(after)
    warn(header, new_header)
    rows = []
    for key in dict.fromkeys([*old, *new]):
        verdict, cells = judge(old.get(key), new.get(key))
        if everything or verdict:
            rows.append([describe(key), *cells, verdict])
    columns = ["", "before", "after", "after / before", "memory", ""]
    show(f"{before} -> {after}", columns, rows)
    both = [key for key in old if key in new and old[key]["seconds"] and new[key]["seconds"]]
    if both:
        shift = statistics.median(_median(new[key]) / _median(old[key]) for key in both)
        console.print(f"{len(both)} cases in both; the middle one takes {shift:.2f} of the time")


Key = tuple[tuple[str, Any], ...]


def read(file: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """The header, and the cases by what they are.

    Raises: typer.BadParameter if the file is not one of these benchmarks'.
    """
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        header = next(line for line in lines if line["kind"] == "run")
        cases = [line for line in lines if line["kind"] == "case"]
    except (json.JSONDecodeError, KeyError, TypeError, StopIteration) as error:
        raise typer.BadParameter(f"{file} must hold the JSON lines that a benchmark wrote; {error!r}") from error
    if not cases:
        raise typer.BadParameter(
            f"{file} must hold timed cases; got none; op, layer, peers, decode and model write them"
        )
    return header, {tuple((k, v) for k, v in case.items() if k not in MEASURED): case for case in cases}


def warn(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("command", "machine", "threads", "versions"):
        if before[name] != after[name]:
            console.print(f"{name} differs: {before[name]} -> {after[name]}", style="yellow")
    console.print(f"commit {_commit(before)} -> {_commit(after)}", style="dim")


def _commit(header: dict[str, Any]) -> str:
    return f"{header['commit'][:10]}{' with changes' if header['changed'] else ''}"


def judge(before: dict[str, Any] | None, after: dict[str, Any] | None) -> tuple[str, list[str]]:
    """A word on what moved, empty if nothing did; and the cells of a row."""
    if before is None or after is None:
        there = before or after
        assert there is not None
        time = duration(_median(there)) if there["seconds"] else there["failure"]
        return ("is new", ["", time, "", ""]) if before is None else ("is gone", [time, "", "", ""])
    if before["failure"] or after["failure"]:
        cells = [one["failure"] or duration(_median(one)) for one in (before, after)]
        word = {(True, False): "runs now", (False, True): "FAILS now"}.get(
            (bool(before["failure"]), bool(after["failure"])), ""
        )
        return word, [*cells, "", ""]
    change = _median(after) / _median(before)
    words = []
    if abs(change - 1) > LEAST and _apart(before["seconds"], after["seconds"]):
        words.append("slower" if change > 1 else "faster")
    if before["memory"] and after["memory"] and abs(after["memory"] / before["memory"] - 1) > 0.01:
        words.append("more memory" if after["memory"] > before["memory"] else "less memory")
    memory = f"{megabytes(before['memory'])} -> {megabytes(after['memory'])}"
    return ", ".join(words), [duration(_median(before)), duration(_median(after)), f"{change:.2f}", memory]


def _median(case: dict[str, Any]) -> float:
    return statistics.median(case["seconds"])


def _apart(a: list[float], b: list[float]) -> bool:
    """Whether the quartiles do not overlap."""
    (low_a, _, high_a), (low_b, _, high_b) = (statistics.quantiles(x, n=4, method="inclusive") for x in (a, b))
    return high_a < low_b or high_b < low_a


def describe(key: Key) -> str:
    return ", ".join(str(value) if name in ("way", "side", "dtype") else f"{name} {value}" for name, value in key)
