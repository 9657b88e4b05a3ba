"""`python -m benchmarks NAME`: one command for each claim that is measured rather than tested."""

import typer

from benchmarks.decode import decode
from benchmarks.floor import floor
from benchmarks.forms import forms
from benchmarks.generation import gpt2, stream
from benchmarks.parity import parity
from benchmarks.quality import quality
from benchmarks.swap import swap
from benchmarks.vision import vision
from benchmarks.xformers import xformers

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
for command in (floor, forms, decode, gpt2, stream, parity, quality, swap, vision, xformers):
    app.command()(command)
app()
