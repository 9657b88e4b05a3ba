"""Writes pages/command-line.md from the help of the `retention` command: `python docs/commands.py`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from retention import cli
from retention.cli import app

PAGE = Path(__file__).parent / "pages/command-line.md"
HEAD = """\
# Command line

`python docs/commands.py` writes this page from the help of the command. Do not edit it. `retention COMMAND --help`
prints the same.
"""


def page() -> str:
    parts = [HEAD, _one_line(cli.__doc__.split("\n\n")[1]) + "\n"]
    for command in app.registered_commands:
        function: Any = command.callback
        text = "\n\n".join(map(_one_line, inspect.getdoc(function).split("\n\n")))
        parts += [f"## retention {command.name or function.__name__}\n", f"{text}\n", _table(function)]
    return "\n".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def options(function: Any) -> dict[str, list[str]]:
    """How each parameter of a command is given: --its-name, or what typer was told; an argument in capitals."""
    hints = get_type_hints(function, include_extras=True)
    return {name: _names(name, hints[name]) for name in inspect.signature(function).parameters}


def _names(name: str, hint: Any) -> list[str]:
    info = next(iter(getattr(hint, "__metadata__", ())), None)
    if "Argument" in type(info).__name__:
        return [name.upper()]
    told = [getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())]
    given = [each for each in told if isinstance(each, str) and each.startswith("-")]
    plain = name.replace("_", "-")
    is_switch = hint is bool or get_args(hint)[:1] == (bool,)
    return given or [f"--{plain}", *([f"--no-{plain}"] if is_switch else [])]


def _table(function: Any) -> str:
    hints = get_type_hints(function, include_extras=True)
    rows = ["| option | value | default | description |", "|---|---|---|---|"]
    for name, names in options(function).items():
        if metadata := getattr(hints[name], "__metadata__", ()):  # all but typer's context
            default = inspect.signature(function).parameters[name].default
            cells = _row(names, get_args(hints[name])[0], default, metadata[0].help or "")
            rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _row(names: list[str], kind: Any, default: Any, text: str) -> Iterator[str]:
    """kind: the type of the value."""
    yield ", ".join(f"`{name}`" for name in names)
    yield "" if kind is bool else _kind(kind)
    if default is inspect.Parameter.empty:
        yield "required"
    elif kind is bool:
        yield f"`{names[0]}`" if default else ""
    else:
        yield "" if default is None or default == "" else f"`{default}`"
    yield text


def _kind(kind: Any) -> str:
    """The name of a type: that of its items for a list, without None for what may be left out."""
    if get_origin(kind) in (Union, types.UnionType):
        return _kind(next(part for part in get_args(kind) if part is not type(None)))
    if get_origin(kind) is list:
        return f"{_kind(get_args(kind)[0])}, any number"
    return {"str": "text", "int": "integer", "float": "number", "Path": "path"}.get(kind.__name__, kind.__name__)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
