"""A model with replaced layers is saved, opened and refused as what it is, by whatever opens it."""

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
import transformers
from hosts import GROUPED, SIZES, build, padded
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from retention.integrations.swap import Swapped, replace_attention, restore_attention
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM, load_swapped


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def train_a_little(model):
    """So that no weight is what it was at the start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".retention." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


# --- saved and opened -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2", "GPTNeoX"])
@pytest.mark.parametrize(
    "second",
    [
        {"gate": "sigmoid"},
        {"decay": "paper"},
        {"window": 9, "sinks": 4},
        {"sinks": 4},
        {"num_decays": 3, "features": False},
    ],
    ids=str,
)
def test_options_belong_to_each_layer(family, second, tmp_path):
    model, (_, batch) = build(family), padded()
    replace_attention(model, layers=[0], allow_lost=True)
    replace_attention(model, layers=[1], allow_lost=True, **second)
    train_a_little(model)
    want = model(**batch).logits
    model.save_pretrained(tmp_path)
    for load in (load_swapped, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path).eval()
        assert type(loaded) is type(model)
        assert torch.equal(loaded(**batch).logits, want)
    options = [module.retention.options for module in loaded.modules() if isinstance(module, Swapped)]
    assert options == [module.retention.options for module in model.modules() if isinstance(module, Swapped)]


@pytest.mark.slow
@torch.no_grad()
def test_every_auto_class_opens_it_with_its_retention(tmp_path):
    model, (_, batch) = build("Llama"), padded()
    replace_attention(model, layers=[0])
    train_a_little(model)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is transformers.LlamaModel
    assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is transformers.LlamaForSequenceClassification
    assert [isinstance(layer.self_attn, Swapped) for layer in classifier.model.layers] == [True, False]
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "llama"
    built = AutoModelForCausalLM.from_config(config)
    assert [isinstance(layer.self_attn, Swapped) for layer in built.model.layers] == [True, False]
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer_like(tmp_path))
    assert isinstance(pipeline.model.model.layers[0].self_attn, Swapped)


def tokenizer_like(folder):
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({str(n): n for n in range(99)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="0", pad_token="0")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_loaded_can_be_restored_changed_and_saved_again(tmp_path):
    model, (_, batch) = build("Llama"), padded()
    replace_attention(model)
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    restore_attention(again)
    again.save_pretrained(tmp_path / "third")
    assert json.loads((tmp_path / "third" / "config.json").read_text())["model_type"] == "llama"
    _, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "third", output_loading_info=True)
    assert not any(info.values())
    with pytest.raises(ValueError, match="has no layers that were replaced"):
        load_swapped(tmp_path / "third")


@pytest.mark.slow
@torch.no_grad()
def test_half_precision_and_sharded_weights_load(tmp_path):
    model, (_, batch) = build("Llama"), padded()
    replace_attention(model)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    weights = model.to(torch.bfloat16).state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in half.state_dict().items())


@pytest.mark.slow
@torch.no_grad()
def test_a_folder_of_the_first_version_opens(tmp_path):
    """Its config names no sinks and no importance of keys; its tensors have the names below."""
    model, (_, batch) = build("Llama"), padded()
    replace_attention(model, layers=[1], window=9, decay="short", key_importance=False)
    model.save_pretrained(tmp_path)
    want = model(**batch).logits
    options = {"scales": 2, "decay": "short", "learnable_decay": True, "features": True, "window": 9, "gate": "silu"}
    contents = json.loads((tmp_path / "config.json").read_text())
    contents["retention_layers"] = {"layers.1.self_attn": {**options, "causal": None, "grid": True}}
    (tmp_path / "config.json").write_text(json.dumps(contents))
    names = {"decay.shift", "q_map.weight", "k_map.weight", "rest.weight", "rest.bias", "gain", "gate.weight"}
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    own = {name.partition(".retention.")[2] for name in stored if ".retention." in name}
    assert own == {*names, "gate.bias"}
    for load in (load_swapped, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(load(tmp_path).eval()(**batch).logits, want)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_without_those_of_retention_are_refused_and_so_are_left_over_ones(tmp_path):
    model = build("Llama")
    replace_attention(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = safetensors.torch.load_file(file)
    gain = "model.layers.1.self_attn.retention.gain"
    without = {name: x for name, x in whole.items() if ".retention." not in name}
    cases = (
        (without, rf"do not fit the replaced layers .*\nmissing_keys: .*{gain}"),
        ({name: x for name, x in whole.items() if name != gain}, rf"missing_keys: {gain}$"),
        (whole | {gain.replace("gain", "more"): torch.ones(3)}, "unexpected_keys: .*retention.more$"),
    )
    for tensors, message in cases:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        for load in (load_swapped, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained):
            with pytest.raises(ValueError, match=message.replace("model.", r"(model\.)?", 1)):
                load(tmp_path)
    safetensors.torch.save_file(whole | {gain: torch.ones(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="mismatched"):
        load_swapped(tmp_path)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_the_class_of_the_model_with_attention_does_not_open_it(family, tmp_path):
    model = build(family)
    replace_attention(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="hidden_size|got str"):
        type(model).from_pretrained(tmp_path)


def test_a_config_that_names_layers_which_are_not_there_is_refused(tmp_path):
    model = build("Llama")
    replace_attention(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    layers = whole["retention_layers"]
    file.write_text(json.dumps(whole | {"retention_layers": {"layers.7.self_attn": layers["layers.0.self_attn"]}}))
    with pytest.raises(ValueError, match=r"has no layers layers\.7\.self_attn, which its config says are replaced"):
        load_swapped(tmp_path)
    file.write_text(json.dumps({name: x for name, x in whole.items() if name != "retention_layers"}))
    with pytest.raises(ValueError, match="must have 'retention_layers'"):
        load_swapped(tmp_path)
    file.write_text(json.dumps(whole | {"architectures": ["OwnLlama"]}))
    with pytest.raises(ValueError, match="is a 'OwnLlama', which transformers does not have; build it, call"):
        load_swapped(tmp_path)


OPEN = """
import json, os, sys
from transformers import AutoModelForCausalLM, PreTrainedModel
for folder, first, options in json.loads(sys.argv[1]):
    if os.fork():  # so that transformers is imported once
        os.wait()
        print("END", flush=True)
        continue
    exec(first)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        print("opened", [name for name, _ in model.named_parameters() if "retention" in name][:1])
    except Exception as error:
        print("refused", type(error).__name__, error)
    sys.stdout.flush()
    os._exit(0)
"""
MISSING = """
import importlib.abc
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] == 'retention':
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
"""
TRUST = {"trust_remote_code": True}
WAYS = {  # what is run before the folder is opened, and with which options it is
    "plain": ("", {}),
    "trusting": ("", TRUST),
    "imported": ("import retention.integrations.transformers", {}),
    "missing": (MISSING, TRUST),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a replaced model and of a RetNet."""
    models = {"replaced": build("Llama"), "RetNet": RetNetForCausalLM(RetNetConfig(dim=16, num_layers=1, num_heads=2))}
    replace_attention(models["replaced"])
    folder = tmp_path_factory.mktemp("saved")
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def answers(saved):
    """What processes print that have not imported the library, by the kind of model and the way they open it."""
    asked = [(kind, way) for kind in ("replaced", "RetNet") for way in WAYS]
    calls = json.dumps([(str(saved / kind), *WAYS[way]) for kind, way in asked])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(saved / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, calls], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL, env=environment, check=True,
    )  # fmt: skip
    return dict(zip(asked, done.stdout.split("END\n"), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replaced", "RetNet"])
def test_a_process_without_the_library_refuses_and_says_what_to_do(kind, answers, saved):
    assert "refused ValueError" in answers[kind, "plain"]
    assert "trust_remote_code=True" in answers[kind, "plain"]
    assert "opened ['model." in answers[kind, "trusting"]
    assert "opened ['model." in answers[kind, "imported"]
    install = 'this model needs the library multiscale-retention: pip install "multiscale-retention'
    assert install in answers[kind, "missing"]
    card = (saved / kind / "README.md").read_text()
    assert "import retention.integrations.transformers" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_a_model_card_of_ones_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model = build("Llama")
    replace_attention(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what is uploaded, and has the model cards of `cards`, by repository."""
    uploads, cards = {}, {}

    def load(repo_id, **_):
        if repo_id not in cards:
            raise LocalEntryNotFoundError("no card")
        return ModelCard(cards[repo_id])

    def commit(self, repo_id, operations, commit_message, **_):
        files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        uploads[repo_id] = {name: Path(file).read_bytes() for name, file in files.items()}
        uploads[repo_id]["message"] = commit_message

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: mock.MagicMock(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(ModelCard, "load", load)
    return types.SimpleNamespace(uploads=uploads, cards=cards)


def replaced_llama():
    model = build("Llama")
    replace_attention(model)
    return model


def small_retnet():
    return RetNetForCausalLM(RetNetConfig(dim=16, num_layers=1, num_heads=2))


@pytest.mark.slow
@pytest.mark.parametrize("make", [replaced_llama, small_retnet])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_an_uploaded_model_has_a_card_that_tells_how_to_load_it(make, way, hub, tmp_path):
    original = make()
    for model in (original, copy.deepcopy(original)):
        if way == "push_to_hub":
            model.push_to_hub("me/mine", tags=["small"])
        else:
            model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
        files = hub.uploads.pop("me/mine")
        card = ModelCard(files["README.md"].decode())
        assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in card.text
        assert "import retention.integrations.transformers" in card.text
        assert 'pip install "multiscale-retention[transformers]"' in card.text
        assert card.data.library_name == "transformers"
        assert set(card.data.tags) == {"retention", *(["small"] if way == "push_to_hub" else [])}
        assert files["message"] == "Upload model"
        assert {"config.json", "model.safetensors", "retention_model.py"} <= files.keys()


def test_a_card_on_the_hub_stays(hub):
    hub.cards["me/mine"] = "---\ntags: [old]\n---\nWritten by hand."
    replaced_llama().push_to_hub("me/mine")
    assert b"Written by hand." in hub.uploads["me/mine"]["README.md"]
    assert b"retention" not in hub.uploads["me/mine"]["README.md"]


def test_a_restored_model_is_uploaded_as_before(hub):
    model = replaced_llama()
    restore_attention(model)
    model.push_to_hub("me/mine")
    assert b"retention" not in hub.uploads["me/mine"]["README.md"]
    assert "retention_model.py" not in hub.uploads["me/mine"]


# --- who is marked ----------------------------------------------------------------------------------------------------


def wrapped(model, kind):
    if kind == "compile":
        return torch.compile(model, backend="eager")
    if kind == "sequential":
        return torch.nn.Sequential(model)
    if kind == "peft":
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return DistributedDataParallel(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("kind", ["compile", "sequential", "peft", "ddp"])
@pytest.mark.parametrize("inside", ["replace", "restore", "neither"])
def test_wrappers_are_looked_through(kind, inside):
    model = build("Llama")
    config, untouched = model.config, copy.deepcopy(model.config)
    try:
        outside = wrapped(model, kind)
        replace_attention(model if inside == "replace" else outside)
        assert set(model.config.retention_in_attention) == {"layers.0.self_attn", "layers.1.self_attn"}
        assert model._is_stateful
        assert model.config is model.model.config
        assert type(config) is transformers.LlamaConfig  # whoever holds the old one is not concerned
        assert not hasattr(config, "retention_in_attention")
        restore_attention(model if inside == "restore" else outside)
        assert not hasattr(model.config, "retention_in_attention")
        assert type(model.config) is transformers.LlamaConfig
        assert model.config == untouched
        assert "_is_stateful" not in vars(model)
        assert all(layer.self_attn.config is model.config for layer in model.model.layers)
        with pytest.raises(ValueError, match="has no attention that was replaced"):
            restore_attention(outside)
        replace_attention(outside)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("part", [lambda m: m.model, lambda m: m.model.layers, lambda m: m.model.layers[1]], ids=str)
def test_a_part_that_is_replaced_marks_the_model_that_it_is_of(part, tmp_path):
    model, (_, batch) = build("Llama"), padded()
    replace_attention(part(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)
    restore_attention(part(model))
    assert not hasattr(model.config, "retention_in_attention")


def test_some_layers_restored_leaves_the_others_marked(tmp_path):
    model = build("Llama")
    replace_attention(model)
    restore_attention(model.model.layers[0])
    assert set(model.config.retention_in_attention) == {"layers.1.self_attn"}
    assert model._is_stateful
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [isinstance(layer.self_attn, Swapped) for layer in loaded.model.layers] == [False, True]


def test_models_that_share_a_config_do_not_mark_each_other(tmp_path):
    config = transformers.LlamaConfig(**SIZES, **GROUPED)
    one, other = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    replace_attention(one)
    assert not hasattr(other.config, "retention_in_attention")
    assert not other._is_stateful
    other.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is transformers.LlamaConfig
    third = AutoModelForCausalLM.from_config(one.config)
    restore_attention(one)
    assert set(third.config.retention_in_attention) == {"layers.0.self_attn", "layers.1.self_attn"}


def test_a_change_of_the_config_while_layers_are_replaced_stays():
    model = build("Llama")
    replace_attention(model, layers=[0])
    model.config.use_cache = False
    model.set_attn_implementation("eager")
    restore_attention(model)
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_a_wrapper_of_several_processes_is_refused():
    """It would not average the gradients of new parameters, without a word."""
    model = build("Llama")
    try:
        outside = wrapped(model, "ddp")
        alone, several = outside.process_group, types.SimpleNamespace(size=lambda: 2)
        for work in (replace_attention, restore_attention):
            outside.process_group = several
            with pytest.raises(
                ValueError, match="in a DistributedDataParallel of several processes, .*; replace or rest"
            ):
                work(model)
            outside.process_group = alone
            work(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_runs_what_is_in_it():
    model, ids = build("Llama"), padded()[0][2][None]
    compiled = torch.compile(model, backend="eager")
    attention = compiled(ids, use_cache=False).logits
    replace_attention(compiled)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert not torch.allclose(compiled(ids, use_cache=False).logits, attention, atol=0.1)
    restore_attention(model)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, attention)
