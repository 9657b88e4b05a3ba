"""Other RetNets to compare with: two as they are installed, the others written down from their conventions in float64.

What is written here shares no code with the library: pairs of channels are complex numbers, decays are powers, sums
run over all pairs of tokens.
"""

import importlib
import math
import os
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F


def peer(module):
    """The installed module of another implementation. Without it tests are skipped, but where CI runs they fail."""
    if "CI" not in os.environ and importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"needs {module}; pip install --no-deps -r tests/peers.txt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Importing from timm.models.layers is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return importlib.import_module(module)


def deviation(got, wanted):
    """The largest, relative to the largest value."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def stirred(module):
    """All parameters away from their start, where many are 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return module.eval()


def torchscale(*, embedding=True, dtype=torch.float32, **options):
    """A decoder of torchscale, weights stirred. In float64 with exact buffers, which it computes in float32."""
    retnet, config = peer("torchscale.architecture.retnet"), peer("torchscale.architecture.config")
    args = config.RetNetConfig(**options)
    embed = torch.nn.Embedding(args.vocab_size, args.decoder_embed_dim) if embedding else None
    decoder = stirred(retnet.RetNetDecoder(args, embed_tokens=embed)).to(dtype)
    if dtype == torch.float64:
        heads = args.decoder_retention_heads
        angles = 10000 ** -torch.linspace(0, 1, args.decoder_embed_dim // heads // 2, dtype=dtype)
        decoder.retnet_rel_pos.angle = angles.repeat_interleave(2)
        decoder.retnet_rel_pos.decay = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=dtype))))
    return decoder


@contextmanager
def wide():
    """torchscale computes its norms and gates in float32 by `.float()`; here that keeps float64."""
    narrow = torch.Tensor.float
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else narrow(x)
    try:
        yield
    finally:
        torch.Tensor.float = narrow


def run(decoder, tokens, **options):
    """What torchscale makes of the tokens."""
    with torch.no_grad(), wide():
        return decoder(tokens, **options)


# The parts that the written-down implementations are made of.


def drawn(shapes, dtype=torch.float64):
    """Weights of these names and shapes; norms around 1, biases around 0."""
    return {
        name: (1.0 if name.endswith("weight") and len(shape) == 1 else 0.0)
        + torch.randn(shape, dtype=dtype) * (0.2 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rms(x, eps, weight=1.0):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer(x, eps, weight=1.0, bias=0.0):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def turned(x, angles):
    """x (..., T, K), the neighbours in K as complex numbers, times e^(i n angle)."""
    n = torch.arange(x.shape[-2], dtype=torch.float64)[:, None]
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * torch.exp(1j * n * angles)
    return torch.view_as_real(z).flatten(-2)


def linspace_angles(key_dim):
    return 10000.0 ** -torch.linspace(0, 1, key_dim // 2, dtype=torch.float64)


def decayed(gammas, length):
    """gamma^(n - m) for m <= n, else 0: (H, T, T)."""
    n = torch.arange(length)
    ages = n[:, None] - n[None]
    return torch.where(ages >= 0, gammas[:, None, None] ** ages.clamp(min=0), 0.0)


def paper_gammas(heads):
    return 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))


def log_linear_gammas(heads):
    return 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=torch.float64).exp()


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(-2)


# syncdoth's RetNetForCausalLM.


def syncdoth_weights(*, vocab, dim, value_dim, ffn, layers, heads, glu=True, ffn_norm=None, buffers=True, lm=False):
    shapes = {"model.embed_tokens.weight": (vocab, dim)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}retention.{name}_proj.weight": (dim, dim) for name in "qk"}
        shapes |= {f"{at}retention.{name}_proj.weight": (value_dim, dim) for name in "vg"}
        shapes |= {f"{at}retention.out_proj.weight": (dim, value_dim), f"{at}retention_layer_norm.weight": (dim,)}
        shapes |= {f"{at}ffn.fc1.weight": (ffn, dim), f"{at}ffn.fc2.weight": (dim, ffn)}
        shapes |= (
            {f"{at}ffn.gate.weight": (ffn, dim)} if glu else {f"{at}ffn.fc1.bias": (ffn,), f"{at}ffn.fc2.bias": (dim,)}
        )
        shapes |= {f"{at}ffn.ffn_layernorm.weight": (ffn,)} if ffn_norm else {}
        shapes |= {f"{at}ffn.ffn_layernorm.bias": (ffn,)} if ffn_norm == "layer" else {}
        shapes[f"{at}final_layer_norm.weight"] = (dim,)
    weights = drawn(shapes | {"model.layer_norm.weight": (dim,), "lm_head.weight": (vocab, dim)})
    if buffers:
        gammas = log_linear_gammas(heads) if lm else paper_gammas(heads)
        weights["model.retnet_rel_pos.angle"] = linspace_angles(dim // heads).repeat_interleave(2).float()
        weights["model.retnet_rel_pos.decay"] = gammas.log().float()
    return weights


def syncdoth(w, tokens, *, heads, lm=False, eps=1e-6):
    x = w["model.embed_tokens.weight"][tokens]
    decay = decayed(log_linear_gammas(heads) if lm else paper_gammas(heads), tokens.shape[1])
    for i in range(sum(name.endswith("q_proj.weight") for name in w)):
        at = f"model.layers.{i}."
        y = rms(x, eps, w[f"{at}retention_layer_norm.weight"])
        q, k, v = (split(linear(w, f"{at}retention.{name}_proj", y), heads) for name in "qkv")
        angles = linspace_angles(q.shape[-1])
        r = turned(q, angles) @ turned(k, angles).mT * q.shape[-1] ** -0.5 * decay / decay.sum(-1, True).sqrt()
        r = r / r.sum(-1, True).abs().clamp(min=1)
        g = F.silu(linear(w, f"{at}retention.g_proj", y))
        x = x + linear(w, f"{at}retention.out_proj", g * joined(rms(r @ v, eps)))
        y = rms(x, eps, w[f"{at}final_layer_norm.weight"])
        h = F.gelu(linear(w, f"{at}ffn.fc1", y))
        h = h * linear(w, f"{at}ffn.gate", y) if f"{at}ffn.gate.weight" in w else h
        if f"{at}ffn.ffn_layernorm.bias" in w:
            h = layer(h, eps, w[f"{at}ffn.ffn_layernorm.weight"], w[f"{at}ffn.ffn_layernorm.bias"])
        elif f"{at}ffn.ffn_layernorm.weight" in w:
            h = rms(h, eps, w[f"{at}ffn.ffn_layernorm.weight"])
        x = x + linear(w, f"{at}ffn.fc2", h)
    return linear(w, "lm_head", rms(x, eps, w["model.layer_norm.weight"]))


# Jamie Stirling's RetNet: no embedding, no head. stacked: the variant with one W_Q for all heads.


def jamie_stirling_weights(*, dim, value_dim, ffn, layers, heads, stacked=False):
    shapes, constants = {}, {}
    key, value = dim // heads, value_dim // heads
    scale = (torch.arange(0, key, 2) + 0.4 * key) / (1.4 * key)
    for i in range(layers):
        at = f"retentions.{i}."
        shapes |= {f"{at}W_G": (dim, value_dim), f"{at}W_O": (value_dim, dim)}
        for name, width in (("W_Q", key), ("W_K", key), ("W_V", value)):
            if stacked:
                shapes[f"{at}{name}"] = (heads, dim, width)
            else:
                shapes |= {f"{at}retentions.{h}.{name}": (dim, width) for h in range(heads)}
        constants |= {f"{at}retentions.{h}.xpos.scale": scale for h in range(heads)}
        constants |= {f"{at}gammas": log_linear_gammas(heads).float(), f"{at}xpos.scale": scale} if stacked else {}
        shapes |= {f"{at}group_norm.weight": (value_dim,), f"{at}group_norm.bias": (value_dim,)}
        shapes |= {f"ffns.{i}.0.weight": (ffn, dim), f"ffns.{i}.0.bias": (ffn,)}
        shapes |= {f"ffns.{i}.2.weight": (dim, ffn), f"ffns.{i}.2.bias": (dim,)}
        shapes |= {f"layer_norms_{n}.{i}.{part}": (dim,) for n in (1, 2) for part in ("weight", "bias")}
    return drawn(shapes) | constants


def jamie_stirling(w, x, *, heads, eps=1e-5):
    n, gammas = torch.arange(x.shape[1], dtype=torch.float64)[:, None], log_linear_gammas(heads)
    for i in range(sum(name.endswith("W_G") for name in w)):
        at = f"retentions.{i}."
        y = layer(x, eps, w[f"layer_norms_1.{i}.weight"], w[f"layer_norms_1.{i}.bias"])
        outs = []
        for h in range(heads):
            q, k, v = (
                y @ (w[f"{at}{name}"][h] if f"{at}{name}" in w else w[f"{at}retentions.{h}.{name}"])
                for name in ("W_Q", "W_K", "W_V")
            )
            size = q.shape[-1]
            scale = ((torch.arange(0, size, 2, dtype=torch.float64) + 0.4 * size) / (1.4 * size)) ** (n / 512)
            angles = 10000.0 ** -(torch.arange(size // 2, dtype=torch.float64) / (size // 2))
            q, k = (
                turned(q, angles) * scale.repeat_interleave(2, -1),
                turned(k, angles) / scale.repeat_interleave(2, -1),
            )
            outs.append(layer((q @ k.mT * decayed(gammas[h : h + 1], x.shape[1])[0]) @ v, eps))
        normed = torch.cat(outs, -1) * w[f"{at}group_norm.weight"] + w[f"{at}group_norm.bias"]
        x = x + (F.silu(y @ w[f"{at}W_G"]) * normed) @ w[f"{at}W_O"]
        y = layer(x, eps, w[f"layer_norms_2.{i}.weight"], w[f"layer_norms_2.{i}.bias"])
        x = x + linear(w, f"ffns.{i}.2", F.gelu(linear(w, f"ffns.{i}.0", y)))
    return x


# retnet-pytorch: no embedding, no head; called with attn_mask="causal".


def retnet_pytorch_weights(*, dim, value_dim, ffn, layers, heads):
    shapes, constants = {}, {}
    for i in range(layers):
        at = f"layers.{i}."
        for name, out, into in (("q", dim, dim), ("k", dim, dim), ("v", value_dim, dim), ("g", value_dim, dim)):
            shapes |= {f"{at}0.{name}_proj.weight": (out, into), f"{at}0.{name}_proj.bias": (out,)}
        shapes |= {f"{at}0.o_proj.weight": (dim, value_dim), f"{at}0.o_proj.bias": (dim,)}
        shapes |= {f"{at}0.pre_norm.{part}": (dim,) for part in ("weight", "bias")}
        shapes |= {f"{at}0.norm.{part}": (value_dim // heads,) for part in ("weight", "bias")}
        shapes |= {f"{at}1.net.0.{part}": (dim,) for part in ("weight", "bias")}
        shapes |= {f"{at}1.net.1.1.weight": (ffn, dim), f"{at}1.net.1.1.bias": (ffn,)}
        shapes |= {f"{at}1.net.2.1.weight": (dim, ffn), f"{at}1.net.2.1.bias": (dim,)}
        constants[f"{at}0.angle"] = linspace_angles(dim // heads).repeat_interleave(2)[None].float()
        constants[f"{at}0.decay"] = paper_gammas(heads).log().float()
    return drawn(shapes) | constants


def retnet_pytorch(w, x, *, heads, gate=F.gelu, eps=1e-5):
    decay = decayed(paper_gammas(heads), x.shape[1])
    for i in range(sum(name.endswith("o_proj.weight") for name in w)):
        at = f"layers.{i}.0."
        y = layer(x, eps, w[f"{at}pre_norm.weight"], w[f"{at}pre_norm.bias"])
        q, k, v = (split(linear(w, f"{at}{name}_proj", y), heads) for name in "qkv")
        angles = linspace_angles(q.shape[-1])
        r = turned(q, angles) @ turned(k, angles).mT * q.shape[-1] ** -0.5 * decay
        out = joined(layer(r @ v, eps, w[f"{at}norm.weight"], w[f"{at}norm.bias"]))
        x = x + linear(w, f"{at}o_proj", gate(linear(w, f"{at}g_proj", y)) * out)
        net = f"layers.{i}.1.net."
        y = layer(x, eps, w[f"{net}0.weight"], w[f"{net}0.bias"])
        x = x + F.gelu(linear(w, f"{net}2.1", F.gelu(linear(w, f"{net}1.1", y))))
    return x


# fla's RetNetForCausalLM: decays, rotation and scale are fixed; the sizes of the heads follow from the weights.


def fla_weights(
    *, vocab, dim, ffn, layers, heads, expand_k=1, expand_v=2, kv_heads=None, gate=True, affine=True, tied=False
):
    key, value, shared = int(dim * expand_k), int(dim * expand_v), (kv_heads or heads) / heads
    shapes = {"model.embeddings.weight": (vocab, dim), "model.norm.weight": (dim,)}
    shapes |= {} if tied else {"lm_head.weight": (vocab, dim)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}attn_norm.weight": (dim,), f"{at}mlp_norm.weight": (dim,)}
        shapes |= {f"{at}attn.q_proj.weight": (key, dim), f"{at}attn.k_proj.weight": (int(key * shared), dim)}
        shapes |= {f"{at}attn.v_proj.weight": (int(value * shared), dim), f"{at}attn.o_proj.weight": (dim, value)}
        shapes |= {f"{at}attn.g_proj.weight": (value, dim)} if gate else {}
        shapes |= {f"{at}attn.g_norm{'_swish_gate' * gate}.weight": (value // heads,)} if affine else {}
        shapes |= {f"{at}mlp.{name}_proj.weight": (ffn, dim) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (dim, ffn)
    weights = drawn(shapes)
    for i in range(layers):  # keys lean toward queries: the norm magnifies the rounding error of a lone score near 0
        q, k = (weights[f"model.layers.{i}.attn.{name}_proj.weight"] for name in "qk")
        k.add_(q.view(-1, heads // (kv_heads or heads), key // heads, dim)[:, 0].reshape(k.shape))
    return weights


def fla(w, tokens, *, heads, eps=1e-6):
    n, embedding = torch.arange(tokens.shape[1], dtype=torch.float64), w["model.embeddings.weight"]
    x = embedding[tokens]
    for i in range(sum(name.endswith("q_proj.weight") for name in w)):
        at = f"model.layers.{i}."
        y = rms(x, eps, w[f"{at}attn_norm.weight"])
        q, k = (linear(w, f"{at}attn.{name}_proj", y) for name in "qk")
        half = q.shape[-1] // heads // 2
        turns = torch.exp(1j * n[:, None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half))
        # The two halves of a head's channels are the real and the imaginary parts.
        q, k = (torch.complex(*z.unflatten(-1, (-1, 2, half)).unbind(-2)).transpose(1, 2) * turns for z in (q, k))
        v = split(linear(w, f"{at}attn.v_proj", y), k.shape[1])
        group = torch.arange(heads) // (heads // k.shape[1])  # each key head serves neighbouring query heads
        r = (q @ k[:, group].mH).real * (2 * half) ** -0.5 * decayed(paper_gammas(heads), len(n))
        out = rms(r @ v[:, group], eps)
        for name in ("g_norm", "g_norm_swish_gate"):
            out = out * w.get(f"{at}attn.{name}.weight", 1.0)
        out = joined(out)
        if f"{at}attn.g_proj.weight" in w:
            out = out * F.silu(linear(w, f"{at}attn.g_proj", y))
        x = x + linear(w, f"{at}attn.o_proj", out)
        y = rms(x, eps, w[f"{at}mlp_norm.weight"])
        x = x + linear(
            w, f"{at}mlp.down_proj", F.silu(linear(w, f"{at}mlp.gate_proj", y)) * linear(w, f"{at}mlp.up_proj", y)
        )
    return rms(x, eps, w["model.norm.weight"]) @ w.get("lm_head.weight", embedding).T
