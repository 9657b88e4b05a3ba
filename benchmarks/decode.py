"""Time and memory of a decoding step, by the number of tokens before it."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.baselines import Attention
from benchmarks.layer import DIM, HEADS
from benchmarks.measure import Measured, Run, Side, race, ratio
from benchmarks.record import Device, Lengths, Limit, Quick, add_case, duration, megabytes, show, spread
from retention import MultiScaleRetention
from retention.integrations.swap import replace_attention
from retention.integrations.transformers import RetentionCacheLayer, RetNetConfig, RetNetForCausalLM
from retention.integrations.transformers.compat import CACHE

VOCAB = 256
LAYERS = ("retention layer", "attention layer")
MODELS = ("RetNet", "GPT-2")
REPLACED = ("replaced attention", "Llama")
SMOLLM2 = dict(  # SmolLM2-135M
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)

Found = dict[tuple[str, int, int], tuple[dict[str, Measured], dict[str, int]]]  # kind, batch, context: times and bytes


def decode(
    length: Lengths = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size; repeat the option for several. Default: 1 and 8.")
    ] = None,
    models: Annotated[bool, typer.Option(help="Also time whole models: a RetNet and a GPT-2.")] = True,
    replaced: Annotated[
        bool, typer.Option(help="Also time a Llama of 135 M parameters, with its attention and with retention.")
    ] = True,
    device: Device = "cpu",
    limit: Limit = 3.0,
    quick: Quick = False,
) -> None:
    """Time a decoding step after many tokens, and measure the cache: layers of width 512, and whole models.

    The attention layer writes into a cache that is allocated beforehand. GPT-2 (25 M parameters, and its learnt
    positions) uses transformers' DynamicCache; the RetNet has 28 M parameters. The Llama has the sizes of SmolLM2-135M;
    where its attention is replaced, exact attention stays for the last 64 and the first 4 tokens.
    """
    lengths = length or ([64, 4096] if quick else [64, 1024, 8192, 65536])
    batches = batch or ([1] if quick else [1, 8])
    sides_of = (
        {"layers": _layers} | ({"models": _models} if models else {}) | ({"replaced": _replaced} if replaced else {})
    )
    found: Found = {}
    for kind, rows, context in (bar := tqdm(list(product(sides_of, batches, lengths)), leave=False)):
        bar.set_description(f"{kind}, batch {rows}, after {context}")
        sides, caches = sides_of[kind](rows, context, device)
        times = race(sides, 0.5 if quick else limit, device)
        found[kind, rows, context] = times, caches
        case = {"kind_of": kind, "batch": rows, "context": context, "device": device}
        add_case(case, times, list(times)[-1], cache=caches)
    _show(found)


def _layers(batch: int, context: int, device: str) -> tuple[dict[str, Side], dict[str, int]]:
    retention, attention = MultiScaleRetention(DIM, HEADS, device=device), Attention(DIM, HEADS).to(device)
    state = retention.initial_state(batch)
    state.kv.normal_()
    state.time += context

    def attend() -> Run:
        cache = torch.randn(2, batch, HEADS, context + 1, DIM // HEADS, device=device)
        x = torch.randn(batch, 1, DIM, device=device)
        return torch.inference_mode()(lambda: attention.step(x, cache, context))

    def retain() -> Run:
        x = torch.randn(batch, 1, DIM, device=device)
        return torch.inference_mode()(lambda: retention.step(x, state))

    keys = 2 * batch * context * DIM * 4
    sides = (Side(retain), Side(attend, needs=2 * keys))
    return dict(zip(LAYERS, sides, strict=True)), dict(zip(LAYERS, (state.kv.nbytes, keys), strict=True))


def _models(batch: int, context: int, device: str) -> tuple[dict[str, Side], dict[str, int]]:
    sizes = dict(
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        n_embd=DIM,
        n_layer=8,
        n_head=HEADS,
        n_positions=context + 1000,
    )
    keys = 8 * 2 * batch * context * DIM * 4
    state = 9 * batch * DIM * (2 * DIM // 4) * 4

    def gpt2() -> Run:
        model = GPT2LMHeadModel(GPT2Config(**sizes)).eval().to(device)
        return _step(model, _keys_and_values(model.config, batch, HEADS, context, DIM // HEADS, device), batch, device)

    def retnet() -> Run:
        config = RetNetConfig(vocab_size=VOCAB, dim=DIM, num_layers=9, num_heads=4)
        model = RetNetForCausalLM(config).eval().to(device)
        cache = _states(model, batch, context, device)
        assert sum(layer.state.kv.nbytes for layer in cache.layers) == state
        return _step(model, cache, batch, device)

    sides = (Side(retnet), Side(gpt2, needs=3 * keys))  # the cache is copied to make room for a token
    return dict(zip(MODELS, sides, strict=True)), dict(zip(MODELS, (state, keys), strict=True))


def _replaced(batch: int, context: int, device: str) -> tuple[dict[str, Side], dict[str, int]]:
    config = LlamaConfig(**SMOLLM2, max_position_embeddings=context + 1000)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    width = config.hidden_size // config.num_attention_heads
    options = dict(window=64, sinks=4)
    with torch.device("meta"):
        state = batch * sum(replace_attention(LlamaForCausalLM(config), **options).state_bytes.values())
    keys = layers * 2 * batch * heads * context * width * 4

    def attention() -> Run:
        model = LlamaForCausalLM(config).eval().to(device)
        return _step(model, _keys_and_values(config, batch, heads, context, width, device), batch, device)

    def retention() -> Run:
        model = LlamaForCausalLM(config).eval().to(device)
        replace_attention(model, **options)
        return _step(model, _states(model, batch, context, device), batch, device)

    sides = (Side(retention), Side(attention, needs=3 * keys))  # the cache is copied to make room for a token
    return dict(zip(REPLACED, sides, strict=True)), dict(zip(REPLACED, (state, keys), strict=True))


def _keys_and_values(config: Any, batch: int, heads: int, context: int, width: int, device: str) -> DynamicCache:
    """Return what attention keeps of a prompt, without waiting for it."""
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, batch, heads, context, width, device=device), layer)
    return cache


def _states(model: Any, batch: int, context: int, device: str) -> DynamicCache:
    """Return the states of retention after a short prompt, as if it had been longer."""
    cache = DynamicCache(config=model.config)
    prompt = torch.randint(VOCAB, (batch, 64), device=device)
    with torch.inference_mode():
        model(prompt, **{CACHE: cache})
    for layer in cache.layers:
        assert isinstance(layer, RetentionCacheLayer)
        layer.state.time += context - 64
    return cache


def _step(model: Any, cache: DynamicCache, batch: int, device: str) -> Run:
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    return torch.inference_mode()(lambda: model(token, **{CACHE: cache}).logits)


def _show(found: Found) -> None:
    rows = []
    for (_, batch, context), (times, caches) in found.items():
        ours, theirs = times.values()
        for name, one in times.items():
            faster = ratio(theirs.seconds, one.seconds) if one is ours and ours.seconds and theirs.seconds else None
            speed = f"{batch / one.median:,.0f}" if one.seconds else one.failure
            cells = [duration(one.median), speed, spread(faster, 1) if faster else "", megabytes(caches[name])]
            rows.append([name, str(batch), f"{context:,}", *cells])
    columns = ["", "batch", "after tokens", "a step", "tokens/s", "times faster", "cache"]
    show("One more token", columns, rows)
