"""Decoding of a very long stream."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from tqdm.auto import trange
from transformers import DynamicCache

from benchmarks.measure import process_growth
from benchmarks.record import show
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM
from retention.integrations.transformers.compat import CACHE

VOCAB = 256


def stream(tokens: int = 100_000) -> None:
    """Decode a long stream token by token: memory on the way, and its logits beside those of one chunkwise pass."""
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
    """As large weights as make it remember: deviations then have something to grow on."""
    torch.manual_seed(1)
    model = RetNetForCausalLM(RetNetConfig(vocab_size=VOCAB, dim=64, num_layers=2, num_heads=4)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model


@torch.inference_mode()
def _logits(text: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, int]:
    """At `places`, and the bytes of the cache."""
    torch.set_num_threads(1)  # steps this small are quicker so
    model = _model()
    cache, wanted, found = DynamicCache(config=model.config), set(places.tolist()), []
    for n in trange(text.shape[1], mininterval=5, desc="decoding"):
        logits = model(text[:, n, None], **{CACHE: cache}).logits
        if n in wanted:
            found.append(logits[0, 0])
    return torch.stack(found), sum(layer.state.kv.nbytes for layer in cache.layers)


def _decode(text: torch.Tensor) -> Callable[[], object]:
    """To be measured in a process of its own, warmed up."""
    _logits(text[:, :500], torch.tensor([499]))
    gc.collect()
    return lambda: _logits(text, torch.tensor([text.shape[1] - 1]))
