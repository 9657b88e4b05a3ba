"""Training from scratch: the loss of a RetNet and of a transformer of the same size on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

from benchmarks.baselines import Transformer
from benchmarks.record import show
from retention import RetNet
from retention.integrations.transformers.training.texts import read_texts


def quality(
    steps: Annotated[int, typer.Option(help="Number of optimiser steps.")] = 2000,
    context: Annotated[int, typer.Option(help="Length of a sequence, in bytes.")] = 64,
    batch: Annotated[int, typer.Option(help="Number of sequences per step.")] = 12,
    dim: Annotated[int, typer.Option(help="Width of the models.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of layers of the models.")] = 4,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Highest learning rate; repeat the option for several. The best one of each model counts."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds; the table shows the mean loss and its range.")] = 1,
    paper: Annotated[
        bool, typer.Option("--paper", help="Also train a RetNet with the layer's defaults, which are the paper's.")
    ] = False,
) -> None:
    """Train a RetNet and a transformer of the same size on the same batches, and compare their validation losses."""
    train, valid = (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in read_texts())
    models = {
        "RetNet": lambda: RetNet.from_preset("tiny", dim=dim, num_layers=layers),
        **({"RetNet, paper's options": lambda: RetNet(256, dim, layers, 4)} if paper else {}),
        "transformer (SDPA)": lambda: Transformer(256, dim, layers, 4, _equal_ffn(dim)),
    }
    rows, best = [], {}
    for name, make in models.items():
        for rate in lr or [3e-3]:
            losses = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = make()
                losses.append(
                    _learn(model, train, valid, steps, context, batch, rate, f"{name}, lr {rate:g}, seed {seed}")
                )
            mean = sum(losses) / seeds
            best[name] = min(best.get(name, math.inf), mean)
            size = sum(p.numel() for p in model.parameters())
            spread = f"{min(losses):.4f} to {max(losses):.4f}"
            rows.append([name, f"{size:,}", f"{rate:g}", f"{mean:.4f}", spread, f"{mean / math.log(2):.4f}"])
    columns = ["model", "parameters", "lr", "validation, nats per byte", "over seeds", "bits per byte"]
    show(f"{steps} steps, {layers} layers, width {dim}, context {context}, batch {batch}", columns, rows)
    ours, theirs = best["RetNet"], best["transformer (SDPA)"]
    typer.echo(
        f"RetNet is {theirs - ours:+.4f} nats ahead of the transformer ({'met' if ours <= theirs else 'MISSED'}: >= 0)"
    )


def _equal_ffn(dim: int) -> int:
    """Return the feed-forward width F' that gives the transformer the parameters of RetNet: 8 + 3 F/d = 4 + 3 F'/d."""
    ours = math.ceil(dim * 4 / 3 / 16) * 16
    return ours + dim * 4 // 3


def _learn(
    model: nn.Module, train: Tensor, valid: Tensor, steps: int, context: int, batch: int, rate: float, name: str
) -> float:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05)
    batches = _batches(train, steps, context, batch)
    for _ in trange(steps, desc=name, leave=False):
        _loss(model, next(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    with torch.no_grad():
        blocks = valid[: len(valid) // (context + 1) * (context + 1)].view(-1, context + 1)
        losses = [_loss(model.eval(), part) * len(part) for part in blocks.split(64)]
    return (sum(losses) / len(blocks)).item()


def _batches(text: Tensor, steps: int, context: int, batch: int) -> Iterator[Tensor]:
    """Yield the same random sequences of the text for every model."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
        yield text[starts + torch.arange(context + 1)]


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
