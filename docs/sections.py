"""Lets the API reference show docstrings as they are written here, where a section may begin without an empty line.

"Args:" and the like stay sections; "Shapes: ..." becomes a paragraph with its name in bold, "name: ..." one with the
name as code. Lines that go on, which are indented, join their paragraph. The code of an example is fenced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Examples):$")
EXAMPLE = re.compile(r"Examples?:$")
LABEL = re.compile(r"([A-Z][a-z]+): (.*)")
NAMES = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*)( \(.*?\))?: (.*)")


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n".join(_lines("\n".join(_fenced(obj.docstring.value.splitlines()))))


def _fenced(lines: list[str]) -> Iterator[str]:
    """The lines, with the block under "Example:" as code unless it has prompts, which are known to be code."""
    starts = [i for i, line in enumerate(lines) if EXAMPLE.match(line)]
    if not starts:
        yield from lines
        return
    start = starts[0] + 1
    end = next((i for i in range(start, len(lines)) if lines[i].strip() and not lines[i].startswith(" ")), len(lines))
    block = lines[start:end]
    if not block or any(line.lstrip().startswith(">>>") for line in block):
        yield from lines
        return
    yield from (*lines[:start], "    ```python", *block, "    ```", *lines[end:])


def _lines(text: str) -> Iterator[str]:
    joins = False  # whether an indented line goes on with a paragraph
    for line in text.splitlines():
        if line.startswith(" "):
            yield line.strip() if joins else line
        elif SECTION.match(line):
            joins = False
            yield from ("", line)
        elif match := LABEL.match(line):
            joins = True
            yield from ("", f"**{match[1]}:** {match[2]}")
        elif match := NAMES.match(line):
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            joins = True
            yield from ("", f"{names}{match[2] or ''}: {match[3]}")
        else:
            joins = False
            yield line
