"""The layers that are cheapest to replace are found by replacing each of them alone."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retention.integrations.swap import replace_attention
from retention.integrations.transformers.training.choosing import LayerCosts, choose_layers

SIZES = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_attention_heads=4, initializer_range=0.3)


@pytest.fixture
def model():
    made = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=2))
    made.model.layers[1].self_attn.o_proj.weight.data.zero_()  # this layer's attention has no effect
    return made


@pytest.fixture
def data():
    chance = torch.Generator().manual_seed(0)
    return [{"input_ids": row, "labels": row} for row in torch.randint(32, (24, 16), generator=chance)]


@pytest.mark.slow
def test_a_layer_without_effect_is_the_cheapest(model, data, tmp_path):
    before = copy.deepcopy(model.state_dict())
    costs = choose_layers(model, data, data, 1, steps=3, batch=2, examples=4, hidden=True)
    assert costs.chosen == [1]
    assert costs.untrained[1] == pytest.approx(costs.original, rel=1e-6)
    assert costs.names == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.training
    costs.write(tmp_path / "layers.json")
    assert LayerCosts.read(tmp_path / "layers.json") == costs
    assert str(costs).splitlines()[2].split() == ["1", "+0.0000", f"{costs.fitted[1] - costs.original:+.4f}", "yes"]


@pytest.mark.slow
def test_the_losses_are_those_of_the_model_with_that_layer_replaced(model, data):
    costs = choose_layers(model, data, data, 3, steps=0, batch=2, examples=4, options={"window": 4}, hidden=True)
    ids = torch.stack([data[i]["input_ids"] for i in range(4)])
    for i in range(3):
        other = copy.deepcopy(model).eval()
        calibration = torch.stack([data[j]["input_ids"] for j in range(8)])
        replace_attention(other, layers=[i], window=4, calibrate_on={"input_ids": calibration})
        wanted = other(ids, labels=ids, use_cache=False).loss.item()
        assert costs.untrained[i] == costs.fitted[i] == pytest.approx(wanted, rel=1e-5)


def test_more_layers_than_there_are_cannot_be_chosen(model, data):
    with pytest.raises(ValueError, match="count must be at most 3, the layers of the model; got count 4"):
        choose_layers(model, data, data, 4)
