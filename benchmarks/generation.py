"""Decoding with whole language models: against a GPT-2 with its cache of keys and values, and for a very long time."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from tqdm.auto import trange
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from benchmarks.measure import peak_memory, ratio, show, take_turns
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM

VOCAB = 256


def gpt2(context: int = 8192, batch: int = 8, rounds: int = 7) -> None:
    """One more token for a GPT-2 and a RetNet of equal size after `context` tokens: speed and memory of the cache."""
    sizes = dict(vocab_size=VOCAB, n_embd=512, n_layer=8, n_head=8, n_positions=context + 1000)
    models = {
        "GPT-2": GPT2LMHeadModel(GPT2Config(**sizes)).eval(),
        "RetNet": RetNetForCausalLM(RetNetConfig(vocab_size=VOCAB, dim=512, num_layers=9, num_heads=4)).eval(),
    }
    caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
    token = torch.zeros(batch, 1, dtype=torch.long)
    with torch.inference_mode():
        for layer in range(8):  # what the prompt would leave behind, without waiting for it
            caches["GPT-2"].update(*torch.randn(2, batch, 8, context, 64), layer)
        models["RetNet"](torch.randint(VOCAB, (batch, 300)), past_key_values=caches["RetNet"])
        steps = {
            name: lambda name=name, model=model: model(token, past_key_values=caches[name])
            for name, model in models.items()
        }
        seconds = take_turns(steps, rounds)
    memory = {
        "GPT-2": sum(x.nbytes for layer in caches["GPT-2"].layers for x in (layer.keys, layer.values)),
        "RetNet": sum(layer.state.kv.nbytes for layer in caches["RetNet"].layers),
    }
    rows = []
    for name, model in models.items():
        middle = sorted(seconds[name])[rounds // 2]
        size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
        rows.append([name, size, f"{1e3 * middle:.1f}", f"{batch / middle:.1f}", f"{memory[name] / 1e6:.1f}"])
    value, low, high = ratio(seconds["GPT-2"], seconds["RetNet"])
    shares = f"1/{memory['GPT-2'] / memory['RetNet']:.0f}"
    rows.append(["RetNet / GPT-2", "", "", f"{value:.0f} ({low:.0f} to {high:.0f})", shares])
    columns = ["", "parameters", "ms a step", "tokens/s", "MB of cache"]
    show(f"Decoding, batch {batch}, after {context} tokens; ratio of speeds with quartiles", columns, rows)


def stream(tokens: int = 100_000) -> None:
    """Decode one stream token by token; memory on the way, and its logits against one chunkwise pass over all of it."""
    torch.manual_seed(0)
    text = torch.randint(VOCAB, (1, tokens))
    places = torch.arange(tokens // 100 - 1, tokens, tokens // 100)
    growth = peak_memory(_decode, text[:, : tokens // 100]), peak_memory(_decode, text)
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
        logits = model(text[:, n, None], past_key_values=cache).logits
        if n in wanted:
            found.append(logits[0, 0])
    return torch.stack(found), sum(layer.state.kv.nbytes for layer in cache.layers)


def _decode(text: torch.Tensor) -> Callable[[], object]:
    """To be measured in a process of its own, warmed up."""
    _logits(text[:, :500], torch.tensor([499]))
    gc.collect()
    return lambda: _logits(text, torch.tensor([text.shape[1] - 1]))
