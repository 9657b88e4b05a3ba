"""`python -m benchmarks NAME` measures speed, memory or quality; each claim of the documents has a command.

A command records its measurements as JSON lines, with machine, versions and commit. `compare` shows the differences of
two such files, and `report` writes the recorded results into the documents.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.compare import compare
from benchmarks.decode import decode
from benchmarks.distributed import distributed
from benchmarks.export import export
from benchmarks.floor import floor
from benchmarks.gate import gate
from benchmarks.gpu.compiled import gpu_compile
from benchmarks.layer import layer
from benchmarks.measure import keep_freed_memory
from benchmarks.model import model
from benchmarks.op import op
from benchmarks.parity import parity
from benchmarks.peers import peers
from benchmarks.pretrained import pretrained
from benchmarks.quality import quality
from benchmarks.quantised import quantised
from benchmarks.record import recording
from benchmarks.report import report
from benchmarks.stream import stream
from benchmarks.swap import swap
from benchmarks.vision import vision
from benchmarks.xformers import xformers

COMMANDS = (
    op,
    layer,
    decode,
    model,
    peers,
    quality,
    swap,
    pretrained,
    vision,
    xformers,
    parity,
    stream,
    distributed,
    export,
    quantised,
    floor,
    gate,
    gpu_compile,
    compare,
    report,
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
for command in COMMANDS:
    app.command()(command)


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
    if not fresh_memory:
        keep_freed_memory()
    if context.invoked_subcommand not in (None, "compare", "report", "gpu-compile"):
        context.with_resource(recording(context.invoked_subcommand, results))


if __name__ == "__main__":
    app()
