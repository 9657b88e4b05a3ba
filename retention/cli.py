"""The `retention` command trains RetNet language models, replaces attention, generates text and converts checkpoints.

Exit codes: 0 success; 1 failure, such as a full disk or a training that diverges;
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
from dataclasses import asdict, fields, replace
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

Files = Annotated[
    list[str] | None,
    typer.Argument(
        help="Training text: text files, folders of text files, or a folder that `save_to_disk` of datasets wrote. "
        "Default: the source of Python's standard library, which needs no download."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Continue the run in --out from its last checkpoint, with the settings it started with."
    ),
]
TextColumn = Annotated[
    str,
    typer.Option(
        help="Column of a saved dataset, with texts or token ids. If there is no column text, input_ids is used."
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Seed of the random numbers: initial weights, order of the sequences, sampled tokens. Change it to repeat "
        "a run with other draws."
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda or mps. auto takes the accelerator of this machine, or else the CPU.")
]
TrainingDtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16. The latter two train in mixed precision, which is faster and takes less "
        "memory on a GPU; prefer bfloat16, whose range is that of float32."
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help="Backend that computes retention. `python -m retention` lists those of this machine. auto takes the first "
        "one that can run the call."
    ),
]
Form = Annotated[
    str,
    typer.Option(
        help="Form of retention: parallel, chunkwise or recurrent. All give the same result. auto takes the form that "
        "suits the backend and the length."
    ),
]
ReportTo = Annotated[
    str, typer.Option(help="Experiment tracker that receives the losses: tensorboard, wandb, ...; all or none of them.")
]


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
    files: Files = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the run: checkpoints, the model, and losses.png, the plot of the losses.")
    ] = Path("runs/retnet"),
    resume: Resume = False,
    preset: Annotated[
        str,
        typer.Option(
            help=f"Size of the model: {', '.join(PRESETS)}. The sizes from 300m on are those of the paper; the smaller "
            "ones train on a CPU."
        ),
    ] = "tiny",
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file with options of RetNetConfig, instead of --preset, for a model of another size."),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Folder of a tokenizer, a tokenizer.json, or a name on the Hugging Face Hub. Default: none; each byte "
            "is a token."
        ),
    ] = "",
    text_column: TextColumn = "text",
    steps: Annotated[
        int,
        typer.Option(help="Number of optimiser steps. The default takes a few minutes for the tiny model on a CPU."),
    ] = 1200,
    batch: Annotated[
        int, typer.Option(help="Number of sequences in a batch of one process. Lower it if memory runs out.")
    ] = 16,
    accumulate: Annotated[
        int,
        typer.Option(
            help="Number of batches whose gradients add up to one step. Raise it for a larger step in the same memory."
        ),
    ] = 1,
    context: Annotated[int, typer.Option(help="Length of a sequence, in tokens. Decoding may go beyond it.")] = 128,
    lr: Annotated[
        float,
        typer.Option(
            help="Highest learning rate of AdamW; it falls to 0 as a cosine. The default suits the small presets; "
            "larger models need a lower one, such as 3e-4."
        ),
    ] = 4e-3,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Number of steps in which the learning rate rises from 0. Default: a tenth of --steps, at most 100."
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay of AdamW. Raise it, to 0.1 for example, for long runs.")
    ] = 0.01,
    seed: Seed = 0,
    eval_every: Annotated[int, typer.Option(help="Number of steps between two evaluations on held-out text.")] = 250,
    save_every: Annotated[
        int, typer.Option(help="Number of steps between two checkpoints. The last two checkpoints are kept.")
    ] = 250,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations again in the backward pass instead of keeping them: less memory, more time.",
        ),
    ] = False,
    context_parallel: Annotated[
        int,
        typer.Option(
            help="Number of processes that each hold a part of every sequence: less memory per process for a long "
            "--context. It divides the number of processes of torchrun."
        ),
    ] = 1,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            help="Number of processes that each hold some of the heads of every layer. It divides the number of heads. "
            "If it is below the number of processes, add --fsdp."
        ),
    ] = 1,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp",
            help="Shard weights, gradients and the state of the optimiser among the processes (FSDP2), instead of a "
            "copy on each.",
        ),
    ] = False,
    device: Device = "auto",
    dtype: TrainingDtype = "float32",
    backend: Backend = "auto",
    form: Form = "auto",
    report_to: ReportTo = "none",
    sample: Annotated[
        int, typer.Option(min=0, help="Number of tokens to generate and print after the training; 0 for none.")
    ] = 400,
) -> None:
    """Train a RetNet language model and print a sample of its text.

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint before the command ends; --resume continues from it.

    On several devices: torchrun --nproc_per_node N -m retention.cli train ... Each process has --batch sequences of its
    own, or with --context-parallel each group of processes. --resume may have another number of processes, if they can
    share the same batch; --context-parallel may change too.
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
    model: Annotated[
        str,
        typer.Argument(help="Language model of transformers: a folder, a GGUF file or a name on the Hugging Face Hub."),
    ] = "",
    files: Files = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the run: checkpoints, the model, and losses.png, the plot of the losses.")
    ] = Path("runs/swap"),
    resume: Resume = False,
    layers: Annotated[
        str,
        typer.Option(
            help="Numbers of the layers to replace, from 0, separated by commas; -1 is the last. Default: all layers. "
            "Fewer layers lose less quality and save less memory."
        ),
    ] = "",
    choose: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of layers to replace, instead of --layers: those that cost the least when each is replaced "
            "alone. The costs are printed, and plotted in layers.png.",
        ),
    ] = None,
    allow_lost: Annotated[
        bool,
        typer.Option(
            "--allow-lost",
            help="Also replace layers with a feature that retention does not have, such as a sliding window. Without "
            "it, such a layer is an error that names the feature.",
        ),
    ] = False,
    decay: Annotated[
        str | None,
        typer.Option(
            help="Initial decays of the heads: short, log_linear or paper. They are trained. Heads remember about 2 to "
            "128 tokens with short, 32 to 512 with log_linear, 32 and more with paper. Default: log_linear with "
            "a window; without one, short."
        ),
    ] = None,
    features: Annotated[
        bool,
        typer.Option(
            help="Train a feature map of queries and keys, and divide by the sum of the scores, as the softmax does. "
            "Without it, queries and keys are used as they are."
        ),
    ] = True,
    window: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of the last tokens that keep exact attention; retention covers the tokens before them. "
            "A window loses less quality, for a state that also holds that many keys and values; 0 is no window. "
            "Default: 64; with --no-features 0.",
        ),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of the first tokens that keep exact attention. Pretrained models put much of their attention "
            "on the first token, and a state that decays cannot hold it. Default: 4; with --no-features 0.",
        ),
    ] = None,
    gate: Annotated[
        str,
        typer.Option(help="Activation of the output gate of the new layers: silu, gelu, relu, sigmoid; or none."),
    ] = "silu",
    num_decays: Annotated[
        int | None,
        typer.Option(
            "--num-decays",
            "--scales",
            help="Number of decays per head; their scores are added. Default: 2; with --no-features 1.",
        ),
    ] = None,
    parts: Annotated[
        int,
        typer.Option(
            help="Number of parts in which the layers are replaced and trained, one part after another. The steps of "
            "both stages are divided among them."
        ),
    ] = 1,
    text_column: TextColumn = "text",
    transfer_steps: Annotated[
        int,
        typer.Option(
            help="Number of steps of the first stage, which fits each new layer to the output of the attention it "
            "replaces. 0 skips the stage."
        ),
    ] = 600,
    tuning_steps: Annotated[
        int,
        typer.Option(
            help="Number of steps of the second stage, which distils the whole model from the original. More steps "
            "close more of the gap. 0 skips the stage."
        ),
    ] = 1400,
    batch: Annotated[int, typer.Option(help="Number of sequences per step. Lower it if memory runs out.")] = 4,
    context: Annotated[
        int | None,
        typer.Option(
            help="Length of a sequence, in tokens. Default: 256, or the model's number of positions if lower."
        ),
    ] = None,
    transfer_lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate of the first stage, for the parameters of retention; the projections take a "
            "tenth of it. Default: each layer gets the best of four rates, by a search of 8 steps at each."
        ),
    ] = None,
    tuning_lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate of the second stage. Default: the best of four rates, by a search of 8 steps "
            "at each."
        ),
    ] = None,
    longer: Annotated[
        list[int] | None,
        typer.Option(
            help="Length of longer sequences, on which the second stage goes on at the end; repeat it, from short to "
            "long. The number of sequences per step falls as the length grows."
        ),
    ] = None,
    longer_steps: Annotated[int, typer.Option(help="Number of steps for each of --longer.")] = 200,
    tune: Annotated[
        str,
        typer.Option(
            help="Weights that the second stage trains: all; layers, those of the replaced layers only; or lora, these "
            "and low-rank updates of all other linear layers. With layers and lora, the original shares the other "
            "weights with the model, which saves memory and time."
        ),
    ] = "all",
    rank: Annotated[int, typer.Option(help="Number of rows of the low-rank updates, with --tune lora.")] = 16,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of evaluations without a lower loss after which a stage ends early. Default: never."
        ),
    ] = None,
    label_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="Factor of the cross-entropy of the text, which the second stage adds to the divergence from the "
            "original's probabilities. 0 trains on the original alone; raise it for text unlike the original's.",
        ),
    ] = 0.0,
    seed: Seed = 0,
    eval_every: Annotated[int, typer.Option(help="Number of steps between two evaluations on held-out text.")] = 100,
    save_every: Annotated[
        int, typer.Option(help="Number of steps between two checkpoints. The last two of each stage are kept.")
    ] = 100,
    device: Device = "auto",
    dtype: TrainingDtype = "float32",
    backend: Backend = "auto",
    form: Form = "auto",
    report_to: ReportTo = "none",
    sample: Annotated[
        int, typer.Option(min=0, help="Number of tokens to generate and print after the training; 0 for none.")
    ] = 200,
) -> None:
    """Replace the attention of a language model by retention, and train it to the quality of the original.

    Training has two stages: each new layer is first fitted to the output of the attention it replaces; then the whole
    model is distilled from the original. With --longer, the second stage goes on with longer sequences.

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint before the command ends; --resume continues from it. The command runs
    on one process.
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
    typer.echo(f"{done}\nthe model is in {out}, the losses in {out / swapping.PLOT}")
    if sample:
        _sample(done, out, sample, seed)


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Folder that `retention train` or `retention swap` wrote.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Beginning of the text; '' begins a new document. Default: 'def ' for a model of bytes, '' for one "
            "with a tokenizer."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Number of tokens to generate; a token is a byte if there is no tokenizer.")
    ] = 400,
    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            help="Divisor of the logits. Lower values give likelier and less varied text; 0 always takes the likeliest "
            "token.",
        ),
    ] = 0.8,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Draw each token from the K likeliest ones only. Default: from all tokens."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the weights and of the computation: float32, bfloat16 or float16. The latter two take half "
            "the memory."
        ),
    ] = "float32",
    backend: Backend = "auto",
    form: Form = "auto",
) -> None:
    """Generate text with a trained model, token by token, from a state of constant size."""
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
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Language model to judge: a folder, a GGUF file or a name on the Hugging Face Hub."),
    ],
    files: Files = None,
    teacher: Annotated[
        str,
        typer.Option(
            help="The model before its attention was replaced. The others are compared with it, and it is also judged "
            "with exact attention to the window and sinks alone."
        ),
    ] = "",
    against: Annotated[
        list[str] | None, typer.Option(help="Another model with the same tokenizer; repeat it for several.")
    ] = None,
    text_column: TextColumn = "text",
    context: Annotated[int, typer.Option(min=64, help="Length of a test, in tokens.")] = 512,
    items: Annotated[int, typer.Option(min=2, help="Number of sequences of each test. More give a finer result.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Number of sequences at a time. Lower it if memory runs out.")] = 4,
    device: Device = "auto",
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval to run too, separated by commas. They need the extra eval.")
    ] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of further tasks of lm-eval, for --tasks.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the results as JSON.")] = None,
) -> None:
    """Judge a model beside the one it came from, on text that was held out from training.

    The tests: loss by position, next tokens, copies of a passage, needles in a text, and continuations. All are made
    from the text itself.
    """
    _say("loading the libraries", err=True)
    with _told():
        from .integrations.transformers.training import evaluation
        from .integrations.transformers.training.train import quiet

        quiet()
        found = evaluation.evaluate(
            model,
            files or [],
            teacher=teacher,
            against=against or [],
            column=text_column,
            context=context,
            count=items,
            batch=batch,
            device=device,
            tasks=[name for name in tasks.split(",") if name],
            include_path=include_path,
        )
        if json is not None:
            evaluation.write(found, json)
    typer.echo(evaluation.table(found))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="Checkpoint to read: a file of weights, or a folder that holds one or its shards.")
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="Result to write: a folder for a model of this library or of fla; a .safetensors or .pt file for "
            "torchscale."
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "--from", help="Library that wrote the checkpoint. Default: recognised by the names of the weights."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="retention, torchscale or fla. Default: torchscale for a checkpoint of this library, else retention.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with options that the weights do not determine. They override the config.json beside them."
        ),
    ] = None,
) -> None:
    """Convert checkpoints of torchscale, fla, syncdoth, yet-another-retnet, jamie-stirling, retnet-pytorch and our own.

    Other files beside the weights, such as the tokenizer, are copied if the result is a folder. For a mixture of
    experts, the command prints the options with which torchscale gives the same logits: those that drop no token.
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
    """Return the settings of a new run, or those of the run in `out` that is resumed."""
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
    """Return the options that `SwapSettings` holds in another form than the command line."""
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
    options = {"layers": layers, "model": model, "files": files, "gate": gate, "longer": given["longer"] or []}
    return options | {"window": window or None, "sinks": sinks}


def _kept(command: typer.Context, kind: type[K], out: Path, read: dict[str, Any]) -> K:
    """Return the settings of a new run, or those of the run in `out`, which the options given now must not contradict.

    Args:
        read: the options that have another form than on the command line.
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
        if _is_given(command, name) and options[name] != value and name not in kind.FREE:
            raise ValueError(f"a resumed run keeps its settings; got {name} {options[name]!r}, the run has {value!r}")
    return replace(begun, **{name: options[name] for name in kind.FREE if _is_given(command, name)})


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
    except Exception as error:  # the model is saved already
        if TRACEBACK in os.environ:
            raise
        typer.secho(f"no sample: {type(error).__name__}: {error}", fg="red", err=True)


def _room(model: Any, codec: Codec, prompt: str) -> float:
    """Return the number of positions that the model has left after the prompt."""
    return getattr(model.config, "max_position_embeddings", math.inf) - len(codec.prompt(prompt))


def _write(model: Any, codec: Codec, prompt: str, tokens: int, *, seed: int, **options: Any) -> None:
    """Print the prompt, then the text of each token as the model generates it."""
    from .integrations.transformers.decoding import stream

    start = codec.prompt(prompt)
    chance = torch.Generator(model.device).manual_seed(seed)
    new = stream(model.eval(), torch.tensor([start], device=model.device), tokens, generator=chance, **options)
    typer.echo(prompt, nl=False)
    for text in codec.text(start, (int(token) for token in new)):
        typer.echo(text, nl=False)
    typer.echo()


def _process(variable: str) -> int:
    """Return a variable that torchrun sets, such as RANK or WORLD_SIZE; 0 without torchrun."""
    return int(os.environ.get(variable, 0))


def _say(line: str, err: bool = False) -> None:
    if _process("RANK") == 0:
        typer.echo(line, err=err)


@contextmanager
def _stopping(name: str, out: Path) -> Iterator[None]:
    """End a run that a signal stopped with the exit code of the signal, and print the command that continues it."""
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
    """Print a wrong option or a failed run as one line without a traceback, and exit with its code."""
    try:
        yield
    except (ValueError, ImportError, OSError, BackendError, FloatingPointError) as error:
        _tell(f"error: {error}")
        raise typer.Exit(1 if _is_failure(error) else 2) from error


def _tell(message: str) -> None:
    """Print an error. If all processes of torchrun have it, the first one prints it, and torchrun ends the others."""
    rank = _process("LOCAL_RANK")
    if rank:
        time.sleep(10)
        message = f"process {rank}: {message}"
    typer.secho(message, fg="red", err=True)


def _is_failure(error: Exception) -> bool:
    """Tell a failure from wrong usage: a training that diverged, or a disk that is full or broken."""
    broken = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    return broken or isinstance(error, (FloatingPointError, NotSavedError))


def main() -> None:
    """Run the command. Unforeseen errors are one line too; with RETENTION_TRACEBACK set, they show their traceback."""
    try:
        app()
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        _tell(f"error: {type(error).__name__}: {error}\n{TRACEBACK}=1 shows where it comes from")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
