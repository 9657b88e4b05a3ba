"""Retention in the attention of real models: it runs, decodes, saves, and comes out again without a trace."""

import copy
import itertools
import pickle

import peft
import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from retention.integrations.hosted import Heads, HostedRetention
from retention.integrations.swap import (
    Adapter,
    Swapped,
    plan_replacement,
    register_adapter,
    replace_attention,
    restore_attention,
)
from retention.integrations.transformers import TransformersAttention, load_swapped, register_attn_implementation

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=300,
    initializer_range=0.5,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = {"num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}  # not hidden_size / num_attention_heads
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.5}
FAMILIES = {
    "GPT2": {},
    "GPT2-scaled": {"scale_attn_by_inverse_layer_idx": True},
    "GPTNeoX": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "GPTNeoX-serial": {"use_parallel_residual": False},
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": None},
    "Mistral-window": {**GROUPED, "sliding_window": 8},
    "Mixtral": {**GROUPED, "num_local_experts": 2},
    "Qwen2": GROUPED,
    "Qwen3": WIDE,
    "Gemma": WIDE,
    "Gemma2": {**WIDE, "sliding_window": 8},
    "Gemma3": {**WIDE, "sliding_window": 8},
    "OPT": OPT,
    "OPT-post": {**OPT, "do_layer_norm_before": False},
    "Phi": {},
}
LENGTHS = (100, 70, 7)


def build(family):
    torch.manual_seed(0)
    name = family.partition("-")[0]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, name + head)(config(**SIZES | FAMILIES[family])).eval()


def padded():
    """Prompts, and all of them as one batch with padding on the left."""
    rows = [torch.randint(3, 99, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = (torch.arange(100) >= 100 - torch.tensor(LENGTHS)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return rows, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


# --- every family -----------------------------------------------------------------------------------------------------

each_family = pytest.mark.parametrize("family", FAMILIES)
all_or_some = pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])


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


@each_family
@all_or_some
@torch.no_grad()
def test_padding_cuts_and_steps_leave_the_logits_alone(family, layers):
    model, (rows, batch) = build(family), padded()
    replace_attention(model, layers=layers, allow_lost=True)
    close = dict(rtol=1e-4, atol=1e-4)
    for row, prompt, logits in zip(range(3), rows, model(**batch).logits, strict=True):
        torch.testing.assert_close(logits[-len(prompt) :], model(prompt[None]).logits[0], **close, msg=f"row {row}")
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 60), (60, 90), *((n, n + 1) for n in range(90, 100))):
        parts.append(model(rows[0][None, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(rows[0][None]).logits, **close)
    assert cache.layers[1].state.kv.shape[0] == 1


@each_family
@all_or_some
def test_generation_with_a_cache_is_that_without(family, layers):
    model, (_, batch) = build(family), padded()
    replace_attention(model, layers=layers, allow_lost=True)
    kwargs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        want = model.generate(**kwargs, **options, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(**kwargs, **options, do_sample=False), want)
    want = model.generate(**kwargs, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(**kwargs, do_sample=False, cache_implementation="static"), want)


@each_family
def test_every_parameter_learns_with_checkpointing(family):
    model, (_, batch) = build(family), padded()
    replace_attention(model, allow_lost=True, gate="silu")
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


# --- the function -----------------------------------------------------------------------------------------------------


def features_of(x, feature_map, head):
    """x (T, K) -> the features of each scale, (T, 2 K)."""
    parts = [z for weight in feature_map.weight[head] for z in (x @ weight, -x @ weight)]
    return torch.cat(parts, -1).softmax(-1).chunk(2, dim=-1)


@torch.no_grad()
def test_a_replaced_layer_is_its_formula():
    """Scores of features above 0, times the decays, over their sum: what attention is, with other scores."""
    model = build("GPT2").double()
    layer = model.transformer.h[1].attn
    replace_attention(model, layers=[1], gate="silu")
    retention = layer.retention
    for parameter in retention.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 9, 32).double()
    q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in layer.c_attn(x).split(32, -1))
    n = torch.arange(9.0).double()
    log_decay = retention.decay(x.device, torch.float64).view(4, 2, 1, 1)
    decay = (log_decay * (n[:, None] - n)).exp().tril()
    scores = torch.zeros(2, 4, 9, 9).double()
    for b, h, s in itertools.product(range(2), range(4), range(2)):
        f, g = (features_of(z[b, h] / 8**0.25, m, h)[s] for z, m in ((q, retention.q_map), (k, retention.k_map)))
        scores[b, h] += f @ g.T * decay[h, s]
    heads = (scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2) * retention.gain
    gate = torch.nn.functional.silu(retention.gate(x)).unflatten(-1, (4, 8))
    torch.testing.assert_close(layer(x)[0], layer.c_proj((heads * gate).flatten(2)))


@torch.no_grad()
@pytest.mark.parametrize("features", [True, False])
def test_each_head_has_its_scales_whatever_it_shares(features):
    decay = [-0.1 * n for n in range(1, 9)]  # the first scale of four heads, then the second
    retention = HostedRetention(Heads(32, 4, 2, 8, 8), scales=2, decay=decay, features=features, gate=None).double()
    for parameter in retention.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    retention.decay.reset_parameters()
    q, k, v = (torch.randn(1, heads, 9, 8).double() for heads in (4, 2, 2))
    n = torch.arange(9.0).double()
    found, _ = retention(q.flatten(2), q, k, v, scale=0.25)
    for h in range(4):
        scores = 0
        for s in range(2):
            a, b = q[0, h] / 2, k[0, h // 2] / 2
            if features:
                a, b = features_of(a, retention.q_map, h)[s], features_of(b, retention.k_map, h // 2)[s]
            scores = scores + a @ b.T * torch.exp(decay[4 * s + h] * (n[:, None] - n)).tril()
        y = scores @ v[0, h // 2]
        y = y / scores.sum(-1, keepdim=True) if features else torch.nn.functional.rms_norm(y, (8,), eps=1e-6)
        torch.testing.assert_close(found[0, :, h], y * retention.gain[h])


@pytest.mark.parametrize("gate", ["silu", "gelu", "relu"])
def test_gates_are_open_at_the_start(gate):
    model, (rows, _) = build("GPT2"), padded()
    replace_attention(model, gate=None)
    want = model(rows[0][None]).logits
    restore_attention(model)
    replace_attention(model, gate=gate)
    torch.testing.assert_close(model(rows[0][None]).logits, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_do_not_see_each_other(attention):
    model, (rows, _) = build("Llama"), padded()
    model.set_attn_implementation(attention)
    replace_attention(model, layers=[0])
    positions = torch.cat([torch.arange(40), torch.arange(60)])[None]
    packed = model(rows[0][None], position_ids=positions, use_cache=False).logits
    alone = [model(rows[0][None, :40]).logits, model(rows[0][None, 40:]).logits]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


def test_cache_of_a_hybrid_holds_a_state_where_retention_is_and_keys_elsewhere():
    model, (rows, _) = build("Llama"), padded()
    replace_attention(model, layers=[1])
    cache = model(rows[0][None]).past_key_values
    assert cache.layers[0].keys.shape == (1, 2, 100, 8)
    assert cache.layers[1].state.kv.shape == (1, 2 * 4, 16, 9)  # two scales
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


@torch.no_grad()
@pytest.mark.parametrize("family", ["GPT2-scaled", "GPTNeoX", "Llama", "Qwen3", "OPT"])
def test_calibration_sees_what_attention_gave_and_gives_heads_its_size(family):
    model, (rows, _) = build(family), padded()
    ids = rows[0][None]
    want, last = model(ids).logits, {}
    keep = lambda name: lambda module, args, out: last.__setitem__(name, out[0])  # noqa: E731
    replace_attention(model, gate="silu")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    for name, layer in layers.items():
        layer.retention.register_forward_hook(keep(name))
    for layer in layers.values():
        layer.retention.calibrating = True
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)  # as if it were attention
    wanted = last[next(iter(layers))].square().mean(dim=(0, 1, 3))
    for layer in layers.values():
        layer.retention.calibrating = False
    restore_attention(model)
    replace_attention(model, gate="silu", calibrate_on={"input_ids": ids})
    for name, layer in layers.items():
        assert not (layer.retention.gain == 1).any()
        layer.retention.register_forward_hook(keep(name))
    model(ids)
    sizes = last[next(iter(layers))].square().mean(dim=(0, 1, 3))
    torch.testing.assert_close(sizes, wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_failed_calibration_leaves_the_model_as_it_was():
    model, (rows, _) = build("Llama"), padded()
    replace_attention(model, layers=[0])
    gain = model.model.layers[0].self_attn.retention.gain.clone()
    want = model(rows[0][None]).logits
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        replace_attention(model, calibrate_on={"nonsense": rows[0][None]})
    assert not isinstance(model.model.layers[1].self_attn, Swapped)
    assert torch.equal(model(rows[0][None]).logits, want)
    assert model.config.retention_in_attention["layers"] == ["model.layers.0.self_attn"]
    replace_attention(model, calibrate_on={"input_ids": rows[0][None]})
    assert torch.equal(model.model.layers[0].self_attn.retention.gain, gain)  # only what is new is calibrated


@torch.no_grad()
def test_calibration_keeps_packed_sequences_apart():
    model, (rows, _) = build("Llama"), padded()
    positions = torch.cat([torch.arange(40), torch.arange(60)])[None]
    want = model(rows[0][None], position_ids=positions, use_cache=False).logits
    replace_attention(model)
    for module in model.modules():
        if isinstance(module, HostedRetention):
            module.calibrating = True
    got = model(rows[0][None], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


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
def test_the_attention_implementation_serves_encoders_and_packed_sequences_and_models_without_an_adapter():
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
    replace_attention(model, layers=[0], gate="silu")
    torch.nn.init.normal_(model.model.layers[0].self_attn.retention.gate.weight)
    want = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, want)
    model.save_pretrained(tmp_path)
    loaded, info = load_swapped(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(loaded.eval()(**batch).logits, want)
    _, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert any("retention.gain" in key for key in info["unexpected_keys"])  # it does not pass in silence
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


def test_a_replaced_model_compiles():
    model, (rows, _) = build("Llama"), padded()
    replace_attention(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(rows[0][None], use_cache=False).logits
    torch.testing.assert_close(compiled(rows[0][None], use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


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
    assert model.config.retention_in_attention["layers"] == [f"model.layers.{n}.self_attn" for n in range(2)]
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
    with pytest.raises(ValueError, match="crossattention: is cross-attention"):
        replace_attention(model)
    assert replace_attention(model, where=lambda name, _: name.endswith(".attn")).replaced == ["transformer.h.0.attn"]


def test_errors_name_what_is_there():
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match=r"no attention of T5EncoderModel has .*T5Attention \(as .*register_adapter"):
        replace_attention(t5)
    model = build("Llama")
    with pytest.raises(ValueError, match="layers must be from -2 to 1; got 2"):
        replace_attention(model, layers=[2])
    with pytest.raises(ValueError, match="layers and where leave nothing to replace; the model has model.layers.0"):
        replace_attention(model, where=lambda *_: False)
    with pytest.raises(TypeError, match="gates"):
        replace_attention(model, gates="silu")
    with pytest.raises(ValueError, match="gate must be one of 'silu', .*; got gate 'sil'"):
        replace_attention(model, gate="sil")
    with pytest.raises(ValueError, match="scales must be a number, whole and at least 1; got scales 0"):
        replace_attention(model, scales=0)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention that was replaced"):
        restore_attention(model)
    with pytest.raises(ValueError, match="LlamaAttention has an adapter already"):
        register_adapter(LlamaAttention, TransformersAttention())
    assert not any(isinstance(module, Swapped) for module in model.modules())
