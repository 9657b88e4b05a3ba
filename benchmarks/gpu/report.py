"""Tables of what `run` found, as Markdown: `python -m benchmarks.gpu.report FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ORDER = ("device", "parity", "capture", "speed", "decode", "sanitizer")


def report(folder: Path) -> str:
    """Return one table for each step that left lines; a step without lines is named too."""
    parts = ["# One run on a GPU", ""]
    for step in ORDER:
        file = folder / f"{step}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        parts += [f"## {step}", "", *(table(rows) if rows else ["Nothing was found; see the log."]), ""]
    return "\n".join(parts)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table with a column for each key, in the order of appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_shown(row.get(key)) for key in keys] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (keys, ["---"] * len(keys), *cells)]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "report.md").write_text(report(folder))
