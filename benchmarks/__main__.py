"""`python -m benchmarks NAME` measures speed, memory or quality; each claim of the documents has a command.

A command records its measurements as JSON lines, with machine, versions and commit. `compare` shows the differences of
two such files, and `report` writes the recorded results into the documents.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# The commands and the files that hold their functions, which are imported when they are called.
COMMANDS = {
    "op": "op",
    "layer": "layer",
    "decode": "decode",
    "model": "model",
    "peers": "peers",
    "quality": "quality",
    "swap": "swap",
    "pretrained": "pretrained",
    "vision": "vision",
    "macs": "macs",
    "xformers": "xformers",
    "parity": "parity",
    "stream": "stream",
    "distributed": "distributed",
    "export": "export",
    "quantised": "quantised",
    "floor": "floor",
    "gate": "gate",
    "gpu-compile": "gpu.compiled",
    "compare": "compare",
    "report": "report",
}
OPTIONS: dict[str, Any] = dict(pretty_exceptions_enable=False, add_completion=False)


class Commands(TyperGroup):
    """The commands by name; the file of a command is imported when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, None if command is None or name is None else _loaded(name), rest


def function_of(name: str) -> Any:
    """Return the function of a command, and import its file."""
    return getattr(import_module(f"benchmarks.{COMMANDS[name]}"), name.replace("-", "_"))


def _loaded(name: str) -> Any:
    alone = typer.Typer(**OPTIONS)
    alone.command(name)(function_of(name))
    return typer.main.get_command(alone)


def explained(name: str) -> str:
    """Return the docstring of a command's function, without importing its file."""
    source = (Path(__file__).parent / f"{COMMANDS[name].replace('.', '/')}.py").read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    return ast.get_docstring(functions[name.replace("-", "_")]) or ""


app = typer.Typer(
    cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__
)
for _name in COMMANDS:
    app.command(_name, help=explained(_name))(lambda: None)


@app.callback()
def main(
    context: typer.Context,
    results: Annotated[
        Path | None,
        typer.Option(help="File for the JSON lines; pictures go beside it. Default: a new file in runs/benchmarks/."),
    ] = None,
    fresh_memory: Annotated[
        bool,
        typer.Option(
            "--fresh-memory",
            help="Let malloc return freed memory. Default: on Linux, it keeps freed memory, for steadier times.",
        ),
    ] = False,
) -> None:
    from benchmarks.measure import keep_freed_memory
    from benchmarks.record import recording

    if not fresh_memory:
        keep_freed_memory()
    if context.invoked_subcommand not in (None, "compare", "report", "gpu-compile"):
        context.with_resource(recording(context.invoked_subcommand, results))


if __name__ == "__main__":
    app()
