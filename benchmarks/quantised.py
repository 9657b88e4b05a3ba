"""Error, memory and time of models whose linear layers are quantised by torchao."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Run, Side, race
from benchmarks.record import Limit, Quick, add_case, duration, megabytes, show
from retention import RetNet
from retention.integrations.swap import replace_attention
from retention.integrations.transformers.compat import CACHE

VOCAB = 256


def quantised(
    dim: Annotated[int, typer.Option(min=64, help="Width of the models.")] = 1024,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the models.")] = 4,
    limit: Limit = 5.0,
    quick: Quick = False,
) -> None:
    """Quantise a RetNet and a Llama with retention in place of attention: error of the logits, memory, time per token.

    The weights are random. The error is that of all logits of 64 tokens, relative to the same model in float32 (root of
    the mean square). int8 and int4 are torchao's weight-only quantisation of linear layers; its packed int4 needs a
    GPU, so each value of int4 takes a byte here. The time is that of a decoding step of one row.
    """
    if quick:
        dim, layers = 128, 1
    rows = []
    tokens = torch.randint(VOCAB, (1, 64))
    for name, whole, step in (
        ("RetNet", _retnet(dim, layers), _retnet_step),
        ("Llama", _llama(dim, layers), _llama_step),
    ):
        versions = _versions(whole)
        with torch.inference_mode():
            want = _logits(whole, tokens)
            errors = {kind: _error(_logits(model, tokens), want) for kind, model in versions.items()}
            times = race({kind: Side(lambda m=model, f=step: f(m, tokens)) for kind, model in versions.items()}, limit)
        sizes = {kind: _bytes(model) for kind, model in versions.items()}
        add_case({"model": name, "dim": dim, "layers": layers}, times, "float32", error=errors, bytes=sizes)
        for kind, one in times.items():
            found = f"{errors[kind]:.2g}" if errors[kind] else "0"
            cells = [megabytes(sizes[kind]), found, duration(one.median)]
            rows.append([name, kind, *cells, f"{1 / one.median:,.0f}" if one.seconds else one.failure])
    columns = ["model", "weights", "memory", "error of the logits", "a step", "tokens/s"]
    show(f"Quantised linear layers, width {dim}, {layers} layers", columns, rows)


def _versions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model in float32 and bfloat16, and quantised."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    half = copy.deepcopy(model).to(torch.bfloat16)
    found = {"float32": model, "bfloat16": half}
    kinds = {
        "int8": (model, Int8WeightOnlyConfig()),
        "int8, bfloat16": (half, Int8WeightOnlyConfig()),
        "int4 in bytes": (model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    }
    for name, (whole, config) in kinds.items():
        found[name] = copy.deepcopy(whole)
        quantize_(found[name], config)
    return found


def _retnet(dim: int, layers: int) -> RetNet:
    torch.manual_seed(0)
    return RetNet(VOCAB, dim, layers, dim // 64, ffn_dim=4 * dim, tie_embeddings=False).eval()


def _llama(dim: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
    )
    model = LlamaForCausalLM(config).eval()
    replace_attention(model)
    return model


def _logits(model: Any, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return (out if isinstance(out, Tensor) else out.logits).float()


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()


def _bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters; those of a quantised weight are the bytes of its parts."""
    return sum(_stored(p) for p in model.parameters())


def _stored(x: Tensor) -> int:
    flatten = getattr(x, "__tensor_flatten__", None)
    return x.nbytes if flatten is None else sum(_stored(getattr(x, name)) for name in flatten()[0])


def _retnet_step(model: Any, tokens: Tensor) -> Run:
    _, state = model(tokens, return_state=True)
    return torch.inference_mode()(lambda: model.step(tokens[:, :1], state))


def _llama_step(model: Any, tokens: Tensor) -> Run:
    cache = DynamicCache(config=model.config)
    model(tokens, **{CACHE: cache})
    return torch.inference_mode()(lambda: model(tokens[:, :1], **{CACHE: cache}).logits)
