"""A sequence in parts over several processes: what they send, how fast they would be, and what memory each takes."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from benchmarks.measure import peak_memory
from benchmarks.plot import with_unit
from benchmarks.record import Lengths, Quick, add, show
from benchmarks.traffic import Traffic
from retention import RetNet
from retention.decay import log_linear
from retention.distributed import context_parallel
from retention.model import PRESETS

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
MODELLED = ("300m", "1.3b", "2.7b", "6.7b")  # presets
TOKENS_PER_RANK, TOKENS_IN_ALL = 16_384, 2**20
CHUNK = 64
MEMORY = 80e9  # bytes of a GPU
LAYERS = 2  # of the model that is counted
MEASURED: dict[str, Any] = dict(vocab_size=64, dim=16, num_layers=2, num_heads=2)  # the model whose memory is measured


@dataclass(frozen=True)
class Machine:
    """What the model of the throughput assumes of each process.

    flops: of bf16 products, a second, as reached in training; bytes: sent a second; latency: seconds of a message.
    """

    flops: float = 400e12
    bytes: float = 50e9
    latency: float = 5e-6

    def __str__(self) -> str:
        return f"{self.flops / 1e12:g} TFLOP/s, {self.bytes / 1e9:g} GB/s and {self.latency * 1e6:g} µs a message"


def distributed(
    lengths: Lengths = None,
    ranks: Annotated[int, typer.Option(help="Processes that are started, and that the bytes are counted for.")] = 4,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure the memory of each process too, in minutes.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence whose memory is measured.")] = TOKENS_IN_ALL,
    quick: Quick = False,
) -> None:
    """Count what retention sends for a sequence over several processes, beside attention; model 8 to 1,024 of them."""
    lengths = lengths or ([256, 1024] if quick else [4096, 16_384, 65_536, 262_144])
    _bytes_by_length(lengths, ranks)
    _throughput(Machine())
    _longest_sequences()
    if memory:
        _memory(tokens, ranks)


# --- bytes, counted ---------------------------------------------------------------------------------------------------


def _bytes_by_length(lengths: list[int], ranks: int) -> None:
    """The bytes that leave a process, for each layer, forward and backward."""
    options: dict[str, Any] = dict(vocab_size=64, dim=64, num_layers=LAYERS, num_heads=4)
    given = _in_processes(_counted, ranks, options, lengths)[0]
    rows = []
    for length, own in zip(lengths, given, strict=True):
        sides = {
            "retention, counted": (ranks - 1) * own / LAYERS,
            "ring attention": _ring(length, ranks, 64, 4),
            "all-gather attention": _all_gather(length, ranks, 64, 4),
        }
        for side, sent in sides.items():
            add({"kind": "sent", "length": length, "ranks": ranks, "side": side, "bytes": sent})
        rows.append([f"{length:,}", *(with_unit(sent, "B") for sent in sides.values())])
    columns = ["tokens in all", "retention, counted", "ring attention", "all-gather attention"]
    title = f"Bytes that a process sends, a layer, forward and backward: {ranks} processes, width 64, batch 1, float32"
    show(title, columns, rows)


def _counted(rank: int, ranks: int, options: dict[str, Any], lengths: list[int]) -> list[float]:
    """The bytes that a process gives to the collectives, for each length; an all-gather sends them to all others."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    model, found = RetNet(**options), []
    for length in lengths:
        text, labels = torch.randint(options["vocab_size"], (2, 1, length))
        with context_parallel(mesh, buffers=[text, labels], buffer_seq_dims=[1, 1]), Traffic() as traffic:
            F.cross_entropy(model(text).flatten(0, 1), labels.flatten()).backward()
        if set(traffic.calls) != {"_allgather_base_"}:
            raise RuntimeError(f"only all-gathers are counted; got {dict(traffic.calls)}")
        found.append(float(sum(traffic.bytes.values())))
    return found


def _ring(length: int, ranks: int, dim: int, size: int) -> float:
    """Keys and values go round forward and backward, and their gradients go round with them."""
    return 3 * (ranks - 1) * 2 * length / ranks * dim * size


def _all_gather(length: int, ranks: int, dim: int, size: int) -> float:
    """Keys and values are gathered, and their gradients are scattered."""
    return 2 * (ranks - 1) * 2 * length / ranks * dim * size


# --- throughput, modelled ---------------------------------------------------------------------------------------------


def _throughput(machine: Machine) -> None:
    for scaling, length_of in (
        ("weak", lambda ranks: ranks * TOKENS_PER_RANK),
        ("strong", lambda ranks: TOKENS_IN_ALL),
    ):
        rows = []
        for preset in MODELLED:
            for side, seconds in SIDES.items():
                row = []
                for ranks in RANKS:
                    speed = length_of(ranks) / seconds(machine, preset, length_of(ranks), ranks)
                    add(
                        {"kind": "modelled", "scaling": scaling, "preset": preset, "side": side, "ranks": ranks}
                        | {"tokens_per_second": speed}
                    )
                    row.append(f"{speed / 1e3:,.4g}")
                rows.append([preset, side, *row])
        tokens = f"{TOKENS_PER_RANK:,} tokens a process" if scaling == "weak" else f"{TOKENS_IN_ALL:,} tokens in all"
        title = f"Modelled training, thousand tokens/s in all, {tokens}, bf16; each process: {machine}"
        show(title, ["preset", "", *(f"{ranks:,}" for ranks in RANKS)], rows)


@cache
def _sizes(preset: str) -> tuple[int, int, int, int]:
    """Layers, heads, width and number of parameters."""
    options = PRESETS[preset]
    count = sum(p.numel() for p in RetNet(**options, device="meta").parameters())
    return options["num_layers"], options["num_heads"], options["dim"], count


def _retention(machine: Machine, preset: str, length: int, ranks: int, tolerance: float = 0.0) -> float:
    """The exchange runs while the process computes inside its part; it takes time where it lasts longer."""
    layers, heads, dim, count = _sizes(preset)
    key, value, own = dim // heads, 2 * dim // heads, length / ranks
    inside = 3 * own * heads * (CHUNK * (key + value) + 4 * key * value)  # two of three are backward
    joining = 3 * own * heads * 4 * key * value  # own state, and reading the state before
    state = heads * key * value * 4
    near = math.exp(own * log_linear(heads)[-1]) <= tolerance  # the decays of the presets
    exchange = 2 * (1 if near else ranks - 1) * (state / machine.bytes + machine.latency)
    layer = max(inside / machine.flops, exchange) + joining / machine.flops
    return 6 * count * own / machine.flops + layers * layer


def _attention(
    machine: Machine, preset: str, length: int, ranks: int, sent: Callable[..., float], hidden: bool
) -> float:
    layers, _, dim, count = _sizes(preset)
    scores = 3 * 2 * length**2 / ranks * dim / machine.flops  # two products, half of the pairs
    exchange = sent(length, ranks, dim, 2) / machine.bytes + 2 * (ranks - 1) * machine.latency
    layer = max(scores, exchange) if hidden else scores + exchange
    return 6 * count * length / ranks / machine.flops + layers * layer


SIDES: dict[str, Callable[[Machine, str, int, int], float]] = {
    "retention": _retention,
    "retention, tolerance 1e-7": partial(_retention, tolerance=1e-7),
    "ring attention": lambda *of: _attention(*of, _ring, True),
    "all-gather attention": lambda *of: _attention(*of, _all_gather, False),
}


# --- longest sequence, modelled ---------------------------------------------------------------------------------------


def _longest_sequences() -> None:
    """Model the longest sequence whose training fits into the memory of so many GPUs."""
    kept = _kept_by_a_block()
    rows = []
    for preset in MODELLED:
        cells = []
        for ranks in RANKS:
            tokens = ranks * _fitting(preset, ranks, kept)
            add({"kind": "longest", "preset": preset, "ranks": ranks, "memory": MEMORY, "tokens": tokens})
            cells.append(f"{tokens / 1e6:,.4g}")
        rows.append([preset, *cells])
    title = (
        f"Modelled: million tokens of the longest sequence that trains on GPUs of {MEMORY / 1e9:g} GB, batch 1, bf16, "
        f"FSDP2, gradient checkpointing; {kept:.1f} values a token and channel inside a block"
    )
    show(title, ["preset", *(f"{ranks:,}" for ranks in RANKS)], rows)


def _kept_by_a_block() -> float:
    """The values that a block keeps for its backward pass, a token and channel, counted in this library."""
    dim, length = 64, 256
    block, found = RetNet(dim=dim, num_layers=1, num_heads=4).backbone.blocks[0], dict[int, int]()
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in parameters:
            found[memory.data_ptr()] = memory.nbytes()
        alive.append(x)  # no other tensor gets its memory
        return x

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        block(torch.randn(1, length, dim, requires_grad=True))
    return sum(found.values()) / 4 / length / dim


def _fitting(preset: str, ranks: int, kept: float) -> int:
    """The tokens of a process: weights, gradients and moments are in shards, 16 bytes a parameter in all.

    Each token keeps the input of every block, and what one block keeps, with as much again for the gradients. Logits
    are computed in parts.
    """
    layers, _, dim, count = _sizes(preset)
    a_token = 2 * dim * (layers + 2 * kept)
    whole_block = 2 * count / layers  # gathered for its pass
    return max(int((MEMORY - 16 * count / ranks - whole_block) / a_token), 0)


# --- memory, measured -------------------------------------------------------------------------------------------------


def _memory(tokens: int, ranks: int) -> None:
    (alone, loss), parts = _in_processes(_grown, 1, tokens)[0], _in_processes(_grown, ranks, tokens)
    rows = [["one process", "", f"{alone / 1e6:.1f} MB", "", f"{loss:.8f}"]]
    for rank, (grown, found) in enumerate(parts):
        add({"kind": "memory", "tokens": tokens, "ranks": ranks, "rank": rank, "bytes": grown, "alone": alone})
        share = f"{grown / (alone / ranks):.3f} x"
        rows.append([f"process {rank}", f"{tokens // ranks:,}", f"{grown / 1e6:.1f} MB", share, f"{found:.8f}"])
    title = f"One training step with {tokens:,} tokens, {MEASURED}, float32"
    show(title, ["", "tokens", "extra memory at the peak", f"of 1/{ranks} of one process", "loss"], rows)


def _grown(rank: int, ranks: int, tokens: int) -> tuple[int, float]:
    """The growth of the peak memory of a process by a training step, and the loss of the whole sequence."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    torch.manual_seed(0)
    model = RetNet(**MEASURED)

    def step(length: int) -> float:
        text, labels = torch.randint(MEASURED["vocab_size"], (2, 1, length), generator=torch.Generator().manual_seed(0))
        with context_parallel(mesh, buffers=[text, labels], buffer_seq_dims=[1, 1]) as shard:
            own = F.cross_entropy(model(text).flatten(0, 1), labels.flatten(), reduction="sum") / shard.total
            own.backward()
        total = own.detach().double()
        dist.all_reduce(total)
        return total.item()

    step(256 * ranks)  # what torch allocates once
    before = peak_memory()
    loss = step(tokens)
    return peak_memory() - before, loss


# --- processes --------------------------------------------------------------------------------------------------------


def _in_processes(run: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """The result of run(rank, ranks, *args) in each of a group of gloo processes."""
    multiprocessing.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (ranks, _free_port(), folder, run, args), ranks, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank)) for rank in range(ranks)]


def _work(rank: int, ranks: int, port: int, folder: str, run: Callable[..., Any], args: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(run(rank, ranks, *args), Path(folder) / str(rank))
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
