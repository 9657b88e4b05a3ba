"""Random retention calls for property-based tests, and how far results may be from the truth."""

import torch
from hypothesis import strategies as st

import retention
from retention.arguments import describe
from retention.call import Inputs, Options

# Relative to the largest value, for float32 and float64; relative RMS for half precision.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-3}
FORMS = ("parallel", "chunkwise", "recurrent")


def deviation(got, want):
    """How far `got` is from the truth, in the measure that BOUNDS uses for its dtype."""
    error, want = got.double() - want.double(), want.double()
    if want.numel() == 0:
        return 0.0
    if got.dtype in (torch.float16, torch.bfloat16):
        return (error.pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp(min=1e-12)).item()
    return (error.abs().max() / want.abs().max().clamp(min=1e-12)).item()


@st.composite
def calls(draw, dtypes=tuple(BOUNDS), causal=None, kinds=("dense", "masked", "packed", "grid")):
    """(q, k, v, log_decay), and options for `retain`: sizes, decays, padding, segments, normalisers at random."""
    kind = draw(st.sampled_from([kind for kind in kinds if kind != "grid" or not causal]))
    batch = 1 if kind == "packed" else draw(st.integers(1, 3))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)]))
    grid = draw(st.sampled_from([(1, 1), (1, 7), (5, 1), (2, 3), (7, 5), (3, 17)])) if kind == "grid" else None
    length = grid[0] * grid[1] if grid else draw(st.sampled_from([1, 2, 5, 7, 8, 9, 19, 33]))
    key_dim, value_dim = draw(st.sampled_from([(1, 1), (4, 6), (5, 3), (8, 8), (7, 16)]))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def noise(heads, width):
        shape = (batch, length, heads, width)
        if draw(st.booleans()):  # as layers make it, not contiguous
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2).contiguous()

    heads = kv_heads * groups
    q, k, v = noise(heads, key_dim), noise(kv_heads, key_dim), noise(kv_heads, value_dim)
    rates = st.sampled_from([0.0, -1e-9, -1e-3, -0.03, -0.5, -4.0, -60.0])
    log_decay = torch.tensor([draw(rates) for _ in range(heads)], dtype=torch.float64)
    options = {
        "causal": kind != "grid" and (draw(st.booleans()) if causal is None else causal),
        "scale": draw(st.sampled_from([None, 0.3, -1.0])),
        "decay_norm": draw(st.booleans()),
        "score_norm": draw(st.booleans()),
    }
    if kind == "masked":
        options["mask"] = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    if kind == "grid":
        options["grid"] = grid
    if kind == "packed":
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=torch.int32)
    return (q, k, v, log_decay), options


def runnable(args, options):
    """Every (backend, form, chunk size) that says it can run the call."""
    found = []
    tensors = {name: options.get(name) for name in ("state", "mask", "cu_seqlens")}
    asked = {name: value for name, value in options.items() if name not in tensors}
    for form in FORMS:
        for size in (None, 1, 5, 8, 16) if form == "chunkwise" else (None,):
            call = describe(Inputs(*args, **tensors), Options(form=form, chunk_size=size, **asked))
            names = [name for name in retention.backends.names() if not retention.backends.why_not(call, name)]
            found += [{"backend": name, "form": form, "chunk_size": size} for name in names]
    return found
