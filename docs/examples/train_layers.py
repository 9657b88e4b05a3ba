"""A RetNet made of `MultiScaleRetention` layers, with a training loop of its own; then it writes.

    python docs/examples/train_layers.py

It learns the source of Python's standard library byte by byte, in about two minutes on a CPU. Training uses whole
sequences; writing goes token by token, from a state of constant size.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retention import MultiScaleRetention, RetentionState


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.retention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        # Decays for short contexts, which are trained from there.
        self.retention = MultiScaleRetention(dim, num_heads, decay="short", learnable_decay=True)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.retention(self.retention_norm(x))
        return x + self.ffn(self.ffn_norm(x))

    def step(self, x: Tensor, state: RetentionState) -> Tensor:
        """One token, x (batch, 1, dim); the state is updated in place."""
        x = x + self.retention.step(self.retention_norm(x), state)
        return x + self.ffn(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self, vocab_size: int, dim: int, num_layers: int, num_heads: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, length) -> logits (batch, length, vocab_size)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.inference_mode()
    def write(self, prompt: bytes, length: int) -> bytes:
        """Continue a text; each byte costs the same, however long the text is."""
        states = [block.retention.initial_state(1) for block in self.blocks]
        text = bytearray(prompt)
        for n in range(len(prompt) + length - 1):
            x = self.embedding(torch.tensor([[text[n]]]))
            for block, state in zip(self.blocks, states, strict=True):
                x = block.step(x, state)
            if n + 1 >= len(prompt):
                logits = self.head(self.norm(x))[0, 0] / 0.8
                text.append(int(torch.multinomial(logits.softmax(-1), 1)))
        return bytes(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps")
    parser.add_argument("--dim", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="number of blocks")
    parser.add_argument("--length", type=int, default=400, help="bytes to write at the end")
    options = parser.parse_args()

    torch.manual_seed(0)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    model = Model(256, options.dim, options.layers, num_heads=4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=options.steps, pct_start=0.1)
    for step in range(options.steps):
        starts = torch.randint(len(text) - 129, (16, 1))
        batch = text[starts + torch.arange(129)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: {loss.item():.3f} nats per byte")

    # The recurrent form writes what the parallel form would have written.
    states = [block.retention.initial_state(1) for block in model.blocks]
    tokens = text[None, :20]
    with torch.inference_mode():
        x = model.embedding(tokens)
        steps = []
        for n in range(20):
            y = x[:, n : n + 1]
            for block, state in zip(model.blocks, states, strict=True):
                y = block.step(y, state)
            steps.append(model.head(model.norm(y)))
        difference = (torch.cat(steps, dim=1) - model(tokens)).abs().max().item()
    print(f"largest difference of logits between one pass and token by token: {difference:.1e}\n")
    print(model.write(b"def ", options.length).decode(errors="replace"))


if __name__ == "__main__":
    main()
