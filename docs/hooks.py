"""What mkdocs runs before it builds: lays the two folders out as they are installed, for the API reference.

pyproject.toml maps the folder integrations to the package retention.integrations, which mkdocstrings cannot see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "build/reference/retention"


def on_startup(**_: Any) -> None:
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for link in PACKAGE.iterdir():
        link.unlink()
    for part in (*(ROOT / "retention").iterdir(), ROOT / "integrations"):
        (PACKAGE / part.name).symlink_to(part)
