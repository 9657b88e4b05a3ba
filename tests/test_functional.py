"""`retain` and `step`: every form, backend and option gives the same numbers, those of the definition."""

import math
from itertools import pairwise

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import retention
from retention import BackendError, RetentionState, ShapeError, functional, initial_state, retain, step
from retention.arguments import describe
from retention.call import Inputs, Options

LOG_DECAY = torch.tensor([-0.01, -0.3], dtype=torch.float64)


def qkv(batch=2, heads=2, length=10, key_dim=4, value_dim=3, kv_heads=None, dtype=torch.float64):
    kv_heads = kv_heads or heads
    shapes = (heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)
    return [torch.randn(batch, h, length, d, dtype=dtype) for h, d in shapes]


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=150)
@given(cases.calls())
def test_every_form_and_backend_agrees_with_the_definition(case):
    args, options = case
    want = oracle.retain(*args, **options)
    ways = cases.runnable(args, options)
    assert {way["form"] for way in ways} == {"parallel", "chunkwise"} | ({"recurrent"} if options["causal"] else set())
    for way in ways:
        got = retain(*args, **options, **way)
        assert got.dtype == args[2].dtype
        assert cases.deviation(got, want) <= cases.BOUNDS[got.dtype], way


@settings(max_examples=80)
@given(cases.calls(causal=True, kinds=("dense", "masked")), st.data())
def test_a_sequence_may_be_cut_anywhere_and_each_part_run_anyhow(case, data):
    args, options = case
    mask = options.pop("mask", None)
    (q, k, v, log_decay), length = args, args[0].shape[2]
    want = oracle.retain(*args, mask=mask, **options)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=4))), length]
    state, parts = None, []
    for start, end in pairwise(cuts):
        part = slice(start, end)
        options["mask"] = None if mask is None else mask[:, part]
        options["state"] = state
        inputs = (*(x[:, :, part] for x in (q, k, v)), log_decay)
        way = data.draw(st.sampled_from(cases.runnable(inputs, {**options, "return_state": True})))
        out, state = retain(*inputs, **options, **way, return_state=True)
        parts.append(out)
    assert cases.deviation(torch.cat(parts, 2), want) <= cases.BOUNDS[q.dtype]
    assert state.time.tolist() == ([length] * len(q) if mask is None else mask.sum(1).tolist())


@pytest.mark.slow
@settings(max_examples=40)
@given(cases.calls(causal=True, kinds=("dense",), dtypes=(torch.float32, torch.float64)))
def test_the_state_is_the_decayed_sum_of_outer_products(case):
    (q, k, v, log_decay), options = case
    want = oracle.state(k, v, log_decay, heads=q.shape[1])
    options["return_state"] = True
    for way in cases.runnable((q, k, v, log_decay), options):
        _, state = retain(q, k, v, log_decay, **options, **way)
        assert cases.deviation(state.kv, want) <= cases.BOUNDS[q.dtype]
        assert (state.k_sum is not None) == options["score_norm"]


def test_packed_segments_continue_from_their_own_states():
    q, k, v = qkv(batch=1, length=12)
    first, second = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 2, 5, 5])
    for form in cases.FORMS:
        options = {"form": form, "score_norm": True, "decay_norm": True}
        _, state = retain(*(x[:, :, :7] for x in (q, k, v)), LOG_DECAY, cu_seqlens=first, return_state=True, **options)
        rest = [x[:, :, 7:] for x in (q, k, v)]
        out, state = retain(*rest, LOG_DECAY, cu_seqlens=second, state=state, return_state=True, **options)
        tokens = [0, 1, 2, 7, 8]  # what the first segment consists of
        alone = oracle.retain(*(x[:, :, tokens] for x in (q, k, v)), LOG_DECAY, score_norm=True, decay_norm=True)
        torch.testing.assert_close(out[:, :, :2], alone[:, :, 3:], rtol=1e-10, atol=1e-12)
        assert state.time.tolist() == [5, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("form", cases.FORMS)
def test_long_inputs_stay_within_the_float32_bound(form):
    length, heads = (8192, 2) if form == "chunkwise" else (2048, 2)
    q, k, v = qkv(batch=1, heads=heads, length=length, key_dim=16, value_dim=8, dtype=torch.float32)
    log_decay = torch.tensor(retention.decay.log_decays("paper", 9)[::8], dtype=torch.float32)
    got = retain(q, k, v, log_decay, form=form)
    want = retain(q.double(), k.double(), v.double(), log_decay.double(), form="chunkwise")
    assert cases.deviation(got, want) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(90, 91), (3, 2730)], ids=str)
def test_large_grids_stay_within_the_float32_bound(grid):
    q, k, v = qkv(batch=1, length=math.prod(grid), key_dim=16, value_dim=8, dtype=torch.float32)
    log_decay = torch.tensor(retention.decay.log_decays("paper", 9)[::8], dtype=torch.float32)
    got = retain(q, k, v, log_decay, causal=False, grid=grid)
    rows, columns = torch.cartesian_prod(*(torch.arange(n) for n in grid)).T
    some = torch.arange(0, q.shape[2], 97)
    distance = (rows[some, None] - rows).abs() + (columns[some, None] - columns).abs()
    decay = (log_decay.double()[:, None, None] * distance).exp()
    want = (q[:, :, some].double() @ k.double().mT * decay * 16**-0.5) @ v.double()
    assert cases.deviation(got[:, :, some], want) <= 1e-4


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_inputs_and_outputs_only(form, dtype):
    q, k, v = qkv(length=300, key_dim=32, value_dim=32, dtype=dtype)
    want = retain(q.double(), k.double(), v.double(), LOG_DECAY, form="parallel")
    assert cases.deviation(retain(q, k, v, LOG_DECAY, form=form), want) <= 4e-3


def test_autocast_leaves_the_sums_in_float32():
    q, k, v = qkv(length=100, dtype=torch.float32)
    for form in cases.FORMS:
        want = retain(q, k, v, LOG_DECAY, form=form)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(retain(q, k, v, LOG_DECAY, form=form), want)


def test_absolute_score_norm_is_the_definition_and_has_the_parallel_form_only():
    q, k, v = qkv(kv_heads=1)
    mask = torch.rand(2, 10) < 0.7
    for options in ({}, {"decay_norm": True, "mask": mask}, {"causal": False}):
        want = oracle.retain(q, k, v, LOG_DECAY, score_norm="absolute", **options)
        got = retain(q, k, v, LOG_DECAY, score_norm="absolute", **options)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="'absolute' exists only in the parallel form.*got form 'chunkwise'"):
        retain(q, k, v, LOG_DECAY, score_norm="absolute", form="chunkwise")


@pytest.mark.parametrize("score_norm", [True, "absolute"])
def test_only_the_absolute_score_norm_has_an_upper_bound(score_norm):
    """torchscale divides by 5e4 at most."""
    q, k, v = qkv()
    want = oracle.retain(1e6 * q, k, v, LOG_DECAY, score_norm=score_norm)
    got = retain(1e6 * q, k, v, LOG_DECAY, score_norm=score_norm)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    if score_norm == "absolute":  # divided by all of sum |R|, no output would be larger than the largest value
        assert got.abs().max() > 2 * v.abs().max()


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay_norm", [False, True])
@pytest.mark.parametrize("score_norm", [False, True, "absolute"])
@pytest.mark.parametrize(
    "options", [{}, {"mask": torch.arange(10) > torch.tensor([[2], [0]])}, {"causal": False, "grid": (5, 2)}], ids=str
)
def test_retain_is_the_scores_times_the_values(options, score_norm, decay_norm):
    q, k, v = qkv(kv_heads=1)
    norms = dict(score_norm=score_norm, decay_norm=decay_norm)
    scores = functional.scores(3 * q, k, LOG_DECAY, **options, **norms)
    torch.testing.assert_close(scores @ v, retain(3 * q, k, v, LOG_DECAY, **options, **norms))


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("pad", ["left", "right", "holes"])
def test_a_padded_row_is_the_same_row_alone(form, pad):
    q, k, v = qkv(batch=1, length=9)
    places = {"left": range(4, 13), "right": range(9), "holes": (0, 2, 3, 5, 6, 9, 10, 11, 12)}[pad]
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[0, list(places)] = True
    mask[1, :2] = True
    padded = [torch.full((2, 2, 13, x.shape[-1]), float("nan"), dtype=x.dtype) for x in (q, k, v)]
    for x, y in zip(padded, (q, k, v), strict=True):
        x[1] = 7.0
        x[0, :, list(places)] = y[0]
    options = {"decay_norm": True, "score_norm": True, "form": form, "return_state": True}
    alone, state_alone = retain(q, k, v, LOG_DECAY, **options)
    out, state = retain(*padded, LOG_DECAY, mask=mask, **options)
    torch.testing.assert_close(out[:1, :, list(places)], alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state[0].kv, state_alone.kv, rtol=1e-10, atol=1e-12)
    assert torch.equal(out[~mask[:, None].expand(2, 2, 13)], torch.zeros_like(out[~mask[:, None].expand(2, 2, 13)]))
    assert state.time.tolist() == [9, 2]


@pytest.mark.parametrize("form", cases.FORMS)
def test_nothing_leaks_between_segments_or_from_the_future(form):
    q, k, v = qkv(batch=1, length=20)
    cu_seqlens = torch.tensor([0, 6, 20], dtype=torch.int32)
    before = retain(q, k, v, LOG_DECAY, cu_seqlens=cu_seqlens, form=form, chunk_size=4)
    for x in (q, k, v):
        x[:, :, :6] += 1
        x[:, :, 15:] += 1
    after = retain(q, k, v, LOG_DECAY, cu_seqlens=cu_seqlens, form=form, chunk_size=4)
    assert torch.equal(before[:, :, 6:15], after[:, :, 6:15])


@pytest.mark.parametrize("form", cases.FORMS)
def test_a_nan_stays_in_its_own_batch_row(form):
    q, k, v = qkv(batch=3)
    k[1, 0, 4, 2] = torch.nan
    out = retain(q, k, v, LOG_DECAY, form=form, chunk_size=4)
    assert out[1].isnan().any()
    assert not out[::2].isnan().any()


@pytest.mark.parametrize("form", cases.FORMS)
def test_decay_of_nothing_sums_and_of_everything_forgets(form):
    v = torch.randn(2, 1, 10, 3, dtype=torch.float64)
    ones = torch.ones(2, 1, 10, 1, dtype=torch.float64)
    torch.testing.assert_close(retain(ones, ones, v, torch.zeros(1), form=form), v.cumsum(2))
    torch.testing.assert_close(retain(ones, ones, v, torch.full((1,), -800.0), form=form), v)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("length", [0, 3])
def test_empty_batches_and_empty_lengths_work(batch, length):
    q, k, v = (x.requires_grad_() for x in qkv(batch=batch, length=length))
    log_decay = LOG_DECAY.clone().requires_grad_()
    mask = torch.ones(batch, length, dtype=torch.bool)
    for more in ({}, {"mask": mask}, {"return_state": True}, {"causal": False}):
        ways = cases.runnable((q, k, v, log_decay), {"score_norm": True, **more})
        assert {way["backend"] for way in ways} == {"chunked", "eager", "xformers"}
        for way in ways:
            found = retain(q, k, v, log_decay, score_norm=True, **more, **way)
            out, state = found if "return_state" in more else (found, None)
            assert out.shape == (batch, 2, length, 3)
            assert state is None or state.kv.shape == (batch, 2, 4, 3)
            (out.sum() + (0 if state is None else state.kv.sum())).backward()
            assert all(x.grad.isfinite().all() for x in (q, k, v, log_decay))


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 65])  # `auto` takes the parallel form, the chunkwise form
@pytest.mark.parametrize("options", [{}, {"mask": torch.arange(65) > 2}, {"causal": False}], ids=str)
def test_the_output_may_be_written_to_in_place(length, options):
    options = {key: x[None, :length] if key == "mask" else x for key, x in options.items()}
    tensors = *(x.requires_grad_() for x in qkv(batch=1, length=length)), LOG_DECAY
    for way in ({}, *cases.runnable(tensors, options)):
        want = torch.autograd.grad(2 * retain(*tensors, **options, **way).sum(), tensors[:3])
        out = retain(*tensors, **options, **way)
        out.mul_(2)
        for a, b in zip(torch.autograd.grad(out.sum(), tensors[:3]), want, strict=True):
            torch.testing.assert_close(a, b)


def test_out_dtype_float32_keeps_sums_that_half_precision_cannot_hold():
    q, k, v = (torch.full((1, 1, 500, 4), x, dtype=torch.float16) for x in (3.0, 10.0, 100.0))
    log_decay = torch.tensor([-1e-5])
    want = retain(*(x.double() for x in (q, k, v)), log_decay)
    for way in cases.runnable((q, k, v, log_decay), {"out_dtype": torch.float32}):
        got = retain(q, k, v, log_decay, out_dtype=torch.float32, **way)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    state = initial_state(1, 1, 4, 4)
    parts = [step(*(x[:, :, [i]] for x in (q, k, v)), log_decay, state, out_dtype=torch.float32) for i in range(20)]
    torch.testing.assert_close(torch.cat(parts, 2).double(), want[:, :, :20], rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("length", [33, 400])
def test_score_norm_in_float32_is_as_exact_as_its_sum(form, length):
    """What rounding does grows by sum |R| / max(|sum R|, 1), which is large where the scores cancel."""
    q, k, v = qkv(length=length, key_dim=16)
    q, k, v = (3 * x for x in (q, k, v))
    log_decay = torch.tensor([-1e-3, -0.1], dtype=torch.float64)
    scores = functional.scores(q, k, log_decay)
    worse = scores.abs().sum(-1, keepdim=True) / scores.sum(-1, keepdim=True).abs().clamp(min=1)
    want = retain(q, k, v, log_decay, score_norm=True)
    got = retain(q.float(), k.float(), v.float(), log_decay, score_norm=True, form=form)
    assert ((got - want).abs() <= 1e-6 * worse * (v.abs().max() + want.abs())).all()


@pytest.mark.parametrize("form", cases.FORMS)
def test_normalised_sums_may_exceed_half_precision(form):
    q, k, v = (torch.full((1, 1, 1500, 4), x, dtype=torch.float16) for x in (3.0, 10.0, 100.0))
    log_decay = torch.tensor([-1e-5])
    assert retain(q, k, v, log_decay, form=form).isinf().any()
    out = retain(q, k, v, log_decay, form=form, decay_norm=True, score_norm=True)
    torch.testing.assert_close(out, torch.full_like(out, 100.0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in its forward-mode rules
def test_transforms_go_to_a_backend_that_has_their_rules():
    q, k, v = qkv()
    tangent = torch.randn_like(q)
    got = torch.func.jvp(lambda q: retain(q, k, v, LOG_DECAY), (q,), (tangent,))[1]
    torch.testing.assert_close(got, retain(tangent, k, v, LOG_DECAY))  # linear in q
    gradient = torch.func.grad(lambda q: retain(q, k, v, LOG_DECAY).sum())(q)
    torch.testing.assert_close(gradient, torch.autograd.grad(retain(q.requires_grad_(), k, v, LOG_DECAY).sum(), q)[0])
    with pytest.raises(BackendError, match="has no rule for torch.func transforms"):
        torch.func.grad(lambda q: retain(q, k, v, LOG_DECAY, backend="chunked").sum())(q)


def test_vmap_over_log_decays_checks_their_values():
    q, k, v = qkv()
    decays = -torch.rand(3, 2, dtype=torch.float64)
    got = torch.vmap(lambda log_decay: retain(q, k, v, log_decay))(decays)
    for out, log_decay in zip(got, decays, strict=True):
        torch.testing.assert_close(out, retain(q, k, v, log_decay))
    with pytest.raises(ValueError, match="log_decay must be finite and at most 0"):
        torch.vmap(lambda log_decay: retain(q, k, v, log_decay))(-decays)


@pytest.mark.slow
def test_second_derivatives_are_eagers():
    q, k, v = (x.requires_grad_() for x in qkv(length=4, key_dim=2, value_dim=2))
    for form in ("parallel", "recurrent"):
        assert torch.autograd.gradgradcheck(lambda *x, form=form: retain(*x, LOG_DECAY, form=form), (q, k, v))
    (gradient,) = torch.autograd.grad(retain(q, k, v, LOG_DECAY, form="chunkwise").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="chunkwise_backward"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that is made in it."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)), 0)
        return made


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
def test_the_pairs_of_a_grid_are_never_there_all_at_once(form):
    side = 48
    q, k, v = qkv(batch=1, length=side * side, dtype=torch.float32)
    with Largest() as largest:
        retain(q, k, v, LOG_DECAY, causal=False, grid=(side, side), form=form)
    pairs = 2 * side**4
    assert largest.numel <= {"parallel": retention.backends.eager.SCORES_AT_ONCE, "chunkwise": pairs / 20}[form] < pairs


def test_a_new_state_shares_no_memory_with_the_old():
    q, k, v = (x[:, :, :0] for x in qkv())
    state = initial_state(2, 2, 4, 3, dtype=torch.float64)
    for form in cases.FORMS:
        _, new = retain(q, k, v, LOG_DECAY, state=state, form=form, return_state=True)
        assert new.kv.data_ptr() != state.kv.data_ptr()
    assert state[0:1].kv.data_ptr() != state.kv.data_ptr()


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"with_state": True},
        {"with_state": True, "score_norm": True, "decay_norm": True},
        {"causal": False, "score_norm": True, "decay_norm": True},
        {"mask": torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]]).bool(), "with_state": True},
        {"cu_seqlens": torch.tensor([0, 3, 3, 7]), "with_state": True},
        {"cu_seqlens": torch.tensor([0, 2, 7]), "causal": False},
        {"grid": (4, 3), "causal": False},
        {"grid": (1, 7), "causal": False, "score_norm": True, "decay_norm": True},
    ],
    ids=str,
)
def test_gradients_of_everything_are_those_of_finite_differences(form, options):
    options = dict(options)
    with_state = options.pop("with_state", False)
    if form == "recurrent" and not options.get("causal", True):
        with pytest.raises(BackendError, match="the recurrent form is causal"):
            retain(*qkv(), LOG_DECAY, form=form, causal=False)
        return
    packed = options.get("cu_seqlens")
    batch, rows = (2, 2) if packed is None else (1, len(packed) - 1)
    length = math.prod(options.get("grid", (7,)))
    inputs = [*qkv(batch=batch, heads=2, kv_heads=1, length=length, key_dim=2, value_dim=2), LOG_DECAY.clone()]
    if with_state:
        inputs += [torch.randn(rows, 2, 2, 2, dtype=torch.float64), torch.randn(rows, 2, 2, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]

    def run(q, k, v, log_decay, kv=None, k_sum=None):
        if kv is None:
            return retain(q, k, v, log_decay, form=form, chunk_size=3, **options)
        k_sum = k_sum if options.get("score_norm") else None
        state = RetentionState(kv, torch.full((rows,), 2), k_sum)
        out, new = retain(q, k, v, log_decay, form=form, chunk_size=3, state=state, return_state=True, **options)
        return (out, new.kv) if k_sum is None else (out, new.kv, new.k_sum)

    if with_state and not options.get("score_norm"):
        inputs.pop()
    # One projection of each Jacobian instead of each of its entries, and tighter than the default for that.
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-8, rtol=1e-6)


def test_the_gradient_of_log_decay_is_finite_at_both_ends():
    for form in cases.FORMS:
        log_decay = torch.tensor([0.0, -800.0], requires_grad=True)
        out = retain(*qkv(dtype=torch.float32), log_decay, form=form, decay_norm=True, chunk_size=4)
        out.sum().backward()
        assert log_decay.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [100, 2000])
def test_gradients_in_float32_match_those_in_float64(length, causal):
    """That of log_decay is the delicate one, a sum over all distances, and that of a fast decay more than others."""
    rates = torch.tensor([-1e-5, -1e-3, -0.03, -0.3, -2.0, -20.0], dtype=torch.float64)
    args = qkv(batch=1, heads=6, length=length, key_dim=8, value_dim=8)
    weight = torch.randn(1, 6, length, 8, dtype=torch.float64)

    def gradients(dtype, **way):
        inputs = [x.to(dtype).requires_grad_() for x in (*args, rates)]
        return torch.autograd.grad((retain(*inputs, causal=causal, **way) * weight.to(dtype)).sum(), inputs)

    want = gradients(torch.float64, form="parallel")
    for backend, form in (("chunked", "chunkwise"), ("xformers", "chunkwise"), ("eager", "parallel")):
        got = gradients(torch.float32, backend=backend, form=form)
        for a, b in zip(got[:3], want[:3], strict=True):
            assert cases.deviation(a, b) <= 1e-5
        assert ((got[3].double() - want[3]).abs() / want[3].abs().clamp(min=1)).max() <= 1e-5, backend


# --- step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
def test_step_is_retain_and_overwrites_the_state(dtype, norms):
    q, k, v = qkv(kv_heads=1, dtype=dtype)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 3] = False
    norm = {"decay_norm": norms, "score_norm": norms}
    want, final = retain(q, k, v, LOG_DECAY, mask=mask, return_state=True, **norm)
    state = initial_state(2, 2, 4, 3, score_norm=norms, dtype=dtype)
    memory = [x.data_ptr() for x in (state.kv, state.time)]
    parts = [
        step(*(x[:, :, n, None] for x in (q, k, v)), LOG_DECAY, state, mask=mask[:, n, None], **norm) for n in range(10)
    ]
    assert cases.deviation(torch.cat(parts, 2), want) <= cases.BOUNDS[dtype]
    torch.testing.assert_close(state.kv, final.kv)
    assert state.time.tolist() == [9, 10]
    assert memory == [x.data_ptr() for x in (state.kv, state.time)]


def test_step_refuses_what_it_cannot_do():
    q, k, v = (x[:, :, :1] for x in qkv())
    state = initial_state(2, 2, 4, 3, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"step takes one token.*got q \(2, 2, 10, 4\)"):
        step(*qkv(), LOG_DECAY, state)
    with pytest.raises(ValueError, match="step overwrites the state and has no gradient"):
        step(q.requires_grad_(), k, v, LOG_DECAY, state)
    with pytest.raises(TypeError, match="state must be a RetentionState; got NoneType"):
        step(q.detach(), k, v, LOG_DECAY, None)
    with pytest.raises(BackendError, match="does not overwrite a state"):
        step(q.detach(), k, v, LOG_DECAY, state, backend="chunked")
    assert not state.kv.any(), "a refused step must leave the state alone"


# --- torch.compile, torch.export --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"causal": False, "grid": (3, 2), "form": "chunkwise", "chunk_size": 4},
        {"mask": torch.arange(10) > torch.tensor([[2], [0]])},
    ],
    ids=str,
)
def test_compiles_to_one_graph_with_gradients(options):
    q, k, v = (x.requires_grad_() for x in qkv(length=math.prod(options.get("grid", (10,)))))
    log_decay = LOG_DECAY.clone().requires_grad_()

    def run(q, k, v, log_decay):
        return retain(q, k, v, log_decay, decay_norm=True, score_norm=True, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k, v, log_decay), run(q, k, v, log_decay)
    torch.testing.assert_close(got, want)
    inputs = (q, k, v, log_decay)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("borders", [[0, 6, 9], [1, 6, 10], [0, 8, 6, 10], [0, 12, 10], [-4, 10]], ids=str)
def test_a_compiled_call_refuses_borders_that_do_not_fit(borders):
    tensors = *qkv(batch=1), LOG_DECAY
    compiled = torch.compile(lambda *x: retain(*x[:4], cu_seqlens=x[4]), fullgraph=True, backend="aot_eager")
    sound = torch.tensor([0, 6, 10])
    torch.testing.assert_close(compiled(*tensors, sound), retain(*tensors, cu_seqlens=sound))
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, not fall, and end at the length 10"):
        compiled(*tensors, torch.tensor(borders))


@pytest.mark.slow
def test_a_compiled_call_refuses_log_decays_above_0():
    compiled = torch.compile(retain, fullgraph=True, backend="aot_eager")
    compiled(*qkv(), LOG_DECAY)
    for wrong in (-LOG_DECAY, LOG_DECAY * torch.nan):
        with pytest.raises(RuntimeError, match="log_decay must be finite and at most 0"):
            compiled(*qkv(), wrong)


@pytest.mark.parametrize("borders", [[0, 6, 9], [1, 6, 10], [0, 8, 6], [0, 12], [-4, 10], [3, 3]], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_operators_give_0_where_no_segment_is(borders, causal):
    """Whoever reaches them with borders that nobody checked."""
    q, k, v = (x.requires_grad_() for x in qkv(batch=1))
    inside = torch.zeros(10, dtype=torch.bool)
    inside[max(borders[0], 0) : max(min(max(borders[: i + 1]), 10) for i in range(len(borders)))] = True
    options = dict(mask=None, cu_seqlens=torch.tensor(borders))
    backends = retention.backends
    call = describe(Inputs(q, k, v, LOG_DECAY), Options(form="chunkwise", causal=causal))._replace(packed=True)
    for backend, form in (
        (backends.chunked, "chunkwise"),
        (backends.xformers, "chunkwise"),
        (backends.xformers, "parallel"),
    ):
        torch.empty(10_000, dtype=torch.float64).fill_(torch.nan)  # memory that is likely to be handed out again
        out, _ = backend.backend(call._replace(form=form), q, k, v, LOG_DECAY, None, **options)
        for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
            assert (x[:, :, ~inside] == 0).all()
            assert x.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at it itself
def test_the_operator_keeps_torchs_contract():
    q, k, v = (x.requires_grad_() for x in qkv(kv_heads=1))
    kv = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 10) < 0.5
    for state, padding, causal in ((kv, None, True), (None, mask, True), (None, None, False)):
        args = (q, k, v, LOG_DECAY.clone().requires_grad_(), state, padding, None, 0.5, causal, 4, causal, q.dtype)
        torch.library.opcheck(retention.backends.chunked.chunkwise, args)


@pytest.mark.parametrize("options", [{}, {"causal": False, "grid": (4, 16)}], ids=str)
def test_the_chunkwise_form_stores_its_inputs_only(options):
    q, k, v = (x.requires_grad_() for x in qkv(length=64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        retain(q, k, v, LOG_DECAY, chunk_size=8, form="chunkwise", **options)
    assert {x.data_ptr() for x in saved} <= {x.data_ptr() for x in (q, k, v, LOG_DECAY)}


# --- bad input: refused before any computation, naming the argument, what came and what was expected ------------------

Q, K, V = (torch.zeros(2, 2, 10, 4), torch.zeros(2, 2, 10, 4), torch.zeros(2, 2, 10, 3))
DECAY = torch.full((2,), -0.1)
STATE = initial_state(2, 2, 4, 3)
MASK = torch.ones(2, 10, dtype=torch.bool)

BAD = [
    ({"q": [1.0]}, TypeError, "q must be a tensor; got q list"),
    ({"q": Q[0]}, ShapeError, r"q must have 4 dimensions \(batch, heads, length, head_dim\); got q \(2, 10, 4\)"),
    ({"k": K[:, :, 1:]}, ShapeError, r"q and k must agree.*got q \(2, 2, 10, 4\), k \(2, 2, 9, 4\)"),
    ({"k": K[..., 1:]}, ShapeError, r"q and k must agree.*k \(2, 2, 10, 3\)"),
    ({"v": V[:1]}, ShapeError, r"k and v must agree.*v \(1, 2, 10, 3\)"),
    (
        {"q": Q.repeat(1, 2, 1, 1)[:, :3]},
        ShapeError,
        r"heads of q a multiple of those of k and v; got q \(2, 3, 10, 4\)",
    ),
    ({"v": V[..., :0]}, ShapeError, r"head dims must be at least 1.*v \(2, 2, 10, 0\)"),
    ({"q": Q.double()}, TypeError, "one dtype of torch.float16, .*; got q torch.float64, k torch.float32"),
    ({"q": Q.int(), "k": K.int(), "v": V.int()}, TypeError, "one dtype of .*; got q torch.int32"),
    ({"k": K.to("meta")}, ValueError, "on one device; got q cpu, k meta"),
    ({"log_decay": DECAY[:1]}, ShapeError, r"one value per head of q, \(2,\); got log_decay \(1,\)"),
    ({"log_decay": DECAY.half()}, TypeError, "log_decay must be float32 or float64.*got torch.float16"),
    (
        {"log_decay": -DECAY},
        ValueError,
        r"must be finite and at most 0; got log_decay \[0.1.*pass log\(gamma\)",
    ),
    ({"log_decay": DECAY * torch.nan}, ValueError, "log_decay must be finite and at most 0; got log_decay .*nan"),
    ({"log_decay": DECAY * torch.inf}, ValueError, "log_decay must be finite and at most 0; got log_decay .*-inf"),
    (
        {"out_dtype": torch.float16},
        ValueError,
        "out_dtype must be torch.float32, as v, or torch.float32; got out_dtype",
    ),
    ({"scale": float("inf")}, ValueError, "scale must be a finite number, or None; got scale inf"),
    ({"scale": "a"}, ValueError, "scale must be a finite number, or None; got scale 'a'"),
    ({"mask": MASK.long()}, TypeError, "mask must be a bool tensor.*got mask torch.int64"),
    ({"mask": [True]}, TypeError, "mask must be a bool tensor.*got mask list"),
    ({"mask": MASK[:, 1:]}, ShapeError, r"mask must be \(batch, length\) \(2, 10\) on cpu; got mask \(2, 9\)"),
    ({"cu_seqlens": torch.tensor([0, 10]), "mask": MASK}, ValueError, "mask and cu_seqlens exclude each other"),
    ({"cu_seqlens": torch.tensor([0, 10])}, ShapeError, r"cu_seqlens .* need a batch of 1; got a batch of 2"),
    (
        {"cu_seqlens": torch.tensor([0.0, 10.0])},
        TypeError,
        "cu_seqlens must be an int32 tensor; got cu_seqlens torch.float32",
    ),
    ({"cu_seqlens": torch.tensor(10)}, ShapeError, r"cu_seqlens must be \(segments \+ 1,\)"),
    ({"rows": 1, "cu_seqlens": torch.tensor([1, 10])}, ValueError, r"start at 0.*got cu_seqlens \[1, 10\]"),
    ({"rows": 1, "cu_seqlens": torch.tensor([0, 9])}, ValueError, r"end at the length 10; got cu_seqlens \[0, 9\]"),
    ({"rows": 1, "cu_seqlens": torch.tensor([0, 7, 4, 10])}, ValueError, r"not fall.*got cu_seqlens \[0, 7, 4, 10\]"),
    ({"state": STATE.kv}, TypeError, "state must be a RetentionState; got Tensor"),
    ({"state": STATE[:1]}, ShapeError, r"state.kv must be .* \(2, 2, 4, 3\); got state.kv \(1, 2, 4, 3\)"),
    ({"state": initial_state(2, 2, 5, 3)}, ShapeError, r"got state.kv \(2, 2, 5, 3\)"),
    (
        {"state": initial_state(2, 2, 4, 3, dtype=torch.float64)},
        TypeError,
        "state.kv must be torch.float32.*torch.float64",
    ),
    ({"state": initial_state(2, 2, 4, 3, score_norm=True)}, ValueError, "a state with a k_sum, score_norm False"),
    ({"state": STATE, "score_norm": True}, ValueError, "a state with no k_sum, score_norm True"),
    (
        {"state": RetentionState(STATE.kv, STATE.time[:1])},
        ShapeError,
        r"must be torch.int64 \(rows,\) \(2,\)",
    ),
    ({"state": STATE, "causal": False}, ValueError, "a state needs causal=True"),
    ({"return_state": True, "causal": False}, ValueError, "a state needs causal=True"),
    ({"grid": 10}, ValueError, r"grid must be \(rows, columns\), two integers of at least 1, or None; got grid 10"),
    ({"grid": (0, 10), "causal": False}, ValueError, r"two integers of at least 1, or None; got grid \(0, 10\)"),
    ({"grid": (3, 3), "causal": False}, ShapeError, r"rows \* columns = length 10; got grid \(3, 3\)"),
    ({"grid": (2, 5)}, ValueError, r"needs causal=False; got causal=True, grid \(2, 5\)"),
    ({"grid": (2, 5), "causal": False, "mask": MASK}, ValueError, "mask or cu_seqlens and grid exclude each other"),
    (
        {"grid": (2, 5), "causal": False, "form": "recurrent"},
        BackendError,
        r"grid \(2, 5\).*eager, recurrent: the recurrent form is causal",
    ),
    ({"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1, or None; got chunk_size 0"),
    (
        {"form": "quick"},
        ValueError,
        "form must be 'auto' or one of 'parallel', 'chunkwise', 'recurrent'; got form 'quick'",
    ),
    (
        {"backend": "fast"},
        ValueError,
        "backend must be 'auto' or one of triton, chunked, eager, xformers, fla; got backend 'fast'",
    ),
    ({"score_norm": "sum"}, ValueError, "score_norm must be False, True or 'absolute'; got score_norm 'sum'"),
    ({"backend": "eager", "form": "chunkwise"}, BackendError, "backend 'eager' cannot run retain.*not chunkwise"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: None)
def test_bad_input_gets_a_clear_error(change, error, message):
    change = dict(change)
    rows = change.pop("rows", 2)
    args = {"q": Q[:rows], "k": K[:rows], "v": V[:rows], "log_decay": DECAY, **change}
    with pytest.raises(error, match=f"(?s){message}"):
        retain(**args)
