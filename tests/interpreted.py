"""The kernels of the triton backend in Triton's interpreter, against the definition. `test_triton.py` runs this file.

TRITON_INTERPRET=1 must be in the environment before the kernels are imported, which is why it is a process of its own.
"""

import oracle
import pytest
import torch

import retention
from retention import RetentionState, retain, step
from retention.backends.triton import plan
from retention.backends.triton.operator import fused

BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-3}
LOG_DECAY = (-0.05, -0.7)
CHUNKWISE = False, True  # not parallel, causal


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Cut short sequences into segments too."""
    monkeypatch.setattr(plan, "FEWEST_CHUNKS", 1)


def definition(q, k, v, log_decay, state, scale, mask, cu_seqlens):
    """Out (B, H, T, V) and the state after the last token of each sequence, in float64."""
    q, k, v, log_decay = (x.double() for x in (q, k, v, log_decay))
    heads, outs, finals = q.shape[1], torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64), []
    for b in range(len(q)):
        for tokens in oracle.sequences(b, q.shape[2], mask, cu_seqlens):
            q_s, k_s, v_s = (x[b : b + 1, :, tokens] for x in (q, k, v))
            out, final = oracle.retain(q_s, k_s, v_s, log_decay, scale=scale), oracle.state(k_s, v_s, log_decay, heads)
            if state is not None:
                before = state[len(finals)].double()
                age = torch.arange(1, len(tokens) + 1, dtype=torch.float64)
                out = out + scale * (log_decay[:, None] * age).exp()[..., None] * (q_s[0] @ before)
                final = final + (log_decay * len(tokens)).exp()[:, None, None] * before
            places = torch.zeros(len(outs), q.shape[2], dtype=torch.bool)
            places[b, tokens] = True
            outs = outs + torch.zeros_like(outs).transpose(1, 2).index_put(
                (torch.tensor(b), torch.tensor(tokens, dtype=torch.long)), out[0].transpose(0, 1)
            ).transpose(1, 2)
            finals.append(final[0])
    return outs, torch.stack(finals)


def error(got, want):
    """RMS of the difference over RMS of what is right; the sum of both where that is 0."""
    got, want = got.double(), want.double()
    scale = want.square().mean().sqrt()
    return ((got - want).square().mean().sqrt() / (scale if scale > 0 else 1)).item() if want.numel() else 0.0


def inputs(batch=1, heads=2, kv_heads=None, length=40, key_dim=8, value_dim=8, dtype=torch.float32, decays=LOG_DECAY):
    kv_heads = kv_heads or heads
    q = torch.randn(batch, length, heads, key_dim).transpose(1, 2).to(dtype)  # as layers make it
    k, v = (torch.randn(batch, kv_heads, length, width).to(dtype) for width in (key_dim, value_dim))
    return [x.requires_grad_() for x in (q, k, v, torch.tensor(decays[:heads]))]


MASK = torch.tensor([[False] * 7 + [True] * 13 + [False] + [True] * 19, [True] * 3 + [False] * 37])
CASES = {
    "plain": {},
    "one token": dict(length=1),
    "a whole chunk": dict(length=16),
    "odd head dims": dict(key_dim=5, value_dim=19),
    "state": dict(state=True),
    "two blocks of values": dict(value_dim=70, state=True),
    "wide": dict(key_dim=136, value_dim=20, length=33, state=True, heads=1),
    "pieces of values": dict(key_dim=20, value_dim=260, length=20, state=True, heads=1),
    "grouped heads": dict(heads=4, kv_heads=2, decays=(-0.05, -0.7, -0.01, -0.2), length=33),
    "no decay": dict(decays=(0.0, -1e-9), state=True),
    "fast decay": dict(decays=(-60.0, -8.0), state=True),
    "immediate decay": dict(decays=(-1e6, -300.0)),
    "mask": dict(batch=2, mask=MASK, state=True),
    "wide with mask": dict(batch=2, mask=MASK[:, :24], length=24, key_dim=130, heads=1),
    "all padding": dict(batch=1, mask=torch.zeros(1, 40, dtype=torch.bool), state=True),
    "packed": dict(cu_seqlens=torch.tensor([0, 0, 3, 3, 37, 40], dtype=torch.int32), state=True),
    "packed, grouped": dict(cu_seqlens=torch.tensor([0, 20, 40]), heads=2, kv_heads=1),
    "bfloat16": dict(dtype=torch.bfloat16, state=True),
    "bfloat16, wide": dict(dtype=torch.bfloat16, key_dim=136, heads=1, length=33),
    "float16": dict(dtype=torch.float16, state=True),
    "float16, odd head dims": dict(dtype=torch.float16, key_dim=5, value_dim=1, length=20, state=True),
    "negative scale": dict(scale=-1.0, length=20),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case):
    options = dict(CASES[case])
    scale, mask, cu_seqlens = options.pop("scale", 0.3), options.pop("mask", None), options.pop("cu_seqlens", None)
    has_state = options.pop("state", False)
    tensors = inputs(**options)
    q, v = tensors[0], tensors[2]
    rows = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    state = torch.randn(rows, q.shape[1], q.shape[3], v.shape[3], requires_grad=True) if has_state else None
    wanted = [*tensors, state] if has_state else tensors
    got = fused(*tensors, state, mask, cu_seqlens, *CHUNKWISE, scale, 16, True, q.dtype)
    want = definition(*tensors, state, scale, mask, cu_seqlens)
    # Along the result itself, so that the many terms of the gradient of a decay, which is one number, do not cancel.
    weights = [x.detach() + x.detach().std() * torch.randn_like(x) if x.numel() > 1 else 1 for x in want]
    losses = [sum((x.double() * w).sum() for x, w in zip(pair, weights, strict=True)) for pair in (got, want)]
    grads = [torch.autograd.grad(loss, wanted, materialize_grads=True) for loss in losses]
    bound = BOUNDS[q.dtype]
    for name, a, b in zip(("out", "final"), got, want, strict=True):
        assert error(a, b) <= bound, name
    for name, a, b in zip(("q", "k", "v", "log_decay", "state"), *grads, strict=False):
        # The gradient of a decay is one number of many terms, which may nearly cancel.
        assert error(a, b) <= (4 * bound if name == "log_decay" else bound), name
        assert a.dtype == (q.dtype if name in "qkv" else torch.float32)


PAIRS = {
    "both ways": dict(causal=False),
    "causal": dict(causal=True),
    "wide": dict(causal=False, key_dim=40, value_dim=70, length=20),
    "mask": dict(causal=False, batch=2, mask=MASK[:, :24], length=24),
    "grouped heads": dict(causal=True, heads=2, kv_heads=1, length=33),
    "bfloat16": dict(causal=False, dtype=torch.bfloat16),
    "float16, odd head dims": dict(causal=True, dtype=torch.float16, key_dim=5, value_dim=3, length=20),
}


@pytest.mark.parametrize("case", PAIRS)
def test_the_parallel_form_is_the_definition(case):
    options = dict(PAIRS[case])
    causal, mask = options.pop("causal"), options.pop("mask", None)
    tensors = inputs(**options)
    got, _ = fused(*tensors, None, mask, None, True, causal, 0.3, None, False, tensors[0].dtype)
    want = oracle.retain(*tensors, causal=causal, mask=mask, scale=0.3)
    weights = want.detach() + want.detach().std() * torch.randn_like(want)
    grads = [torch.autograd.grad((x.double() * weights).sum(), tensors) for x in (got, want)]
    bound = BOUNDS[tensors[0].dtype]
    assert error(got, want) <= bound
    for name, a, b in zip(("q", "k", "v", "log_decay"), *grads, strict=True):
        assert error(a, b) <= (4 * bound if name == "log_decay" else bound), name


def test_one_segment_for_each_sequence(monkeypatch):
    monkeypatch.setattr(plan, "FEWEST_CHUNKS", 4)
    tensors = inputs(length=40, value_dim=19)
    state = torch.randn(1, 2, 8, 19, requires_grad=True)
    got, want = (
        fused(*tensors, state, None, None, *CHUNKWISE, 0.3, 16, True, torch.float32),
        definition(*tensors, state, 0.3, None, None),
    )
    pair = zip(got, want, strict=True)
    assert all(error(a, b) <= 1e-5 for a, b in pair)
    grads = [
        torch.autograd.grad(out.double().sin().sum() + s.double().sin().sum(), [*tensors, state])
        for out, s in (got, want)
    ]
    assert all(error(a, b) <= 2e-5 for a, b in zip(*grads, strict=True))


def test_a_gradient_of_the_state_alone_and_of_the_output_alone():
    tensors = inputs(length=20)
    out, final = fused(*tensors, None, None, None, *CHUNKWISE, 0.3, 16, True, torch.float32)
    want, after = definition(*tensors, None, 0.3, None, None)
    for a, b, inputs_of in ((out, want, tensors), (final, after, tensors[1:])):
        grads = [torch.autograd.grad(x.double().square().sum(), inputs_of, retain_graph=True) for x in (a, b)]
        assert all(error(x, y) <= 2e-5 for x, y in zip(*grads, strict=True))


def test_padding_that_is_not_a_number_changes_nothing():
    mask = torch.rand(1, 24) < 0.6
    tensors = inputs(length=24)
    spoiled = [x.detach().masked_fill(~mask[:, None, :, None], torch.nan).requires_grad_() for x in tensors[:3]]
    out, _ = fused(*spoiled, tensors[3], None, mask, None, *CHUNKWISE, 0.3, 16, False, torch.float32)
    assert error(out, definition(*tensors, None, 0.3, mask, None)[0]) <= 1e-5
    grads = torch.autograd.grad(out.sum(), [*spoiled, tensors[3]])
    assert all(g.isfinite().all() for g in grads)
    assert all(not g[:, :, ~mask[0]].any() for g in grads[:3])


def test_sums_beyond_the_range_of_float16():
    q, k, v = (torch.full((1, 1, 40, 16), x, dtype=torch.float16) for x in (1e-3, 60.0, 60.0))
    out, final = fused(q, k, v, torch.zeros(1), None, None, None, *CHUNKWISE, 1.0, 16, True, torch.float16)
    assert final.max() > 7e4
    want, _ = definition(q, k, v, torch.zeros(1), None, 1.0, None, None)
    assert error(out, want) <= 4e-3


def test_gradients_of_float32_sums_of_float16_may_be_small():
    tensors = inputs(length=20, dtype=torch.float16)
    out, _ = fused(*tensors, None, None, None, *CHUNKWISE, 0.3, 16, False, torch.float32)
    want, _ = definition(*tensors, None, 0.3, None, None)
    assert out.dtype == torch.float32
    grads = [torch.autograd.grad(x.double().sum() * 1e-5, tensors[3]) for x in (out, want)]
    assert error(*(g[0] for g in grads)) <= 1e-3


def test_no_tokens():
    tensors = inputs(length=0)
    state = torch.randn(1, 2, 8, 8, requires_grad=True)
    out, final = fused(*tensors, state, None, None, *CHUNKWISE, 0.3, None, True, torch.float32)
    assert out.shape == (1, 2, 0, 8)
    assert torch.equal(final, state)
    assert torch.equal(torch.autograd.grad(final.sum(), state)[0], torch.ones_like(state))


@pytest.mark.parametrize(
    "options", [{"decay_norm": True}, {"score_norm": True}, {"decay_norm": True, "score_norm": True}]
)
def test_retain_normalises(options):
    tensors = inputs(length=20, dtype=torch.bfloat16)
    got = retain(*tensors, backend="triton", chunk_size=16, **options)
    assert error(got, oracle.retain(*tensors, **options)) <= 4e-3


def test_a_sequence_goes_on_in_steps():
    q, k, v, log_decay = (
        x.detach() for x in inputs(batch=2, heads=4, kv_heads=2, length=5, value_dim=19, decays=(-0.1, -0.2, 0.0, -1.0))
    )
    mask = torch.tensor([[True] * 5, [True, True, True, False, True]])
    part = [x[:, :, :3] for x in (q, k, v)]
    outs, state = retain(*part, log_decay, mask=mask[:, :3], backend="triton", return_state=True)
    outs = [outs]
    for n in (3, 4):
        kv = state.kv
        token = [x[:, :, n : n + 1] for x in (q, k, v)]
        outs.append(step(*token, log_decay, state, mask=mask[:, n : n + 1], backend="triton"))
        assert state.kv is kv  # in place
    want, after = definition(q, k, v, log_decay, None, 8**-0.5, mask, None)
    assert error(torch.cat(outs, 2), want) <= 1e-5
    assert error(state.kv, after) <= 1e-5
    assert state.time.tolist() == [5, 4]


def test_a_step_overwrites_a_state_that_is_not_contiguous():
    q, k, v, log_decay = (x.detach() for x in inputs(length=1))
    kv = torch.randn(1, 2, 8, 8).transpose(2, 3)
    before = kv.clone()
    step(q, k, v, log_decay, RetentionState(kv, torch.zeros(1, dtype=torch.long)), backend="triton")
    assert error(kv, log_decay.exp()[:, None, None] * before + k.mT @ v) <= 1e-5


def test_it_is_chosen_in_the_interpreter():
    q, k, v, log_decay = inputs(length=100)
    assert "chunkwise  triton     can, and is chosen" in retention.explain(q, k, v, log_decay)


def test_one_node_for_export_and_right_fake_outputs():
    tensors = [x.detach() for x in inputs(length=20)]
    torch.library.opcheck(
        fused,
        (*tensors, None, None, None, *CHUNKWISE, 0.3, 16, True, torch.float32),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_it_compiles_to_one_graph_with_gradients():
    tensors = inputs(length=20)

    def run(q, k, v, log_decay):
        return retain(q, k, v, log_decay, backend="triton", form="chunkwise", chunk_size=16)

    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(x.sum(), tensors) for x in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_compiled_step_overwrites_its_state():
    q, k, v, log_decay = (x.detach() for x in inputs(length=1))
    plain, compiled = (retention.initial_state(1, 2, 8, 8) for _ in range(2))
    run = torch.compile(lambda *x: step(*x, backend="triton"), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(run(q, k, v, log_decay, compiled), step(q, k, v, log_decay, plain, backend="triton"))
    assert torch.equal(compiled.kv, plain.kv)
