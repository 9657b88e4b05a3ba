"""Attention classes of transformers that nobody has registered: recognised, or refused with the reason."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from hosts import ENCODERS, GROUPED, MORE, SIZES, build, documented_names, each, padded
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from retention.errors import ShapeError
from retention.integrations.swap import (
    Heads,
    find_adapter,
    plan_replacement,
    register_adapter,
    replace_attention,
    restore_attention,
)
from retention.integrations.transformers import TransformersAttention
from retention.integrations.transformers.adapters import RecognisedAttention
from retention.integrations.transformers.compat import CACHE

CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def test_the_page_on_replacement_lists_the_families_that_are_tested():
    page = Path(__file__).parents[2] / "docs/pages/replace-attention.md"
    listed = page.read_text().split("Tests run ")[1].split(". ")[0].replace("\n", " ")
    assert listed.replace(" and ", ", ").split(", ") == documented_names()


# --- decoders ---------------------------------------------------------------------------------------------------------

each_family = each(MORE, quick=["GPTJ"])


@pytest.mark.slow
@each_family
@torch.no_grad()
def test_restoring_is_bit_exact(family):
    model, (_, batch) = build(family), padded()
    before, logits = copy.deepcopy(model.state_dict()), model(**batch).logits
    report = replace_attention(model, allow_lost=True)
    assert len(report.replaced) == 2
    assert not torch.allclose(model(**batch).logits, logits, atol=1e-2)
    restore_attention(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(**batch).logits, logits)


@each_family
@torch.no_grad()
def test_padding_cuts_and_steps_leave_the_logits_alone(family):
    model, (rows, batch) = build(family), padded()
    replace_attention(model, allow_lost=True, window=9 if family in ("SmolLM3", "Falcon-grouped", "GPTNeo") else None)
    for prompt, logits in zip(rows, model(**batch).logits, strict=True):
        torch.testing.assert_close(logits[-len(prompt) :], model(prompt[None]).logits[0], **CLOSE)
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 60), (60, 96), *((n, n + 1) for n in range(96, 100))):
        parts.append(model(rows[0][None, start:end], **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(rows[0][None]).logits, **CLOSE)
    assert cache.layers[1].state.kv.shape[0] == 1


@each_family
def test_generation_with_a_cache_is_that_without(family):
    model, (_, batch) = build(family), padded()
    replace_attention(model, allow_lost=True, layers=[1])
    batch = {name: batch[name][:, -30:] for name in ("input_ids", "attention_mask")}
    kwargs = dict(**batch, max_new_tokens=5)
    for options in ({}, {"num_beams": 2}):
        want = model.generate(**kwargs, **options, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(**kwargs, **options, do_sample=False), want)


@each_family
def test_gradients_reach_every_projection(family):
    model, (_, batch) = build(family), padded()
    replace_attention(model, allow_lost=True)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None and "experts" not in name]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["GPTJ", "GPTNeo", "Falcon-grouped", "DeepseekV3"])
def test_the_softmax_is_gone_and_all_else_is_where_it_was(family):
    """With a window that holds the whole prompt, a replaced layer is the attention it was."""
    model, (rows, _) = build(family), padded()
    ids = rows[2][None]  # shorter than GPT-Neo's own window
    want = model(ids).logits
    replace_attention(model, allow_lost=True, window=16, gate=None)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-3, atol=1e-3)


def test_the_plan_tells_what_local_layers_lose():
    plan = plan_replacement(build("GPTNeo"), allow_lost=True)
    assert plan.replaced == ["transformer.h.0.attn.attention", "transformer.h.1.attn.attention"]
    assert plan.lost == {"transformer.h.1.attn.attention": ["the sliding window of 8 tokens"]}
    with pytest.raises(ValueError, match="would lose the sliding window of 8 tokens; pass allow_lost=True"):
        replace_attention(build("GPTNeo"))


# --- encoders ---------------------------------------------------------------------------------------------------------


def encoder(family):
    """An encoder, and a batch for it of two inputs whose last tokens differ."""
    model = build(family)
    if family in ("ViT", "DeiT"):
        pixels = torch.randn(1, 1, 12, 12).repeat(2, 1, 1, 1)
        pixels[1, :, -3:, -3:] += 1
        return model, {"pixel_values": pixels}
    if family == "Whisper":
        sound = torch.randn(1, 5, 30).repeat(2, 1, 1)
        sound[1, :, -2:] += 1
        return model.encoder, {"input_features": sound}
    ids = torch.randint(3, 99, (1, 20)).repeat(2, 1)
    ids[1, -1] = 3 + (ids[0, -1] - 2) % 96
    return model, {"input_ids": ids}


@pytest.mark.slow
@torch.no_grad()
@each(ENCODERS, quick=["Bert"])
def test_encoders_look_both_ways_and_are_restored(family):
    model, batch = encoder(family)
    want = model(**batch).last_hidden_state
    assert len(replace_attention(model).replaced) == 2
    hidden = model(**batch).last_hidden_state
    assert not torch.allclose(hidden, want, atol=1e-2)
    assert not torch.allclose(hidden[0, 0], hidden[1, 0], atol=1e-4)  # the first token hears of the last
    torch.testing.assert_close(model(**{k: v[:1] for k, v in batch.items()}).last_hidden_state, hidden[:1], **CLOSE)
    restore_attention(model)
    assert torch.equal(model(**batch).last_hidden_state, want)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["Bert", "XLMRoberta"])
def test_padding_leaves_an_encoder_alone(family):
    model, (rows, _) = build(family), padded()
    replace_attention(model)
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = model(right, attention_mask=(right != 0).long()).last_hidden_state
    for row, prompt in zip(hidden, rows, strict=True):
        torch.testing.assert_close(row[: len(prompt)], model(prompt[None]).last_hidden_state[0], **CLOSE)


# --- what is refused before anything changes --------------------------------------------------------------------------

EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
T5 = dict(vocab_size=99, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64)
BART = dict(
    vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
)  # fmt: skip
LLAMA4 = dict(EXPERTS, head_dim=8, intermediate_size_mlp=64, layer_types=["chunked_attention", "full_attention"])
REFUSED = {  # model, config, which layer, reason
    "GptOssModel": (SIZES | GROUPED | EXPERTS | {"head_dim": 8}, "layers.0.self_attn", "has attention sinks"),
    "BloomModel": (dict(vocab_size=99, hidden_size=32, n_layer=1, n_head=4), "h.0.self_attention", "has alibi"),
    "MptModel": (dict(vocab_size=99, d_model=32, n_layers=1, n_heads=4), "blocks.0.attn", "has alibi"),
    "FalconModel": (SIZES | {"alibi": True}, "h.0.self_attention", "has alibi"),
    "T5EncoderModel": (T5, "encoder.block.0.layer.0.SelfAttention", "has a bias of positions"),
    "DiffLlamaModel": (SIZES | GROUPED, "layers.0.self_attn", "has lambda_q1, lambda_k1, lambda_q2, lambda_k2, and"),
    "DogeModel": (SIZES | GROUPED, "layers.0.self_attn", "has .*A, and what that does is not known; if it is harmless"),
    "Llama4TextModel": (SIZES | GROUPED | LLAMA4, "layers.0.self_attn", "is of the type 'chunked_attention'"),
    "BartModel": (BART, "decoder.layers.0.encoder_attn", "is cross-attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_retention_cannot_do_is_refused_with_the_reason(name):
    sizes, layer, reason = REFUSED[name]
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**sizes))
    with pytest.raises(ValueError, match=f"nothing was replaced, because\n.*{reason}"):
        replace_attention(model, where=lambda name, _: name == layer, allow_lost=True)


@pytest.mark.slow
@torch.no_grad()
def test_self_attention_beside_cross_attention_is_replaced():
    torch.manual_seed(0)
    model = transformers.BartModel(transformers.BartConfig(**BART)).eval()
    plan = plan_replacement(model, where=lambda name, _: name.endswith("self_attn"))
    assert plan.replaced == ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
    replace_attention(model, where=lambda name, _: name.endswith("self_attn"))
    ids = torch.randint(3, 99, (2, 9))
    whole = model(ids, decoder_input_ids=ids).last_hidden_state
    first = model(ids, decoder_input_ids=ids[:, :5])
    rest = model(ids, decoder_input_ids=ids[:, 5:], **{CACHE: first[CACHE]}).last_hidden_state
    torch.testing.assert_close(torch.cat([first.last_hidden_state, rest], 1), whole, **CLOSE)
    attention, x = model.decoder.layers[0].self_attn, torch.randn(1, 9, 32)
    with pytest.raises(ValueError, match="takes its own tokens only; got key_value_states, as cross-attention has"):
        attention(x, key_value_states=x)


def test_heads_that_do_not_fit_the_projections_are_refused():
    for part, width, reason in (
        ("k_proj", 20, "k_proj 20 wide, and that is not divided by 8"),
        ("q_proj", 24, "q_proj 24 wide, which is not 4 heads of 8"),
        ("k_proj", 24, "v_proj 16 wide, and that is not divided by 3 heads"),
    ):
        model = build("Olmo2")
        setattr(model.model.layers[0].self_attn, part, torch.nn.Linear(32, width))
        with pytest.raises(ValueError, match=reason):
            replace_attention(model)
    model = build("ViT")
    model.get_submodule(plan_replacement(model).replaced[0]).num_attention_heads = 8
    with pytest.raises(ValueError, match="says that it has 8 heads, and its projections are for 4"):
        replace_attention(model)


@pytest.mark.slow
def test_heads_that_an_adapter_gets_wrong_are_an_error_at_the_first_call(monkeypatch):
    monkeypatch.setattr(TransformersAttention, "heads", lambda self, attention: Heads(32, 4, 4, 8, 8))
    model = build("Granite")
    replace_attention(model)
    with pytest.raises(ShapeError, match=r"k must be \(1, 4, 7, 8\), .*; got k \(1, 2, 7, 8\)"):
        model(padded()[0][2][None])


# --- classes of one's own ---------------------------------------------------------------------------------------------


class MyAttention(LlamaAttention):
    """Nothing new."""


class Tempered(LlamaAttention):
    """With a parameter that nobody knows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = torch.nn.Parameter(torch.ones(1))


def llama_with(kind):
    model = build("Llama")
    for n, layer in enumerate(model.model.layers):
        layer.self_attn = kind(model.config, n).eval()
    return model


def test_a_class_that_goes_by_the_interface_is_recognised_and_others_are_not():
    assert isinstance(find_adapter(MyAttention), RecognisedAttention)
    assert find_adapter(transformers.models.llama.modeling_llama.LlamaMLP) is None
    assert replace_attention(llama_with(MyAttention)).replaced == [f"model.layers.{n}.self_attn" for n in range(2)]


def test_an_unknown_part_is_refused_until_somebody_vouches_for_it():
    reason = "has temperature, and what that does is not known; if it is harmless, register_adapter.Tempered, Trans"
    with pytest.raises(ValueError, match=reason):
        replace_attention(llama_with(Tempered))
    register_adapter(Tempered, TransformersAttention())
    assert len(replace_attention(llama_with(Tempered)).replaced) == 2


# --- what is refused at a call ----------------------------------------------------------------------------------------


def replaced_layer(**options):
    """A replaced layer of Llama, and its input."""
    model = build("Llama")
    replace_attention(model, **options)
    x = torch.randn(1, 9, 32)
    turns = model.model.rotary_emb(x, torch.arange(9)[None])
    return model.model.layers[0].self_attn, dict(hidden_states=x, position_embeddings=turns, attention_mask=None)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("keyword", "given"),
    [
        ({"s_aux": torch.ones(4)}, r"s_aux=a tensor \(4,\)"),
        ({"position_bias": torch.ones(1, 4, 9, 9)}, r"position_bias=a tensor \(1, 4, 9, 9\)"),
        ({"softcap": 30.0}, "softcap=30.0"),
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"surprise": "x"}, "surprise='x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_keyword_that_is_not_known_to_be_harmless_is_an_error(keyword, given):
    layer, inputs = replaced_layer()
    with pytest.raises(ValueError, match=f"retention has nothing for what .*LlamaAttention .*: {given}"):
        layer(**inputs, **keyword)


@torch.no_grad()
def test_harmless_keywords_change_nothing():
    layer, inputs = replaced_layer()
    want = layer(**inputs)[0]
    harmless = dict(position_ids=torch.arange(9)[None], use_cache=False, num_items_in_batch=9, softcap=None)
    assert torch.equal(layer(**inputs, **harmless)[0], want)


@torch.no_grad()
def test_the_keyword_is_causal_counts_more_than_the_attribute():
    layer, inputs = replaced_layer()
    other = {**inputs, "hidden_states": inputs["hidden_states"].clone()}
    other["hidden_states"][:, -1] += 1
    for causal in (None, True, False):
        first, second = (layer(**given, is_causal=causal)[0][:, 0] for given in (inputs, other))
        assert torch.equal(first, second) == (causal is not False)


@torch.no_grad()
def test_borders_of_packed_sequences_count_as_flash_attention_gives_them():
    layer, inputs = replaced_layer()
    packed = layer(**inputs, cu_seq_lens_q=torch.tensor([0, 4, 9]))[0]
    x, (cos, sin) = inputs["hidden_states"], inputs["position_embeddings"]
    alone = layer(x[:, 4:], position_embeddings=(cos[:, 4:], sin[:, 4:]), attention_mask=None)[0]
    torch.testing.assert_close(packed[:, 4:], alone, **CLOSE)


@torch.no_grad()
def test_masks_that_say_what_retention_would_not_do_are_errors():
    layer, inputs = replaced_layer()
    everything, causal = torch.ones(1, 1, 9, 9).bool(), torch.ones(1, 1, 9, 9).tril().bool()
    biased = torch.zeros(1, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min) - 0.5 * causal
    for mask, reason in (
        (everything, "lets tokens see those after them, and the layer looks back only"),
        (biased, "adds a bias to the scores"),
        (causal.expand(1, 4, 9, 9), "differs by heads"),
    ):
        with pytest.raises(ValueError, match=reason):
            layer(**{**inputs, "attention_mask": mask})
    want = layer(**inputs)[0]
    assert torch.equal(layer(**{**inputs, "attention_mask": causal})[0], want)
    additive = torch.zeros(1, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert torch.equal(layer(**{**inputs, "attention_mask": additive})[0], want)
    layer, inputs = replaced_layer(causal=True)
    layer(**{**inputs, "attention_mask": everything})  # to look back only is what was asked for
    with pytest.raises(ValueError, match="hides from each token those after it, .*; pass causal=True"):
        replaced_layer()[0](**{**inputs, "attention_mask": causal}, is_causal=False)


@torch.no_grad()
def test_a_second_call_of_the_attention_function_in_one_forward_is_an_error():
    class Twice(LlamaAttention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
            attend = transformers.AttentionInterface().get_interface(self.config._attn_implementation, None)
            q, k, v = (z.unflatten(-1, (-1, 8)).transpose(1, 2) for z in self._qkv(hidden_states))
            first, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
            second, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
            return self.o_proj((first - second).flatten(2)), None

        def _qkv(self, x):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    model = llama_with(Twice)
    replace_attention(model)
    with pytest.raises(ValueError, match="calls the attention function twice in one forward"):
        model(padded()[0][2][None], use_cache=False)
