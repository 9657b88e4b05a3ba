"""Exported programs: plain operations, exact, for every batch and length; and TorchScript, which is refused."""

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from torch.export import Dim, export

import retention
from retention import MultiScaleRetention, RetNet, retain

LOG_DECAY = torch.tensor([-0.3, -0.01], dtype=torch.float64)
BATCH, LENGTH = Dim("batch", min=1, max=1000), Dim("length", min=1, max=100_000)


@pytest.fixture
def exporting(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)


def qkv(batch=2, length=10):
    return tuple(torch.randn(batch, 2, length, width, dtype=torch.float64) for width in (4, 4, 3))


class Retain(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, state=None, mask=None):
        return retain(q, k, v, LOG_DECAY, state=state, mask=mask, **self.options)


# --- the form that is recorded ----------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60)
@given(cases.calls(dtypes=(torch.float64, torch.float32), kinds=("dense", "masked", "grid")))
def test_what_is_recorded_is_the_definition(call):
    tensors, options = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_exporting", lambda: True)
        got = retain(*tensors, chunk_size=4, form="chunkwise", **options)
    assert cases.deviation(got, oracle.retain(*tensors, **options)) <= cases.BOUNDS[got.dtype]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 19])
def test_a_recorded_sequence_goes_on_from_its_state(length, exporting):
    q, k, v = qkv(length=length + 7)
    whole = oracle.retain(q, k, v, LOG_DECAY)
    _, state = retain(*(x[:, :, :7] for x in (q, k, v)), LOG_DECAY, return_state=True)
    tail = [x[:, :, 7:] for x in (q, k, v)]
    out, after = retain(*tail, LOG_DECAY, state=state, return_state=True, chunk_size=4, form="chunkwise")
    torch.testing.assert_close(out, whole[:, :, 7:])
    torch.testing.assert_close(after.kv, oracle.state(k, v, LOG_DECAY, 2))
    assert after.time.tolist() == [length + 7] * 2


def test_other_backends_come_last_while_a_program_is_recorded(registry, exporting):
    class Opaque:
        def why_not(self, call):
            return []

        def __call__(self, *args):
            raise AssertionError("must not run")

    retention.register("opaque", Opaque(), before="triton")
    for options in ({}, {"causal": False, "grid": (2, 5)}):
        retain(*qkv(), LOG_DECAY, **options)
    with pytest.raises(AssertionError, match="must not run"):
        retain(*qkv(), LOG_DECAY, backend="opaque")


# --- torch.export -----------------------------------------------------------------------------------------------------


def own_nodes(program):
    return [node for node in program.graph.nodes if "retention" in str(node.target)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "state", "masked"),
    [
        ({"return_state": True, "decay_norm": True, "score_norm": True}, True, True),
        ({"causal": False}, False, False),
    ],
    ids=str,
)
def test_a_program_suits_every_batch_and_length(options, state, masked):
    model = Retain(**options)

    def inputs(batch, length):
        _, before = retain(*qkv(batch, 7), LOG_DECAY, return_state=True, score_norm=state)
        return *qkv(batch, length), before if state else None, torch.rand(batch, length) < 0.7 if masked else None

    shapes = (
        *[{0: BATCH, 2: LENGTH}] * 3,
        [{0: BATCH}] * 3 if state else None,
        {0: BATCH, 1: LENGTH} if masked else None,
    )
    program = export(model, inputs(2, 130), dynamic_shapes=shapes)
    assert own_nodes(program) == []
    for sizes in ((1, 1), (3, 63), (1, 64), (2, 257)):
        given_, run = inputs(*sizes), program.module()
        for got, want in zip(*(torch.utils._pytree.tree_leaves(f(*given_)) for f in (run, model)), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_a_program_with_a_grid_suits_every_batch():
    """A number of rows at a time, as the parallel form takes on a grid, would depend on the batch."""
    model = Retain(causal=False, grid=(2, 5))
    program = export(model, qkv(), dynamic_shapes=({0: BATCH},) * 3)
    for batch in (1, 5):
        given_ = qkv(batch)
        torch.testing.assert_close(program.module()(*given_), model(*given_))


@pytest.mark.slow
def test_a_program_has_gradients():
    inputs = [x.requires_grad_() for x in qkv(length=9)]
    program = export(Retain(), tuple(inputs)).module()
    got, want = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (program, Retain()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# --- TorchScript ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (MultiScaleRetention(16, 2), torch.ones(1, 3, 16)),
        (torch.nn.Sequential(MultiScaleRetention(16, 2)), torch.ones(1, 3, 16)),
        (RetNet(dim=16, num_layers=1, num_heads=2), torch.ones(1, 3, dtype=torch.long)),
        (retain, (*qkv(), LOG_DECAY)),
    ],
    ids=["layer", "nested", "RetNet", "retain"],
)
def test_torchscript_is_refused_and_torch_export_named(how, model, inputs):
    arguments = (inputs,) if how == "trace" else ()
    with pytest.raises(TypeError, match=r"TorchScript cannot hold retention.*use torch\.export\.export"):
        getattr(torch.jit, how)(model, *arguments)
