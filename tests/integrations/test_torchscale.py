"""torchscale's interface: numbers, names and defaults of torchscale 0.3.0, and decoding that it has not."""

import argparse
import copy
import json
from contextlib import contextmanager

import peers
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from retention import cli
from retention.integrations import checkpoints
from retention.integrations.torchscale import RetNetConfig, RetNetDecoder

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
SMALL = dict(
    vocab_size=50, decoder_embed_dim=32, decoder_value_embed_dim=48, decoder_retention_heads=2,
    decoder_ffn_embed_dim=40, decoder_layers=3,
)  # fmt: skip
BATCH = torch.arange(74).view(2, 37) * 7 % 50


def small(**options):
    return peers.stirred(RetNetDecoder(RetNetConfig(**SMALL | options)))


def ours_and_theirs(dtype=torch.float64, **options):
    theirs = peers.torchscale(dtype=dtype, **SMALL | options)
    ours = RetNetDecoder(theirs.args).eval().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


OPTIONS = [
    dict(),
    dict(decoder_retention_heads=4, decoder_value_embed_dim=32, activation_fn="swish", layernorm_eps=1e-3),
    dict(deepnorm=True),
    dict(subln=False, decoder_normalize_before=False),
    dict(no_scale_embedding=False, layernorm_embedding=True),
    dict(share_decoder_input_output_embed=True, dropout=0.1, drop_path_rate=0.2),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "default")
def test_the_same_numbers_under_the_same_names(options, dtype):
    ours, theirs = ours_and_theirs(dtype, **options)
    (got, mine), (wanted, extra) = ours(BATCH), peers.run(theirs, BATCH)
    assert peers.deviation(got, wanted) <= BOUND[dtype]
    assert mine.keys() == extra.keys()
    assert mine["l_aux"] == extra["l_aux"] == [None] * 3
    assert mine["attn"] is extra["attn"] is None
    for a, b in zip(mine["inner_states"], extra["inner_states"], strict=True):
        assert peers.deviation(a, b) <= BOUND[dtype]
    features = ours(BATCH, features_only=True)[0]
    assert peers.deviation(features, peers.run(theirs, BATCH, features_only=True)[0]) <= BOUND[dtype]
    assert torch.equal(ours.output_layer(features), got)
    for a, b in zip(ours.forward_embedding(BATCH), peers.run(theirs.forward_embedding, BATCH), strict=True):
        assert peers.deviation(a, b) <= BOUND[dtype]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "default")
def test_state_dicts_go_both_ways(options):
    ours, theirs = ours_and_theirs(torch.float32, **options)
    mine, state = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == state.keys()
    assert all(torch.equal(mine[key], state[key]) for key in state)
    theirs.load_state_dict(small(**options).state_dict())
    changed = state | {"retnet_rel_pos.decay": torch.tensor([-0.5, -0.1])}
    changed |= {"layers.0.ffn.fc9.weight": torch.zeros(3)}
    del changed["layers.1.ffn.fc2.weight"]
    with pytest.raises(RuntimeError) as error:
        ours.load_state_dict(changed)
    for message in ("retnet_rel_pos.decay holds other values", "fc9", "ffn.fc2.weight"):
        assert message in str(error.value)


def test_names_hold_inside_another_module_and_after_a_copy():
    decoder = small()
    whole = nn.ModuleDict({"first": nn.Linear(2, 2), "decoder": decoder, "last": nn.Linear(2, 2)})
    state = whole.state_dict()
    assert [key.removeprefix("decoder.") for key in state if key.startswith("decoder.")] == list(decoder.state_dict())
    twin = copy.deepcopy(whole)
    nn.init.zeros_(twin["decoder"].layers[0].ffn.fc1.weight)
    twin.load_state_dict(state)
    assert torch.equal(twin["decoder"](BATCH)[0], decoder(BATCH)[0])


def test_chunkwise_gives_the_numbers_of_parallel():
    """theirs differs by percents between its own two forms."""
    ours, theirs = ours_and_theirs(chunkwise_recurrent=True, recurrent_chunk_size=8)
    layer = ours.layers[0].retention
    assert (layer.form, layer.chunk_size) == ("chunkwise", 8)
    theirs.chunkwise_recurrent = False
    assert peers.deviation(ours(BATCH)[0], peers.run(theirs, BATCH)[0]) <= 1e-10


def test_token_embeddings_stand_for_the_embedding():
    ours, theirs = ours_and_theirs()
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    wanted = peers.run(theirs, BATCH, token_embeddings=x)[0]
    assert peers.deviation(ours(BATCH, token_embeddings=x)[0], wanted) <= 1e-10
    state = {}
    parts = [ours(BATCH[:, :n], state, token_embeddings=x[:, :n])[0] for n in (20, 21, 37)]
    assert peers.deviation(torch.cat(parts, 1), wanted) <= 1e-10
    state = {}
    parts = [ours(BATCH[:, :n], state, token_embeddings=x[:, m:n])[0] for m, n in ((0, 20), (20, 37))]
    assert peers.deviation(torch.cat(parts, 1), wanted) <= 1e-10


# Decoding.


@pytest.mark.slow
def test_decoding_a_token_at_a_time_is_theirs():
    ours, theirs = ours_and_theirs()
    mine, state = {}, {}
    for n in range(1, 20):
        got, wanted = ours(BATCH[:, :n], mine)[0], peers.run(theirs, BATCH[:, :n], incremental_state=state)[0]
        assert got.shape == wanted.shape == (2, 1, 50)
        assert peers.deviation(got, wanted) <= 1e-10


def test_a_prompt_is_one_pass_and_what_is_new_the_next(monkeypatch):
    decoder, lengths, state = small().double(), [], {}
    forward = decoder.backbone.forward
    monkeypatch.setattr(decoder.backbone, "forward", lambda x, **o: lengths.append(x.shape[1]) or forward(x, **o))
    parts = [decoder(BATCH[:, :n], state, src_lengths=None)[0] for n in (30, 31, 35, 37)]
    assert lengths == [30, 1, 4, 2]
    assert peers.deviation(torch.cat(parts, 1), decoder(BATCH)[0]) <= 1e-10
    with pytest.raises(ValueError, match=r"more tokens than the 37 in incremental_state; got tokens \(2, 37\)"):
        decoder(BATCH, state)
    before = {i: dict(state[i]) for i in range(3)}
    longer = torch.cat([BATCH, BATCH[:, :1]], 1)
    again = decoder(longer, state)[0]
    assert torch.equal(decoder(longer, before)[0], again)  # the tensors of the first dict were left alone


def test_is_first_step_begins_anew():
    decoder, state = small(), {}
    decoder(BATCH[:, :9], state)
    state["is_first_step"] = True
    assert decoder.is_first_step(state)
    assert torch.equal(decoder(BATCH[:, :5], state)[0], decoder(BATCH[:, :5])[0])
    state["is_first_step"] = False
    assert decoder(BATCH[:, :7], state)[0].shape == (2, 2, 50)


def reorder_as_fairseq_does(state, order):
    for module in state:
        for key in state[module]:
            state[module][key] = state[module][key].index_select(0, order)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_beam_search_is_exact(own):
    decoder, beams, state = small().double(), 4, {}
    tokens, scores = BATCH[:1, :5].repeat(beams, 1), torch.tensor([0.0] + [-torch.inf] * (beams - 1)).double()
    with torch.no_grad():
        for _ in range(12):
            logits = decoder(tokens, state)[0][:, -1]
            assert peers.deviation(logits, decoder(tokens)[0][:, -1]) <= 1e-10
            scores, best = (scores[:, None] + logits.log_softmax(-1)).flatten().topk(beams)
            parents = best // 50
            tokens = torch.cat([tokens[parents], best[:, None] % 50], 1)
            decoder.reorder_incremental_state(state, parents) if own else reorder_as_fairseq_does(state, parents)
    assert len({tuple(row) for row in tokens.tolist()}) == beams


# Configs.


def test_the_config_has_their_options_and_defaults():
    theirs = vars(peers.peer("torchscale.architecture.config").RetNetConfig())
    assert vars(RetNetConfig()) == theirs | {"decoder_value_embed_dim": 2 * 768}


@pytest.mark.parametrize(
    "options", [dict(deepnorm=True), dict(subln=True, decoder_normalize_before=False), dict(dropout=0.3)]
)
def test_the_config_follows_their_rules(options):
    config = peers.peer("torchscale.architecture.config")
    theirs = config.RetNetConfig(decoder_value_embed_dim=99, **options)
    assert vars(RetNetConfig(decoder_value_embed_dim=99, **options)) == vars(theirs)


def test_override_takes_what_is_given():
    config = RetNetConfig(dropout=0.2)
    config.override(argparse.Namespace(decoder_embed_dim=64, dropout=None, deepnorm=True, arch="retnet"))
    assert (config.decoder_embed_dim, config.decoder_value_embed_dim, config.dropout) == (64, 128, 0.2)
    assert (config.decoder_normalize_before, config.subln) == (False, False)
    config = RetNetConfig(decoder_value_embed_dim=96)
    config.override(argparse.Namespace(decoder_embed_dim=64))
    assert config.decoder_value_embed_dim == 96


@pytest.mark.slow
def test_the_example_of_their_readme_runs():
    decoder = RetNetDecoder(RetNetConfig(vocab_size=64000))
    assert decoder(torch.zeros(1, 3, dtype=torch.long))[0].shape == (1, 3, 64000)


def test_what_is_not_there_is_refused():
    with pytest.raises(TypeError, match="decoder_embed_size"):
        RetNetConfig(decoder_embed_size=3)
    for option in (dict(multiway=True), dict(xpos_rel_pos=True), dict(rel_pos_buckets=32), dict(fsdp=True)):
        with pytest.raises(ValueError, match=f"got {next(iter(option))}"):
            small(**option)
    with pytest.raises(ValueError, match="activation_fn must be one of swish, gelu, relu; got 'selu'"):
        small(activation_fn="selu")
    both = RetNetConfig(**SMALL, deepnorm=True)
    both.decoder_normalize_before = True
    with pytest.raises(ValueError, match="set decoder_normalize_before=False"):
        RetNetDecoder(both)
    bare = RetNetDecoder(RetNetConfig(**SMALL | dict(vocab_size=-1)))
    with pytest.raises(ValueError, match="no embedding"):
        bare(BATCH)
    with pytest.raises(ValueError, match="no output layer"):
        bare(BATCH, token_embeddings=torch.zeros(2, 37, 32))
    assert bare(BATCH, token_embeddings=torch.zeros(2, 37, 32), features_only=True)[0].shape == (2, 37, 32)
    assert small(no_output_layer=True).output_projection is None


def test_checkpoint_activations_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        decoder = small(checkpoint_activations=checkpointed).train()
        assert decoder.backbone.gradient_checkpointing == checkpointed
        decoder(BATCH)[0].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]))
    assert peers.deviation(*gradients) <= 1e-5


# Experts: theirs want a process group, and count with integers where torch no longer does.


@contextmanager
def group(folder, monkeypatch):
    count = torch.histc
    monkeypatch.setattr(torch, "histc", lambda x, **options: count(x.float(), **options))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(), dict(moe_top1_expert=True), dict(subln=False, layernorm_eps=1e-3)])
def test_experts(options, tmp_path, monkeypatch):
    # Theirs drops tokens over a capacity, and second experts by chance; not so with these.
    options = dict(moe_freq=2, moe_expert_count=4, decoder_layers=4, **options)
    kept = dict(moe_eval_capacity_token_fraction=1.0, moe_second_expert_policy="all")
    with group(tmp_path, monkeypatch):
        ours, theirs = ours_and_theirs(torch.float32, **options, **kept)
        (got, mine), (wanted, extra) = ours(BATCH), peers.run(theirs, BATCH)
    assert peers.deviation(got, wanted) <= 1e-5
    assert [loss is None for loss in mine["l_aux"]] == [True, False, True, False]
    for a, b in zip(mine["l_aux"][1::2], extra["l_aux"][1::2], strict=True):
        assert peers.deviation(a, b) <= 1e-5
    torch.save(theirs.state_dict(), tmp_path / "moe.pt")
    converted = checkpoints.convert(tmp_path / "moe.pt", tmp_path / "ours", config=vars(theirs.args))
    out = converted(BATCH)
    assert peers.deviation(out.logits, wanted) <= 1e-5
    assert peers.deviation(out.aux_loss, torch.stack(extra["l_aux"][1::2]).mean()) <= 1e-5
    checkpoints.convert(tmp_path / "ours", tmp_path / "back.pt")
    back, state = torch.load(tmp_path / "back.pt"), theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "warned"),
    [
        ({}, "had moe_eval_capacity_token_fraction=0.25, moe_second_expert_policy='random', by default"),
        (
            {"moe_second_expert_policy": "all"},
            "had moe_eval_capacity_token_fraction=0.25, moe_second_expert_policy='all',",
        ),
        ({"moe_eval_capacity_token_fraction": 1.0}, "moe_second_expert_policy='random',"),
        ({"moe_eval_capacity_token_fraction": -1.0, "moe_second_expert_policy": "all"}, "token_fraction=-1.0"),
        ({"moe_eval_capacity_token_fraction": "x"}, "token_fraction='x'"),
        ({"moe_eval_capacity_token_fraction": 1.0, "moe_second_expert_policy": "all"}, None),
        ({"moe_eval_capacity_token_fraction": 1.0, "moe_top1_expert": True}, None),
    ],
    ids=str,
)
def test_experts_that_leave_tokens_out_are_named_and_so_is_what_is_compared(told, warned, tmp_path):
    options = dict(moe_freq=2, moe_expert_count=4)
    torch.save(small(**options).state_dict(), tmp_path / "moe.pt")
    (tmp_path / "told.json").write_text(json.dumps(told))
    words = ["convert", str(tmp_path / "moe.pt"), str(tmp_path / "ours"), "--config", str(tmp_path / "told.json")]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("warning: ")]
    kept = "moe_eval_capacity_token_fraction=1.0, moe_second_expert_policy='all'"
    assert len(lines) == (warned is not None)
    assert all(warned in line and f"in evaluation, with {kept}" in line for line in lines)
    result = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "ours"), str(tmp_path / "back.pt")])
    assert kept in result.output


def test_what_is_printed_is_the_torchscale_that_gives_the_same(tmp_path, monkeypatch):
    options = checkpoints.RetNetConfig(
        vocab_size=50, dim=32, num_layers=2, num_heads=2, moe_every=2, moe_num_experts=4, subln=True,
        retention=dict(value_dim=48, norm="rms", decay_norm=True, score_norm=True),
    )  # fmt: skip
    ours = peers.stirred(checkpoints.RetNetForCausalLM(options)).eval()
    with group(tmp_path, monkeypatch):
        theirs = peers.torchscale(**checkpoints.torchscale_options(ours))
        theirs.load_state_dict(checkpoints.torchscale_tensors(ours))
        wanted = peers.run(theirs, BATCH)[0]
    assert peers.deviation(ours(BATCH).logits, wanted) <= 1e-5
