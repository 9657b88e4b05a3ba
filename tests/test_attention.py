"""Softmax attention on xformers or torch: the same numbers, and the truth about which it was."""

import sys

import pytest
import torch

from retention import ShapeError
from retention.xformers.attention import attend, choose


def qkv(length=16, keys=16, heads=4, kv_heads=2, dim=8, value_dim=8, dtype=torch.float32):
    shapes = (heads, length, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    return [torch.randn(2, *shape, dtype=dtype) for shape in shapes]


def formula(q, k, v, causal=False, scale=None, mask=None):
    """A query at a time."""
    q, k, v = (x.double() for x in (q, k, v))
    rows = []
    for b, h, n in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        head = h // (q.shape[1] // k.shape[1])
        scores = k[b, head] @ q[b, h, n] * (q.shape[3] ** -0.5 if scale is None else scale)
        if causal:
            scores[n + 1 + k.shape[2] - q.shape[2] :] = -torch.inf
        if mask is not None:
            row = mask.expand(*q.shape[:3], k.shape[2])[b, h, n]
            scores = scores.masked_fill(~row, -torch.inf) if mask.dtype == torch.bool else scores + row
        rows.append(scores.softmax(0) @ v[b, head])
    return torch.stack(rows).view(*q.shape[:3], -1)


def seen(keys=16, length=16):
    """Some of the keys, each query at least one."""
    mask = torch.rand(2, 1, length, keys) < 0.5
    mask[..., 0] = True
    return mask


CALLS = {
    "plain": ({}, {}),
    "causal": ({}, {"causal": True}),
    "scaled": ({}, {"causal": True, "scale": 0.7}),
    "cached": ({"length": 5}, {"causal": True}),
    "one token": ({"length": 1}, {"causal": True}),
    "as many heads": ({"kv_heads": 4}, {"causal": True}),
    "one head": ({"kv_heads": 1}, {}),
    "wide values": ({"value_dim": 16, "kv_heads": 4}, {}),
    "mask": ({}, {"mask": seen}),
    "mask of odd length": ({"keys": 13, "length": 11}, {"mask": lambda: seen(13, 11)}),
    "added": ({"keys": 13}, {"mask": lambda: torch.randn(16, 13)}),
    "added to each head": ({}, {"mask": lambda: torch.randn(2, 4, 16, 16)}),
    "mask for all queries": ({}, {"mask": lambda: seen(length=1)}),
    "mask with gradients": ({"kv_heads": 4}, {"mask": seen}),
}


def drawn(case):
    sizes, options = CALLS[case]
    return qkv(**sizes), {name: x() if callable(x) else x for name, x in options.items()}


@pytest.mark.parametrize("case", CALLS)
def test_torch_runs_it_where_xformers_has_no_operator(case):
    tensors, options = drawn(case)
    out, label = attend(*tensors, **options)
    torch.testing.assert_close(out.double(), formula(*tensors, **options), rtol=1e-5, atol=1e-5)
    assert label == "sdpa"
    assert choose(*tensors, **options) == ("sdpa", "xformers has no attention operator for cpu")


@pytest.mark.slow
@pytest.mark.parametrize("learning", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("case", CALLS)
def test_xformers_runs_it_where_it_can_and_so_do_its_gradients(case, learning, operator):
    tensors, options = drawn(case)
    tensors = [x.requires_grad_(learning) for x in tensors]
    assert choose(*tensors, **options) == ("xformers cpuF", "")
    operator.clear()
    out, label = attend(*tensors, **options)
    assert label == "xformers cpuF"
    assert len(operator) == 1
    want = formula(*tensors, **options)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    if learning:
        weight = torch.randn_like(out)
        wanted = torch.autograd.grad(want, tensors, weight.double())
        for a, b in zip(torch.autograd.grad(out, tensors, weight), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_shared_heads_are_not_copied_in_inference(operator):
    q, k, v = qkv()
    attend(q, k, v, causal=True)
    given = operator[-1]
    assert given.key.shape == (2, 16, 2, 2, 8)
    assert given.key.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_a_query_that_sees_nothing_gives_no_nan(operator):
    q, k, v = qkv()
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[0, :, 3] = False
    out, _ = attend(q, k, v, mask=mask)
    assert out.isfinite().all()
    others = torch.arange(16) != 3
    torch.testing.assert_close(out[:, :, others], attend(q, k, v)[0][:, :, others])
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attend(q, k, v, mask=added)[0], out)


def test_what_xformers_cannot_do_is_said_and_done_by_torch(operator):
    tensors = qkv(dtype=torch.float64)
    assert choose(*tensors) == ("sdpa", "xformers has no operator for torch.float64")
    out, label = attend(*tensors)
    assert label == "sdpa"
    torch.testing.assert_close(out, formula(*tensors))
    learnt = torch.randn(16, 16, requires_grad=True)
    assert choose(*qkv(), mask=learnt) == ("sdpa", "the mask needs a gradient")
    out, _ = attend(*qkv(), mask=learnt)
    assert torch.autograd.grad(out.square().sum(), learnt)[0].any()
    refused = choose(*qkv(dtype=torch.bfloat16))
    assert refused.label == "sdpa"
    assert "`cpuF` is not supported because" in refused.why


def test_an_operator_that_has_no_way_back_is_not_taken_in_training(operator, unprobed):
    from xformers.ops import fmha

    assert attend(*qkv())[1] == "xformers cpuF"
    for place in (fmha.cutlass, fmha.ck):
        unprobed.setattr(place.BwOp, "SUPPORTED_MAX_K", 4)
    q, k, v = qkv()
    assert choose(q.requires_grad_(), k, v).label == "sdpa"
    assert "max(query.shape[-1], value.shape[-1]) > 4" in choose(q, k, v).why
    assert choose(q.detach(), k, v).label == "xformers cpuF"


def test_an_operator_that_computes_something_else_is_not_taken(operator, unprobed):
    from xformers.ops import fmha

    right = fmha.memory_efficient_attention
    unprobed.setattr(fmha, "memory_efficient_attention", lambda *args, **options: right(*args, **options) * 1.1)
    label, why = choose(*qkv())
    assert label == "sdpa"
    assert "its attention, or its gradient, is wrong" in why


def test_autocast_gives_what_it_gives_to_torch(operator):
    q, k, v = qkv()
    with torch.autocast("cpu", torch.float16):
        out, label = attend(q, k, v.half(), causal=True)
    assert label == "xformers cpuF"
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), formula(q, k, v, causal=True), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_compiled_it_is_torchs_in_one_graph(operator):
    tensors, labels = qkv(), []

    def run(q, k, v):
        out, label = attend(q, k, v, causal=True)
        labels.append(label)
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors).double(), formula(*tensors, causal=True), rtol=1e-5, atol=1e-5)
    assert labels == ["sdpa"]


def test_without_xformers_it_is_torchs(unprobed):
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        unprobed.delitem(sys.modules, name)
    unprobed.setitem(sys.modules, "xformers", None)
    assert attend(*qkv(), causal=True)[1] == "sdpa"
    assert "needs xformers, which is not installed" in choose(*qkv()).why


def test_arguments_that_do_not_fit_are_named():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="mask and causal exclude each other"):
        attend(q, k, v, causal=True, mask=seen())
    with pytest.raises(ShapeError, match="at least as many keys as queries; got q .2, 4, 16, 8."):
        choose(q, k[:, :, :7], v[:, :, :7], causal=True)
    with pytest.raises(ShapeError, match="with heads that divide those of q; got q .2, 3, 16, 8., k .2, 2, 16, 8."):
        attend(q[:, :3], k, v)
