"""A replacement or restoration that fails at any of its steps leaves the model bit for bit what it was."""

import copy
import itertools

import pytest
import timm
import torch
import transformers
from hosts import FAMILIES, build, padded

import retention.integrations.timm  # noqa: F401
from retention.integrations.swap import (
    Swapped,
    adapter,
    calibration,
    replace,
    replace_attention,
    restore_attention,
    whole,
)
from retention.integrations.swap.retention import HostedRetention
from retention.integrations.transformers import adapters, marks


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def llama():
    return build("Llama"), {"input_ids": padded()[0][0][None]}


def gpt2():
    return build("GPT2"), {"input_ids": padded()[0][0][None]}


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    return model, {"x": torch.randn(1, 3, 32, 32)}


def encoder():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return torch.nn.TransformerEncoder(layer, 2).eval(), {"src": torch.randn(2, 5, 16)}


MODELS = (llama, vit, encoder)


def picture(model):
    """All that can be seen of a model: classes, attributes, hooks, parameters, configs."""
    seen = []
    for name, module in model.named_modules():
        plain = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers")
        }
        seen.append((name, type(module), plain, [id(p) for p in module.parameters(recurse=False)]))
        if "config" in plain:
            seen.append((type(module.config), id(module.config), copy.deepcopy(vars(module.config))))
    return seen


class Failure(Exception):
    pass


def failing_at(monkeypatch, owner, name, call, error):
    """Let the `call`-th call of owner.name raise, after it has done its work."""
    real, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        found = real(*args, **kwargs)
        if next(calls) == call:
            raise error
        return found

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def steps(model):
    kind = type(next(m for m in model.modules() if adapter.find_adapter(type(m)) is not None))
    own = type(adapter.find_adapter(kind))
    return [
        (replace, "_build"),
        (replace, "_fresh_weights"),
        (replace, "swapped_class"),
        (replace, "calibrate"),
        (HostedRetention, "__init__"),
        (calibration.Probe, "_measure"),
        (calibration.Probe, "gain"),
        (own, "attach"),
        (own, "detach"),
        (own, "heads"),
        (adapters, "update_marks"),
        (marks, "_mark"),
        (marks, "_set_stateful"),
        (torch.nn.Module, "load_state_dict"),
        (torch.nn.Module, "__setattr__"),
    ]


def works(batch, make):
    """What may fail, and its options."""
    yield restore_attention, {}
    yield replace_attention, {}
    yield replace_attention, {"init": "fresh"}
    if make is llama:
        yield replace_attention, {"calibrate_on": batch}


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_a_failure_at_any_call_leaves_the_model_as_it_was(make, monkeypatch):
    model, batch = make()
    reached = set()
    for (work, options), (owner, name) in itertools.product(works(batch, make), steps(model)):
        for call, error in ((1, KeyboardInterrupt()), (2, Failure()), (30, Failure())):
            if not fails(make, batch, work, options, (owner, name, call, error), monkeypatch):
                break
            reached.add((work.__name__, name))
    assert {("replace_attention", name) for name in ("_build", "_fresh_weights", "swapped_class", "attach")} <= reached
    assert ("restore_attention", "detach") in reached
    if make is llama:
        assert {("replace_attention", name) for name in ("calibrate", "_measure", "gain", "update_marks")} <= reached


def fails(make, batch, work, options, place, monkeypatch):
    """Whether `work` came to the place where it fails; if so, all is as it was, and can be replaced and restored."""
    *where, error = place
    model, _ = make()
    monkeypatch.setattr(whole, "_living_modules", lambda: list(model.modules()))  # of all there are it takes 0.1 s
    if work is restore_attention:
        replace_attention(model)
    before, state = picture(model), copy.deepcopy(model.state_dict())
    want, chance = outputs(model, batch), torch.get_rng_state()
    with monkeypatch.context() as patched:
        failing_at(patched, *where, error)
        try:
            work(model, **options)
        except type(error):
            pass
        else:
            return False
    assert torch.equal(torch.get_rng_state(), chance)
    assert picture(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(outputs(model, batch), want)
    if work is replace_attention:
        replace_attention(model, **options)
    restore_attention(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())
    return True


@torch.no_grad()
def outputs(model, batch):
    found = model(**batch)
    return getattr(found, "logits", found)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_leaves_names_order_random_numbers_and_outputs_as_they_were(family):
    model, (_, batch) = build(family), padded()
    names, want = [name for name, _ in model.named_parameters()], model(**batch).logits
    children = [name for name, _ in model.named_modules()]
    config = copy.deepcopy(model.config)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    replace_attention(model, allow_lost=True, calibrate_on=batch)
    assert torch.equal(torch.get_rng_state(), before)
    restore_attention(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_modules()] == children
    assert model.config == config
    assert type(model.config) is type(config)
    assert torch.equal(model(**batch).logits, want)


def test_only_fresh_weights_move_the_random_state():
    model, _ = llama()
    before = torch.get_rng_state()
    replace_attention(model, init="fresh")
    assert not torch.equal(torch.get_rng_state(), before)
    weights = [build("Llama") for _ in range(2)]
    torch.manual_seed(3)
    for twin in weights:
        replace_attention(twin, init="fresh")
    first, second = (twin.model.layers[0].self_attn.q_proj.weight for twin in weights)
    assert not torch.equal(first, second)


def test_modes_are_kept_by_calibration():
    model, batch = gpt2()
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    replace_attention(model, layers=[0], calibrate_on=batch)
    assert [module.training for name, module in model.named_modules() if ".retention" not in name] == modes
    other, _ = gpt2()
    replace_attention(other, layers=[0], calibrate_on=batch)  # evaluation mode: dropout plays no part
    gains = [m.transformer.h[0].attn.retention.gain for m in (model, other)]
    assert torch.equal(*gains)
