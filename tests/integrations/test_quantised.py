"""Models whose linear layers are quantised, by torchao and by modules that have no weight in the place of one."""

import copy

import pytest
import torch
from cases import deviation
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

from retention import BackendError, MultiScaleRetention, RetNet
from retention.ffn import FeedForward
from retention.integrations.swap import replace_attention
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM

CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def quantised(model, name="int8"):
    model = copy.deepcopy(model)
    quantize_(model, CONFIGS[name])
    return model


def rounded(model, found):
    """The model with floating weights that have the values of the quantised ones in `found`."""
    model = copy.deepcopy(model)
    for mine, theirs in zip(model.modules(), found.modules(), strict=True):
        if isinstance(mine, nn.Linear):
            mine.weight.copy_(theirs.weight.dequantize())
    return model


def replaced_llama():
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).eval()
    replace_attention(model, window=8)
    return model


def retnet():
    sizes = dict(vocab_size=99, dim=64, num_layers=2, num_heads=2, tie_word_embeddings=False)
    return RetNetForCausalLM(RetNetConfig(**sizes)).eval()


# --- torchao ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_quantised_retnet_decodes_as_it_computes_whole_sequences(name):
    whole = RetNet(99, 64, num_layers=2, num_heads=2, tie_embeddings=False).eval()
    model, tokens = quantised(whole, name), torch.randint(99, (2, 20))
    logits = model(tokens)
    assert deviation(logits, rounded(whole, model)(tokens)) <= 1e-5
    assert not torch.equal(logits, whole(tokens))
    state = [block.retention.initial_state(2) for block in model.backbone.blocks]
    steps = [model.step(token, state) for token in tokens.split(1, dim=1)]
    assert deviation(torch.cat(steps, dim=1), logits) <= 1e-5
    prompt = model.generate(tokens, max_new_tokens=3, temperature=0)
    assert torch.equal(prompt[:, 20], logits[:, -1].argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "make",
    [replaced_llama, retnet],
    ids=["replaced Llama", "RetNet"],
)
@torch.no_grad()
def test_a_quantised_model_of_transformers_generates_what_it_computes(make, name):
    whole = make()
    model, tokens = quantised(whole, name), torch.randint(1, 99, (2, 20))
    logits = model(tokens, use_cache=False).logits
    assert deviation(logits, rounded(whole, model)(tokens, use_cache=False).logits) <= 1e-5
    model.generation_config.eos_token_id = None  # so that no text ends early
    found = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    again = model(found[:, :-1], use_cache=False).logits[:, 19:].argmax(-1)
    assert torch.equal(found[:, 20:], again)


@pytest.mark.slow
@torch.no_grad()
def test_attention_of_a_quantised_model_is_replaced_in_its_own_dtype():
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    host = quantised(LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).to(torch.bfloat16))
    replace_attention(host)
    assert {p.dtype for p in host.model.layers[0].self_attn.retention.parameters()} == {torch.bfloat16}
    assert host(torch.randint(99, (1, 5)), use_cache=False).logits.isfinite().all()


def test_a_kernel_that_would_read_the_bare_weight_refuses_a_quantised_one():
    ffn = quantised(FeedForward(32, 32, activation="silu", backend="xformers"))
    with pytest.raises(BackendError, match="needs a plain weight for fc1; got a weight Int8Tensor.*backend 'torch'"):
        ffn(torch.ones(1, 2, 32))


# --- others -----------------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """As other quantisers keep a layer: integers, and a scale of floats or integers, under names of their own."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("packed", torch.zeros(4, dtype=torch.uint8))
        self.register_buffer("scale", scale)


class Method(nn.Module):
    """As torch.ao.nn.quantized keeps a layer: no tensor that torch sees, and a weight that is a method."""

    def weight(self):
        raise AssertionError("must not be asked")


@pytest.mark.parametrize(
    ("projection", "dtype"),
    [
        (Packed(torch.ones(1)), torch.float32),
        (Packed(torch.ones(1, dtype=torch.float16)), torch.float32),
        (Packed(torch.ones(1, dtype=torch.float64)), torch.float64),
        (Packed(torch.ones(1, dtype=torch.int32)), torch.float32),
        (Method(), torch.float32),
    ],
)
def test_the_first_state_needs_no_weight(projection, dtype):
    layer = MultiScaleRetention(16, 2)
    layer.q_proj = projection
    assert layer.initial_state(3).kv.dtype == dtype


def test_the_first_state_is_where_the_packed_weight_is():
    layer = MultiScaleRetention(16, 2)
    layer.q_proj = Packed(torch.ones(1)).to("meta")
    assert layer.initial_state(3).kv.device.type == "meta"
