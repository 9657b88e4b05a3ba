"""transformers' `generate` on a cache of states: every way of decoding gives what whole forward passes give.

The weights are large, so that a wrong mask or a wrong state changes tokens, and the padding embeds to more than zeros.
The prompts are padded on the left and up to four chunks long.
"""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from retention.backends.chunked import walk
from retention.decay import HeadDecay
from retention.integrations.transformers import RetentionCacheLayer, RetNetConfig, RetNetForCausalLM, modeling
from retention.integrations.transformers.compat import CACHE

MODES = ("auto", "parallel", "chunkwise", "recurrent")
LENGTHS = (200, 150, 131, 7, 180)
NEW = 12


def make(**options):
    torch.manual_seed(1)
    sizes = dict(vocab_size=97, dim=32, num_layers=2, num_heads=4, pad_token_id=0, bos_token_id=1)
    model = RetNetForCausalLM(RetNetConfig(**sizes, **options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.5)
    return model


@pytest.fixture
def model():
    return make()


def prompts():
    return [torch.randint(2, 97, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]


def padded(tokens, side="left"):
    """tokens, one row each, and their attention mask."""
    length = max(map(len, tokens))
    ids, mask = torch.zeros(2, len(tokens), length, dtype=torch.long)
    for i, row in enumerate(tokens):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def argmax_of_whole_passes(model, prompt, new=NEW):
    """One parallel pass over everything for each token, without padding, cache or state."""
    tokens = prompt[None]
    for _ in range(new):
        logits = model(tokens, forward_mode="parallel", use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :]


def greedy(model, **options):
    inputs = padded(prompts())
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :]


def check_greedy(model, **options):
    want = torch.stack([argmax_of_whole_passes(model, prompt) for prompt in prompts()])
    assert want.unique().numel() > 20  # else a wrong state would go unseen
    assert torch.equal(greedy(model, **options), want)


def check_beams(model):
    kwargs = dict(max_new_tokens=NEW, num_beams=4, num_return_sequences=3, do_sample=False)
    kwargs |= dict(return_dict_in_generate=True, output_scores=True)
    cached = model.generate(**padded(prompts()), **kwargs)
    whole = model.generate(**padded(prompts()), use_cache=False, **kwargs)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(cached.sequences_scores, whole.sequences_scores, rtol=1e-4, atol=1e-4)


def check_round_trip(model, folder):
    model.save_pretrained(folder)
    loaded = RetNetForCausalLM.from_pretrained(folder).eval()
    tokens = prompts()[0][None]
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_greedy_is_the_argmax_of_whole_parallel_passes(model, mode):
    check_greedy(model, forward_mode=mode)


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 70}]
)
def test_greedy_with_other_caches(model, options):
    check_greedy(model, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"deepnorm": True, "no_scale_embedding": False, "layernorm_embedding": True},
        {"use_glu": False, "subln": "layer", "norm": "layer", "moe_freq": 2, "moe_expert_count": 3},
        {"retention": {"rotary": "xpos", "bias": True}},
        {"retention": {"decay_norm": True, "score_norm": True, "num_kv_heads": 2, "learnable_decay": True}},
    ],
    ids=lambda options: "-".join(options),
)
def test_greedy_with_every_option(options):
    check_greedy(make(**options))


def test_beam_search_with_several_sequences_is_that_without_a_cache(model):
    check_beams(model)


def test_sampling_depends_on_the_seed_only(model):
    kwargs = dict(max_new_tokens=NEW, do_sample=True, top_k=20, num_return_sequences=2)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outs.append(model.generate(**padded(prompts()), use_cache=use_cache, **kwargs))
    assert torch.equal(*outs)


def test_compiled_decoding_is_one_graph_without_breaks(model):
    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None, dynamic=False)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    options = dict(cache_implementation="static", compile_config=config)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch._dynamo.utils.counters.clear()
        check_greedy(model, **options)
        model.generate(**padded([row[:-3] for row in prompts()]), max_new_tokens=2 * NEW, do_sample=False, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_conversation_goes_on_from_the_cache_with_many_new_tokens_at_once(model):
    first = padded(prompts())
    begun = model.generate(**first, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    more = torch.randint(2, 97, (5, 90))
    ids = torch.cat([begun.sequences, more], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(5, 95, dtype=torch.long)], dim=1)
    kwargs = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    want = model.generate(ids, **kwargs)
    assert begun[CACHE].get_seq_length() == begun.sequences.shape[1] - 1
    assert torch.equal(model.generate(ids, **{CACHE: begun[CACHE]}, **kwargs), want)


def test_inputs_embeds_continue_like_input_ids(model):
    inputs = padded(prompts())
    embeds = model.model.embed_tokens(inputs["input_ids"])
    kwargs = dict(attention_mask=inputs["attention_mask"], max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(inputs_embeds=embeds, **kwargs), greedy(model))


def test_what_rolls_back_is_refused(model):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(**padded(prompts()[:1]), max_new_tokens=3, assistant_model=make())
    cache = model(prompts()[0][None])[CACHE]
    assert not cache.layers[0].is_croppable
    with pytest.raises(ValueError, match=r"cannot forget its last tokens; .* assisted decoding.*crop\(-1\)"):
        cache.crop(-1)


# --- the cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_any_cut_of_a_padded_batch_gives_the_logits_of_each_row_alone(model, mode):
    inputs = padded(prompts())
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, logits, start = None, [], 0
    for end in (3, 4, 70, 199, 200):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], **{CACHE: cache}, forward_mode=mode)
        cache, start = out[CACHE], end
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for row, prompt in enumerate(prompts()):
        want = model(prompt[None], forward_mode="parallel").logits
        torch.testing.assert_close(logits[row, -len(prompt) :], want[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_holds_the_same_tensors_from_the_first_token_to_the_last(model):
    cache = DynamicCache(config=model.config)
    model(prompts()[0][None], **{CACHE: cache})
    tensors = [layer.state.kv.data_ptr() for layer in cache.layers]
    size = sum(layer.state.kv.numel() for layer in cache.layers)
    for token in prompts()[1]:
        model(token.view(1, 1), **{CACHE: cache})
    model(prompts()[2][None], **{CACHE: cache})
    cache.reorder_cache(torch.tensor([0]))
    assert [layer.state.kv.data_ptr() for layer in cache.layers] == tensors
    assert size == model.config.num_layers * 32 * 64 // 4  # heads (key_dim / heads) (value_dim / heads)
    assert cache.get_seq_length() == 200 + 150 + 131


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [lambda config: DynamicCache(), lambda config: StaticCache(config, 300)])
def test_a_cache_made_by_the_user_is_filled(model, make_cache):
    prompt = prompts()[0][None]
    cache = make_cache(model.config)
    model(prompt[:, :150], **{CACHE: cache})
    assert all(isinstance(layer, RetentionCacheLayer) for layer in cache.layers)
    logits = model(prompt[:, 150:], **{CACHE: cache}).logits
    torch.testing.assert_close(logits, model(prompt).logits[:, 150:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cache_operations_on_the_batch(model):
    tokens = torch.stack([prompts()[0][:50], prompts()[1][:50]])
    rows = {"reorder_cache": [1, 1], "batch_select_indices": [1], "batch_repeat_interleave": [0, 0, 0, 1, 1, 1]}
    arguments = {"reorder_cache": torch.tensor([1, 1]), "batch_select_indices": torch.tensor([1])}
    for name, expected in rows.items():
        cache = model(tokens)[CACHE]
        before = cache.layers[1].state.clone()
        getattr(cache, name)(arguments.get(name, 3))
        assert torch.equal(cache.layers[1].state.kv, before.kv[expected])
        assert cache.layers[1].state.time.tolist() == [50] * len(expected)
        assert cache.batch_size == len(expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.layers[0].state.kv.any()


def test_a_cache_from_inference_mode_can_be_used_outside_of_it(model):
    prompt = prompts()[0][None]
    with torch.inference_mode():
        cache = model(prompt[:, :100])[CACHE]
    with torch.no_grad():
        logits = torch.cat([model(prompt[:, n, None], **{CACHE: cache}).logits for n in range(100, 110)], dim=1)
        torch.testing.assert_close(logits, model(prompt[:, :110]).logits[:, 100:], rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_cache(model):
    """Truncated backpropagation over segments of a long text."""
    prompt = prompts()[0][None]
    first = model(prompt[:, :100])
    model(prompt[:, 100:], **{CACHE: first[CACHE]}).logits.sum().backward()
    weight = model.model.backbone.blocks[0].retention.k_proj.weight
    grad = weight.grad.clone()
    model.zero_grad()
    model(prompt).logits[:, 100:].sum().backward()
    torch.testing.assert_close(grad, weight.grad, rtol=1e-3, atol=1e-3)


def test_a_cache_of_keys_and_values_is_refused(model):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), 0)
    assert isinstance(cache.layers[0], DynamicLayer)
    with pytest.raises(TypeError, match="the cache holds keys and values in layer 0"):
        model(prompts()[0][None], **{CACHE: cache})


# --- these tests can fail ---------------------------------------------------------------------------------------------


def test_a_wrong_decay_of_the_state_across_chunks_is_caught(model, monkeypatch):
    right = walk.Factors.carry.func
    monkeypatch.setattr(walk.Factors, "carry", property(lambda self: 0.9 * right(self)))
    with pytest.raises(AssertionError):
        check_greedy(model)


def test_a_missing_reordering_of_beams_is_caught(model, monkeypatch):
    monkeypatch.setattr(RetentionCacheLayer, "reorder_cache", lambda self, beam_idx: None)
    with pytest.raises(AssertionError):
        check_beams(model)


def test_a_dropped_padding_mask_is_caught(model, monkeypatch):
    monkeypatch.setattr(modeling, "token_mask", lambda *_: None)
    with pytest.raises(AssertionError):
        check_greedy(model)


def test_an_uninitialised_decay_is_caught(model, monkeypatch, tmp_path):
    """As buffers that are not saved come out of `from_pretrained`."""
    check_round_trip(model, tmp_path)
    true, build, loaded = HeadDecay.forward, HeadDecay.__init__, []

    def remembered(self, *args, **kwargs):
        build(self, *args, **kwargs)
        loaded.append(self)

    def uninitialised(self, *args):
        return true(self, *args) * (1e-18 if any(self is decay for decay in loaded) else 1)

    monkeypatch.setattr(HeadDecay, "__init__", remembered)
    monkeypatch.setattr(HeadDecay, "forward", uninitialised)
    with pytest.raises(AssertionError):
        check_round_trip(model, tmp_path)
