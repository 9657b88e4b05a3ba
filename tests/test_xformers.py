"""The backend `xformers`: what it computes, what it refuses, and what it says of the library it leans on."""

import gc
import subprocess
import sys
import weakref
from itertools import pairwise

import cases
import oracle
import pytest
import torch
from fake_xformers import fake, hide
from hypothesis import given, settings
from hypothesis import strategies as st

import retention
from retention import BackendError, MultiScaleRetention, RetentionState, backends, explain, retain
from retention.__main__ import report
from retention.backends.xformers import XFormers, chunkwise, parallel
from retention.backends.xformers.operator import block_sparse
from retention.xformers import library

LOG_DECAY = torch.tensor([-0.01, -0.3], dtype=torch.float64)
X = dict(backend="xformers")


def qkv(batch=2, heads=2, length=70, key_dim=4, value_dim=3, kv_heads=None, dtype=torch.float64):
    shapes = (heads, key_dim), (kv_heads or heads, key_dim), (kv_heads or heads, value_dim)
    return [torch.randn(batch, h, length, d, dtype=dtype) for h, d in shapes]


@pytest.fixture
def small(registry):
    """The backend with blocks so small that short inputs have several."""
    retention.register("small", XFormers(block_size=16))
    return "small"


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60)
@given(cases.calls(), st.integers(1, 4))
def test_several_blocks_agree_with_the_definition(small, case, times):
    (q, k, v, log_decay), options = case
    q, k, v = (torch.cat([x] * times, 2) for x in (q, k, v))
    if "mask" in options:
        options["mask"] = torch.cat([options["mask"]] * times, 1)
    if "cu_seqlens" in options:
        cu_seqlens = options["cu_seqlens"]
        options["cu_seqlens"] = torch.cat([cu_seqlens, cu_seqlens[-1:] * times])
    if "grid" in options:
        options["grid"] = options["grid"][0] * times, options["grid"][1]
    want = oracle.retain(q, k, v, log_decay, **options)
    for form in ("parallel",) if "grid" in options else ("chunkwise", "parallel"):
        got = retain(q, k, v, log_decay, **options, backend=small, form=form)
        assert got.dtype == v.dtype
        assert cases.deviation(got, want) <= cases.BOUNDS[got.dtype], form


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(st.integers(0, 70), max_size=3), st.sampled_from([16, 17, 64]), st.booleans())
def test_a_state_carries_over_at_any_cut(cuts, chunk_size, score_norm):
    q, k, v = qkv(kv_heads=1)
    options = {"chunk_size": chunk_size, "score_norm": score_norm, "decay_norm": True}
    want, whole = retain(q, k, v, LOG_DECAY, return_state=True, **options)
    cuts, parts, state = [0, *sorted(cuts), 70], [], None
    for start, end in pairwise(cuts):
        part = [x[:, :, start:end] for x in (q, k, v)]
        out, state = retain(*part, LOG_DECAY, state=state, return_state=True, **X, **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.kv, whole.kv, rtol=1e-10, atol=1e-12)


def test_packed_segments_have_their_own_states_also_empty_ones():
    q, k, v = qkv(batch=1)
    cu_seqlens = torch.tensor([0, 0, 3, 40, 40, 70])
    state = RetentionState(torch.randn(5, 2, 4, 3, dtype=torch.float64), torch.arange(5))
    options = dict(cu_seqlens=cu_seqlens, state=state, return_state=True)
    (got, after), (want, other) = (
        retain(q, k, v, LOG_DECAY, **options, backend=name) for name in ("xformers", "chunked")
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after.kv, other.kv, rtol=1e-10, atol=1e-12)


def test_xformers_own_sequence_info_is_cu_seqlens():
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    q, k, v = qkv(batch=1)
    packed = BlockDiagonalCausalMask.from_seqlens([30, 1, 39]).q_seqinfo.seqstart
    got = retain(q, k, v, LOG_DECAY, cu_seqlens=packed, **X)
    alone = [retain(*(x[:, :, a:b] for x in (q, k, v)), LOG_DECAY) for a, b in ((0, 30), (30, 31), (31, 70))]
    torch.testing.assert_close(got, torch.cat(alone, 2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["chunkwise", "parallel"])
def test_not_even_a_nan_gets_into_another_segment_or_row(form, small):
    q, k, v = qkv(batch=1)
    cu_seqlens = torch.tensor([0, 20, 45, 70])
    want = retain(q, k, v, LOG_DECAY, cu_seqlens=cu_seqlens, backend=small, form=form)
    for x in (q, k, v):
        x[:, :, 20:45] = torch.nan
    got = retain(q, k, v, LOG_DECAY, cu_seqlens=cu_seqlens, backend=small, form=form)
    assert torch.equal(got[:, :, :20], want[:, :, :20])
    assert torch.equal(got[:, :, 45:], want[:, :, 45:])
    rows = retain(*(x.view(1, 2, 7, 10, -1)[0].transpose(0, 1) for x in (q, k, v)), LOG_DECAY, backend=small, form=form)
    assert rows[5:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["chunkwise", "parallel"])
def test_half_precision_is_summed_in_float32(form, dtype):
    q, k, v = qkv(length=300, key_dim=32, value_dim=32, kv_heads=1, dtype=dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = retain(*exact, LOG_DECAY)
    got = retain(*(x.requires_grad_() for x in (q, k, v)), LOG_DECAY, form=form, **X)
    assert cases.deviation(got, want) <= 4e-3
    weight = torch.randn_like(want).to(dtype)
    wanted = torch.autograd.grad(want, exact, weight.double())
    for a, b in zip(torch.autograd.grad(got, (q, k, v), weight), wanted, strict=True):
        assert cases.deviation(a, b) <= 4e-3


def test_autocast_leaves_the_sums_in_float32():
    q, k, v = qkv(dtype=torch.float32)
    for form in ("chunkwise", "parallel"):
        want = retain(q, k, v, LOG_DECAY, form=form, **X)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(retain(q, k, v, LOG_DECAY, form=form, **X), want)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("chunkwise", {"with_state": True}),
        ("chunkwise", {"with_state": True, "score_norm": True, "decay_norm": True}),
        ("chunkwise", {"with_state": True, "mask": torch.arange(35) % torch.tensor([[7], [2]]) > 0}),
        ("chunkwise", {"with_state": True, "cu_seqlens": torch.tensor([0, 18, 18, 35])}),
        ("chunkwise", {"causal": False, "score_norm": True}),
        ("chunkwise", {"causal": False, "cu_seqlens": torch.tensor([0, 18, 18, 35])}),
        ("parallel", {}),
        ("parallel", {"causal": False, "score_norm": True, "decay_norm": True}),
        ("parallel", {"causal": False, "mask": torch.arange(35) % torch.tensor([[7], [2]]) > 0}),
        ("parallel", {"cu_seqlens": torch.tensor([0, 18, 18, 35])}),
        ("parallel", {"causal": False, "grid": (7, 5), "decay_norm": True}),
    ],
    ids=str,
)
def test_gradients_of_everything_are_those_of_finite_differences(form, options, small):
    options = dict(options)
    with_state, packed = options.pop("with_state", False), options.get("cu_seqlens")
    rows = 2 if packed is None else len(packed) - 1
    inputs = qkv(batch=2 if packed is None else 1, kv_heads=1, length=35, key_dim=1, value_dim=2)
    inputs = [*inputs, LOG_DECAY.clone()]
    if with_state:
        inputs += [torch.randn(rows, 2, 1, 2, dtype=torch.float64), torch.randn(rows, 2, 1, dtype=torch.float64)]

    def run(q, k, v, log_decay, kv=None, k_sum=None):
        k_sum = k_sum if options.get("score_norm") else None
        state = None if kv is None else RetentionState(kv, torch.full((rows,), 2), k_sum)
        got = retain(q, k, v, log_decay, state=state, return_state=with_state, backend=small, form=form, **options)
        return (got[0], got[1].kv) if with_state else got

    if not options.get("score_norm"):
        inputs = inputs[:5]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at it itself
def test_the_operator_keeps_torchs_contract():
    q, k, v = (x.requires_grad_() for x in qkv(kv_heads=1, length=35))
    kv = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 35) < 0.5
    decay = LOG_DECAY.clone().requires_grad_()
    for form, state, padding, causal, grid in (
        ("chunkwise", kv, None, True, ()),
        ("chunkwise", None, mask, False, ()),
        ("parallel", None, mask, True, ()),
        ("parallel", None, None, False, (7, 5)),
    ):
        options = (form, 16, 0.5, causal, grid, 0.0, state is not None, q.dtype)
        torch.library.opcheck(block_sparse, (q, k, v, decay, state, padding, None, *options))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_kept_stays_bounded_over_many_lengths(monkeypatch):
    monkeypatch.setattr(parallel.patterns, "limit", 4 * 2**20)
    seen = []
    for length in range(1, 400, 7):
        q, k, v = qkv(batch=1, length=length, dtype=torch.float32)
        for form in ("chunkwise", "parallel"):
            retain(q, k, v, LOG_DECAY, form=form, **X)
        seen += [weakref.ref(p.decay) for p in parallel.patterns.kept.values()]
        assert 0 < parallel.patterns.nbytes() <= 4 * 2**20
    gc.collect()
    alive = {id(ref()) for ref in seen} - {id(None)}
    assert len(alive) == len(parallel.patterns.kept)
    assert chunkwise._diagonal.cache_info().maxsize is not None


def test_a_pattern_larger_than_the_bound_is_used_and_not_kept(monkeypatch):
    monkeypatch.setattr(parallel.patterns, "limit", 100)
    q, k, v = qkv(batch=1)
    got = retain(q, k, v, LOG_DECAY, form="parallel", **X)
    torch.testing.assert_close(got, retain(q, k, v, LOG_DECAY))
    assert not parallel.patterns.kept


def test_what_inference_made_serves_training():
    chunkwise._diagonal.cache_clear()
    parallel.patterns.kept.clear()
    q, k, v = qkv()
    for form in ("chunkwise", "parallel"):
        with torch.inference_mode():
            want = retain(q, k, v, LOG_DECAY, form=form, **X)
        got = retain(q.requires_grad_(), k, v, LOG_DECAY.clone().requires_grad_(), form=form, **X)
        torch.testing.assert_close(got, want)
        got.sum().backward()
    assert not any(p.decay.is_inference() for p in parallel.patterns.kept.values())


# --- eps --------------------------------------------------------------------------------------------------------------


def test_eps_leaves_out_blocks_that_have_decayed_and_no_others(small):
    q, k, v = qkv(length=320, dtype=torch.float32)
    retention.register("rough", XFormers(eps=1e-4, block_size=16))
    want, got = (retain(q, k, v, LOG_DECAY, backend=name, form="parallel") for name in (small, "rough"))
    plan = parallel.Plan(q, k, LOG_DECAY, None, 16, 1.0, True, (), 1e-4)
    slow, fast = (len(plan.pattern(heads).apart) for heads in plan.groups)
    assert slow == 20 * 21 // 2, "0.99^320 is above 1e-4"
    assert fast == 20 + 19 + 18, (
        "0.74^n is above 1e-4 up to n = 30: the own block, the one before, the next begins at 17"
    )
    assert torch.equal(got[:, 0], want[:, 0])
    assert 1e-7 < cases.deviation(got[:, 1], want[:, 1]) < 1e-3


@pytest.mark.parametrize("options", [dict(eps=-0.1), dict(eps=1), dict(block_size=8)], ids=str)
def test_options_out_of_range_are_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} must be at least .*got {name} {options[name]}"):
        XFormers(**options)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"form": "recurrent"}, "has the forms parallel and chunkwise, not recurrent"),
        ({"form": "chunkwise", "causal": False, "grid": (7, 10)}, "the chunkwise form has no decay on a grid"),
        ({"form": "parallel", "return_state": True}, "the parallel form has no state; use chunkwise"),
        ({"form": "chunkwise", "chunk_size": 15}, "chunks have at least 16 tokens, not 15"),
    ],
    ids=str,
)
def test_refusals(options, reason):
    with pytest.raises(BackendError, match=reason):
        retain(*qkv(), LOG_DECAY, **options, **X)


def test_transforms_are_refused():
    q, k, v = qkv()
    with pytest.raises(BackendError, match="xformers, chunkwise: has no rule for torch.func transforms"):
        torch.func.grad(lambda q: retain(q, k, v, LOG_DECAY, **X).sum())(q)


def test_auto_never_takes_it():
    for form in cases.FORMS:
        call = backends.Call(1, 8, 8, 4096, 64, 128, torch.float32, "cpu", 1.0, torch.float32, form=form)
        assert backends.choose(call)[0] is not backends._backends["xformers"]


# --- torch.compile ----------------------------------------------------------------------------------------------------

FRESH = """
import sys, torch, retention
assert "xformers" not in sys.modules
layer = retention.MultiScaleRetention(16, 2, backend="xformers", learnable_decay=True)
x = torch.randn(2, 40, 16, requires_grad=True)
run = torch.compile(layer, fullgraph=True, backend="aot_eager")
with torch.autocast("cpu", torch.bfloat16):  # nor may the probe see this
    run(x).sum().backward()
assert "xformers" in sys.modules
retention.set_backend(layer, "auto")
grad, x.grad = x.grad, None
with torch.autocast("cpu", torch.bfloat16):
    layer(x).sum().backward()
torch.testing.assert_close(grad, x.grad, rtol=0.02, atol=0.02)
"""


@pytest.mark.slow
def test_the_first_use_may_be_inside_a_compiled_graph():
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", FRESH], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"mask": torch.arange(40) > torch.tensor([[2], [0]])}, {"form": "parallel"}], ids=str
)
def test_a_layer_around_it_compiles_to_one_graph_and_does_not_recompile(options):
    layer = MultiScaleRetention(16, 2, **X)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for _ in range(3):
        x = torch.randn(2, 40, 16)
        torch.testing.assert_close(compiled(x, **options), layer(x, **options))
    assert len(graphs) == 1


# --- the library ------------------------------------------------------------------------------------------------------


def wrong_product(real):
    def masked_matmul(a, b, mask):
        return real.masked_matmul(a * 1.1, b, mask)

    return fake(masked_matmul=masked_matmul, BlockSparseTensor=real.BlockSparseTensor)


def no_gradient(real):
    def masked_matmul(a, b, mask):
        raise NotImplementedError("no kernel for this device")

    return fake(masked_matmul=masked_matmul, BlockSparseTensor=real.BlockSparseTensor)


BROKEN = {
    "missing": (lambda real: {"xformers": None}, ModuleNotFoundError, 'not installed: pip install "xformers==0.0.35"'),
    "too old": (
        lambda real: fake(masked_matmul=real.masked_matmul),
        ImportError,
        "cannot import name 'BlockSparseTensor'.*0.0.35 was tested: pip install --force-reinstall",
    ),
    "too new": (
        lambda real: fake(BlockSparseTensor=real.BlockSparseTensor),
        ImportError,
        "cannot import name 'masked_matmul'.*pip install --force-reinstall",
    ),
    "broken": (no_gradient, NotImplementedError, "does not work.*no kernel for this device.*pip install"),
    "wrong": (wrong_product, ArithmeticError, "products, or their gradients, are wrong.*pip install"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_an_unusable_xformers_is_an_error_with_cause_and_cure(case, unprobed):
    make, cause, message = BROKEN[case]
    real = library.sparse()
    library.sparse.cache_clear()
    for name, module in make(real).items():
        unprobed.setitem(sys.modules, name, module)
    inputs = (*qkv(), LOG_DECAY)
    with pytest.raises(BackendError, match=f"(?s){message}") as error:
        retain(*inputs, **X)
    assert isinstance(error.value.__cause__, cause)
    assert "cannot: " in explain(*inputs, **X)
    assert "found" not in explain(*inputs, **X)
    assert "pip install" in report()
    torch.testing.assert_close(retain(*inputs), retain(*inputs, backend="eager"))


def test_an_xformers_that_fails_to_import_in_its_own_way_is_no_exception(unprobed, tmp_path):
    package = tmp_path / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libsomething.so: cannot open')")
    hide(unprobed)
    unprobed.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match="OSError: libsomething.so: cannot open.*pip install") as error:
        retain(*qkv(), LOG_DECAY, **X)
    assert isinstance(error.value.__cause__, OSError)
