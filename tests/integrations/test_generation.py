"""transformers' `generate` on a cache of states: every way of decoding gives what whole forward passes give.

The weights are large, so that a wrong mask or a wrong state changes tokens, and the padding embeds to more than zeros.
The prompts are padded on the left and up to four chunks long.
"""

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from retention.backends.chunked import loop
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
        logits = model(tokens, form="parallel", use_cache=False).logits
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_greedy_is_the_argmax_of_whole_parallel_passes(model, mode):
    check_greedy(model, form=mode)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 70}]
)
def test_greedy_with_other_caches(model, options):
    check_greedy(model, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"deepnorm": True, "scale_embedding": True, "norm_embedding": True},
        {"gated": False, "subln": "layer", "norm": "layer", "moe_every": 2, "moe_num_experts": 3},
        {"retention": {"rotary": "xpos", "bias": True}},
        {"retention": {"decay_norm": True, "score_norm": True, "num_kv_heads": 2, "learnable_decay": True}},
    ],
    ids=lambda options: "-".join(options),
)
def test_greedy_with_every_option(options):
    check_greedy(make(**options))


@pytest.mark.slow
def test_beam_search_with_several_sequences_is_that_without_a_cache(model):
    check_beams(model)


@pytest.mark.slow
def test_sampling_depends_on_the_seed_only(model):
    kwargs = dict(max_new_tokens=NEW, do_sample=True, top_k=20, num_return_sequences=2)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outs.append(model.generate(**padded(prompts()), use_cache=use_cache, **kwargs))
    assert torch.equal(*outs)


@pytest.mark.slow
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


# --- keywords of generate ---------------------------------------------------------------------------------------------


class Streamer:
    def __init__(self):
        self.tokens = []

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def tokenizer():
    """A character for each token."""
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ", "¡"]
    made = Tokenizer(BPE({character: n for n, character in enumerate(characters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="!", bos_token='"', eos_token="#")


def own_sampling(model, input_ids, logits_processor, stopping_criteria, generation_config, extra, **kwargs):
    return GenerationMixin._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)


BEAMS = {"num_beams": 3}
SAMPLE = {"do_sample": True}
BOTH_DICTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
KEYWORDS = {
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": list(range(2, 60))},
    "max_length": {"max_new_tokens": None, "max_length": 30},
    "max_time": {"max_time": 100.0},
    "stop_strings": {"stop_strings": [*"abcdefghijklmnop"], "tokenizer": tokenizer()},
    "token_healing": {"token_healing": False, "tokenizer": tokenizer()},
    "temperature": {**SAMPLE, "temperature": 0.5},
    "top_k": {**SAMPLE, "top_k": 5},
    "top_p": {**SAMPLE, "top_p": 0.5},
    "top_h": {**SAMPLE, "top_h": 0.5},
    "min_p": {**SAMPLE, "min_p": 0.1},
    "typical_p": {**SAMPLE, "typical_p": 0.5},
    "epsilon_cutoff": {**SAMPLE, "epsilon_cutoff": 0.01},
    "eta_cutoff": {**SAMPLE, "eta_cutoff": 0.01},
    "renormalize_logits": {**SAMPLE, "renormalize_logits": True, "top_k": 5},
    "remove_invalid_values": {"remove_invalid_values": True},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[n] for n in range(3, 90)]},
    "sequence_bias": {"sequence_bias": [[[5], 3.0], [[7], -9.0]]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 50))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 90))},
    "forced_bos_token_id": {"forced_bos_token_id": 5},
    "forced_eos_token_id": {"forced_eos_token_id": 5},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.1), "eos_token_id": 5},
    "guidance_scale": {"guidance_scale": 1.5},
    "negative_prompt_ids": {"guidance_scale": 1.5, "negative_prompt_ids": torch.randint(3, 97, (2, 4))},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(context_width=1)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(5, 40))},
    "logits_processor": {"logits_processor": LogitsProcessorList([lambda ids, scores: scores.roll(1, dims=-1)])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([lambda ids, _: ids[:, -1] % 2 == 0])},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=3, do_sample=False)},
    "custom_generate": {"custom_generate": own_sampling, "extra": 1},
    "num_return_sequences": {**SAMPLE, "num_return_sequences": 3},
    "num_beams": {**BEAMS, "num_return_sequences": 3},
    "beams sample": {**BEAMS, **SAMPLE},
    "length_penalty": {**BEAMS, "length_penalty": 2.0, "eos_token_id": [5, 6, 7]},
    "early_stopping": {**BEAMS, "early_stopping": True, "eos_token_id": [5, 6, 7]},
    "output_hidden_states": {**BOTH_DICTS, "output_hidden_states": True},
    "beam outputs": {**BEAMS, **BOTH_DICTS, "output_hidden_states": True},
    "output_router_logits": {"output_router_logits": True},
    "logits_to_keep": {"logits_to_keep": 2},
    "cache dynamic": {"cache_implementation": "dynamic"},
    "cache static": {"cache_implementation": "static"},
    "beams static": {**BEAMS, "cache_implementation": "static"},
    "prefill_chunk_size": {"prefill_chunk_size": 5},
    "prefill static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "prefill beams": {**BEAMS, "prefill_chunk_size": 5, "cache_implementation": "static"},
    "position_ids": {"position_ids": torch.tensor([[0, 0, 0, *range(17)], [*range(20)]])},
}


def llama():
    torch.manual_seed(1)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own, of options that do not go together
@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_of_generate_does_with_a_cache_what_it_does_without(name):
    """And a Llama of transformers takes it too."""
    inputs = padded([row[:n] for row, n in zip(prompts(), (17, 20), strict=False)])
    model, outs = make(), []
    options = {"max_new_tokens": 6, "do_sample": False, **KEYWORDS[name]}
    llama().generate(**inputs, **options)
    without = {k: v for k, v in options.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    for given in (options, {**without, "use_cache": False}):
        torch.manual_seed(3)
        outs.append(model.generate(**inputs, **given))
    cached, whole = (out if torch.is_tensor(out) else out.sequences for out in outs)
    assert torch.equal(cached, whole)
    if "output_hidden_states" in options:
        steps = [step if "num_beams" in options else step[-1] for step in outs[0].hidden_states]
        assert len(steps) == cached.shape[1] - 20


def test_streamers_and_stop_strings_see_each_token(model):
    inputs, options, streamer = padded(prompts()[:1]), dict(max_new_tokens=6, do_sample=False), Streamer()
    (found,) = model.generate(**inputs, **options, streamer=streamer).tolist()
    assert streamer.tokens == [*found, "end"]
    fourth = tokenizer().decode(found[203])
    stop = found.index(found[203], 200)
    (stopped,) = model.generate(**inputs, **options, stop_strings=[fourth], tokenizer=tokenizer()).tolist()
    assert stopped == found[: stop + 1]


@pytest.mark.parametrize("keyword", ["attn_mask", "temprature"])
def test_a_keyword_that_generate_does_not_have_is_refused(model, keyword):
    with pytest.raises(ValueError, match=keyword):
        model.generate(**padded(prompts()[:1]), max_new_tokens=2, **{keyword: 1.0})


def test_attention_weights_are_refused_in_generate(model):
    with pytest.raises(ValueError, match="no attention weights"):
        model.generate(**padded(prompts()[:1]), max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)


# --- exported decoding ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.export's own
@pytest.mark.parametrize("retention", [None, {"score_norm": True, "num_kv_heads": 2}, {"rotary": "xpos"}])
def test_an_exported_program_decodes_step_by_step_and_begins_anew_at_position_0(retention):
    model = make(retention=retention, tie_word_embeddings=False)
    cache = {"batch_size": 1, "max_cache_len": 300, "device": "cpu"}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache)
    prompt = prompts()[3][None]
    token, position = prompt[:, :1], torch.zeros(1, dtype=torch.long)
    exported = TorchExportableModuleForDecoderOnlyLM(model).export(input_ids=token, cache_position=position)
    program, want = exported.module(), argmax_of_whole_passes(model, prompt[0], 4)
    assert want.unique().numel() > 2
    for _ in range(2):
        tokens = prompt[0].tolist()
        for n in range(len(tokens) + 4 - 1):
            position = torch.tensor([n])
            logits = program(input_ids=torch.tensor([tokens[n : n + 1]]), cache_position=position)
            tokens += [logits.argmax().item()] if n + 1 == len(tokens) else []
        assert tokens[len(prompt[0]) :] == want.tolist()


def test_a_cache_that_was_made_early_is_filled(model):
    cache, prompt = StaticCache(model.config, 300), prompts()[0][None]
    cache.early_initialization(1, model.config.num_heads, model.config.head_dim, torch.float32, torch.device("cpu"))
    memory = cache.layers[0].keys
    with torch.no_grad():
        logits = [
            model(part, **{CACHE: cache}).logits for part in (prompt[:, :150], prompt[:, 150:199], prompt[:, 199:])
        ]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(prompt).logits, rtol=1e-4, atol=1e-4)
    assert cache.layers[0].keys is memory
    cache.reset()
    torch.testing.assert_close(model(prompt[:, :9], **{CACHE: cache}).logits, model(prompt[:, :9]).logits)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_any_cut_of_a_padded_batch_gives_the_logits_of_each_row_alone(model, mode):
    inputs = padded(prompts())
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, logits, start = None, [], 0
    for end in (3, 4, 70, 199, 200):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], **{CACHE: cache}, form=mode)
        cache, start = out[CACHE], end
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for row, prompt in enumerate(prompts()):
        want = model(prompt[None], form="parallel").logits
        torch.testing.assert_close(logits[row, -len(prompt) :], want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_wrong_decay_of_the_state_across_chunks_is_caught(model, monkeypatch):
    right = loop.Factors.carry.func
    monkeypatch.setattr(loop.Factors, "carry", property(lambda self: 0.9 * right(self)))
    with pytest.raises(AssertionError):
        check_greedy(model)


@pytest.mark.slow
def test_a_missing_reordering_of_beams_is_caught(model, monkeypatch):
    monkeypatch.setattr(RetentionCacheLayer, "reorder_cache", lambda self, beam_idx: None)
    with pytest.raises(AssertionError):
        check_beams(model)


@pytest.mark.slow
def test_a_dropped_padding_mask_is_caught(model, monkeypatch):
    monkeypatch.setattr(modeling, "token_mask", lambda *_: None)
    with pytest.raises(AssertionError):
        check_greedy(model)


@pytest.mark.slow
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
