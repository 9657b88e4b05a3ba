"""Time and memory of whole language models, for a prompt and for a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Measured, Run, Side, race, ratio
from benchmarks.record import Device, Lengths, Limit, Quick, add_case, duration, megabytes, show, spread
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM

PASSES = ("prompt", "training step")
VOCAB = 256


def retnet(_: int) -> Any:
    return RetNetForCausalLM(RetNetConfig(vocab_size=VOCAB, dim=512, num_layers=9, num_heads=4))


def gpt2(length: int) -> Any:
    sizes = dict(n_embd=512, n_layer=8, n_head=8, n_positions=length)
    rates = dict(
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )  # RetNet and Llama have no dropout; with it, SDPA would store all scores
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes, **rates))


def llama(length: int) -> Any:
    sizes = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=9, num_attention_heads=8)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=length, **sizes))


MODELS: dict[str, Callable[[int], Any]] = {"RetNet": retnet, "GPT-2": gpt2, "Llama": llama}


def model(
    length: Lengths = None,
    batch: Annotated[int, typer.Option(help="Number of sequences in the batch.")] = 1,
    device: Device = "cpu",
    limit: Limit = 20.0,
    quick: Quick = False,
) -> None:
    """Time prompts and training steps of a RetNet (28 M parameters), a GPT-2 (26 M) and a Llama (29 M), by length."""
    found = {}
    lengths = length or ([256] if quick else [512, 2048, 8192])
    for way, tokens in (bar := tqdm(list(product(PASSES, lengths)), leave=False)):
        bar.set_description(f"{way}, {tokens} tokens")
        sides = {name: Side(partial(_prepared, make, way, batch, tokens, device)) for name, make in MODELS.items()}
        found[way, tokens] = race(sides, 1.0 if quick else limit, device)
        add_case({"way": way, "length": tokens, "batch": batch, "device": device}, found[way, tokens], "Llama")
    _show(found, batch)


def _prepared(make: Callable[[int], Any], way: str, batch: int, length: int, device: str) -> Run:
    model, tokens = make(length).to(device), torch.randint(VOCAB, (batch, length), device=device)
    if way == "prompt":
        model.eval()
        return torch.inference_mode()(lambda: model(tokens, logits_to_keep=1).logits)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> Tensor:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss

    return step


Found = dict[tuple[str, int], dict[str, Measured]]


def _show(found: Found, batch: int) -> None:
    rows = []
    for (way, length), sides in found.items():
        ours = sides["RetNet"]
        for name, one in sides.items():
            faster = ratio(one.seconds, ours.seconds) if one is not ours and one.seconds and ours.seconds else None
            speed = f"{batch * length / one.median:,.0f}" if one.seconds else one.failure
            cells = [duration(one.median), speed, spread(faster) if faster else "", megabytes(one.memory)]
            rows.append([way, f"{length:,}", name, *cells])
    show(
        f"Language models, batch {batch}", ["", "tokens", "", "time", "tokens/s", "its time / RetNet's", "memory"], rows
    )
