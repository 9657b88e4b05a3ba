"""The `retention` command: train a language model, let it write, swap attention, convert checkpoints.

Exit codes: 0 all went well; 1 failure, such as a full disk or a divergence;
2 wrong usage; 130 Ctrl-C; 143 SIGTERM; 129 SIGHUP.
"""

from __future__ import annotations

import errno
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

try:
    import typer
except ImportError as error:
    raise SystemExit('the retention command needs typer; pip install "multiscale-retention[cli]"') from error

import torch

from .errors import BackendError, NotSavedError
from .layer import set_backend
from .model import PRESETS
from .version import __version__

if TYPE_CHECKING:
    from .integrations.transformers.training.codec import Codec
    from .integrations.transformers.training.settings import Kept, Settings
    from .integrations.transformers.training.swapping import Swap
    from .integrations.transformers.training.train import Run

K = TypeVar("K", bound="Kept")
TRACEBACK = "RETENTION_TRACEBACK"  # an environment variable: show tracebacks

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Backend = Annotated[str, typer.Option(help="auto, or a name that `python -m retention` lists.")]
Form = Annotated[str, typer.Option(help="auto, parallel, chunkwise or recurrent.")]
Seed = Annotated[int, typer.Option(help="Of everything that is left to chance.")]
ReportTo = Annotated[str, typer.Option(help="none, all, or an experiment tracker: tensorboard, wandb, ...")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    command: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Texts, folders of texts, or a saved dataset. Default: Python's own source."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the model and a plot.")] = Path("runs/retnet"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with its settings.")] = False,
    preset: Annotated[str, typer.Option(help=f"Size: {', '.join(PRESETS)}.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="Instead: options of RetNetConfig, a JSON file.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder, tokenizer.json or name on the hub. Default: bytes.")] = "",
    text_column: Annotated[str, typer.Option(help="Of a saved dataset; texts or token ids.")] = "text",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1200,
    batch: Annotated[int, typer.Option(help="Sequences at a time on each process.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches that make one step.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens per sequence; bytes without a tokenizer.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate; falls as a cosine.")] = 4e-3,
    warmup: Annotated[int | None, typer.Option(help="Steps to the peak. Default: a tenth, at most 100.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    seed: Seed = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 250,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (mixed precision).")] = "float32",
    backend: Backend = "auto",
    form: Form = "auto",
    report_to: ReportTo = "none",
    sample: Annotated[int, typer.Option(min=0, help="Tokens to write at the end; bytes without a tokenizer.")] = 400,
) -> None:
    """Train a RetNet language model, then write a sample. Ctrl-C, SIGTERM and SIGHUP save; --resume goes on.

    On many devices: torchrun --nproc_per_node N -m retention.cli train ...
    """
    _say("loading the libraries", err=True)
    with _told(), _stopping("train", out):
        from .integrations.transformers.training import train as training

        training.quiet()
        settings = _settings(command, out)
        run = training.train(settings, out, resume=resume)
    _say(f"{run.corpus.report(run.loss)}; the model is in {out}, the losses in {out / training.PLOT}")
    if sample and _process("RANK") == 0:
        _sample(run, out, sample, seed)


@app.command()
def swap(
    command: typer.Context,
    model: Annotated[str, typer.Argument(help="A model of transformers: a folder, or a name on the hub.")] = "",
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Texts, folders of texts, or a saved dataset. Default: Python's own source."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the model and a plot.")] = Path("runs/swap"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with its settings.")] = False,
    layers: Annotated[str, typer.Option(help="Which, such as 0,2,-1. Default: all.")] = "",
    allow_lost: Annotated[
        bool, typer.Option("--allow-lost", help="Also layers that do what retention will not, such as a window.")
    ] = False,
    decay: Annotated[str, typer.Option(help="short, log_linear or paper; learnt from there.")] = "short",
    features: Annotated[bool, typer.Option(help="Learn a feature map of q and k.")] = True,
    window: Annotated[
        int | None,
        typer.Option(min=0, help="Newest tokens that exact attention keeps. Default: 64; with --no-features 0, none."),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(min=0, help="First tokens that exact attention keeps. Default: 4; with --no-features 0, none."),
    ] = None,
    gate: Annotated[str, typer.Option(help="silu, gelu, relu, sigmoid or none.")] = "silu",
    scales: Annotated[
        int | None, typer.Option(help="Retentions, each with its decays, to a head. Default: 2, without features 1.")
    ] = None,
    parts: Annotated[int, typer.Option(help="Replace the layers in so many parts, one after another.")] = 1,
    text_column: Annotated[str, typer.Option(help="Of a saved dataset; texts or token ids.")] = "text",
    transfer_steps: Annotated[int, typer.Option(help="In which layers learn what their attention gave.")] = 600,
    tuning_steps: Annotated[int, typer.Option(help="In which the model learns from the one it was.")] = 1400,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 4,
    context: Annotated[int | None, typer.Option(help="Tokens per sequence. Default: 256, if the model can.")] = None,
    transfer_lr: Annotated[
        float, typer.Option(help="Peak learning rate of new layers; their projections, a tenth.")
    ] = 4e-2,
    tuning_lr: Annotated[float, typer.Option(help="The same of the whole model, in the tuning.")] = 3e-4,
    label_weight: Annotated[float, typer.Option(min=0, help="Of the text itself, beside what the model was.")] = 0.0,
    seed: Seed = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 100,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (mixed precision).")] = "float32",
    backend: Backend = "auto",
    form: Form = "auto",
    report_to: ReportTo = "none",
    sample: Annotated[int, typer.Option(min=0, help="Tokens to write at the end; bytes without a tokenizer.")] = 200,
) -> None:
    """Put retention where a model has attention, and train it until it is as good as it was.

    First each new layer learns what its attention gave, then the whole model what it said before. Ctrl-C, SIGTERM and
    SIGHUP save; --resume goes on. One process.
    """
    _say("loading the libraries", err=True)
    with _told(), _stopping("swap", out):
        from .integrations.transformers.training import swapping
        from .integrations.transformers.training.train import quiet

        quiet()
        if _process("WORLD_SIZE"):
            raise ValueError("swap runs on one process; start it without torchrun")
        settings = _kept(command, swapping.SwapSettings, out, _swap_options(command.params))
        done = swapping.swap(settings, out, resume=resume)
    typer.echo(f"{done.report}\n{done.recovery}\nthe model is in {out}, the losses in {out / swapping.PLOT}")
    if sample:
        _sample(done, out, sample, seed)


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Folder that `retention train` or `retention swap` wrote.")],
    prompt: Annotated[
        str | None,
        typer.Option(help="What the text begins with; '' begins a document. Default: 'def '; with a tokenizer, ''."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write; bytes without a tokenizer.")] = 400,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the likeliest K tokens only.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Backend = "auto",
    form: Form = "auto",
) -> None:
    """Let a trained model continue a text, token by token, from a state of constant size."""
    with _told():
        from .integrations.transformers.modeling import AutoModelForCausalLM
        from .integrations.transformers.training.settings import check_device, check_dtype, codec_of
        from .integrations.transformers.training.train import quiet

        quiet()
        if not (model / "config.json").is_file():
            raise ValueError(f"no model in {model}: it has no config.json; `retention train --out {model}` makes one")
        check_dtype(dtype)
        check_device(device)
        codec = codec_of(model)
        prompt = codec.opening if prompt is None else prompt
        if not codec.prompt(prompt):
            raise ValueError(f"prompt must hold at least one token; got prompt {prompt!r}")
        found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), output_loading_info=True)
        loaded, info = found
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the weights in {model} are not those of a whole model; missing: {', '.join(missing[:9])}"
            )
        if loaded.config.vocab_size < codec.size:
            raise ValueError(
                f"the model must know the {codec.size} tokens of its tokenizer (bytes, if it has none); "
                f"it has vocab_size {loaded.config.vocab_size}; put the right tokenizer into {model}"
            )
        set_backend(loaded, backend, form)
        if device == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = "cpu" if accelerator is None else accelerator.type
        loaded.to(device).eval()
        room = _room(loaded, codec, prompt)
        if tokens > room:
            raise ValueError(f"tokens must be at most {room}, for which the model has positions left; got {tokens}")
    _write(loaded, codec, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of weights, or a folder that holds one or its shards.")],
    out: Annotated[Path, typer.Argument(help="A folder for a model of ours; a .safetensors or .pt for torchscale's.")],
    format: Annotated[str | None, typer.Option("--from", help="Whose checkpoint it is. Default: recognised.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="retention, or torchscale: default for ours.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of options that the weights do not tell.")] = None,
) -> None:
    """Convert a checkpoint: of torchscale, syncdoth, yet-another-retnet, jamie-stirling, retnet-pytorch, or ours.

    What stands beside the weights, such as the tokenizer, comes along into a folder. A mixture of experts gives the
    logits of torchscale with the options that are printed, with which no token is left out.
    """
    with _told():
        from .integrations import checkpoints
        from .integrations.transformers.training.train import quiet

        quiet()
        given = checkpoints.read_json(config) if config else None
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            model = checkpoints.convert(source, out, format=format, target=target, config=given)
    for warning in heard:
        typer.secho(f"warning: {warning.message}", fg="yellow", err=True)
    typer.echo(f"{type(model).__name__}, {model.num_parameters():,} parameters, written to {out}")
    if out.is_file():
        options = ", ".join(f"{name}={value!r}" for name, value in checkpoints.torchscale_options(model).items())
        typer.echo(f"its torchscale config: RetNetConfig({options})")


def _settings(command: typer.Context, out: Path) -> Settings:
    """Of a new run, or of the one in `out` that is resumed."""
    from .integrations.transformers.training.settings import Settings, read_config

    given, options = command.params, dict[str, Any]()
    options["files"] = [str(Path(file).resolve()) for file in given["files"] or []]
    options["tokenizer"] = given["tokenizer"]
    if given["tokenizer"] and Path(given["tokenizer"]).exists():
        options["tokenizer"] = str(Path(given["tokenizer"]).resolve())
    options["config"] = {}
    if given["config"]:
        if _is_given(command, "preset"):
            raise ValueError(f"preset and config must not both be given; got {given['preset']!r} and {given['config']}")
        options |= {"preset": "", "config": read_config(given["config"])}
    return _kept(command, Settings, out, options)


def _swap_options(given: dict[str, Any]) -> dict[str, Any]:
    """What `SwapSettings` has otherwise than the command line."""
    try:
        layers = [int(number) for number in given["layers"].split(",")] if given["layers"] else None
    except ValueError:
        raise ValueError(f"layers must be numbers with commas, such as 0,2,-1; got {given['layers']!r}") from None
    if not given["model"] and not given["resume"]:
        raise ValueError("name a model: retention swap MODEL")
    model = str(Path(given["model"]).resolve()) if Path(given["model"]).exists() else given["model"]
    files = [str(Path(file).resolve()) for file in given["files"] or []]
    gate = None if given["gate"] == "none" else given["gate"]
    kept = {"window": 64, "sinks": 4} if given["features"] else {"window": 0, "sinks": 0}
    window, sinks = (kept[name] if given[name] is None else given[name] for name in ("window", "sinks"))
    return {"layers": layers, "model": model, "files": files, "gate": gate, "window": window or None, "sinks": sinks}


def _kept(command: typer.Context, kind: type[K], out: Path, read: dict[str, Any]) -> K:
    """Settings of a new run, or those with which the run in `out` began: what the user gives anew must be the same.

    read: what has another form than on the command line.
    """
    from .integrations.transformers.training.saving import check_folder, holds_run

    check_folder(out)
    options = {f.name: command.params[f.name] for f in fields(kind) if f.name in command.params} | read
    if not command.params["resume"]:
        if holds_run(out):
            raise ValueError(f"{out} holds a run already; continue it with --resume, or name another --out")
        return kind(**options)
    begun = kind.read(out)
    for name, value in asdict(begun).items():
        if _is_given(command, name) and options[name] != value:
            raise ValueError(f"a resumed run keeps its settings; got {name} {options[name]!r}, the run has {value!r}")
    return begun


def _is_given(command: typer.Context, name: str) -> bool:
    source = command.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _sample(run: Run | Swap, out: Path, tokens: int, seed: int) -> None:
    if run.corpus.unit != run.codec.unit:
        typer.echo("no sample: the corpus came as token ids, and without a tokenizer they cannot be read")
        return
    model, codec = run.model, run.codec
    typer.echo(f"\nA sample (for more: retention generate --model {out} --prompt TEXT):\n")
    tokens = int(min(tokens, _room(model, codec, codec.opening)))
    try:
        _write(model, codec, codec.opening, tokens, temperature=0.8, seed=seed)
    except Exception as error:  # the model is saved, which was the work of the command
        if TRACEBACK in os.environ:
            raise
        typer.secho(f"no sample: {type(error).__name__}: {error}", fg="red", err=True)


def _room(model: Any, codec: Codec, prompt: str) -> float:
    """How many tokens may follow the prompt."""
    return getattr(model.config, "max_position_embeddings", math.inf) - len(codec.prompt(prompt))


def _write(model: Any, codec: Codec, prompt: str, tokens: int, *, seed: int, **options: Any) -> None:
    """Print the prompt and what the model adds to it, as it comes."""
    from .integrations.transformers.writing import stream

    start = codec.prompt(prompt)
    chance = torch.Generator(model.device).manual_seed(seed)
    new = stream(model.eval(), torch.tensor([start], device=model.device), tokens, generator=chance, **options)
    typer.echo(prompt, nl=False)
    for text in codec.text(start, (int(token) for token in new)):
        typer.echo(text, nl=False)
    typer.echo()


def _process(rank: str) -> int:
    """RANK or LOCAL_RANK, of this process among those of torchrun; 0 if it is alone."""
    return int(os.environ.get(rank, 0))


def _say(line: str, err: bool = False) -> None:
    if _process("RANK") == 0:
        typer.echo(line, err=err)


@contextmanager
def _stopping(name: str, out: Path) -> Iterator[None]:
    """A signal ends a run with its own exit code, and with the command that continues it."""
    from .integrations.transformers.training.progress import Stopped
    from .integrations.transformers.training.settings import Kept

    try:
        yield
    except Stopped as stop:
        how = "stopped and saved" if stop.saved else f"stopped by {stop}"
        begun = any((out / kind.FILE).is_file() for kind in Kept.__subclasses__())
        _say(f"{how}; continue with: retention {name} --resume --out {out}" if begun else f"{how}; nothing was begun")
        raise typer.Exit(128 + stop.number) from None
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the user's making, and those of a run, are one line, without a traceback."""
    try:
        yield
    except (ValueError, ImportError, OSError, BackendError, FloatingPointError) as error:
        if _process("LOCAL_RANK") > 0:  # the first says it for all, if torchrun does not end it before
            time.sleep(10)
        else:
            typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1 if _is_failure(error) else 2) from error


def _is_failure(error: Exception) -> bool:
    """Whether it is none of the user's making: a training that diverged, or a disk that is full or broken."""
    broken = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    return broken or isinstance(error, (FloatingPointError, NotSavedError))


def main() -> None:
    """The command. An error that nobody foresaw is one line too; with RETENTION_TRACEBACK set, it has its traceback."""
    try:
        app()
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        if _process("LOCAL_RANK") == 0:
            typer.secho(
                f"error: {type(error).__name__}: {error}\n{TRACEBACK}=1 shows where it comes from", fg="red", err=True
            )
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
