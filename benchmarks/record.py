"""Records measurements with machine, versions and commit: as tables to read and as JSON lines to keep."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured
from benchmarks.pictures import draw_pictures

console = Console(width=None if sys.stdout.isatty() else 140)
_files: list[TextIO] = []  # file of the running command, if it is recorded
_RESULTS = "benchmarks/results"  # results of earlier runs do not count as changes of the code
_LIBRARIES = ("transformers", "timm", "xformers", "triton", "torchscale", "yet-another-retnet")

Quick = Annotated[bool, typer.Option("--quick", help="Run fewer and smaller cases, in about a minute.")]
Device = Annotated[str, typer.Option(help="Device to run on: cpu or cuda.")]
Limit = Annotated[
    float, typer.Option(help="Seconds for all sides of a case together. At least three rounds run in any case.")
]
Lengths = Annotated[list[int] | None, typer.Option("--length", help="Number of tokens; repeat the option for several.")]


class Result(NamedTuple):
    """A ratio with its quartiles, and the bound that it must keep."""

    name: str
    value: tuple[float, float, float]
    sign: str
    bound: float

    def holds(self) -> bool:
        return self.value[0] >= self.bound if self.sign == ">=" else self.value[0] <= self.bound


@contextmanager
def recording(command: str, file: Path | None) -> Iterator[Path]:
    """Record all that is added and shown as JSON lines. After an interruption, FILE.part holds the lines so far.

    Args:
        command: name of the benchmark.
        file: the file. Default: a file in runs/benchmarks/, named after the command and the time.
    """
    now = datetime.now(timezone.utc)
    file = file or Path("runs/benchmarks") / f"{command}-{now:%Y%m%d-%H%M%S}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(file.suffix + ".part")
    with part.open("w", encoding="utf-8") as lines:
        _files.append(lines)
        try:
            said = {"benchmark": command, "command": sys.argv[1:], "time": now.isoformat(timespec="seconds")}
            add({"kind": "run", **said, **surroundings()})
            yield file
        except typer.Exit:  # a missed bound is a result too
            _keep(part, file)
            raise
        finally:
            _files.pop()
    _keep(part, file)


def _keep(part: Path, file: Path) -> None:
    if len(part.read_text(encoding="utf-8").splitlines()) < 2:  # only the header, as after --help
        part.unlink()
        return
    part.replace(file)
    pictures = draw_pictures(file)
    console.print("kept in", ", ".join(map(str, [file, *pictures])), style="dim")


def surroundings() -> dict[str, Any]:
    """Return machine, versions and commit."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "busy": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_versions()},
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){_RESULTS}")),
    }


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip()


def add(line: Mapping[str, Any]) -> None:
    if _files:
        _files[-1].write(json.dumps(line) + "\n")
        _files[-1].flush()


def add_case(case: Mapping[str, Any], found: Mapping[str, Measured], yardstick: str, **more: Mapping[str, Any]) -> None:
    """Add a line for each side of a case.

    Args:
        case: the options that all sides share.
        found: the measurement of each side.
        yardstick: the side of another library, to which `compare` relates the times.
        more: further values, by side.
    """
    for side, measured in found.items():
        extra = {name: values[side] for name, values in more.items() if side in values}
        add({"kind": "case", **case, "side": side, "yardstick": yardstick, **asdict(measured), **extra})


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    add({"kind": "table", "title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", style="dim")


def show_results(title: str, results: Sequence[Result]) -> bool:
    """Show the results, and return whether all bounds hold."""
    rows = []
    for result in results:
        value, low, high = result.value
        add({"kind": "result", **result._asdict(), "holds": result.holds()})
        verdict = "met" if result.holds() else "MISSED"
        rows.append(
            [result.name, f"{value:.2f}", f"{low:.2f} to {high:.2f}", f"{result.sign} {result.bound:g}", verdict]
        )
    show(title, ["ratio", "median", "quartiles", "target", ""], rows)
    return all(result.holds() for result in results)


def spread(value: tuple[float, float, float], digits: int = 2) -> str:
    """Return the text of a ratio with its quartiles."""
    middle, low, high = (f"{x:.{digits}f}" for x in value)
    return f"{middle} ({low} to {high})"


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} us"


def megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.3g} MB"
