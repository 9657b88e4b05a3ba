"""`model.set_attn_implementation("xformers")`: what stays attention in a model runs on xformers, and says so."""

import sys

import hosts
import pytest
import torch
import transformers

from retention import BackendError
from retention.integrations.swap import replace_attention, restore_attention
from retention.integrations.transformers import attention_ran, register_xformers_attention
from retention.integrations.transformers.compat import CACHE

THREE = hosts.SIZES | {"num_hidden_layers": 3}
FAMILIES = {
    "GPT2": {},
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 8},
}


def build(family):
    torch.manual_seed(0)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**THREE | FAMILIES[family])
    return getattr(transformers, family + head)(config).eval()


def tokens(rows=2, length=20):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def names(model):
    """Of its attention layers."""
    return [name for name, module in model.named_modules() if name.endswith((".attn", ".self_attn"))]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[], [1]], ids=["attention", "hybrid"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", [False, True], ids=["sdpa", "xformers"])
def test_logits_and_texts_are_those_of_sdpa(family, layers, padded, kernel, request):
    calls = request.getfixturevalue("operator") if kernel else request.getfixturevalue("unprobed") and []
    register_xformers_attention()
    model, ids = build(family), tokens()
    replace_attention(model, layers=layers, allow_lost=True) if layers else None
    batch = {"input_ids": ids, "attention_mask": (torch.arange(20) >= torch.tensor([[0], [5 * padded]])).long()}
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    want, text = model(**batch).logits, model.generate(**batch, **options)
    model.set_attn_implementation("xformers")
    calls.clear()
    got = model(**batch).logits
    kept = [name for i, name in enumerate(names(model)) if i not in layers]
    assert attention_ran(model) == dict.fromkeys(kept, "xformers cpuF" if kernel else "sdpa")
    assert len(calls) == len(kept) * kernel
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-3, atol=1e-3)
    assert torch.equal(model.generate(**batch, **options), text)
    without = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(without, text)


@torch.no_grad()
def test_only_the_layers_that_stay_attention_change_and_all_come_back(operator):
    register_xformers_attention()
    model, ids = build("Llama"), tokens()
    softmax = model(ids).logits
    replace_attention(model, layers=[0, 2])
    retained = [module.config._attn_implementation for module in model.modules() if hasattr(module, "host_config")]
    model.config._attn_implementation = "xformers"
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "host_config")] == retained
    operator.clear()
    model(ids)
    assert len(operator) == 1
    restore_attention(model)
    torch.testing.assert_close(model(ids).logits, softmax, rtol=1e-4, atol=1e-4)
    assert len(operator) == 4
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, softmax)


def test_gradients_are_those_of_sdpa(operator):
    register_xformers_attention()
    model, ids = build("Llama"), tokens()
    replace_attention(model, layers=[1])
    grads = []
    for name in ("sdpa", "xformers"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-6


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kernel", [False, True], ids=["sdpa", "xformers"])
def test_more_tokens_on_a_cache_a_static_cache_and_packed_rows(kernel, request):
    if kernel:
        request.getfixturevalue("operator")
    register_xformers_attention()
    model, ids = build("Llama"), tokens(rows=1)
    want, text = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    model.set_attn_implementation("xformers")
    first = model(ids[:, :11])
    rest = model(ids[:, 11:], **{CACHE: first[CACHE]})
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), want, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static"), text)
    found = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, packed, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_encoders_see_both_ways(operator):
    register_xformers_attention()
    bert, ids = transformers.BertModel(transformers.BertConfig(**THREE)).eval(), tokens()
    mask = (torch.arange(20) < torch.tensor([[20], [14]])).long()
    want = bert(ids, attention_mask=mask).last_hidden_state
    bert.set_attn_implementation("xformers")
    operator.clear()
    torch.testing.assert_close(bert(ids, attention_mask=mask).last_hidden_state[mask.bool()], want[mask.bool()])
    assert len(operator) == 3


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_runs_torchs():
    register_xformers_attention()
    model, ids = build("Llama"), tokens()
    want = model(ids, use_cache=False).logits
    model.set_attn_implementation("xformers")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
    assert set(attention_ran(model).values()) == {"sdpa"}


def test_what_it_cannot_do_is_an_error(unprobed):
    register_xformers_attention()
    config = transformers.Gemma2Config(**THREE, head_dim=8, num_key_value_heads=2)
    model = transformers.Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("xformers")
    with pytest.raises(ValueError, match="has no softcap; got them; use the implementation 'eager'"):
        model(tokens())
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        unprobed.delitem(sys.modules, name)
    unprobed.setitem(sys.modules, "xformers", None)
    from retention.xformers import probe

    probe._trouble.cache_clear()
    with pytest.raises(BackendError, match="xformers' attention cannot run on cpu: needs xformers, which is not") as e:
        register_xformers_attention()
    assert isinstance(e.value.__cause__, ModuleNotFoundError)
