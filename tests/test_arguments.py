"""Every public door of `retention` refuses what does not fit, before any computation, by the name of the argument."""

import inspect
import math

import numpy as np
import pytest
import torch
from doors import (
    BACKBONE,
    COUNT,
    CU_SEQLENS,
    DECAY,
    DEVICE,
    DIM,
    DTYPE,
    EPS,
    FACTOR,
    FLAG,
    FORWARD,
    FREQS,
    GRID,
    HEADS,
    IDS,
    IDS_WRONG,
    INPUT,
    MASK,
    MAYBE_WHOLE,
    NAME,
    RATE,
    SCALE,
    TOKEN,
    VOCAB,
    WHOLE,
    B,
    Door,
    T,
    X,
    cases,
    check_refusals,
    states,
    tensors,
    unchanged,
)

import retention
from retention import MultiScaleRetention, RetNet, backends, decay, decoding, rotary
from retention.ffn import FeedForward, MixtureOfExperts
from retention.functional import scores
from retention.layer import set_backend
from retention.model import DropPath, RetNetBackbone, RetNetBlock
from retention.norm import HeadNorm, set_norm_backend


def qkv():
    return dict(
        q=torch.randn(B, 4, T, 3), k=torch.randn(B, 2, T, 3), v=torch.randn(B, 2, T, 5), log_decay=-torch.rand(4)
    )


LOG_DECAY = [None, [-0.1] * 4, -torch.rand(4).half(), -torch.rand(3), -torch.rand(4, 1), -torch.ones(4).long()]
LOG_DECAY += [torch.ones(4), torch.full((4,), math.nan), torch.full((4,), -math.inf), -torch.ones(4, device="meta")]


def retain_door():
    call = {"scale": SCALE, "causal": FLAG, "decay_norm": FLAG, "return_state": FLAG, "chunk_size": MAYBE_WHOLE}
    call |= {"out_dtype": [*DTYPE, torch.float16, torch.float64, torch.ones(2)]}
    call |= {"score_norm": [1, 0, None, "sum", "", [True], torch.ones(2), np.ones(2)], "form": [*NAME, None]}
    call |= {
        "out_dtype": [*DTYPE, torch.float64, "float32"],
        "backend": [*NAME, None],
        "mask": MASK,
        "grid": GRID,
        "log_decay": LOG_DECAY,
    }
    call |= {name: tensors(x, name) for name, x in qkv().items() if name != "log_decay"}
    return call


LAYER = dict(
    dim=[*WHOLE],
    num_heads=[*WHOLE, 3],
    num_kv_heads=[*MAYBE_WHOLE, 3],
    key_dim=[*MAYBE_WHOLE, 15, 14, 2],
    value_dim=[*MAYBE_WHOLE, 15],
    decay=DECAY,
    learnable_decay=FLAG,
    rotary=NAME,
    interleaved=FLAG,
    scale=SCALE,
    bias=FLAG,
    gate=NAME,
    norm=NAME,
    norm_affine=["", True, 1, None, "all", ["shared"]],
    norm_eps=EPS,
    causal=FLAG,
    decay_norm=FLAG,
    score_norm=[1, 0, None, "sum", [True]],
    dropout=RATE,
    init_gain=FACTOR,
    init_scale=FACTOR,
    backend=[*NAME, None],
    form=[*NAME, None],
    chunk_size=MAYBE_WHOLE,
    device=DEVICE,
    dtype=DTYPE,
)
BLOCK = dict(norm="rms", norm_eps=1e-6, norm_before=True, alpha=1.0, dropout=0.0, drop_path=0.0)


def layer(**options):
    return MultiScaleRetention(DIM, HEADS, **options).eval()


def block():
    return RetNetBlock(DIM, HEADS, ffn=FeedForward(DIM, 8), retention={}, **BLOCK).eval()


def model():
    return RetNet(VOCAB, DIM, 2, HEADS).eval()


ROTATION = [3, "x", [1.0], torch.zeros(T, 4), torch.zeros(T - 1, 4, 2), torch.zeros(T, 3, 2), torch.zeros(T, 4, 3)]
STEP_MASK = [True, [[True]], torch.ones(B, 1), torch.ones(B).bool(), torch.ones(B, 2).bool(), torch.ones(1, 1).bool()]
ONE_TOKEN = [*tensors(TOKEN), X]
GENERATE = dict(
    max_new_tokens=COUNT,
    temperature=EPS,
    top_k=MAYBE_WHOLE,
    mask=[*MASK, torch.ones(B, T).bool().tril(T - 3)],
    generator=[3, "x", torch.Generator],
)


def lists_of(state):
    """What must not come for the states of a model of two blocks."""
    found = [{}, state, "ab", 2, [], [state], [state] * 3, [state, None], [None, state], [state, {}]]
    return [*found, *([state, x] for x in states(state)[7:]), *([x, state] for x in states(state)[7:])]


def core_doors():
    any_layer, causal_off, any_block, any_model = layer(), layer(causal=False), block(), model()
    backbone = any_model.backbone
    state = any_layer.initial_state(B)
    one = torch.randn(B, 4, 1, 3), torch.randn(B, 2, 1, 3), torch.randn(B, 2, 1, 5)
    op_state = retention.initial_state(B, 4, 3, 5)
    one_token = dict(q=one[0], k=one[1], v=one[2], log_decay=-torch.rand(4))
    packed = {name: x[:1] if name != "log_decay" else x for name, x in qkv().items()}
    square = {name: x[:1].expand(T, -1, -1, -1) if name != "log_decay" else x for name, x in qkv().items()}
    of_retain = retain_door()
    of_step = {
        name: of_retain[name] for name in ("scale", "decay_norm", "score_norm", "out_dtype", "backend", "log_decay")
    }
    of_scores = {name: x for name, x in of_retain.items() if name in inspect.signature(scores).parameters}
    doors = {
        "retain": Door(retention.retain, qkv, of_retain),
        "retain with a state": Door(
            retention.retain, lambda: dict(qkv(), state=op_state.clone()), {"state": states(op_state)}
        ),
        "retain packed": Door(
            retention.retain,
            lambda: dict(packed, cu_seqlens=torch.tensor([0, 2, T])),
            {"cu_seqlens": CU_SEQLENS, "mask": [torch.ones(1, T).bool()]},
        ),
        "retain on a grid": Door(
            retention.retain,
            lambda: dict(qkv(), grid=(2, 3), causal=False),
            {"grid": GRID, "causal": [*FLAG, True], "mask": [torch.ones(B, T).bool()], "return_state": [True]},
        ),
        "retain of as many rows as tokens": Door(
            retention.retain,
            lambda: dict(square, mask=torch.ones(T, T).bool()),
            {"mask": [torch.ones(T, T).bool().tril(), torch.ones(T, T).bool().triu(1)]},
        ),
        "step": Door(
            retention.step,
            lambda: dict(one_token, state=op_state),
            dict(
                of_step,
                state=[None, *states(op_state)],
                mask=STEP_MASK,
                **{
                    name: [*tensors(x, name), torch.cat([x, x], 2)]
                    for name, x in one_token.items()
                    if name != "log_decay"
                },
            ),
            after=unchanged(op_state),
        ),
        "scores": Door(scores, lambda: {n: x for n, x in qkv().items() if n != "v"}, of_scores),
        "explain": Door(
            retention.explain, qkv, {**of_retain, "in_place": [True], "mode": ["auto"]}, hides=tuple(of_retain)
        ),
        "initial_state": Door(
            retention.initial_state,
            lambda: dict(rows=B, heads=4, key_dim=3, value_dim=5),
            dict(rows=COUNT, heads=WHOLE, key_dim=WHOLE, value_dim=WHOLE, score_norm=FLAG, device=DEVICE, dtype=DTYPE),
        ),
        "layer": Door(MultiScaleRetention, lambda: dict(dim=DIM, num_heads=HEADS), LAYER),
        "layer.forward": Door(
            any_layer.forward,
            lambda: dict(x=X),
            dict(FORWARD, x=INPUT, key=INPUT[1:], value=INPUT[1:], state=states(state), grid=GRID, rotation=ROTATION),
        ),
        "layer.forward on a grid": Door(causal_off.forward, lambda: dict(x=X, grid=(2, 3)), {"grid": GRID}),
        "layer.forward packed": Door(
            any_layer.forward, lambda: dict(x=X[:1], cu_seqlens=torch.tensor([0, 2, T])), {"cu_seqlens": CU_SEQLENS}
        ),
        "layer.step": Door(
            any_layer.step,
            lambda: dict(x=TOKEN, state=state),
            dict(x=ONE_TOKEN, state=[None, *states(state)], mask=STEP_MASK, rotation=ROTATION),
            after=unchanged(state),
        ),
        "layer.scores": Door(any_layer.scores, lambda: dict(x=X), dict(x=INPUT, mask=MASK, grid=GRID)),
        "layer.rotation": Door(
            any_layer.rotation,
            lambda: dict(x=X),
            dict(x=[*INPUT[:8], *INPUT[9:13]], mask=MASK, cu_seqlens=FORWARD["cu_seqlens"], state=states(state)),
        ),
        "layer.initial_state": Door(any_layer.initial_state, lambda: dict(batch=B), dict(batch=COUNT)),
        "set_backend": Door(
            set_backend,
            lambda: dict(model=any_layer, backend="auto", form="auto"),
            dict(model=[None, "model", MultiScaleRetention], backend=[*NAME, None], form=[*NAME, None]),
        ),
        "set_norm_backend": Door(
            set_norm_backend,
            lambda: dict(model=any_model, backend="torch"),
            dict(model=[None, "model", RetNet, any_layer], backend=[*NAME, None]),
        ),
        "HeadNorm": Door(
            HeadNorm,
            lambda: dict(num_heads=HEADS, head_dim=8, kind="group", affine=False, eps=1e-6),
            dict(
                num_heads=WHOLE,
                head_dim=WHOLE,
                kind=[*NAME, None],
                affine=LAYER["norm_affine"],
                eps=EPS,
                device=DEVICE,
                dtype=DTYPE,
            ),
        ),
        "HeadNorm.forward": Door(
            HeadNorm(HEADS, 8, "rms", False, 1e-6).forward,
            lambda: dict(x=torch.randn(B, T, HEADS, 8)),
            dict(x=[None, 3, [1.0], torch.randn(B, T, HEADS, 7), torch.ones(8).long(), torch.tensor(1.0)]),
        ),
        "FeedForward": Door(
            FeedForward,
            lambda: dict(dim=DIM, hidden_dim=8),
            dict(
                dim=WHOLE,
                hidden_dim=WHOLE,
                gated=FLAG,
                bias=FLAG,
                activation=[*NAME, None],
                activate_output=FLAG,
                hidden_norm=NAME,
                norm_eps=EPS,
                dropout=RATE,
                activation_dropout=RATE,
                init_scale=FACTOR,
                backend=[*NAME, None, "xformers"],
                device=DEVICE,
                dtype=DTYPE,
            ),
        ),
        "FeedForward.forward": Door(
            FeedForward(DIM, 8).forward,
            lambda: dict(x=X),
            dict(x=[*INPUT[:10], *INPUT[12:]]),
        ),
        "MixtureOfExperts": Door(
            MixtureOfExperts,
            lambda: dict(dim=DIM, hidden_dim=8, num_experts=3, top_k=2),
            dict(dim=WHOLE, hidden_dim=WHOLE, num_experts=WHOLE, top_k=[*WHOLE, 4], device=DEVICE, dtype=DTYPE),
            hides=("device", "dtype"),
        ),
        "MixtureOfExperts.forward": Door(
            MixtureOfExperts(DIM, 8, num_experts=3, top_k=2).forward, lambda: dict(x=X), dict(x=INPUT, mask=MASK)
        ),
        "DropPath": Door(DropPath, lambda: dict(rate=0.1), dict(rate=RATE)),
        "RetNetBlock": Door(
            RetNetBlock,
            lambda: dict(dim=DIM, num_heads=HEADS, ffn=FeedForward(DIM, 8), retention={}, **BLOCK),
            dict(
                dim=WHOLE,
                num_heads=[*WHOLE, 3],
                ffn=[None, 3, FeedForward, len],
                retention=[None, *BACKBONE["retention"]],
                norm=[*NAME, None],
                norm_eps=EPS,
                norm_before=FLAG,
                alpha=FACTOR,
                dropout=RATE,
                drop_path=RATE,
                device=DEVICE,
                dtype=DTYPE,
            ),
        ),
        "RetNetBlock.forward": Door(
            any_block.forward, lambda: dict(x=X), dict(FORWARD, x=INPUT, state=states(state)), hides=(*FORWARD, "state")
        ),
        "RetNetBlock.step": Door(
            any_block.step,
            lambda: dict(x=TOKEN, state=state),
            dict(x=ONE_TOKEN, state=[None, *states(state)], mask=STEP_MASK),
            hides=("mask",),
            after=unchanged(state),
        ),
        "RetNetBackbone": Door(RetNetBackbone, lambda: dict(dim=DIM, num_layers=2, num_heads=HEADS), BACKBONE),
        "RetNetBackbone.forward": Door(
            backbone.forward,
            lambda: dict(x=X),
            dict(FORWARD, x=INPUT, state=lists_of(state), return_layers=FLAG, return_scores=FLAG),
        ),
        "RetNetBackbone.step": Door(
            backbone.step,
            lambda: dict(x=TOKEN, state=[state, state.clone()]),
            dict(x=ONE_TOKEN, state=[None, *lists_of(state)], mask=STEP_MASK),
            after=unchanged(state),
        ),
        "RetNet": Door(
            RetNet,
            lambda: dict(vocab_size=VOCAB, dim=DIM, num_layers=2, num_heads=HEADS),
            dict(BACKBONE, vocab_size=WHOLE, tie_embeddings=FLAG),
            hides=tuple(BACKBONE),
        ),
        "RetNet.from_preset": Door(
            RetNet.from_preset,
            lambda: dict(preset="tiny", num_layers=1),
            dict(preset=[*NAME, None], num_layers=WHOLE),
            hides=("num_layers",),
        ),
        "RetNet.forward": Door(
            any_model.forward, lambda: dict(tokens=IDS), dict(FORWARD, tokens=IDS_WRONG, state=lists_of(state))
        ),
        "RetNet.step": Door(
            any_model.step,
            lambda: dict(tokens=IDS[:, :1], state=[state, state.clone()]),
            dict(tokens=[*IDS_WRONG, IDS], state=[None, *lists_of(state)], mask=STEP_MASK),
            hides=("x",),
            after=unchanged(state),
        ),
        "RetNet.generate": Door(
            any_model.generate,
            lambda: dict(tokens=IDS, max_new_tokens=2),
            dict(GENERATE, tokens=[*IDS_WRONG, IDS[:, :0]]),
            hides=tuple(GENERATE),
        ),
        "stream": Door(
            decoding.stream,
            lambda: dict(prompt=any_model._prompt, step=any_model.step, tokens=IDS, max_new_tokens=2),
            dict(GENERATE, tokens=IDS_WRONG[:9], prompt=[None, 3], step=[None, "x"]),
        ),
        "register": Door(
            retention.register,
            lambda: dict(name="another", backend=backends.eager.backend),
            dict(
                name=["", "auto", "eager", None, 3, ["a"]],
                backend=[None, "eager", len, backends.eager, backends.eager.Eager],
                before=["", "no such", 3, ["eager"], True],
            ),
        ),
        "unregister": Door(
            retention.unregister, lambda: dict(name="eager"), dict(name=["", "auto", "no such", None, 3, ["eager"]])
        ),
        "state[...]": Door(
            state.__getitem__, lambda: dict(rows=[1, 0]), dict(rows=[True, None, "a", 1.5, {}, (0, 1), state])
        ),
        "state.to": Door(state.to, lambda: dict(device="cpu"), dict(device=[*DEVICE, None])),
        "state.copy_": Door(
            state.copy_,
            lambda: dict(other=state.clone()),
            dict(other=[None, {}, state.kv, state[:1], retention.initial_state(B, 2, 8, 16, score_norm=True)]),
            after=unchanged(state),
        ),
        "decay.paper": Door(decay.paper, lambda: dict(num_heads=4), dict(num_heads=WHOLE)),
        "decay.short": Door(decay.short, lambda: dict(num_heads=4), dict(num_heads=WHOLE)),
        "decay.log_linear": Door(
            decay.log_linear,
            lambda: dict(num_heads=4),
            dict(num_heads=WHOLE, first=[*FACTOR, 1.0, 2], last=[*FACTOR, 1.0, 2]),
        ),
        "decay.log_decays": Door(
            decay.log_decays,
            lambda: dict(decay="paper", num_heads=2),
            dict(decay=DECAY, num_heads=WHOLE),
        ),
        "decay.HeadDecay": Door(
            decay.HeadDecay,
            lambda: dict(decay="paper", num_heads=2),
            dict(
                decay=DECAY,
                num_heads=WHOLE,
                learnable=FLAG,
                pairs=[3, [-0.5], (0.5,), ("a",)],
                device=DEVICE,
                dtype=DTYPE,
            ),
        ),
        "rotary.frequencies": Door(
            rotary.frequencies,
            lambda: dict(rotary="rope", key_dim=8),
            dict(rotary=[*NAME, None], key_dim=[*WHOLE, 7], base=FACTOR),
        ),
        "rotary.pair_decays": Door(rotary.pair_decays, lambda: dict(key_dim=8), dict(key_dim=[*WHOLE, 7])),
        "rotary.rotation": Door(
            rotary.rotation,
            lambda: dict(times=torch.arange(3), freqs=(1.0, 0.1)),
            dict(
                times=[None, 3, [1, 2], torch.rand(3), torch.ones(3).bool()],
                dtype=[*DTYPE, None],
                freqs=[None, 3, "ab", ["a"], torch.ones(2)],
            ),
        ),
        "rotary.rotation_table": Door(
            rotary.rotation_table,
            lambda: dict(length=3, freqs=(1.0, 0.1), device=torch.device("cpu"), dtype=torch.float32),
            dict(length=COUNT, dtype=[*DTYPE, None], freqs=FREQS, device=[*DEVICE, None]),
        ),
        "rotary.rotate": Door(
            rotary.rotate,
            lambda: dict(x=torch.randn(B, 2, T, 8), rotation=torch.randn(T, 4, 2)),
            dict(
                x=[
                    None,
                    [1.0],
                    torch.ones(2, T, 8).long(),
                    torch.randn(2, T, 7),
                    torch.randn(2, T - 1, 8),
                    torch.randn(8),
                ],
                rotation=[None, *ROTATION, torch.ones(T, 4, 2).long()],
                interleaved=FLAG,
            ),
        ),
    }
    return doors


DOORS = core_doors()


@pytest.mark.parametrize(("door", "name"), cases(DOORS))
def test_what_does_not_fit_is_refused_by_name_before_any_computation(door, name, registry):
    check_refusals(DOORS[door], name)


@pytest.mark.parametrize("door", DOORS)
def test_what_fits_is_taken(door, registry):
    DOORS[door].call(**DOORS[door].valid())


def test_a_door_that_computes_first_or_names_another_argument_is_noticed():
    def late(x):
        return torch.nn.functional.linear(x, x)

    def foreign(x):
        raise ValueError("y must be another x")

    for door in (late, foreign, lambda x: None):
        with pytest.raises(AssertionError):
            check_refusals(Door(door, dict, {"x": [torch.ones(2, 2)]}), "x")
