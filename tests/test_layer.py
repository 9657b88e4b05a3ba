"""MultiScaleRetention: the formula under every option, the same in every form, and well behaved as a module."""

import copy
import math

import oracle
import pytest
import torch
import torch.utils.checkpoint
from torch.nn import functional as F

from retention import MultiScaleRetention, ShapeError, set_backend
from retention.decay import log_decays
from retention.layer import GATED_AT_ONCE

FORMS = ("parallel", "chunkwise", "recurrent")
OPTIONS = [
    {},
    {"decay": "log_linear", "rotary": "rope", "interleaved": False, "norm": "rms", "scale": 1.0},
    {"decay": [-0.1, -0.2, -0.3, -0.4], "rotary": None, "norm": None, "gate": None, "value_dim": 12},
    {"num_kv_heads": 2, "key_dim": 16, "value_dim": 24, "bias": True, "gate": "gelu", "norm_affine": "channel"},
    {"num_kv_heads": 1, "gate": "relu", "norm": "rms", "norm_affine": "shared", "norm_eps": 0.1},
    {"learnable_decay": True, "gate": "sigmoid", "norm_affine": "shared", "decay_norm": True, "score_norm": True},
    {"score_norm": "absolute", "decay_norm": True},
    {"causal": False, "decay_norm": True, "score_norm": True},
    {"rotary": "xpos", "num_kv_heads": 2, "learnable_decay": True},
    {"rotary": "xpos", "interleaved": False, "scale": 1.0},
]
GATES = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid, None: lambda x: 1.0}


def make(dim=32, num_heads=4, dtype=torch.float64, **options):
    layer = MultiScaleRetention(dim, num_heads, dtype=dtype, **options)
    for parameter in layer.parameters():  # so that no bias is 0, no norm weight 1 and no gate shut
        if parameter is not layer.decay.shift:
            torch.nn.init.normal_(parameter, std=0.5)
    return layer


def formula(x, layer, num_heads=4, *, num_kv_heads=None, rotary="paper", interleaved=True, gate="silu", norm="group",
            norm_affine=False, norm_eps=1e-6, scale=None, decay="paper", key_dim=32, value_dim=64,
            **options):  # fmt: skip
    """The layer once more, head by head and from its weights only."""
    options = {key: options[key] for key in ("causal", "decay_norm", "score_norm") if key in options}
    kv_heads, K, V = num_kv_heads or num_heads, key_dim // num_heads, value_dim // num_heads
    q, k, v = (
        p(x).unflatten(-1, (-1, d)).transpose(1, 2)
        for p, d in ((layer.q_proj, K), (layer.k_proj, K), (layer.v_proj, V))
    )
    assert k.shape[1] == kv_heads
    if rotary:
        pairs = K // 2
        theta = [10000 ** -(i / (pairs - 1 if rotary == "paper" else pairs)) for i in range(pairs)]
        for z in (q, k):
            for i in range(pairs):
                a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
                angle = torch.arange(x.shape[1], dtype=torch.float64) * theta[i]
                turned = torch.complex(z[..., a], z[..., b]) * torch.exp(1j * angle)
                if rotary == "xpos":
                    growth = ((2 * i + 0.4 * K) / (1.4 * K)) ** (torch.arange(x.shape[1], dtype=torch.float64) / 512)
                    turned = turned * growth if z is q else turned / growth
                z[..., a], z[..., b] = turned.real.clone(), turned.imag.clone()
    y = oracle.retain(q, k, v, torch.tensor(log_decays(decay, num_heads), dtype=torch.float64), scale=scale, **options)
    heads = []
    for h in range(num_heads):
        head = y[:, h]
        if norm == "group":
            head = (head - head.mean(-1, keepdim=True)) / (head.var(-1, keepdim=True, unbiased=False) + norm_eps).sqrt()
        if norm == "rms":
            head = head / (head.pow(2).mean(-1, keepdim=True) + norm_eps).sqrt()
        if norm_affine:
            channel = norm_affine == "channel"
            head = head * (layer.norm.weight[h] if channel else layer.norm.weight)
            if norm == "group":
                head = head + (layer.norm.bias[h] if channel else layer.norm.bias)
        heads.append(head)
    open_gate = GATES[gate](layer.g_proj(x)) if gate else 1.0
    return layer.out_proj(open_gate * torch.cat(heads, -1))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_every_option_is_the_formula_in_every_form(options):
    layer, x = make(**options), torch.randn(2, 11, 32, dtype=torch.float64)
    want = formula(x, layer, **options)
    for form in FORMS:
        if form == "recurrent" and options.get("causal") is False:
            continue
        if form != "parallel" and options.get("score_norm") == "absolute":
            continue
        torch.testing.assert_close(layer(x, form=form), want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_scores_are_what_the_values_are_weighed_with(options):
    layer, x = make(**options | {"norm": None, "gate": None, "num_kv_heads": 4}), torch.randn(2, 11, 32).double()
    mask = torch.arange(11) >= torch.tensor([[3], [0]])
    values = layer.v_proj(x).unflatten(-1, (4, -1)).transpose(1, 2)
    scores = layer.scores(x, mask=mask)
    assert scores.shape == (2, 4, 11, 11)
    assert bool(scores.triu(1).any()) != layer.causal
    want = layer(x, mask=mask, form="parallel")
    torch.testing.assert_close(layer.out_proj((scores @ values).transpose(1, 2).flatten(2)), want)


def test_on_a_grid_the_decay_is_that_of_rows_times_that_of_columns():
    layer = MultiScaleRetention(16, 2, rotary=None, norm=None, gate=None, causal=False, decay="short").double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    rows, columns = ((torch.arange(n)[:, None] - torch.arange(n)).abs() for n in (3, 4))
    decay = torch.stack([torch.kron(g**rows, g**columns) for g in layer.decay(x.device, x.dtype).exp()])
    scores = q @ k.mT * layer.scale * decay
    torch.testing.assert_close(layer.scores(x, grid=(3, 4)), scores)
    want = layer.out_proj((scores @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid=(3, 4)), want)


def test_a_layer_that_looks_both_ways_has_no_state_and_no_step():
    layer, x = MultiScaleRetention(16, 2, causal=False), torch.randn(2, 1, 16)
    with pytest.raises(ValueError, match="a state needs causal retention; this layer has causal=False"):
        layer.initial_state(2)
    with pytest.raises(ValueError, match="a state needs causal retention; this layer has causal=False"):
        layer.step(x, MultiScaleRetention(16, 2).initial_state(2))


def test_xpos_stays_finite_where_its_factors_leave_every_bound():
    layer = MultiScaleRetention(16, 1, rotary="xpos", decay=[0.0])
    x = torch.randn(1, 60_000, 16)
    y, state = layer(x, return_state=True)
    assert y.isfinite().all()
    assert torch.finfo(torch.float32).max < (4 / 14) ** (-60_000 / 512)
    assert state.kv.shape == layer.initial_state(1).kv.shape == (1, 8, 2, 32)


def test_default_construction_is_the_papers():
    layer = MultiScaleRetention(64, 4)
    assert (layer.key_dim, layer.value_dim, layer.num_heads, layer.num_kv_heads) == (64, 128, 4, 4)
    assert [name for name, _ in layer.named_parameters()] == [
        f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "g_proj", "out_proj")
    ]
    assert layer(torch.randn(2, 5, 64)).shape == (2, 5, 64)


@pytest.mark.slow
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[5], OPTIONS[8]], ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "packed"])
@torch.no_grad()
def test_parts_steps_and_rows_alone_are_the_whole(options, padding):
    """Rotation included: positions follow each row's own time."""
    layer, x = make(**options), torch.randn(2, 12, 32, dtype=torch.float64)
    close = {"rtol": 1e-9, "atol": 1e-11}
    if padding == "packed":
        packed = layer(x.reshape(1, 24, 32), cu_seqlens=torch.tensor([0, 12, 24]))
        torch.testing.assert_close(packed.view_as(x), layer(x), **close)
        return
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = padding != "left"
    whole = layer(x, mask=mask)
    if padding == "left":
        torch.testing.assert_close(whole[:1, 3:], layer(x[:1, 3:]), **close)
    first, state = layer(x[:, :7], mask=mask[:, :7], return_state=True)
    rest = layer(x[:, 7:], mask=mask[:, 7:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, **close)
    steps = [layer.step(x[:, n, None], state, mask=mask[:, n, None]) for n in range(7, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), rest, **close)
    begun = layer.initial_state(2)
    again = [layer.step(x[:, n, None], begun, mask=mask[:, n, None]) for n in range(12)]
    torch.testing.assert_close(torch.cat(again, 1)[mask], whole[mask], **close)


def test_cross_inputs_take_the_place_of_x():
    layer = make()
    x, key, value = torch.randn(3, 2, 6, 32, dtype=torch.float64).unbind()
    torch.testing.assert_close(layer(x, x, x), layer(x))
    torch.testing.assert_close(layer(x, key), layer(x, key, key))
    assert not torch.allclose(layer(x, key, value), layer(x, key))
    # the gate and the queries are x's, the rest is not
    layer.g_proj.weight.data.zero_()
    layer.q_proj.weight.data.zero_()
    assert not layer(x, key, value).any()


def test_decoding_writes_into_the_state_it_got():
    layer = make(dtype=torch.float32)
    state = layer.initial_state(1)
    memory = state.kv.data_ptr(), state.time.data_ptr()
    for _ in range(3):
        layer.step(torch.randn(1, 1, 32), state)
    assert memory == (state.kv.data_ptr(), state.time.data_ptr())
    assert state.time.item() == 3


# --- dtypes and devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decays_and_positions_stay_exact_in_half_precision(dtype):
    """In bfloat16, 641 of 2048 positions are distinct and the slowest gamma of 8 heads is 1."""
    layer = MultiScaleRetention(64, 8)
    half = copy.deepcopy(layer).to(dtype)
    assert torch.equal(half.decay(torch.device("cpu")), layer.decay(torch.device("cpu")))
    rotation = half.rotation(torch.randn(1, 3000, 64, dtype=dtype))
    assert rotation.dtype == torch.float32
    assert len(torch.unique(rotation.view(3000, -1), dim=0)) == 3000
    x = torch.randn(1, 512, 64)
    error = (half(x.to(dtype)).float() - layer(x)).pow(2).mean().sqrt() / layer(x).pow(2).mean().sqrt()
    assert error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"norm": "rms", "norm_affine": "channel"}, {"gate": None}, {"rotary": "xpos"}])
def test_the_norm_takes_sums_that_half_precision_cannot_hold(options):
    """Scores of some thousand: the sums are above 65504, the largest number of float16."""
    layer = MultiScaleRetention(64, 2, **options)
    with torch.no_grad():
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj):
            proj.weight.mul_(64)
    half, exact = copy.deepcopy(layer).half(), copy.deepcopy(layer).half().double()
    x = (torch.randn(1, 1, 64) + 0.1 * torch.randn(1, 2500, 64)).half()
    want = exact(x.double())
    found = half(x)  # with gradients the gate takes another way than without
    with torch.no_grad():
        state = half.initial_state(1)
        steps = torch.cat([half.step(x[:, [n]], state) for n in range(50)], dim=1)
        results = ((found, want), (half(x), want), (steps, want[:, :50]))
    assert 2 * x.numel() > GATED_AT_ONCE  # as many numbers as are gated in parts
    for got, wanted in results:
        assert got.dtype == torch.float16
        error = (got.double() - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
        assert error < 2e-2  # the scores themselves are rounded


def test_an_ensemble_with_learnable_decays_runs_under_vmap():
    layers = [make(dtype=torch.float64, learnable_decay=True) for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(2, 9, 32, dtype=torch.float64)

    def run(weights, buffers):
        return torch.func.functional_call(layers[0], (weights, buffers), (x,))

    for got, layer in zip(torch.vmap(run)(weights, buffers), layers, strict=True):
        torch.testing.assert_close(got, layer(x))


def test_a_learnable_decay_keeps_its_slow_heads_in_bfloat16():
    layer = MultiScaleRetention(64, 16, learnable_decay=True).bfloat16()
    assert layer.decay.shift.dtype == torch.bfloat16
    got = layer.decay(torch.device("cpu"))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(log_decays("paper", 16)))
    layer(torch.randn(1, 9, 64, dtype=torch.bfloat16)).sum().backward()
    assert layer.decay.shift.grad.isfinite().all()
    assert layer.decay.shift.grad.any()


def test_a_learnable_decay_is_shifted_in_log_of_one_minus_gamma():
    layer = MultiScaleRetention(64, 2, learnable_decay=True)
    torch.nn.init.constant_(layer.decay.shift, math.log(2))
    torch.testing.assert_close(layer.decay(torch.device("cpu")).exp(), torch.tensor([1 - 2 / 32, 1 - 2 / 64]))


def test_a_learnable_decay_cannot_leave_its_range():
    layer = make(learnable_decay=True)
    torch.nn.init.constant_(layer.decay.shift, 9.0)
    assert math.exp(layer.decay(torch.device("cpu"), torch.float64).max().item()) == pytest.approx(1e-4, rel=1e-3)
    assert layer(torch.randn(1, 5, 32, dtype=torch.float64)).isfinite().all()


def test_autocast():
    layer, x = make(dtype=torch.float32), torch.randn(2, 40, 32, requires_grad=True)
    want = layer(x)
    for form in FORMS:
        with torch.autocast("cpu", torch.bfloat16):
            got = layer(x, form=form)
        assert got.dtype == torch.bfloat16
        assert ((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()).item() < 0.02
        got.sum().backward()


def test_meta_device_then_real():
    layer = MultiScaleRetention(32, 4, device="meta", learnable_decay=True, norm_affine="channel")
    assert layer(torch.randn(2, 5, 32, device="meta")).shape == (2, 5, 32)
    layer.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer.decay(torch.device("cpu")), torch.tensor(log_decays("paper", 4)))
    assert layer(torch.randn(2, 5, 32)).isfinite().all()


def test_copies_and_state_dicts_compute_the_same():
    layer, x = make(learnable_decay=True, norm_affine="shared"), torch.randn(1, 6, 32, dtype=torch.float64)
    other = MultiScaleRetention(32, 4, learnable_decay=True, norm_affine="shared", dtype=torch.float64)
    assert not any(layer.buffers())
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer)):
        assert torch.equal(same(x), layer(x))


def test_training_after_inference_mode():
    decay = [-0.0123, -0.0456]  # seen nowhere else, so made here for the first time
    layer, x = MultiScaleRetention(8, 2, decay=decay), torch.randn(1, 5, 8)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.q_proj.weight.grad.any()


def test_dropout_is_for_training_only():
    layer, x = make(dropout=0.5), torch.randn(1, 5, 32, dtype=torch.float64)
    assert (layer(x) == 0).any()
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    layer, x = make(), torch.randn(1, 70, 32, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(layer(x).sum(), (x, layer.k_proj.weight))
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    for got, gradient in zip((x.grad, layer.k_proj.weight.grad), want, strict=True):
        assert torch.equal(got, gradient)


# --- compile, export --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"interleaved": False, "learnable_decay": True}], ids=str)
def test_compiles_to_one_graph_and_does_not_recompile(options):
    layer, x = make(dtype=torch.float32, **options), torch.randn(2, 9, 32, requires_grad=True)
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    mask = torch.arange(9) >= torch.tensor([[2], [0]])
    for _ in range(3):
        torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask))
    assert len(graphs) == 1
    compiled(x, mask=mask).sum().backward()
    (out, state), (want, other) = compiled(x, return_state=True), layer(x, return_state=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state.kv, other.kv)


@pytest.mark.slow
def test_one_decoding_step_compiles_and_exports():
    layer, x = make(dtype=torch.float32), torch.randn(2, 1, 32)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, state):
            return self.layer.step(x, state)

    state, other = layer.initial_state(2), layer.initial_state(2)
    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x, state), layer.step(x, other))
    torch.testing.assert_close(state.kv, other.kv)
    assert state.time.tolist() == [3, 3]
    program = torch.export.export(Step(), (x, layer.initial_state(2))).module()
    state, other = layer.initial_state(2), layer.initial_state(2)
    torch.testing.assert_close(program(x, state), layer.step(x, other))
    torch.testing.assert_close(state.kv, other.kv)


# --- bad options and input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide key_dim; got num_heads 3, key_dim 32"),
        ({"value_dim": 30}, "num_heads must divide value_dim; got num_heads 4, value_dim 30"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads; got num_kv_heads 3, num_heads 4"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1; got num_heads 0"),
        ({"key_dim": 4.0}, "key_dim must be an integer of at least 1; got key_dim 4.0"),
        ({"key_dim": 12}, "even key dim per head; got key_dim 3"),
        ({"decay": "slow"}, "decay must be one of 'paper', 'log_linear', 'short' or 4 log-decays; got decay 'slow'"),
        ({"rotary": "alibi"}, "rotary must be one of 'paper', 'rope', 'xpos' or None; got rotary 'alibi'"),
        ({"gate": "swish"}, "gate must be one of 'silu', 'gelu', 'relu', 'sigmoid', None; got gate 'swish'"),
        ({"norm": "batch"}, "norm must be one of 'group', 'rms', None; got norm 'batch'"),
        ({"norm_affine": True}, "norm_affine must be one of False, 'shared', 'channel'; got norm_affine True"),
        ({"score_norm": "sum"}, "score_norm must be one of False, True, 'absolute'; got score_norm 'sum'"),
        ({"dropout": 1.5}, "dropout must be a number, at least 0 and below 1; got dropout 1.5"),
        ({"dropout": "x"}, "dropout must be a number, at least 0 and below 1; got dropout 'x'"),
        ({"norm_eps": -1.0}, "norm_eps must be a number, at least 0; got norm_eps -1.0"),
        ({"init_gain": 0}, "init_gain must be a number, above 0; got init_gain 0"),
        ({"scale": math.nan}, "scale must be a number, finite, or None; got scale nan"),
        ({"causal": "no"}, "causal must be True or False; got causal 'no'"),
        ({"causal": False, "form": "recurrent"}, "the recurrent form is causal; got causal False, form 'recurrent'"),
        ({"score_norm": "absolute", "form": "chunkwise"}, "exists only in the parallel form; got form 'chunkwise'"),
        ({"decay": [-20.0] * 4, "learnable_decay": True}, "keeps gamma above 1e-4; got a log-decay of -20"),
        ({"form": "fast"}, "form must be one of 'parallel', 'chunkwise', 'recurrent', 'auto'; got form 'fast'"),
        (
            {"backend": "cuda"},
            "backend must be 'auto' or one of triton, chunked, eager, xformers, fla; got backend 'cuda'",
        ),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, or None; got chunk_size 0"),
    ],
)
def test_wrong_options_are_named_when_the_layer_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleRetention(32, **{"num_heads": 4, **options})


def test_misspelt_options_are_refused():
    with pytest.raises(TypeError, match="num_head"):
        MultiScaleRetention(32, num_head=4)


def test_wrong_input_is_named():
    layer = make(dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"x must be \(batch, length, dim 32\); got x \(2, 5, 31\)"):
        layer(torch.randn(2, 5, 31))
    with pytest.raises(ShapeError, match=r"agree in \(batch, length\); got x \(2, 5, 32\), key \(2, 6, 32\)"):
        layer(torch.randn(2, 5, 32), torch.randn(2, 6, 32))
    with pytest.raises(ShapeError, match=r"state.kv must be .* \(2, 4, 8, 16\); got state.kv \(2, 2, 16, 32\)"):
        layer(torch.randn(2, 5, 32), state=make(num_heads=2, dtype=torch.float32).initial_state(2))


def test_set_backend_reaches_every_layer():
    model = torch.nn.Sequential(make(), torch.nn.ModuleList([make()]))
    set_backend(model, "eager", "parallel")
    assert {(m.backend, m.form) for m in model.modules() if isinstance(m, MultiScaleRetention)} == {
        ("eager", "parallel")
    }
    with pytest.raises(ValueError, match="got backend 'cuda'"):
        set_backend(model, "cuda")
    with pytest.raises(ValueError, match="got form 'quick'"):
        set_backend(model, form="quick")


def test_decoding_needs_no_backend_named_for_it():
    layer = make(backend="chunked", dtype=torch.float32)
    assert layer.step(torch.randn(2, 1, 32), layer.initial_state(2)).shape == (2, 1, 32)


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_what_is_gated_in_parts_without_gradients_is_what_is_gated_at_once(gate):
    layer, x = MultiScaleRetention(16, 2, value_dim=512, gate=gate), torch.randn(2, 300, 16)
    with torch.no_grad():
        found = layer(x)
    assert found.shape[1] * 2 * 512 > GATED_AT_ONCE
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-6)
