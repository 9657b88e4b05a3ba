"""Checkpoints of fla's RetNet: the same logits here, the same bits on the way back, and refusals of other functions."""

import json
import threading
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from retention import cli
from retention.integrations.checkpoints import convert, fla_options, fla_tensors, load, torchscale_tensors
from retention.integrations.formats import FLA, detect
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM, RetNetModel

SIZES = dict(vocab=50, dim=32, ffn=48, layers=2, heads=4)
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
KINDS = {
    "plain": {},
    "expand_k-0.5": dict(expand_k=0.5),
    "expand_v-1": dict(expand_v=1),
    "grouped": dict(kv_heads=2),
    "one-kv-head": dict(kv_heads=1, expand_k=0.5, expand_v=1),
    "no-gate": dict(gate=False),
    "no-affine": dict(affine=False),
    "tied": dict(tied=True),
    "all": dict(expand_k=0.5, expand_v=1, kv_heads=2, gate=False, tied=True),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def options_of(
    vocab, dim, ffn, layers, heads, expand_k=1, expand_v=2, kv_heads=None, gate=True, affine=True, tied=False
):
    """What fla writes into its config.json."""
    return {
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "attn": None,
        "attn_mode": "chunk",
        "attnres_block_size": None,
        "bos_token_id": 1,
        "elementwise_affine": affine,
        "eos_token_id": 2,
        "expand_k": expand_k,
        "expand_v": expand_v,
        "feature_map": None,
        "fuse_norm": True,
        "hidden_act": "swish",
        "hidden_ratio": 2,
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-6,
        "num_heads": heads,
        "num_hidden_layers": layers,
        "num_kv_heads": kv_heads,
        "tie_word_embeddings": tied,
        "use_output_gate": gate,
        "use_short_conv": False,
        "vocab_size": vocab,
    }


def folder_of(path, kind=None, dtype=torch.float64, shards=1, told=None, weights=None):
    """A folder as fla writes it; returns it and its weights in float64."""
    sizes = SIZES | (kind or {})
    weights = weights or {key: x.to(dtype) for key, x in peers.fla_weights(**sizes).items()}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(options_of(**sizes) | (told or {})))
    names = sorted(weights)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, keys in files.items():
        save_file({key: weights[key] for key in keys}, path / file)
    return path, {key: x.double() for key, x in weights.items()}


def shapes_of(sizes):
    """The shapes of fla's tensors by name."""
    with torch.device("meta"):
        return {key: x.shape for key, x in peers.fla_weights(**sizes).items()}


def command(*arguments):
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@EVERY_KIND
def test_the_logits_are_those_of_fla(kind, dtype, tmp_path):
    folder, weights = folder_of(tmp_path / "theirs", kind, dtype)
    tokens = torch.randint(50, (2, 70))
    ours, wanted = load(folder), peers.fla(weights, tokens, heads=4)
    assert ours.dtype == dtype
    with torch.no_grad():
        assert peers.deviation(ours(tokens).logits, wanted) <= BOUND[dtype]
        prompt = ours(tokens[:, :60])
        steps = [prompt.logits]
        for i in range(60, 70):
            steps.append(ours(tokens[:, i : i + 1], cache=prompt.cache).logits)
        assert peers.deviation(torch.cat(steps, 1), wanted) <= BOUND[dtype]


def test_the_comparison_can_fail(tmp_path):
    folder, weights = folder_of(tmp_path / "theirs", dict(kv_heads=2))
    tokens = torch.randint(50, (2, 40))
    wanted = peers.fla(weights, tokens, heads=4)
    layer = [{"rotary": "paper"}, {"interleaved": True}, {"decay": "log_linear"}, {"norm_eps": 1e-2}, {"scale": 1.0}]
    for config in ({"norm_eps": 1e-3}, {"activation": "gelu"}, *({"retention": options} for options in layer)):
        assert peers.deviation(load(folder, config=config)(tokens).logits, wanted) > 1e-8, config


@EVERY_KIND
def test_weights_alone_tell_the_sizes(kind, tmp_path):
    folder, weights = folder_of(tmp_path / "theirs", kind)
    (folder / "config.json").unlink()
    tokens = torch.randint(50, (1, 20))
    if kind.get("affine", True):
        ours = load(folder)
    else:  # the norm of a head tells how many channels a head has
        with pytest.raises(ValueError, match='how many heads there are; give a config: {"num_heads": N}'):
            load(folder)
        ours = load(folder, config={"num_heads": 4})
    assert peers.deviation(ours(tokens).logits, peers.fla(weights, tokens, heads=4)) <= 1e-10
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_KIND
def test_there_and_back_is_bit_equal(kind, dtype, tmp_path):
    folder, weights = folder_of(tmp_path / "theirs", kind, dtype, shards=3, told={"pad_token_id": 3})
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "README.md"):
        (folder / name).write_text(f"{name} of fla")
    result = command(folder, tmp_path / "ours", "--from", "fla")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "ours/tokenizer.model").read_text() == "tokenizer.model of fla"
    result = command(tmp_path / "ours", tmp_path / "back", "--to", "fla")
    assert result.exit_code == 0, result.output
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == weights.keys()
    assert all(x.dtype == dtype and torch.equal(x.double(), weights[key]) for key, x in back.items())
    told, found = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    told["num_kv_heads"] = told["num_kv_heads"] or 4
    assert found == {key: told[key] for key in found if key != "dtype"} | {"dtype": str(dtype).removeprefix("torch.")}
    assert (tmp_path / "back/tokenizer.json").read_text() == "tokenizer.json of fla"
    assert not (tmp_path / "back/README.md").exists()


def test_a_model_of_ours_becomes_one_of_fla(tmp_path):
    layer = dict(key_dim=16, value_dim=32, num_kv_heads=2, rotary="rope", interleaved=False, norm="rms")
    sizes = dict(vocab_size=50, dim=32, num_layers=2, num_heads=4, activation="silu", norm_eps=1e-5)
    config = RetNetConfig(**sizes, tie_word_embeddings=False, retention=layer | {"norm_eps": 1e-5})
    model = peers.stirred(RetNetForCausalLM(config)).double()
    tokens = torch.randint(50, (2, 40))
    wanted = peers.fla(fla_tensors(model), tokens, heads=4, eps=1e-5)
    assert peers.deviation(model(tokens).logits, wanted) <= 1e-10
    options = fla_options(model)
    assert (options["expand_k"], options["expand_v"], options["elementwise_affine"]) == (0.5, 1.0, False)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", target="fla")
    assert torch.equal(load(tmp_path / "theirs")(tokens).logits, model(tokens).logits)


def test_a_base_model_without_head_loads_and_goes_back(tmp_path):
    folder, weights = folder_of(tmp_path / "theirs", told={"architectures": ["RetNetModel"]})
    bare = {key.removeprefix("model."): x for key, x in weights.items() if key != "lm_head.weight"}
    save_file(bare, folder / "model.safetensors")
    ours, tokens = load(folder), torch.randint(50, (2, 30))
    assert isinstance(ours, RetNetModel)
    wanted = peers.fla(weights | {"lm_head.weight": torch.eye(32, dtype=torch.float64)}, tokens, heads=4)
    assert peers.deviation(ours(tokens).last_hidden_state, wanted) <= 1e-10
    assert fla_options(ours)["architectures"] == ["RetNetModel"]
    assert fla_tensors(ours).keys() == {f"model.{key}" for key in bare}


FREE_TO_FLA = dict(rotary="rope", interleaved=False, norm="rms")
NOT_OF_FLA = {
    "retention.rotary must be 'rope', is 'paper'": dict(retention=FREE_TO_FLA | {"rotary": "paper"}),
    "retention.interleaved must be False, is True": dict(retention=FREE_TO_FLA | {"interleaved": True}),
    "retention.decay must be 'paper', is 'short'": dict(retention=FREE_TO_FLA | {"decay": "short"}),
    "retention.learnable_decay must be False": dict(retention=FREE_TO_FLA | {"learnable_decay": True}),
    "retention.gate must be None or 'silu', is 'gelu'": dict(retention=FREE_TO_FLA | {"gate": "gelu"}),
    "retention.norm must be 'rms', is 'group'": dict(retention=FREE_TO_FLA | {"norm": "group"}),
    "retention.norm_affine must be False or 'shared'": dict(retention=FREE_TO_FLA | {"norm_affine": "channel"}),
    "retention.norm_eps must be 1e-06, is 0.1": dict(retention=FREE_TO_FLA | {"norm_eps": 0.1}),
    "retention.scale must be 0.25, is 3.0": dict(retention=FREE_TO_FLA | {"scale": 3.0}),
    "at most 256 key channels, has 512": dict(retention=FREE_TO_FLA | {"key_dim": 1024}),
    "activation must be 'silu', is 'gelu'": dict(activation="gelu"),
    "scale_embedding must be False": dict(scale_embedding=True),
    "norm must be 'rms', is 'layer'": dict(norm="layer"),
    "moe_every must be 0, is 2": dict(moe_every=2, moe_num_experts=2),
    "must have an embedding": dict(vocab_size=0, tie_word_embeddings=False),
}


@pytest.mark.parametrize(("message", "options"), NOT_OF_FLA.items(), ids=list(NOT_OF_FLA))
def test_fla_is_not_given_what_it_cannot_compute(message, options):
    usual = dict(vocab_size=50, dim=32, num_layers=2, num_heads=2, activation="silu", retention=FREE_TO_FLA)
    config = RetNetConfig(**usual | options)
    model = RetNetForCausalLM(config) if config.vocab_size else RetNetModel(config)
    with pytest.raises(ValueError, match="fla's RetNet cannot compute what this model does: ") as error:
        fla_tensors(model)
    assert message in str(error.value)
    assert str(error.value).count(" must ") == 1


def test_the_options_that_fla_leaves_free_change_nothing_that_it_computes():
    free = dict(key_dim=32, num_kv_heads=2, scale=16**-0.5, decay=[-(2.0**-5), -(2.0**-6)], dropout=0.1, chunk_size=64)
    config = RetNetConfig(dim=32, num_layers=1, num_heads=2, activation="silu", retention=FREE_TO_FLA | free)
    with pytest.raises(ValueError, match=r"does: retention.decay must be 'paper', is \[-0.03125, -0.015625\]$"):
        fla_tensors(RetNetForCausalLM(config))
    config.retention["decay"] = "paper"
    assert fla_tensors(RetNetForCausalLM(config))


def test_sizes_written_out_are_those_left_to_their_default():
    usual = dict(norm="rms", decay_norm=True, score_norm=True)
    sizes = dict(key_dim=32, num_kv_heads=2, scale=0.25)
    config = RetNetConfig(dim=32, num_layers=1, num_heads=2, retention=usual | sizes)
    assert torchscale_tensors(RetNetForCausalLM(config))
    config = RetNetConfig(dim=32, num_layers=1, num_heads=2, retention=usual | dict(key_dim=16, num_kv_heads=1))
    message = "retention.key_dim must be 32, is 16; retention.num_kv_heads must be 2, is 1"
    with pytest.raises(ValueError, match=message):
        torchscale_tensors(RetNetForCausalLM(config))


REFUSED = {
    "feature-map": (dict(feature_map="relu"), {}, "feature_map of fla must be None, .*; got 'relu'"),
    "hybrid": (dict(attn={"layers": [1], "num_heads": 4}), {}, "attn of fla must be None"),
    "residuals": (dict(attnres_block_size=4), {}, "attnres_block_size of fla must be None, .*; got 4"),
    "powlu": (dict(hidden_act="powlu"), {}, "hidden_act of fla must be 'swish' or 'silu', .*; got 'powlu'"),
    "convolution": (dict(use_short_conv=True), {}, "use_short_conv of fla must be False, .*; got True"),
    "of-another": (dict(model_type="gla"), {}, "model_type of fla must be 'retnet', .*; got 'gla'"),
    "conv1d": ({}, {"model.layers.0.attn.q_conv1d.weight": (32, 1)}, "have short convolutions"),
    "res-proj": ({}, {"model.layers.0.attn_res_proj.weight": (1, 32)}, "have attention over residuals"),
    "unknown": ({}, {"model.layers.0.attn.gk_proj.0.weight": (16, 32)}, "unknown tensors: model.layers.0.attn.gk_proj"),
    "bias": ({}, {"model.layers.0.attn.g_proj.bias": (32,)}, "unknown tensors: model.layers.0.attn.g_proj.bias"),
    "twice": (
        {},
        {"model.layers.0.attn.g_norm.weight": (16,)},
        "two tensors for one place: model.layers.0.attn.g_norm.weight, model.layers.0.attn.g_norm_swish_gate.weight",
    ),
    "heads": (dict(num_heads=8), {}, "num_heads 8 contradicts the weights, which have num_heads 4"),
    "kv-heads": (dict(num_kv_heads=2), {}, r"wrong shapes: model.layers.0.attn.k_proj.weight must be \(16, 32\)"),
    "gate": (dict(use_output_gate=False), {}, "unknown tensors: model.layers.0.attn.g_proj.weight"),
    "affine": (dict(elementwise_affine=False), {}, "elementwise_affine False contradicts the weights"),
    "tie": (dict(tie_word_embeddings=True), {}, "tie_word_embeddings True contradicts the weights"),
    "layers": (dict(num_hidden_layers=3), {}, "num_hidden_layers 3 contradicts the weights"),
    "shape": ({}, {"model.layers.1.attn.k_proj.weight": (16, 32)}, r"k_proj.weight must be \(32, 32\), is \(16, 32\)"),
}


@pytest.mark.parametrize(("told", "more", "message"), REFUSED.values(), ids=list(REFUSED))
def test_other_functions_are_refused(told, more, message, tmp_path):
    folder, weights = folder_of(tmp_path / "theirs", told=told)
    save_file(weights | {key: torch.ones(shape) for key, shape in more.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_gate_that_only_the_config_has_is_refused(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs", dict(gate=False), told={"use_output_gate": True})
    with pytest.raises(
        ValueError, match="use_output_gate True contradicts the weights, which have retention.gate None"
    ):
        load(folder)


def test_a_head_that_is_neither_tied_nor_there_is_refused(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs", dict(tied=True), told={"tie_word_embeddings": False})
    with pytest.raises(ValueError, match="tie_word_embeddings False contradicts the weights, which have .* True"):
        load(folder)


@pytest.mark.parametrize("door", [RetNetForCausalLM, RetNetConfig])
def test_the_folder_is_not_taken_for_one_of_ours(door, tmp_path):
    folder, _ = folder_of(tmp_path / "theirs")
    with pytest.raises(ValueError, match="is of a 'retnet'; .* loaded by retention.integrations.checkpoints.load"):
        door.from_pretrained(folder)


def test_the_sizes_of_the_public_model_of_1_3_billion_parameters():
    sizes = dict(vocab=32000, dim=2048, ffn=2816, layers=24, heads=8)
    value = torch.arange(64.0)  # tensors without memory; by its value the head is not the embedding
    theirs = {key: value[len(key)].expand(shape) for key, shape in shapes_of(sizes).items()}
    assert len(theirs) == 267
    assert detect(theirs) is FLA
    ours = {str(FLA.to_ours(key)): x for key, x in theirs.items()}
    config = RetNetConfig.from_dict(FLA.config(ours, FLA.known(options_of(**sizes))))
    with torch.device("meta"):
        model = RetNetForCausalLM(config)
    found = {key.removeprefix("model."): x.shape for key, x in model.state_dict().items()}
    assert found == {key: x.shape for key, x in ours.items()}
    assert model.num_parameters() == 1_351_727_104
    layer = model.model.backbone.blocks[0].retention
    assert (layer.head_key_dim, layer.head_value_dim) == (256, 512)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def own_memory():
    """The bytes of this process that are not those of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def most_memory(function):
    """The most memory that a call takes at a time, in bytes, sampled every two milliseconds."""
    done, seen = threading.Event(), [own_memory()]

    def watch():
        while not done.wait(0.002):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(seen) - seen[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells the memory of a process")
@pytest.mark.parametrize(("widened", "shards"), [(False, 4), (True, 4), (True, 0)], ids=str)
def test_a_large_folder_is_never_held_twice(widened, shards, tmp_path):
    sizes = dict(vocab=20_000, dim=1024, ffn=512, layers=1, heads=4)
    weights = {key: torch.full(shape, len(key) / 8, dtype=torch.bfloat16) for key, shape in shapes_of(sizes).items()}
    if widened:  # fla keeps the norms of the heads in float32 if the gate is not fused with them
        weights["model.layers.0.attn.g_norm_swish_gate.weight"] = torch.ones(512)
    folder, _ = folder_of(tmp_path / "theirs", sizes, shards=shards or 1, weights=weights)
    if not shards:  # a file of torch, which is read into memory and not mapped
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    size = sum(x.numel() * (4 if widened else 2) for x in weights.values())
    names = weights.keys()
    del weights
    there = most_memory(lambda: convert(tmp_path / "theirs", tmp_path / "ours"))
    back = most_memory(lambda: convert(tmp_path / "ours", tmp_path / "back", target="fla"))
    assert there < (1.25 if widened else 0.25) * size  # files are mapped into memory; only another dtype is a copy
    assert back < 0.25 * size
    assert load_file(tmp_path / "back/model.safetensors").keys() == names
