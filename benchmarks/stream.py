"""Memory and accuracy of decoding a very long text."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from tqdm.auto import trange
from transformers import DynamicCache

from benchmarks.measure import process_growth
from benchmarks.record import show
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM
from retention.integrations.transformers.compat import CACHE

VOCAB = 256


def stream(tokens: Annotated[int, typer.Option(help="Number of tokens to decode.")] = 100_000) -> None:
    """Decode a long text token by token, and compare the logits with those of one chunkwise pass."""
    torch.manual_seed(0)
    text = torch.randint(VOCAB, (1, tokens))
    places = torch.arange(tokens // 100 - 1, tokens, tokens // 100)
    growth = process_growth(_decode, text[:, : tokens // 100]), process_growth(_decode, text)
    decoded, size = _logits(text, places)
    with torch.inference_mode():
        whole = _model()(text, forward_mode="chunkwise", logits_to_keep=places).logits[0]
    error = ((decoded - whole).abs().max() / whole.abs().max()).item()
    rows = [
        ["extra memory of the process, 1 % of the stream", f"{growth[0] / 1e6:.1f} MB"],
        ["extra memory of the process, all of it", f"{growth[1] / 1e6:.1f} MB"],
        ["cache", f"{size / 1e6:.2f} MB"],
        ["logits against the chunkwise pass, largest deviation", f"{error:.1e}"],
    ]
    show(f"A stream of {tokens} tokens, batch 1, fp32", ["", ""], rows)


def _model() -> RetNetForCausalLM:
    """Return a model with large weights, which keeps much in its state, so that rounding errors can grow."""
    torch.manual_seed(1)
    model = RetNetForCausalLM(RetNetConfig(vocab_size=VOCAB, dim=64, num_layers=2, num_heads=4)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model


@torch.inference_mode()
def _logits(text: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the logits at `places`, and the size of the cache in bytes."""
    torch.set_num_threads(1)  # steps this small are quicker so
    model = _model()
    cache, wanted, found = DynamicCache(config=model.config), set(places.tolist()), []
    for n in trange(text.shape[1], mininterval=5, desc="decoding"):
        logits = model(text[:, n, None], **{CACHE: cache}).logits
        if n in wanted:
            found.append(logits[0, 0])
    return torch.stack(found), sum(layer.state.kv.nbytes for layer in cache.layers)


def _decode(text: torch.Tensor) -> Callable[[], object]:
    """Warm up, and return the decoding to be measured; it runs in a process of its own."""
    _logits(text[:, :500], torch.tensor([499]))
    gc.collect()
    return lambda: _logits(text, torch.tensor([text.shape[1] - 1]))
