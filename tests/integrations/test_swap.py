"""Retention in the attention of real models: it runs, decodes, saves, and comes out again without a trace."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from hosts import FAMILIES, GROUPED, SIZES, build, each, padded
from transformers import DynamicCache
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.llama.modeling_llama import LlamaAttention

from retention import ShapeError
from retention.integrations.swap import (
    Adapter,
    Heads,
    HostedRetention,
    Swapped,
    plan_replacement,
    register_adapter,
    replace_attention,
    restore_attention,
)
from retention.integrations.transformers import TransformersAttention, load_swapped, register_attn_implementation
from retention.integrations.transformers.compat import CACHE


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


# --- every family -----------------------------------------------------------------------------------------------------

each_family = each(FAMILIES, quick=["Llama"])
all_or_some = pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
all_some_or_beside_exact_attention = pytest.mark.parametrize(
    "options", [{}, {"layers": [1]}, {"window": 9, "sinks": 4}], ids=["all", "hybrid", "window and sinks"]
)


@pytest.mark.slow
@each_family
@all_or_some
@torch.no_grad()
def test_restoring_is_bit_exact(family, layers):
    model, (_, batch) = build(family), padded()
    before, logits = copy.deepcopy(model.state_dict()), model(**batch).logits
    names = [name for name, _ in model.named_parameters()]
    report = replace_attention(model, layers=layers, allow_lost=True)
    assert len(report.replaced) == (2 if layers is None else 1)
    assert not torch.allclose(model(**batch).logits, logits, atol=1e-2)
    assert set(names) <= {name for name, _ in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after > report.parameters_before
    assert restore_attention(model) == report.replaced
    assert [name for name, _ in model.named_parameters()] == names
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.slow
@each_family
@all_some_or_beside_exact_attention
@torch.no_grad()
def test_padding_cuts_and_steps_leave_the_logits_alone(family, options):
    model, (rows, batch) = build(family), padded()
    replace_attention(model, **options, allow_lost=True)
    close = dict(rtol=1e-4, atol=1e-4)
    for row, prompt, logits in zip(range(3), rows, model(**batch).logits, strict=True):
        torch.testing.assert_close(logits[-len(prompt) :], model(prompt[None]).logits[0], **close, msg=f"row {row}")
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 60), (60, 90), *((n, n + 1) for n in range(90, 100))):
        parts.append(model(rows[0][None, start:end], **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(rows[0][None]).logits, **close)
    assert cache.layers[1].state.kv.shape[0] == 1


@pytest.mark.slow
@each_family
@all_some_or_beside_exact_attention
def test_generation_with_a_cache_is_that_without(family, options):
    model, (_, batch) = build(family), padded()
    replace_attention(model, **options, allow_lost=True)
    kwargs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        want = model.generate(**kwargs, **options, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(**kwargs, **options, do_sample=False), want)
    want = model.generate(**kwargs, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(**kwargs, do_sample=False, cache_implementation="static"), want)


@each_family
def test_every_parameter_learns_with_checkpointing(family):
    model, (_, batch) = build(family), padded()
    replace_attention(model, allow_lost=True, gate="silu", window=9)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.16
    enable()
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not [name for name in without if "experts" not in name]


def test_bert_in_both_directions():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    rows, _ = padded()
    replace_attention(model)
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = model(right, attention_mask=(right != 0).long()).last_hidden_state
    for row, prompt in zip(hidden, rows, strict=True):
        torch.testing.assert_close(row[: len(prompt)], model(prompt[None]).last_hidden_state[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 9])
def test_packed_sequences_do_not_see_each_other(attention, window):
    model, (rows, _) = build("Llama"), padded()
    model.set_attn_implementation(attention)
    replace_attention(model, layers=[0], window=window)
    positions = torch.cat([torch.arange(40), torch.arange(60)])[None]
    packed = model(rows[0][None], position_ids=positions, use_cache=False).logits
    alone = [model(rows[0][None, :40]).logits, model(rows[0][None, 40:]).logits]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("window", "sinks"), [(9, 0), (9, 4), (None, 4)])
def test_cache_beside_exact_attention_holds_the_same_tensors_from_the_first_token_to_the_last(window, sinks):
    model, (rows, _) = build("Llama"), padded()
    report = replace_attention(model, window=window, sinks=sinks)
    cache = model(rows[0][None, :1])[CACHE]
    before = {name: z.data_ptr() for name, z in vars(cache.layers[1].state).items() if z is not None}
    for start, end in ((1, 2), (2, 40), (40, 41)):
        model(rows[0][None, start:end], **{CACHE: cache})
    cache.reorder_cache(torch.tensor([0]))
    state = cache.layers[1].state
    assert {name: z.data_ptr() for name, z in vars(state).items() if z is not None} == before
    assert [*state.keys.shape] == [*state.values.shape] == [1, 2, (window or 0) + sinks, 8]
    assert cache.get_seq_length() == 41
    exact, all_bytes = (
        [z.nbytes for z in zs] for zs in ([state.keys, state.values], [state.keys, state.values, state.kv])
    )
    assert 2 * sum(all_bytes) == sum(report.state_bytes.values())
    assert 2 * sum(exact) == report.state_bytes["window"] + report.state_bytes["sinks"]
    assert ("sinks 1.0 kB" in str(report)) == (sinks > 0)
    cache.reset()
    torch.testing.assert_close(model(rows[0][None], **{CACHE: cache}).logits, model(rows[0][None]).logits)


def test_cache_of_a_hybrid_holds_a_state_where_retention_is_and_keys_elsewhere():
    model, (rows, _) = build("Llama"), padded()
    replace_attention(model, layers=[1])
    cache = model(rows[0][None])[CACHE]
    assert cache.layers[0].keys.shape == (1, 2, 100, 8)
    assert cache.layers[1].state.kv.shape == (1, 2 * 4, 16, 9)  # two decays
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(rows[0][None], assistant_model=build("Llama"), max_new_tokens=3)


class CausalSelfAttention(torch.nn.Module):
    """As many small GPTs have it."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in self.c_attn(x).chunk(3, dim=-1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


def test_an_attention_of_ones_own_takes_an_adapter_of_a_few_lines():
    class SmallGPT(Adapter):
        def heads(self, attention):
            return Heads(dim=32, num_heads=4, num_kv_heads=4, key_dim=8, value_dim=8)

        def forward(self, attention, host_forward, x):
            q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in attention.c_attn(x).chunk(3, dim=-1))
            y, _ = attention.retention(x, q, k, v, scale=8**-0.5)
            return attention.c_proj(y.flatten(2))

    register_adapter(CausalSelfAttention, SmallGPT())
    model, x = torch.nn.Sequential(CausalSelfAttention(), CausalSelfAttention()), torch.randn(2, 9, 32)
    want = model(x)
    assert replace_attention(model).replaced == ["0", "1"]
    y = model(x)
    assert not torch.allclose(y, want)
    torch.testing.assert_close(model(x[:, :5]), y[:, :5])
    restore_attention(model)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_fresh_layers_have_new_weights_under_the_same_parameters(family):
    model = build(family)
    before, identity = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    replace_attention(model, layers=[1], init="fresh")
    for name, weight in model.state_dict().items():
        if ".retention." in name:
            continue
        assert weight.data_ptr() == identity.get(name, weight).data_ptr()
        fresh = "1." in name and "attn" in name and name.endswith("weight")
        assert torch.equal(weight, before[name]) != fresh, name
    name = "transformer.h.1.attn.c_attn.weight" if family == "GPT2" else "model.layers.1.self_attn.q_proj.weight"
    assert identity[name].std().item() == pytest.approx(
        before[name].std().item(), rel=0.2
    )  # the family's own initialisation
    with pytest.raises(ValueError, match='calibrate_on needs init="copy"; fresh weights have no attention'):
        replace_attention(model, init="fresh", calibrate_on={"input_ids": padded()[0][0][None]})
    with pytest.raises(ValueError, match="init must be one of 'copy', 'fresh'; got init 'new'"):
        replace_attention(model, init="new")


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Llama", "Qwen3", "OPT", "Phi"])
def test_the_attention_implementation_is_what_replacement_begins_with(family):
    register_attn_implementation()
    model, (rows, batch) = build(family), padded()
    softmax = model(**batch).logits
    model.set_attn_implementation("retention")
    found = model(**batch).logits
    for row, prompt, logits in zip(range(3), rows, found, strict=True):
        torch.testing.assert_close(
            logits[-len(prompt) :], model(prompt[None]).logits[0], rtol=1e-4, atol=1e-4, msg=f"row {row}"
        )
    want = model.generate(rows[0][None], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(rows[0][None], max_new_tokens=8, do_sample=False), want)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**batch).logits, softmax)
    replace_attention(model)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], found[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_attention_implementation_serves_encoders_and_packed_sequences():
    register_attn_implementation()
    rows, _ = padded()
    bert = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    bert.set_attn_implementation("retention")
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = bert(right, attention_mask=(right != 0).long()).last_hidden_state
    torch.testing.assert_close(hidden[1, :70], bert(rows[1][None]).last_hidden_state[0], rtol=1e-4, atol=1e-4)
    olmo = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES, **GROUPED)).eval()
    olmo.set_attn_implementation("retention")
    positions = torch.cat([torch.arange(40), torch.arange(60)])[None]
    packed = olmo(rows[0][None], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 40:], olmo(rows[0][None, 40:]).logits, rtol=1e-4, atol=1e-4)


def test_limits_of_the_attention_implementation_are_errors():
    with pytest.raises(ValueError, match="decay must be one of 'paper'"):
        register_attn_implementation(decay="fast")
    register_attn_implementation()
    model, (rows, _) = build("Llama"), padded()
    model.set_attn_implementation("retention")
    with pytest.raises(ValueError, match="use no static cache, or replace_attention"):
        model.generate(rows[2][None], max_new_tokens=4, cache_implementation="static")
    model = build("Mistral-window")
    model.set_attn_implementation("retention")
    with pytest.raises(ValueError, match="no sliding window; got one of 8 tokens"):
        model(rows[0][None])


# --- as a module ------------------------------------------------------------------------------------------------------


def test_a_replaced_model_saves_loads_and_copies(tmp_path):
    model, (_, batch) = build("Llama"), padded()
    replace_attention(model, layers=[0], gate="silu", window=9)
    torch.nn.init.normal_(model.model.layers[0].self_attn.retention.gate.weight)
    want = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, want)
    model.save_pretrained(tmp_path)
    loaded, info = load_swapped(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(loaded.eval()(**batch).logits, want)
    assert loaded.model.layers[0].self_attn.retention.options["window"] == 9
    restore_attention(loaded)
    loaded.save_pretrained(tmp_path / "restored")
    with pytest.raises(ValueError, match="has no layers that were replaced"):
        load_swapped(tmp_path / "restored")


def test_a_replaced_model_pickles():
    model, (_, batch) = build("GPT2"), padded()
    replace_attention(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    restore_attention(loaded)


def test_parameters_keep_their_identity_dtype_and_mode():
    model = build("Llama").to(torch.bfloat16).train()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(False)
    replace_attention(model)
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.weight is weight
    assert not weight.requires_grad
    assert layer.retention.gain.dtype == torch.bfloat16
    assert layer.retention.training
    assert isinstance(layer, LlamaAttention)
    assert isinstance(layer, Swapped)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_lora_trains_a_replaced_model():
    model, (_, batch) = build("Llama"), padded()
    replace_attention(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(trained) == 2 * 2
    assert all("q_proj.lora" in name for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [{}, {"window": 9, "sinks": 4}], ids=str)
def test_a_replaced_model_compiles(exact):
    model, (rows, _) = build("Llama"), padded()
    replace_attention(model, **exact)
    compiled, prompt = torch.compile(model, fullgraph=True, backend="aot_eager"), rows[0][None, :20]
    want = model(prompt, use_cache=False).logits
    torch.testing.assert_close(compiled(prompt, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


def test_a_module_under_two_names_is_replaced_once():
    model = build("Llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    report = replace_attention(model)
    assert report.replaced == ["model.layers.0.self_attn"]
    assert isinstance(model.model.layers[1].self_attn, Swapped)


@torch.no_grad()
def test_layers_of_several_libraries_in_one_model_are_replaced_and_restored():
    class Reader(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    torch.manual_seed(0)
    model, x = Reader(transformers.LlamaConfig(**SIZES, **GROUPED)).eval(), torch.randn(1, 9, 32)
    ids = padded()[0][0][None]
    want = model(ids).logits, model.extra(x, x, x)[0]
    assert len(replace_attention(model).replaced) == 3
    assert not torch.equal(model(ids).logits, want[0])
    assert not torch.equal(model.extra(x, x, x)[0], want[1])
    assert list(model.config.retention_in_attention) == [f"layers.{n}.self_attn" for n in range(2)]
    assert len(restore_attention(model)) == 3
    assert torch.equal(model(ids).logits, want[0])
    assert torch.equal(model.extra(x, x, x)[0], want[1])


# --- what is asked for, and what cannot be ----------------------------------------------------------------------------


def test_layers_are_chosen_by_number_and_by_name():
    model = build("Llama")
    for chosen in ({"layers": [-1]}, {"where": lambda name, module: "layers.1" in name}):
        plan = plan_replacement(model, **chosen)
        assert plan.replaced == ["model.layers.1.self_attn"]
        assert plan.kept == {"model.layers.0.self_attn": "not asked for"}
        assert not any(isinstance(module, Swapped) for module in model.modules())
    report = replace_attention(model, layers=[-1])
    assert report == plan
    assert "retention in 1 layers: model.layers.1.self_attn" in str(report)
    assert "kept model.layers.0.self_attn: not asked for" in str(report)


def test_twice_is_once_and_other_options_are_refused():
    model = build("Llama")
    replace_attention(model, layers=[0])
    gain = model.model.layers[0].self_attn.retention.gain
    report = replace_attention(model)
    assert model.model.layers[0].self_attn.retention.gain is gain
    assert len(report.replaced) == 2
    with pytest.raises(ValueError, match=r"layers.0.self_attn: has retention already, .*; restore_attention first"):
        replace_attention(model, gate="gelu")


@pytest.mark.slow
def test_nothing_is_touched_if_one_layer_cannot_be_replaced():
    model = build("Mistral-window")
    with pytest.raises(ValueError, match=r"would lose the sliding window of 8 tokens; pass allow_lost=True"):
        replace_attention(model)
    assert not any(isinstance(module, Swapped | HostedRetention) for module in model.modules())
    assert replace_attention(model, allow_lost=True).lost["model.layers.0.self_attn"] == [
        "the sliding window of 8 tokens"
    ]


def test_cross_attention_is_refused_and_self_attention_beside_it_replaced():
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match=r"crossattention: is cross-attention(.|\n)*layers=\[0\] leaves these out"):
        replace_attention(model)
    assert replace_attention(model, layers=[0]).replaced == ["transformer.h.0.attn"]
    restore_attention(model)
    assert replace_attention(model, where=lambda name, _: name.endswith(".attn")).replaced == ["transformer.h.0.attn"]


def test_errors_name_what_is_there():
    big = transformers.BigBirdModel(transformers.BigBirdConfig(**SIZES, attention_type="original_full"))
    with pytest.raises(
        ValueError, match=r"no attention of BigBirdModel has .*BigBirdAttention \(as .*register_adapter"
    ):
        replace_attention(big)
    model = build("Llama")
    with pytest.raises(ValueError, match="layers must be from -2 to 1; got 2"):
        replace_attention(model, layers=[2])
    with pytest.raises(ValueError, match="layers and where leave nothing to replace; the model has model.layers.0"):
        replace_attention(model, where=lambda *_: False)
    with pytest.raises(TypeError, match="gates"):
        replace_attention(model, gates="silu")
    with pytest.raises(ValueError, match="gate must be one of 'silu', .*; got gate 'sil'"):
        replace_attention(model, gate="sil")
    with pytest.raises(ValueError, match="num_decays must be an integer of at least 1; got num_decays 0"):
        replace_attention(model, num_decays=0)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention that was replaced"):
        restore_attention(model)
    with pytest.raises(ValueError, match="FalconAttention has an adapter already"):
        register_adapter(FalconAttention, TransformersAttention())
    assert not any(isinstance(module, Swapped) for module in model.modules())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"layers": "0"}, TypeError, r"layers must be whole numbers, such as \[0, 2, -1\]; got '0'"),
        ({"layers": [0.5]}, TypeError, "layers must be whole numbers, .*; got 0.5"),
        ({"layers": [True]}, TypeError, "layers must be whole numbers, .*; got True"),
        ({"layers": 1}, TypeError, "layers must be a list|layers must be whole numbers"),
        ({"layers": []}, ValueError, "layers and where leave nothing to replace"),
        (
            {"where": "layers.0"},
            TypeError,
            "where must be a function of a layer's name and module; got where 'layers.0'",
        ),
        ({"calibrate_on": torch.zeros(1, 3).long()}, TypeError, "calibrate_on must be the keyword .*; got Tensor"),
        ({"window": True}, ValueError, "window must be an integer of at least 1, or None; got window True"),
        ({"num_decays": True}, ValueError, "num_decays must be an integer of at least 1; got num_decays True"),
        ({"decay": "fast"}, ValueError, "decay must be one of 'paper'"),
        ({"backend": "nonsense"}, ValueError, "nonsense"),
        ({"form": "sideways"}, ValueError, "form must be one of .*; got form 'sideways'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be .*; got chunk_size 0"),
        ({"learnable_decay": "yes"}, ValueError, "learnable_decay must be True or False; got .*'yes'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_is_touched(given, error, message):
    model = build("Llama")
    for work in (plan_replacement, replace_attention):
        if "calibrate_on" in given and work is plan_replacement:
            continue
        with pytest.raises(error, match=message):
            work(model, **given)
        assert not any(isinstance(module, Swapped | HostedRetention) for module in model.modules())


def test_what_is_for_new_layers_is_refused_where_there_are_none():
    model, (rows, _) = build("Llama"), padded()
    replace_attention(model, layers=[0])
    report = replace_attention(model, calibrate_on={"input_ids": rows[0][None]})
    assert report.already == ["model.layers.0.self_attn"]
    assert "already there, and left as they are: model.layers.0.self_attn" in str(report)
    for given in ({"init": "fresh"}, {"calibrate_on": {"input_ids": rows[0][None]}}):
        with pytest.raises(ValueError, match=r"is for layers that get retention now; all of these have it already"):
            replace_attention(model, **given)


@torch.no_grad()
def test_a_calibration_batch_that_cannot_serve_is_refused_and_nothing_is_changed():
    model, (rows, _) = build("Llama"), padded()
    ids = rows[0][None]
    want = model(ids).logits
    weight = model.model.embed_tokens.weight
    kept = weight[ids[0, 5]].clone()
    weight[ids[0, 5]] = torch.nan
    with pytest.raises(ValueError, match=r"calibrate_on gives values in model.layers.0.self_attn that are not finite"):
        replace_attention(model, calibrate_on={"input_ids": ids})
    weight[ids[0, 5]] = kept
    assert not any(isinstance(module, Swapped) for module in model.modules())
    assert torch.equal(model(ids).logits, want)

    class Partly(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            self.model.config.num_hidden_layers = 1
            try:
                return self.model(input_ids)
            finally:
                self.model.config.num_hidden_layers = 2

    with pytest.raises(ValueError, match=r"calibrate_on did not reach model.model.layers.1.self_attn"):
        replace_attention(Partly(model), calibrate_on={"input_ids": ids})
    assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_padding_in_the_calibration_batch_does_not_count():
    gains = []
    for padding in (False, True):
        model, (rows, _) = build("Llama"), padded()
        ids, positions = rows[1][None], torch.arange(70)[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        if padding:
            zeros = torch.zeros(1, 30).long()
            batch = {name: torch.cat([zeros, x], dim=1) for name, x in batch.items()}
        replace_attention(model, calibrate_on=batch)
        gains.append(torch.cat([layer.self_attn.retention.gain for layer in model.model.layers]))
    torch.testing.assert_close(*gains, rtol=1e-4, atol=1e-4)


def test_a_layer_whose_retention_was_deleted_says_so_and_is_restored():
    model, (rows, _) = build("Llama"), padded()
    want = model(rows[0][None]).logits
    replace_attention(model)
    del model.model.layers[0].self_attn.retention
    for work in (plan_replacement, replace_attention):
        with pytest.raises(ValueError, match="its child `retention` is gone; call restore_attention first"):
            work(model)
    with pytest.raises(RuntimeError, match="its child `retention` is gone; call restore_attention"):
        model(rows[0][None])
    restore_attention(model)
    assert torch.equal(model(rows[0][None]).logits, want)
    replace_attention(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation:UserWarning")
def test_a_quantised_layer_is_refused():
    model = build("Llama")
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="has no floating-point parameters, .*; replace first, then quantise"):
        replace_attention(quantised)


def test_a_host_whose_cache_is_not_found_is_refused_with_the_versions(monkeypatch):
    """As it was when a release of transformers renamed the argument."""
    model = build("Llama")
    replace_attention(model, window=4)
    cache = DynamicCache(config=model.config)
    keys = torch.randn(1, 2, 8, 8)

    class Hidden:
        """A cache of a type that nobody knows."""

        def update(self, k, v, *args, **kwargs):
            return torch.cat([keys, k], dim=2), torch.cat([keys, v], dim=2)

    attention = model.model.layers[0].self_attn
    x, positions = torch.randn(1, 1, 32), (torch.ones(1, 1, 8), torch.zeros(1, 1, 8))
    with pytest.raises(TypeError, match=r"must be a transformers.Cache; got Hidden \(transformers .*; tested: "):
        attention(x, position_embeddings=positions, attention_mask=None, **{CACHE: Hidden()})
    real = type(attention).host.forward
    renamed = lambda self, x, *, memory=None, **kwargs: real(self, x, **{CACHE: memory}, **kwargs)  # noqa: E731
    monkeypatch.setattr(type(attention).host, "forward", renamed)
    with pytest.raises(ShapeError, match=r"must hand on the keys of its 1 tokens; got 9, .* \(transformers .*; tested"):
        attention(x, position_embeddings=positions, attention_mask=None, memory=Hidden())
    y, _ = attention(x, position_embeddings=positions, attention_mask=None, memory=cache)  # found by its type
    assert y.shape == (1, 1, 32)
    assert cache.get_seq_length() == 1
