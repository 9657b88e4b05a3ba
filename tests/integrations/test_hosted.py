"""The retention that takes the place of a softmax, against its formula: all pairs of tokens at once, in float64."""

import copy
import itertools

import pytest
import torch
import transformers
from cases import deviation
from hosts import SIZES, build, padded
from hypothesis import assume, settings
from hypothesis import given as drawn
from hypothesis import strategies as st

from retention import ShapeError
from retention.decay import log_linear, short
from retention.integrations.swap import (
    Heads,
    HostedRetention,
    Swapped,
    calibration,
    replace_attention,
    restore_attention,
)
from retention.integrations.swap.window import WindowState


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


# --- the function -----------------------------------------------------------------------------------------------------


def features_of(x, feature_map, head):
    """x (T, K) -> the features of each decay, (T, 2 K)."""
    parts = [z for weight in feature_map.weight[head] for z in (x @ weight, -x @ weight)]
    features = torch.cat(parts, -1).softmax(-1).chunk(len(parts) // 2, dim=-1)
    if feature_map.importance is None:
        return features
    return [f * (x @ u).exp()[:, None] for f, u in zip(features, feature_map.importance[head], strict=True)]


@torch.no_grad()
def test_a_replaced_layer_is_its_formula():
    """Scores of features above 0, times the decays, over their sum: what attention is, with other scores."""
    model = build("GPT2").double()
    layer = model.transformer.h[1].attn
    replace_attention(model, layers=[1], gate="silu")
    retention = layer.retention
    for parameter in retention.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 9, 32).double()
    q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in layer.c_attn(x).split(32, -1))
    n = torch.arange(9.0).double()
    log_decay = retention.decay(x.device, torch.float64).view(4, 2, 1, 1)
    decay = (log_decay * (n[:, None] - n)).exp().tril()
    scores = torch.zeros(2, 4, 9, 9).double()
    for b, h, s in itertools.product(range(2), range(4), range(2)):
        f, g = (features_of(z[b, h] / 8**0.25, m, h)[s] for z, m in ((q, retention.q_map), (k, retention.k_map)))
        scores[b, h] += f @ g.T * decay[h, s]
    heads = (scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2) * retention.gain
    gate = torch.nn.functional.silu(retention.gate(x)).unflatten(-1, (4, 8))
    torch.testing.assert_close(layer(x)[0], layer.c_proj((heads * gate).flatten(2)))


@torch.no_grad()
@pytest.mark.parametrize("features", [True, False])
def test_each_head_has_its_scales_whatever_it_shares(features):
    decay = [-0.1 * n for n in range(1, 9)]  # the first scale of four heads, then the second
    retention = HostedRetention(Heads(32, 4, 2, 8, 8), num_decays=2, decay=decay, features=features, gate=None).double()
    for parameter in retention.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    retention.decay.reset_parameters()
    q, k, v = (torch.randn(1, heads, 9, 8).double() for heads in (4, 2, 2))
    n = torch.arange(9.0).double()
    found, _ = retention(q.transpose(1, 2).flatten(2), q, k, v, scale=0.25)
    for h in range(4):
        scores = 0
        for s in range(2):
            a, b = q[0, h] / 2, k[0, h // 2] / 2
            if features:
                a, b = features_of(a, retention.q_map, h)[s], features_of(b, retention.k_map, h // 2)[s]
            scores = scores + a @ b.T * torch.exp(decay[4 * s + h] * (n[:, None] - n)).tril()
        y = scores @ v[0, h // 2]
        y = y / scores.sum(-1, keepdim=True) if features else torch.nn.functional.rms_norm(y, (8,), eps=1e-6)
        torch.testing.assert_close(found[0, :, h], y * retention.gain[h])


@torch.no_grad()
def test_keys_are_as_important_as_their_vectors_say():
    heads, q, k, v = Heads(4, 1, 1, 4, 4), *torch.randn(3, 1, 1, 9, 4)
    retention, plain = (HostedRetention(heads, gate=None, key_importance=on) for on in (True, False))
    x = torch.zeros(1, 9, 4)
    assert plain.k_map.importance is None
    assert torch.equal(retention(x, q, k, v, scale=1.0)[0], plain(x, q, k, v, scale=1.0)[0])  # all alike at the start
    retention.k_map.importance.copy_(torch.tensor([12.0, 0, 0, 0]))
    k[..., 0] = -1.0
    k[:, :, 3, 0] = 1.0
    y, _ = retention(x, q, k, v, scale=1.0)
    torch.testing.assert_close(y[0, 3:, 0], v[0, 0, 3].expand(6, 4))  # the only key that counts, bounded by e^10
    torch.testing.assert_close(y[0, 0, 0], v[0, 0, 0])  # a sum of scores that is tiny divides like any other


def test_heads_beside_a_window_remember_longer():
    heads = Heads(4, 1, 1, 4, 4)
    assert HostedRetention(heads, window=8).decay.values == log_linear(2)
    assert HostedRetention(heads, sinks=2).decay.values == short(2)
    assert HostedRetention(heads, window=8, decay="short").decay.values == short(2)


def test_the_importance_of_keys_needs_features():
    with pytest.raises(ValueError, match="key_importance needs features=True; got features False, key_importance True"):
        HostedRetention(Heads(4, 1, 1, 4, 4), features=False, key_importance=True)
    assert HostedRetention(Heads(4, 1, 1, 4, 4), features=False).options["key_importance"] is False


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["silu", "gelu", "relu"])
def test_gates_are_open_at_the_start(gate):
    model, (rows, _) = build("GPT2"), padded()
    replace_attention(model, gate=None)
    want = model(rows[0][None]).logits
    restore_attention(model)
    replace_attention(model, gate=gate)
    torch.testing.assert_close(model(rows[0][None]).logits, want, rtol=1e-3, atol=1e-3)


# --- with a window ----------------------------------------------------------------------------------------------------

HEADS = Heads(dim=32, num_heads=4, num_kv_heads=2, key_dim=8, value_dim=6)
SCALE = 0.4


def windowed(window, heads=HEADS, **options):
    """Weights at random, as after training."""
    made = HostedRetention(heads, window=window, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def inputs(length, batch=2, heads=HEADS):
    x = torch.randn(batch, length, heads.dim)
    shapes = (
        (heads.num_heads, heads.key_dim),
        (heads.num_kv_heads, heads.key_dim),
        (heads.num_kv_heads, heads.value_dim),
    )
    return [x.double(), *(torch.randn(batch, n, length, size).double() for n, size in shapes)]


def formula(retention, x, q, k, v):
    """Scores over their sum: exp(scale q.k) for the first `sinks` and the last `window` tokens, else a weight times
    those of retention.

    Time passes for retention from when a token leaves the window.
    """
    n, window = torch.arange(x.shape[1]).double(), retention.window or 0
    ago = n[:, None] - n
    near = (ago >= 0) & ((ago < window) | (n < retention.sinks))
    far = (ago >= 0) & ~near
    groups = q.shape[1] // k.shape[1]
    log_decay = retention.decay(x.device, torch.float64).view(k.shape[1], retention.num_decays, groups)
    out = torch.zeros(*x.shape[:2], q.shape[1], v.shape[3]).double()
    for b, h in itertools.product(range(x.shape[0]), range(q.shape[1])):
        queries, keys = q[b, h], k[b, h // groups]
        scores = (SCALE * queries @ keys.T).exp() * near
        for s in range(retention.num_decays):
            f = features_of(queries * SCALE**0.5, retention.q_map, h)[s]
            g = features_of(keys * SCALE**0.5, retention.k_map, h // groups)[s]
            decay = (log_decay[h // groups, s, h % groups] * (ago - window).clamp(min=0)).exp()
            scores = scores + retention.rest(x[b])[:, h, None].exp() * (f @ g.T) * decay * far
        out[b, :, h] = scores / scores.sum(-1, keepdim=True) @ v[b, h // groups] * retention.gain[h]
    gate = 1 if retention.gate is None else torch.nn.functional.silu(retention.gate(x)).view_as(out)
    return out * gate


def rows_alone(retention, mask, x, q, k, v):
    """The formula of each row's real tokens by themselves, 0 at padding."""
    out = torch.zeros(*x.shape[:2], q.shape[1], v.shape[3]).double()
    for b, real in enumerate(mask):
        out[b, real] = formula(retention, x[b : b + 1, real], *(z[b : b + 1, :, real] for z in (q, k, v)))[0]
    return out


def at(part, x, *heads):
    """The tokens of a part."""
    return x[:, part], *(z[:, :, part] for z in heads)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 4, 7, 40])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("options", [{}, {"num_decays": 1, "gate": None}], ids=["default", "one decay"])
def test_a_window_attends_and_retention_gathers_what_has_left_it(window, length, options):
    retention, given = windowed(window, **options), inputs(length)
    leaves = [*(z.requires_grad_() for z in given), *retention.parameters()]
    found, want = retention(*given, scale=SCALE)[0], formula(retention, *given)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(want)
    gradients = ((weights * y).sum() for y in (found, want))
    for got, true in zip(*(torch.autograd.grad(g, leaves, materialize_grads=True) for g in gradients), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-10)


@st.composite
def calls(draw, sequences):
    """What each of some calls takes: how many tokens of each sequence, packed or as rows, and where the padding is."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        counts = draw(st.lists(st.integers(0, 9), min_size=sequences, max_size=sequences))
        order = None
        if not draw(st.booleans()):
            length = max(counts) + draw(st.integers(0, 2))
            places = [draw(st.permutations(range(length))) for _ in counts]
            real = [[place < n for place in row] for n, row in zip(counts, places, strict=True)]
            order = torch.tensor(real, dtype=torch.bool).view(sequences, length)
        found.append((counts, order))
    return found


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@drawn(
    window=st.none() | st.integers(1, 7),
    sinks=st.integers(0, 6),
    kv_heads=st.sampled_from([1, 2, 4]),
    parts=st.integers(1, 3).flatmap(calls),
    grad=st.booleans(),
)
def test_calls_of_all_kinds_continue_one_another_as_one_dense_sum(window, sinks, kv_heads, parts, grad):
    assume(window or sinks)
    heads = Heads(dim=32, num_heads=4, num_kv_heads=kv_heads, key_dim=8, value_dim=6)
    retention = windowed(window, heads, sinks=sinks)
    lengths = [sum(counts) for counts in zip(*(counts for counts, _ in parts), strict=True)]
    given = [[z.requires_grad_(grad) for z in inputs(n, 1, heads)] for n in lengths]
    found, state, done = [[] for _ in lengths], None, [0] * len(lengths)
    with torch.set_grad_enabled(grad):
        for counts, real in parts:
            pieces = [at(slice(i, i + n), *z) for z, i, n in zip(given, done, counts, strict=True)]
            options = dict(scale=SCALE, state=state, return_state=True)
            if real is None:
                row = [torch.cat(z, dim=1 if i == 0 else 2) for i, z in enumerate(zip(*pieces, strict=True))]
                borders = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
                y, state = retention(*row, cu_seqlens=borders, **options)
                outs = y[0].split(counts)
            else:
                y, state = retention(*(padded_rows(z, real) for z in zip(*pieces, strict=True)), mask=real, **options)
                outs = [one[r] for one, r in zip(y, real, strict=True)]
            for out, one in zip(found, outs, strict=True):
                out.append(one)
            done = [i + n for i, n in zip(done, counts, strict=True)]
        whole = [formula(retention, *z)[0] for z in given]
    for out, want in zip(found, whole, strict=True):
        torch.testing.assert_close(torch.cat(out), want, rtol=1e-10, atol=1e-10)
    assert state.time.tolist() == lengths
    assert [*state.keys.shape] == [len(lengths), kv_heads, sinks + (window or 0), 8]
    if grad:
        leaves = [*retention.parameters(), *(z for one in given for z in one)]
        sums = (sum(y.square().sum() for y in ys) for ys in (itertools.chain(*found), whole))
        gradients = (torch.autograd.grad(y, leaves, allow_unused=True, materialize_grads=True) for y in sums)
        for got, true in zip(*gradients, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-8)


def padded_rows(pieces, real):
    """One row for each piece (1, n, dim) of x, or (1, H, n, D) of q, k or v, which are NaN at padding."""
    one = pieces[0]
    fill = float("nan") if one.dim() == 4 else 0.0  # x goes through a linear map, whose gradients would be NaN
    out = torch.full((len(real), *one.shape[1:-2], real.shape[1], one.shape[-1]), fill).double()
    for i, piece in enumerate(pieces):
        out[i, ..., real[i], :] = piece[0]
    return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "sinks"), [(20, 0), (14, 6), (None, 20)])
def test_what_fits_into_window_and_sinks_is_attended_to_as_it_was(dtype, window, sinks):
    retention = HostedRetention(HEADS, window=window, sinks=sinks, gate=None).to(dtype)
    x, q, k, v = (z.to(dtype) for z in inputs(20))
    found = retention(x, 3 * q, k, v, scale=SCALE)[0]
    assert found.dtype == dtype
    doubles = ((3 * q).double(), k.double(), v.double())
    want = torch.nn.functional.scaled_dot_product_attention(*doubles, is_causal=True, scale=SCALE, enable_gqa=True)
    assert deviation(found, want.transpose(1, 2)) < {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 4e-3)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"features": False}, {}, {"window": 4}, {"sinks": 4}], ids=str)
def test_sums_that_half_precision_cannot_hold_are_divided_first(options):
    heads = Heads(32, 2, 2, 8, 8)
    retention = HostedRetention(heads, decay=[-1e-4] * (2 if "features" in options else 4), gate=None, **options).half()
    x, (q, k, v) = torch.randn(1, 4000, 32).half(), (torch.full((1, 2, 4000, 8), 1.0).half() for _ in range(3))
    v = 1000 * v + torch.randn_like(v)
    found, _ = retention(x, q, k, v, scale=1.0)
    want, _ = retention.double()(x.double(), q.double(), k.double(), v.double(), scale=1.0)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), want, rtol=4e-3, atol=0)


@torch.no_grad()
def test_half_precision_and_autocast_stay_near_the_formula():
    retention, (x, q, k, v) = windowed(8, sinks=3), inputs(60)
    want = formula(retention, x, q, k, v)
    for dtype, bound in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):  # the gate and the maps are of that dtype too
        half = retention.to(dtype)
        assert deviation(half(*(z.to(dtype) for z in (x, q, k, v)), scale=SCALE)[0], want) < bound
        single = retention.float()
        with torch.autocast("cpu", dtype):
            projected = (z.to(dtype) for z in (q, k, v))
            assert deviation(single(x.float(), *projected, scale=SCALE)[0].to(dtype), want) < bound


@torch.no_grad()
def test_padding_anywhere_is_as_if_it_were_not_there():
    retention, given = windowed(5), inputs(33, batch=4)
    mask = torch.rand(4, 33) < 0.6
    mask[0], mask[1] = torch.arange(33) >= 11, torch.arange(33) < 11  # on the left, on the right
    found = retention(*given, scale=SCALE, mask=mask)[0]
    torch.testing.assert_close(found, rows_alone(retention, mask, *given), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (5, 0), (5, 3), (None, 3)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_whatever_stands_at_padding_reaches_no_real_token(window, sinks, value):
    """Neither in what the layer gives nor in the gradients, from a state or without."""
    retention = windowed(window, sinks=sinks)
    mask = torch.rand(4, 33) < 0.6
    mask[0], mask[1] = torch.arange(33) >= 11, torch.arange(33) < 11
    found = []
    for filled in (0.0, value):
        torch.manual_seed(1)
        given = [z.requires_grad_() for z in inputs(33, batch=4)]
        x = given[0].masked_fill(~mask[..., None], filled)
        q, k, v = (z.masked_fill(~mask[:, None, :, None], filled) for z in given[1:])
        x = x if window or sinks else given[0]
        first, state = retention(*at(slice(0, 20), x, q, k, v), scale=SCALE, mask=mask[:, :20], return_state=True)
        second, _ = retention(*at(slice(20, 33), x, q, k, v), scale=SCALE, mask=mask[:, 20:], state=state)
        y = torch.cat([first, second], dim=1)[mask]
        found += [[y, *torch.autograd.grad(y.square().sum(), given[1:])]]
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("window", [None, 5])
def test_shapes_are_checked_before_any_computation(window):
    retention, (x, q, k, v) = windowed(window), inputs(9)
    one = torch.ones(2, 1).bool()
    wrong = (
        (
            (x[:, :1], q[:, :, :1], k, v, one),
            r"k must be \(2, 2, 1, 8\), for q .*got k \(2, 2, 9, 8\)",
        ),
        ((x, q[:, :2], k, v, None), r"q must be \(2, 4, 9, 8\)"),
        ((x, q, k, v[..., :3], None), r"v must be \(2, 2, 9, 6\)"),
        ((x, q, k, v, one), r"mask must be \(batch, length\) \(2, 9\) .*got mask \(2, 1\)"),
        ((x[:, :4], q, k, v, None), r"x must be \(2, 9, 32\), or an image of as many cells; got x \(2, 4, 32\)"),
        ((x, q[0], k, v, None), r"q must be \(batch, heads, length, key_dim\); got q \(4, 9, 8\)"),
        ((x[:, :4], q, k, v, None), r"x must be \(2, 9, 32\)"),
        ((x, q[0], k, v, None), r"q must be \(batch, heads, length, key_dim\); got q \(4, 9, 8\)"),
    )
    for (*given, mask), message in wrong:
        with pytest.raises(ShapeError, match=message):
            retention(*given, scale=SCALE, mask=mask)


def test_nothing_crosses_the_border_of_packed_sequences():
    retention, given = windowed(5), inputs(33, batch=1)
    found = retention(*given, scale=SCALE, cu_seqlens=torch.tensor([0, 3, 3, 19, 33], dtype=torch.int32))[0]
    alone = [formula(retention, *at(slice(*ends), *given)) for ends in ((0, 3), (3, 19), (19, 33))]
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ends", [(1,), (3, 4, 12), (20, 21), range(1, 33)], ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_any_cut_goes_on_from_the_state(ends, padding, grad):
    retention, given = windowed(5), inputs(33)
    mask = torch.rand(2, 33) < 0.6 if padding else torch.ones(2, 33, dtype=torch.bool)
    state, parts = None, []
    with torch.set_grad_enabled(grad):
        for start, end in itertools.pairwise((0, *ends, 33)):
            part = slice(start, end)
            options = dict(mask=mask[:, part] if padding else None, state=state, return_state=True)
            y, state = retention(*at(part, *given), scale=SCALE, **options)
            parts.append(y)
    want = rows_alone(retention, mask, *given)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-10, atol=1e-10)
    if grad:
        leaves = list(retention.parameters())
        sums = torch.cat(parts, 1).square().sum(), want.square().sum()
        for got, true in zip(*(torch.autograd.grad(y, leaves) for y in sums), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 3])
def test_the_state_keeps_its_size_and_its_place(sinks, tmp_path):
    retention, given = windowed(5, sinks=sinks), inputs(33)
    _, state = retention(*at(slice(0, 2), *given), scale=SCALE, return_state=True)
    assert [*state.keys.shape] == [2, 2, sinks + 5, 8]
    assert [*state.values.shape] == [2, 2, sinks + 5, 6]
    held = {name: z.untyped_storage().nbytes() for name, z in vars(state).items() if z is not None}
    _, later = retention(*at(slice(2, 32), *given), scale=SCALE, state=state, return_state=True)
    assert {name: z.untyped_storage().nbytes() for name, z in vars(later).items() if z is not None} == held
    keys = later.keys
    want, _ = retention(*given, scale=SCALE)
    twice = later[[1, 1, 0]]  # beams
    found, after = retention(*at(slice(32, 33), *given), scale=SCALE, state=later)
    torch.testing.assert_close(found, want[:, 32:])
    assert after is later
    assert after.keys is keys
    found, _ = retention(*at(slice(32, 33), *(z[[1, 1, 0]] for z in given)), scale=SCALE, state=twice)
    torch.testing.assert_close(found, want[[1, 1, 0], 32:])
    assert isinstance(twice, WindowState)
    torch.save(twice, tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "state.pt", weights_only=True).keys, twice.keys)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("window", "sinks"), [(5, 3), (None, 4)])
def test_a_step_compiles_once(window, sinks):
    retention, given = windowed(window, sinks=sinks), inputs(12)
    want, _ = retention(*given, scale=SCALE)
    _, state = retention(*at(slice(0, 3), *given), scale=SCALE, return_state=True)
    torch._dynamo.reset()
    compiled = torch.compile(retention, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(3, 12):
            y, _ = compiled(*at(slice(n, n + 1), *(z.clone() for z in given)), scale=SCALE, state=state)
            torch.testing.assert_close(y, want[:, n : n + 1])


@pytest.mark.parametrize("exact", [{"window": 16}, {"window": 16, "sinks": 4}, {"sinks": 4}], ids=str)
def test_what_is_attended_to_and_retention_are_one_fused_softmax(exact):
    layer = HostedRetention(Heads(dim=16, num_heads=4, num_kv_heads=2, key_dim=8, value_dim=8), **exact)
    x, q, k, v = (
        torch.randn(2, *shape, requires_grad=True) for shape in ((40, 16), (4, 40, 8), (2, 40, 8), (2, 40, 8))
    )
    with torch.profiler.profile() as profile:
        layer(x, q, k, v, scale=0.3)[0].sum().backward()
    calls = {event.key: event.count for event in profile.key_averages() if "scaled_dot_product" in event.key}
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert calls[fused] == calls[f"{fused}_backward"] == 1
    assert "aten::_scaled_dot_product_attention_math" not in calls


@pytest.mark.parametrize("exact", [{"window": 16}, {"window": 16, "sinks": 4}, {"sinks": 4}], ids=str)
def test_memory_grows_with_the_length_and_not_with_its_square(exact):
    retention = HostedRetention(HEADS, **exact)

    def kept(length):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda z: sizes.append(z.numel()) or z, lambda z: z):
            retention(*(z.float() for z in inputs(length, batch=1)), scale=SCALE)
        return sum(sizes)

    assert kept(1024) < 2.1 * kept(512)


@torch.no_grad()
def test_a_window_lets_a_replaced_model_say_what_it_said_while_it_lasts():
    model, (rows, _) = build("Llama"), padded()
    ids = rows[0][None]
    want = model(ids).logits
    replace_attention(model, window=16, calibrate_on={"input_ids": ids[:, :16]})
    found = model(ids).logits
    torch.testing.assert_close(found[:, :16], want[:, :16], rtol=1e-3, atol=1e-3)  # a gate is not quite 1
    assert not torch.allclose(found[:, 16:], want[:, 16:], atol=0.1)


@torch.no_grad()
def test_a_window_serves_torchs_attention_where_it_is_causal():
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x, causal = torch.randn(2, 12, 32), torch.ones(12, 12).triu(1).bool()
    want, _ = attention(x, x, x, attn_mask=causal)
    replace_attention(attention, window=12, gate=None)
    torch.testing.assert_close(attention(x, x, x, attn_mask=causal)[0], want)
    with pytest.raises(
        ValueError, match="window and sinks need causal retention; got causal False; leave them out, or"
    ):
        attention(x, x, x)


def test_what_a_window_cannot_do_is_an_error():
    with pytest.raises(ValueError, match="window must be an integer of at least 1, or None; got window 0"):
        HostedRetention(HEADS, window=0)
    with pytest.raises(ValueError, match="window and sinks need features=True, .*; got window 8"):
        HostedRetention(HEADS, window=8, features=False)
    with pytest.raises(ValueError, match="sinks must be an integer of at least 0; got sinks -1"):
        HostedRetention(HEADS, sinks=-1)
    with pytest.raises(ValueError, match="window and sinks need features=True, .*; got sinks 2"):
        HostedRetention(HEADS, sinks=2, features=False)
    bert = transformers.BertModel(transformers.BertConfig(**SIZES))
    with pytest.raises(
        ValueError, match="sees both ways, and window and sinks look back; leave them out, or pass causal"
    ):
        replace_attention(bert, window=8)
    assert not any(isinstance(module, HostedRetention) for module in bert.modules())
    retention, given = windowed(8), inputs(9, batch=1)
    with pytest.raises(
        ValueError, match="sees both ways, and window and sinks look back; leave them out, or pass causal"
    ):
        replace_attention(bert, sinks=2)
    _, state = HostedRetention(HEADS).double()(*given, scale=SCALE, return_state=True)
    with pytest.raises(TypeError, match="state must be a WindowState; got RetentionState; pass what this layer"):
        retention(*given, scale=SCALE, state=state)


def test_a_state_of_another_layer_or_batch_is_an_error():
    retention, given = windowed(4, sinks=2), inputs(9)
    _, state = retention(*given, scale=SCALE, return_state=True)
    _, other = windowed(5, sinks=2)(*given, scale=SCALE, return_state=True)
    two = torch.tensor([0, 4, 9], dtype=torch.int32)
    cases = (
        (
            given,
            {"state": other},
            r"state.keys must be \(2, 2, 6, 8\), for 2 sequences, window 4 and sinks 2; got .* 7, ",
        ),
        (given, {"state": state[:1]}, r"state.time must be \(2,\), .*; got state.time \(1,\); pass what this layer"),
        (
            [z[:1] for z in given],
            {"state": state[[0, 1, 1]], "cu_seqlens": two},
            r"state.time must be \(2,\), for 2 sequences",
        ),
    )
    for call, options, message in cases:
        with pytest.raises(ShapeError, match=message):
            retention(*call, scale=SCALE, **options)


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["GPT2-scaled", "GPTNeoX", "Llama", "Qwen3", "OPT"])
def test_calibration_sees_what_attention_gave_and_gives_heads_its_size(family):
    model, (rows, _) = build(family), padded()
    ids = rows[0][None]
    want, seen, heads = model(ids).logits, {}, {}
    replace_attention(model, gate=None)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    with calibration.measured(layers):
        for name, layer in layers.items():
            layer.retention.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out[0]))
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)  # as if it were attention
    restore_attention(model)
    replace_attention(model, gate=None, calibrate_on={"input_ids": ids})
    first = next(iter(layers))  # whose input is that of the model with attention
    layers[first].retention.register_forward_hook(lambda module, args, out: heads.__setitem__(first, out[0]))
    model(ids)
    assert all(not (layer.retention.gain == 1).any() for layer in layers.values())
    sizes, wanted = (z[first].square().mean(dim=(0, 1, 3)) for z in (heads, seen))
    torch.testing.assert_close(sizes, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_failed_calibration_leaves_the_model_as_it_was():
    model, (rows, _) = build("Llama"), padded()
    replace_attention(model, layers=[0])
    gain = model.model.layers[0].self_attn.retention.gain.clone()
    want = model(rows[0][None]).logits
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        replace_attention(model, calibrate_on={"nonsense": rows[0][None]})
    assert not isinstance(model.model.layers[1].self_attn, Swapped)
    assert torch.equal(model(rows[0][None]).logits, want)
    assert list(model.config.retention_in_attention) == ["layers.0.self_attn"]
    replace_attention(model, calibrate_on={"input_ids": rows[0][None]})
    assert torch.equal(model.model.layers[0].self_attn.retention.gain, gain)  # only what is new is calibrated


@torch.no_grad()
def test_calibration_keeps_packed_sequences_apart():
    model, (rows, _) = build("Llama"), padded()
    positions = torch.cat([torch.arange(40), torch.arange(60)])[None]
    want = model(rows[0][None], position_ids=positions, use_cache=False).logits
    replace_attention(model)
    with calibration.measured({name: m for name, m in model.named_modules() if isinstance(m, Swapped)}):
        got = model(rows[0][None], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_calibrated_and_computes_retention_afterwards():
    model, (rows, _) = build("Llama"), padded()
    ids = rows[0][None, :12]
    other = copy.deepcopy(model)
    replace_attention(other, calibrate_on={"input_ids": ids})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    attended = compiled(ids, use_cache=False).logits
    replace_attention(compiled, calibrate_on={"input_ids": ids})
    for mine, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)
    found = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(found, other(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, attended, atol=0.1)
