"""Checkpoints of other RetNets give the same logits here, go back bit for bit, and are refused if not whole."""

import argparse
import json

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from typer.testing import CliRunner

from retention import cli
from retention.integrations.checkpoints import convert, load, torchscale_options, torchscale_tensors
from retention.integrations.formats import FORMATS
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM, RetNetModel
from retention.layer import set_backend

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=str)
SMALL = dict(dim=32, value_dim=48, ffn=40, layers=2, heads=2)
SHAPES = [
    pytest.param(1, 1, dict(dim=16, value_dim=16, ffn=24, layers=1, heads=1), id="one-token"),
    pytest.param(2, 37, SMALL, id="small"),
    pytest.param(3, 200, dict(dim=48, value_dim=96, ffn=64, layers=3, heads=3), id="long"),
    pytest.param(1, 129, dict(dim=64, value_dim=64, ffn=80, layers=2, heads=8), id="heads"),
]


def theirs(name, dtype=torch.float64, **sizes):
    """Weights of one of the formats written down in `peers`, and a function from its input to its output."""
    make, forward = getattr(peers, f"{name}_weights"), getattr(peers, name)
    weights = make(**sizes)
    exact = {key: x.to(dtype).double() if x.dtype == torch.float64 else x for key, x in weights.items()}
    weights = {key: x.to(dtype) if x.dtype == torch.float64 else x for key, x in weights.items()}
    return weights, lambda x, **options: forward(exact, x, heads=sizes["heads"], **options)


def saved(weights, path):
    """As it would be: a file of safetensors, whose keys come back sorted by letters."""
    save_file({key: x.clone() for key, x in weights.items()}, path)
    return path


def torchscale(dtype, dim, value_dim, ffn, layers, heads, **options):
    names = dict(decoder_embed_dim=dim, decoder_value_embed_dim=value_dim, decoder_ffn_embed_dim=ffn)
    names |= dict(decoder_layers=layers, decoder_retention_heads=heads, vocab_size=50)
    return peers.torchscale(dtype=dtype, **names | options)


def source(decoder, folder, **beside):
    file = folder / "torchscale.pt"
    torch.save(decoder.state_dict(), file)
    if beside:
        (folder / "config.json").write_text(json.dumps(beside))
    return file


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize(("batch", "length", "sizes"), SHAPES)
def test_torchscale(batch, length, sizes, dtype, tmp_path):
    decoder = torchscale(dtype, **sizes)
    tokens = torch.randint(50, (batch, length))
    ours = load(source(decoder, tmp_path))
    assert isinstance(ours, RetNetForCausalLM)
    assert ours.dtype == dtype
    assert peers.deviation(ours(tokens).logits, peers.run(decoder, tokens)[0]) <= BOUND[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(activation_fn="swish", layernorm_eps=1e-3),
        dict(no_scale_embedding=False, layernorm_embedding=True),
        dict(share_decoder_input_output_embed=True),
        dict(deepnorm=True, subln=False, decoder_normalize_before=False),
        dict(deepnorm=False, subln=False, decoder_normalize_before=False),
    ],
    ids=lambda options: ",".join(options),
)
def test_what_the_weights_of_torchscale_do_not_tell_comes_from_a_config(options, tmp_path):
    decoder = torchscale(torch.float64, **SMALL, **options)
    tokens = torch.randint(50, (2, 60))
    ours = load(source(decoder, tmp_path), config=vars(decoder.args))
    assert peers.deviation(ours(tokens).logits, peers.run(decoder, tokens)[0]) <= 1e-10
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == ("share_decoder_input_output_embed" in options)
    (tmp_path / "config.json").write_text(json.dumps(vars(decoder.args)))  # beside the weights does as well
    assert torch.equal(load(tmp_path / "torchscale.pt")(tokens).logits, ours(tokens).logits)
    again = peers.torchscale(**torchscale_options(ours))
    again.load_state_dict(torchscale_tensors(ours))
    assert peers.deviation(peers.run(again, tokens)[0], ours(tokens).logits) <= 1e-5


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize(("batch", "length", "sizes"), SHAPES[1:])
def test_yet_another_retnet(batch, length, sizes, dtype, tmp_path):
    retnet = peers.peer("yet_another_retnet.retnet")
    dim, heads = 8 * sizes["heads"], sizes["heads"]
    model = retnet.RetNet(50, dim, heads, sizes["layers"], dim_feedforward=sizes["ffn"], dtype=dtype)
    peers.stirred(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    tokens = torch.randint(50, (batch, length))
    ours = load(tmp_path / "model.pt")
    assert peers.deviation(ours(tokens).logits, model.forward_parallel(tokens)) <= BOUND[dtype]


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_yet_another_retnet_uses_one_activation_in_both_places(kind, tmp_path):
    retnet = peers.peer("yet_another_retnet.retnet")
    model = peers.stirred(retnet.RetNet(50, 32, 2, 2, activation=kind, dim_feedforward=40, dtype=torch.float64))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    tokens = torch.randint(50, (2, 30))
    ours = load(tmp_path / "model.pt", config={"activation": kind})
    assert peers.deviation(ours(tokens).logits, model.forward_parallel(tokens)) <= 1e-10


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("lm", [False, True], ids=["paper", "use_lm_decay"])
@pytest.mark.parametrize(
    "ffn", [dict(), dict(glu=False), dict(glu=False, ffn_norm="layer"), dict(glu=False, ffn_norm="rms")]
)
def test_syncdoth(ffn, lm, dtype, tmp_path):
    weights, forward = theirs("syncdoth", dtype, vocab=50, lm=lm, **SMALL, **ffn)
    tokens = torch.randint(50, (2, 70))
    ours = load(saved(weights, tmp_path / "model.safetensors"))
    assert ours.config.retention["decay"] == ("log_linear" if lm else "paper")
    assert peers.deviation(ours(tokens).logits, forward(tokens, lm=lm)) <= BOUND[dtype]


@pytest.mark.parametrize("sharded", [True, False])
def test_a_folder_of_syncdoth_with_its_config(sharded, tmp_path):
    weights, _ = theirs("syncdoth", vocab=50, buffers=False, lm=True, **SMALL)
    del weights["lm_head.weight"]  # transformers leaves out what is tied
    weights = dict(sorted(weights.items()))
    config = dict(
        decoder_retention_heads=2, use_lm_decay=True, subln=True, pad_token_id=3, architectures=["RetNetForCausalLM"]
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "retnet", "layernorm_eps": 1e-4}))
    names = list(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]} if sharded else {"model.safetensors": names}
    for file, keys in files.items():
        saved({key: weights[key] for key in keys}, tmp_path / file)
    if sharded:
        index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = torch.randint(50, (2, 40))
    ours = load(tmp_path)
    wanted = peers.syncdoth(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, tokens, heads=2, lm=True, eps=1e-4
    )
    assert peers.deviation(ours(tokens).logits, wanted) <= 1e-10
    assert ours.config.tie_word_embeddings
    assert ours.config.pad_token_id == 3


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("stacked", [False, True], ids=["per-head", "stacked"])
@pytest.mark.parametrize(("batch", "length", "sizes"), [*SHAPES, (1, 30, SMALL | dict(heads=12, dim=48, value_dim=96))])
def test_jamie_stirling(batch, length, sizes, stacked, dtype, tmp_path):
    weights, forward = theirs("jamie_stirling", dtype, stacked=stacked, **sizes)
    x = torch.randn(batch, length, sizes["dim"], dtype=dtype)
    ours = load(saved(weights, tmp_path / "model.safetensors"))
    assert isinstance(ours, RetNetModel)
    assert ours.embed_tokens is None
    assert peers.deviation(ours(inputs_embeds=x).last_hidden_state, forward(x.double())) <= BOUND[dtype]


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize(("batch", "length", "sizes"), SHAPES)
def test_retnet_pytorch(batch, length, sizes, dtype, tmp_path):
    weights, forward = theirs("retnet_pytorch", dtype, **sizes)
    x = torch.randn(batch, length, sizes["dim"], dtype=dtype)
    file = saved(weights, tmp_path / "model.safetensors")
    assert peers.deviation(load(file)(inputs_embeds=x).last_hidden_state, forward(x.double())) <= BOUND[dtype]
    ours = load(file, config={"msr_gate_fn": "silu"})
    wanted = forward(x.double(), gate=F.silu)
    assert peers.deviation(ours(inputs_embeds=x).last_hidden_state, wanted) <= BOUND[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["syncdoth", "jamie_stirling", "retnet_pytorch"])
def test_each_comparison_can_fail(name, tmp_path):
    vocab = dict(vocab=50) if name == "syncdoth" else {}
    weights, forward = theirs(name, **SMALL, **vocab)
    file = saved(weights, tmp_path / "model.safetensors")
    x = torch.randint(50, (2, 40)) if vocab else torch.randn(2, 40, 32, dtype=torch.float64)
    wrong = [
        {"norm_eps": 1e-2},
        {"activation": "relu"},
        {"retention": {"norm_eps": 1e-2}},
        {"retention": {"scale": 3.0}},
    ]
    wrong += [{"retention": {"rotary": "rope"}}, {"retention": {"gate": "relu"}}]
    wrong += [{"retention": {"score_norm": False}}, {"retention": {"interleaved": False}}]
    for config in wrong[:-2] if name != "syncdoth" else wrong:
        ours = load(file, config=config)
        got = ours(x).logits if vocab else ours(inputs_embeds=x).last_hidden_state
        assert peers.deviation(got, forward(x)) > 1e-8, config


@pytest.mark.slow
def test_the_comparisons_with_what_is_installed_can_fail(tmp_path):
    decoder, tokens = torchscale(torch.float64, **SMALL), torch.randint(50, (2, 40))
    for config in ({"layernorm_eps": 1e-4}, {"activation_fn": "relu"}, {"retention": {"decay_norm": False}}):
        ours = load(source(decoder, tmp_path), config=config)
        assert peers.deviation(ours(tokens).logits, peers.run(decoder, tokens)[0]) > 1e-8, config
    retnet = peers.peer("yet_another_retnet.retnet")
    model = peers.stirred(retnet.RetNet(50, 32, 2, 2, dim_feedforward=40, dtype=torch.float64))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for config in ({"layer_norm_eps": 1e-5}, {"activation": "gelu"}, {"retention": {"decay": "paper"}}):
        ours = load(tmp_path / "model.pt", config=config)
        assert peers.deviation(ours(tokens).logits, model.forward_parallel(tokens)) > 1e-8, config


def test_the_forms_agree_on_a_converted_model(tmp_path):
    decoder = torchscale(torch.float64, **SMALL)
    ours = load(source(decoder, tmp_path))
    tokens = torch.randint(50, (2, 90))
    wanted = peers.run(decoder, tokens)[0]
    for form in ("parallel", "chunkwise", "recurrent"):
        set_backend(ours, form=form)
        assert peers.deviation(ours(tokens).logits, wanted) <= 1e-10


def test_torchscale_there_and_back_is_bit_equal(tmp_path):
    for tied in (False, True):
        decoder = torchscale(torch.float32, **SMALL, share_decoder_input_output_embed=tied)
        convert(source(decoder, tmp_path), tmp_path / f"ours{tied}")
        for suffix in (".pt", ".safetensors"):
            back = tmp_path / f"back{tied}{suffix}"
            convert(tmp_path / f"ours{tied}", back)
            tensors = torch.load(back) if suffix == ".pt" else load_file(back)
            state = decoder.state_dict()
            assert tensors.keys() == state.keys()
            assert all(torch.equal(x, state[key]) and x.dtype == state[key].dtype for key, x in tensors.items())


def test_a_model_of_ours_runs_in_torchscale(tmp_path):
    retention = dict(value_dim=64, norm="rms", decay_norm=True, score_norm=True, decay="short")
    sizes = dict(vocab_size=50, dim=32, num_layers=2, num_heads=2, activation="silu", retention=retention)
    ours = RetNetForCausalLM(RetNetConfig(**sizes)).eval()
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "torchscale.pt")
    options = torchscale_options(ours)
    assert options["activation_fn"] == "swish"
    decoder = peers.torchscale(**options)
    decoder.load_state_dict(torch.load(tmp_path / "torchscale.pt"))
    tokens = torch.randint(50, (2, 50))
    assert peers.deviation(ours(tokens).logits, peers.run(decoder, tokens)[0]) <= 1e-5


def test_torchscale_is_not_given_what_it_cannot_compute(tmp_path):
    RetNetForCausalLM(RetNetConfig(dim=32, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="retention.norm must be 'rms', is 'group'") as error:
        convert(tmp_path / "ours", tmp_path / "out.pt")
    assert "retention.decay_norm must be True, is False" in str(error.value)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "ours"]
    experts = RetNetForCausalLM(RetNetConfig(dim=32, num_layers=1, num_heads=2, **EXPERTS | {"moe_top_k": 3}))
    with pytest.raises(ValueError, match="moe_top_k must be 1 or 2, is 3"):
        torchscale_tensors(experts)


def test_former_names_of_options_of_ours_are_understood_beside_those_of_other_formats(tmp_path):
    weights, _ = theirs("jamie_stirling", **SMALL)
    file = saved(weights, tmp_path / "model.safetensors")
    with pytest.warns(DeprecationWarning, match="is deprecated and will be removed in 0.2; use ") as warned:
        ours = load(file, config={"activation_fn": "relu", "no_scale_embedding": False})
    assert {w.filename for w in warned} == {__file__}
    assert (ours.config.activation, ours.config.scale_embedding) == ("relu", True)
    (tmp_path / "config.json").write_text(json.dumps({"activation_fn": "relu"}))
    assert load(tmp_path).config.activation == "relu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_buffers_are_those_of_the_schedule(dtype, tmp_path):
    weights, _ = theirs("syncdoth", vocab=50, **SMALL)
    ours = load(saved({key: x.to(dtype) for key, x in weights.items()}, tmp_path / "model.safetensors"))
    assert ours.config.retention["decay"] == "paper"
    assert ours.dtype == dtype


def test_other_decays_are_taken_over(tmp_path):
    weights, forward = theirs("syncdoth", vocab=50, **SMALL)
    weights["model.retnet_rel_pos.decay"] = torch.tensor([0.9, 0.99], dtype=torch.float64).log()
    ours = load(saved(weights, tmp_path / "model.safetensors"))
    tokens = torch.randint(50, (2, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "paper_gammas", lambda heads: torch.tensor([0.9, 0.99], dtype=torch.float64))
        assert peers.deviation(ours(tokens).logits, forward(tokens)) <= 1e-10


@pytest.mark.parametrize(
    "wrap", [lambda w: {"model": {f"decoder.{k}": x for k, x in w.items()}, "step": 3}, lambda w: {"state_dict": w}]
)
def test_what_trainers_wrap_around_is_taken_off(wrap, tmp_path):
    decoder = torchscale(torch.float32, **SMALL)
    plain = load(source(decoder, tmp_path))
    torch.save(wrap(decoder.state_dict()), tmp_path / "wrapped.pt")
    tokens = torch.randint(50, (1, 20))
    assert torch.equal(load(tmp_path / "wrapped.pt")(tokens).logits, plain(tokens).logits)


# Folders of ours.

OURS = dict(vocab_size=50, dim=32, num_layers=2, num_heads=2)
EXPERTS = dict(moe_every=2, moe_num_experts=3)


def own_folder(folder, model_class=RetNetForCausalLM, **options):
    model = model_class(RetNetConfig(**OURS | options)).eval()
    model.save_pretrained(folder)
    return model


def change_config(folder, **options):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, EXPERTS, {"lm_head_bias": True}, {"norm": "layer", "num_labels": 5}], ids=str)
def test_a_folder_of_ours_loads_as_from_pretrained_does(options, tied, tmp_path):
    model, tokens = own_folder(tmp_path, tie_word_embeddings=tied, **options), torch.randint(50, (2, 9))
    loaded = load(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_folder_of_ours_without_a_head_loads(tmp_path):
    model, tokens = own_folder(tmp_path, RetNetModel), torch.randint(50, (2, 9))
    assert torch.equal(load(tmp_path)(tokens).last_hidden_state, model(tokens).last_hidden_state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("built", "told", "message"),
    [
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, "tie_word_embeddings True, .* have False"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, "missing tensors: lm_head.weight"),
        ({}, {"nrom_eps": 1e-3}, "has options that no RetNet has: nrom_eps; correct or remove them"),
        ({}, {"retention": {"gama": 1}}, "has options that no RetNet has: gama"),
        ({}, {"model_type": "llama"}, "model_type must be 'retention'; .* is of a 'llama'"),
        ({}, {"num_layers": 3}, "num_layers 3, of which the weights have 2"),
        ({}, {"vocab_size": 51}, r"embed_tokens.weight must be \(51, 32\), is \(50, 32\)"),
        (EXPERTS, {"moe_num_experts": 4}, "moe_num_experts 4, of which the weights have 3"),
        (EXPERTS, {"moe_every": 0}, "unknown tensors: backbone.blocks.1.ffn.experts"),
        ({}, {"retention": {"scale": "x"}}, "the config makes no RetNet: scale must be"),
    ],
    ids=str,
)
def test_a_folder_of_ours_is_held_to_its_config(built, told, message, tmp_path):
    own_folder(tmp_path, **built)
    change_config(tmp_path, **told)
    with pytest.raises(ValueError, match=message.replace("backbone", "(model.)?backbone")):
        load(tmp_path)


# What stands beside the weights.

BESIDE = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "vocab.txt"]
BESIDE += ["README.md", "LICENSE", "tokenizer.model", "added_tokens.json", "merges.txt", "special_tokens_map.json"]
LEFT = ["optimizer.pt", "tf_model.h5", "pytorch_model.bin.index.json", ".gitattributes"]


def folder_with_files(folder):
    """A folder of syncdoth's, with what stands beside its weights."""
    folder.mkdir()
    saved(theirs("syncdoth", vocab=50, **SMALL)[0], folder / "model.safetensors")
    (folder / "config.json").write_text('{"decoder_retention_heads": 2}')
    for name in BESIDE + LEFT:
        (folder / name).write_text(f"the {name}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("tools")
    (folder / "checkpoint-3").mkdir()
    return folder


@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_what_stands_beside_the_weights_comes_along(name, tmp_path):
    source, out = folder_with_files(tmp_path / "theirs"), tmp_path / "ours"
    assert command(source / name, out).exit_code == 0
    assert all((out / name).read_text() == f"the {name}" for name in BESIDE)
    assert (out / "additional_chat_templates/tools.jinja").read_text() == "tools"
    written = {"config.json", "model.safetensors", "retention_model.py", "additional_chat_templates"}
    assert {path.name for path in out.iterdir()} == {*BESIDE, *written}
    assert json.loads((out / "config.json").read_text())["model_type"] == "retention"


def test_a_file_on_its_own_brings_its_tokenizer_and_no_neighbours(tmp_path):
    source, out = folder_with_files(tmp_path / "theirs"), tmp_path / "theirs/ours"
    (source / "config.json").unlink()
    assert command(source / "model.safetensors", out).exit_code == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "merges.txt"}
    assert "LICENSE" not in names
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers")  # ours


def test_what_cannot_be_copied_is_refused_before_anything_is_written(tmp_path):
    source = folder_with_files(tmp_path / "theirs")
    (source / "a.txt").symlink_to("absent")
    result = command(source, tmp_path / "ours")
    assert result.exit_code == 2
    assert "a.txt stands beside the weights and cannot be copied" in result.output
    assert not (tmp_path / "ours").exists()


# The command, and what it refuses.


def command(*arguments):
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_converts_there_and_back(tmp_path):
    weights, forward = theirs("syncdoth", vocab=50, **SMALL)
    del weights["model.retnet_rel_pos.angle"], weights["model.retnet_rel_pos.decay"]
    file = saved(weights, tmp_path / "model.safetensors")
    (tmp_path / "heads.json").write_text('{"decoder_retention_heads": 2}')
    result = command(file, tmp_path / "new/ours", "--from", "syncdoth", "--config", tmp_path / "heads.json")
    assert result.exit_code == 0, result.output
    assert "RetNetForCausalLM" in result.output
    result = command(tmp_path / "new/ours", tmp_path / "torchscale.safetensors", "--to", "torchscale")
    assert result.exit_code == 0, result.output
    assert "decoder_retention_heads=2" in result.output
    tokens = torch.randint(50, (2, 40))
    ours = RetNetForCausalLM.from_pretrained(tmp_path / "new/ours", dtype="auto")
    assert peers.deviation(ours(tokens).logits, forward(tokens)) <= 1e-10
    assert torch.equal(load(tmp_path / "torchscale.safetensors")(tokens).logits, ours(tokens).logits)


def change(key, x):
    def changed(weights):
        return {k: v for k, v in weights.items() if k != key} if x is None else weights | {key: x}

    return changed


BIAS = torch.zeros(32)
REFUSALS = {
    "unknown": (change("model.layers.0.ffn.fc9.weight", BIAS), "unknown tensors: model.layers.0.ffn.fc9.weight"),
    "unknown-too": (change("score.weight", BIAS), "unknown tensors: score.weight"),
    "missing": (change("model.layers.1.ffn.fc2.weight", None), "missing tensors: model.layers.1.ffn.fc2.weight"),
    "shape": (change("model.layers.1.ffn.fc2.weight", torch.zeros(32, 41)), "fc2.weight must be (32, 40), is (32, 41)"),
    "old": (change("model.layers.0.retention.q_proj.bias", BIAS), "torchscale before 2023-09-28"),
    "xmoe": (change("model.layers.0.moe_layer.gate.wg_reduction.weight", BIAS), "X-MoE"),
    "angles": (change("model.retnet_rel_pos.angle", torch.ones(16)), "the rotation in these weights is another"),
    "heads": (change("model.retnet_rel_pos.decay", torch.zeros(4)), "contradict each other"),
    "integers": (change("model.version", torch.tensor([3])), "must hold floating-point tensors"),
    "detection": (lambda weights: {"weight": BIAS}, "of none of the formats torchscale, syncdoth"),
    "nothing": (lambda weights: {}, "must hold floating-point tensors by name; got nothing"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_what_is_not_whole_is_refused_and_nothing_written(spoil, message, tmp_path):
    weights, _ = theirs("syncdoth", vocab=50, **SMALL)
    torch.save(spoil(weights), tmp_path / "in.pt")
    result = command(tmp_path / "in.pt", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["in.pt"]


def test_torchscale_without_a_gate_is_refused_as_old(tmp_path):
    weights, _ = theirs("syncdoth", vocab=50, glu=False, **SMALL)
    weights = {key.removeprefix("model."): x for key, x in weights.items() if key != "lm_head.weight"}
    with pytest.raises(ValueError, match="torchscale before 2023-09-28"):
        load(saved(weights, tmp_path / "model.safetensors"))
    assert isinstance(load(tmp_path / "model.safetensors", "syncdoth"), RetNetModel)


class Runs:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("hidden", "name"), [(Runs(), "print"), (argparse.Namespace(arch="retnet"), "argparse.Namespace")]
)
def test_files_that_run_code_are_refused(hidden, name, tmp_path, capsys):
    torch.save({"model": {"layers.0.x": BIAS}, "args": hidden}, tmp_path / "in.pt")
    result = command(tmp_path / "in.pt", tmp_path / "out")
    assert result.exit_code == 2
    assert "save its state dict alone" in result.output
    assert name in result.output
    assert "this must not run" not in result.output + capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["in.pt", "in.safetensors"])
def test_files_of_something_else_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=name):
        load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="must hold one file of weights"):
        load(tmp_path / "folder")


def test_existing_output_is_refused(tmp_path):
    weights, _ = theirs("syncdoth", vocab=50, **SMALL)
    file = saved(weights, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    result = command(file, tmp_path / "out")
    assert result.exit_code == 2
    assert "exists; name another place" in result.output
    assert not list((tmp_path / "out").iterdir())
    result = command(file, tmp_path / "out.bin", "--to", "torchscale")
    assert ".safetensors or .pt" in result.output
    assert not (tmp_path / "out.bin").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    weights, _ = theirs("syncdoth", vocab=50, **SMALL)
    file = saved(weights, tmp_path / "model.safetensors")

    def full(model, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(RetNetForCausalLM, "save_pretrained", full)
    result = command(file, tmp_path / "out")
    assert result.exit_code == 2
    assert "no space left" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_a_config_says_is_checked(tmp_path):
    weights, _ = theirs("syncdoth", vocab=50, buffers=False, **SMALL)
    file = saved(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match='how many heads there are; give a config: {"decoder_retention_heads": N}'):
        load(file)
    with pytest.raises(ValueError, match="unknown option 'heads' for syncdoth; known are .*decoder_retention_heads"):
        load(file, config={"heads": 2})
    with pytest.raises(ValueError, match="decoder_layers 7 contradicts the weights, which have num_layers 2"):
        load(file, config={"decoder_retention_heads": 2, "decoder_layers": 7})
    with pytest.raises(ValueError, match="must be one of torchscale, syncdoth"):
        load(file, "fairseq")
    del weights["model.layer_norm.weight"]
    with pytest.raises(ValueError, match='give a config: {"deepnorm": true}'):
        load(saved(weights, file), config={"decoder_retention_heads": 2})
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold options by name"):
        load(file)


@pytest.mark.parametrize("known", FORMATS.values(), ids=list(FORMATS))
def test_every_rule_leads_back(known):
    for ours in (ours for _, ours in known.rules if not ours.startswith("constant.")):
        key = ours.replace("*", "7")
        assert known.to_ours(known.to_theirs(key)) == key
