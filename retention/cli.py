"""The `retention` command: train a language model, let it write, convert checkpoints of other RetNets."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError as error:
    raise SystemExit('the retention command needs typer; pip install "multiscale-retention[cli]"') from error

import torch

from .errors import BackendError
from .layer import set_backend
from .model import PRESETS

if TYPE_CHECKING:
    from .integrations.transformers.training import Settings

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Backend = Annotated[str, typer.Option(help="auto, or a name that `python -m retention` lists.")]
Form = Annotated[str, typer.Option(help="auto, parallel, chunkwise or recurrent.")]
Seed = Annotated[int, typer.Option(help="Of everything that is left to chance.")]


@app.command()
def train(
    command: typer.Context,
    files: Annotated[list[str] | None, typer.Argument(help="Texts or folders. Default: Python's own source.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the model.")] = Path("runs/retnet"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with its settings.")] = False,
    preset: Annotated[str, typer.Option(help=f"Size: {', '.join(PRESETS)}.")] = "tiny",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1200,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    context: Annotated[int, typer.Option(help="Bytes per sequence.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate; falls as a cosine.")] = 4e-3,
    seed: Seed = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 250,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (mixed precision).")] = "float32",
    backend: Backend = "auto",
    form: Form = "auto",
    sample: Annotated[int, typer.Option(min=0, help="Bytes to write at the end.")] = 400,
) -> None:
    """Train a byte-level RetNet language model, then write a sample. Ctrl-C saves; --resume goes on."""
    given = dict(command.params, files=[str(Path(file).resolve()) for file in files or []])
    with _told():
        from .integrations.transformers import training

        training.quiet()
        options = {f.name: given[f.name] for f in fields(training.Settings) if f.name in given}
        settings = _resumed(command, options, out) if resume else training.Settings(**options)
        if not resume and (training.last_checkpoint(out) or (out / "config.json").exists()):
            raise ValueError(f"{out} holds a run already; continue it with --resume, or name another --out")
        model, loss = training.train(settings, out, resume=resume)
    if loss is None:
        typer.echo(f"stopped and saved; continue with: retention train --resume --out {out}")
        raise typer.Exit(130)
    typer.echo(f"validation {loss:.4f} nats, {loss / math.log(2):.4f} bits per byte; the model is in {out}")
    if sample:
        typer.echo(f"\nA sample (for more: retention generate --model {out} --prompt TEXT):\n")
        _write(model, "def ", sample, temperature=0.8, seed=seed)


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Folder that `retention train` wrote.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="Bytes to write.")] = 400,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest byte each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the likeliest K bytes only.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Backend = "auto",
    form: Form = "auto",
) -> None:
    """Let a trained model continue a text, byte by byte, from a state of constant size."""
    with _told():
        from .integrations.transformers import RetNetForCausalLM
        from .integrations.transformers.training import DTYPES, check_device, quiet

        quiet()
        if not (model / "config.json").is_file():
            raise ValueError(f"no model in {model}: it has no config.json; `retention train --out {model}` makes one")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got dtype {dtype!r}")
        check_device(device)
        if not prompt:
            raise ValueError("prompt must hold at least one character; got an empty prompt")
        loaded: Any = RetNetForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        set_backend(loaded, backend, form)
        if device == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = "cpu" if accelerator is None else accelerator.type
        loaded.to(device).eval()
    _write(loaded, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of weights, or a folder that holds one or its shards.")],
    out: Annotated[Path, typer.Argument(help="A folder for a model of ours; a .safetensors or .pt for torchscale's.")],
    format: Annotated[str | None, typer.Option("--from", help="Whose checkpoint it is. Default: recognised.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="retention, or torchscale: default for ours.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of options that the weights do not tell.")] = None,
) -> None:
    """Convert a checkpoint: of torchscale, syncdoth, yet-another-retnet, jamie-stirling, retnet-pytorch, or ours."""
    with _told():
        from .integrations import checkpoints
        from .integrations.transformers.training import quiet

        quiet()
        given = checkpoints.read_config(config) if config else None
        model = checkpoints.convert(source, out, format=format, target=target, config=given)
    typer.echo(f"{type(model).__name__}, {model.num_parameters():,} parameters, written to {out}")
    if out.is_file():
        options = ", ".join(f"{name}={value!r}" for name, value in checkpoints.torchscale_options(model).items())
        typer.echo(f"its torchscale config: RetNetConfig({options})")


def _resumed(command: typer.Context, options: dict[str, Any], out: Path) -> Settings:
    """The settings the run began with. What the user gives anew must be the same."""
    from .integrations.transformers import training

    file = out / training.SETTINGS
    if not file.is_file():
        raise ValueError(f"nothing to resume in {out}: it has no {training.SETTINGS}")
    begun = training.Settings(**json.loads(file.read_text()))
    for name, value in asdict(begun).items():
        source = command.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and options[name] != value:
            raise ValueError(f"a resumed run keeps its settings; got {name} {options[name]!r}, the run has {value!r}")
    return begun


def _write(model: Any, prompt: str, tokens: int, *, seed: int, **options: Any) -> None:
    """Print the prompt and what the model adds to it, as it comes."""
    start = torch.tensor([list(prompt.encode())], device=model.device)
    chance = torch.Generator(model.device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    typer.echo(prompt, nl=False)
    for token in model.eval().stream(start, tokens, generator=chance, **options):
        typer.echo(decoder.decode(bytes([token.item()])), nl=False)
    typer.echo(decoder.decode(b"", final=True))


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the user's making are one line, without a traceback."""
    try:
        yield
    except (ValueError, ImportError, OSError, BackendError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from error


def main() -> None:
    app()
