"""The triton backend: its plan, what it refuses, and its kernels in Triton's interpreter. None of it needs a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retention import backends
from retention.backends import Call
from retention.backends.triton import plan, probe
from retention.backends.triton.plan import Sizes, backward_plan, forward_plan

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
CALL = Call(
    batch=1,
    heads=8,
    kv_heads=8,
    length=4096,
    key_dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
    out_dtype=torch.bfloat16,
    device="cuda",
    scale=1.0,
    form="chunkwise",
)


@needs_triton
@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """In one process of its own, since the kernels must be imported with TRITON_INTERPRET=1."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent / "interpreted.py"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a machine whose GPU passed the trial."""
    monkeypatch.setitem(probe._answers, "cuda", None)


def test_auto_prefers_it_on_a_gpu(on_gpu):
    for change in (
        {},
        {"masked": True},
        {"packed": True},
        {"has_state": True, "return_state": True},
        {"needs_grad": True},
    ):
        chosen, _ = backends.choose(CALL._replace(form="auto", **change))
        assert chosen is backends._backends["triton"]
    for change in ({"length": 197, "causal": False}, {"length": 50, "masked": True}, {"length": 100, "causal": False}):
        chosen, call = backends.choose(CALL._replace(form="auto", **change))
        assert (chosen, call.form) == (backends._backends["triton"], "parallel")
    step = CALL._replace(form="recurrent", length=1, in_place=True, has_state=True)
    assert backends.choose(step)[0] is backends._backends["triton"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"form": "parallel", "has_state": True}, "the parallel form has no states"),
        ({"form": "parallel", "return_state": True}, "use chunkwise"),
        ({"form": "parallel", "packed": True}, "no states and packed rows; use chunkwise"),
        ({"form": "recurrent"}, "is for one token in place; use chunkwise"),
        ({"in_place": True}, "overwrites a state only in the recurrent form"),
        ({"causal": False}, "the chunkwise form is causal; use parallel"),
        ({"form": "parallel", "causal": False, "grid": (64, 64)}, "has no decay on a grid"),
        ({"dtype": torch.float64}, "has no float64"),
        ({"key_dim": 257}, "at most key_dim 256 and value_dim 512, not 257 and 128"),
        ({"value_dim": 513}, "not 128 and 513"),
        ({"chunk_size": 8}, "at least 16 tokens, not 8"),
        ({"transformed": True}, "torch.func"),
    ],
)
def test_what_it_refuses(change, reason, on_gpu):
    assert reason in "; ".join(backends.why_not(CALL._replace(**change), "triton"))


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(probe, "_answers", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backends.why_not(CALL._replace(device="cpu"), "triton") == [
        "needs an NVIDIA GPU; TRITON_INTERPRET=1 in the environment runs it in Triton's interpreter"
    ]
    assert backends.why_not(CALL._replace(device="mps"), "triton") == ["needs an NVIDIA GPU, not mps"]


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with a GPU, before any call; for the causes that keep the kernels from running."""
    monkeypatch.setattr(probe, "_answers", {})
    monkeypatch.setattr(probe, "_causes", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return monkeypatch


def test_an_old_gpu_is_refused(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    assert backends.why_not(CALL, "triton") == ["needs GPUs of compute capability 8.0 or newer"]


def test_a_missing_library_is_named_with_its_remedy(gpu):
    gpu.setitem(sys.modules, "triton", None)
    assert backends.why_not(CALL, "triton")[0].startswith("needs Triton, which is not installed: pip install triton")
    assert isinstance(backends._backends["triton"].cause, ModuleNotFoundError)


@needs_triton
def test_wrong_results_of_a_device_are_found_at_first_use(gpu):
    """Where kernels start but compute nothing, as with a broken compiler."""
    gpu.setattr(probe, "fused", lambda q, k, v, log_decay, *_: (q * k * v * log_decay, None))
    gpu.setattr(probe, "_trial", lambda device, trial=probe._trial: trial("cpu"))
    (reason,) = backends.why_not(CALL, "triton")
    assert reason.startswith("does not work here (ArithmeticError: its results, or their gradients, are wrong")


def test_nothing_is_tried_while_a_cuda_graph_is_captured(gpu):
    gpu.setattr(torch.cuda, "is_initialized", lambda: True)
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu.setattr(probe, "_trial", lambda device: pytest.fail("runs in the capture"))
    assert "run the call once before the capture" in backends.why_not(CALL, "triton")[0]
    assert probe._answers == {}  # it is tried after the capture


# --- the plan ---------------------------------------------------------------------------------------------------------


def sizes(batch=1, heads=16, length=16384, key_dim=128, value_dim=128, **options):
    return Sizes(batch, heads, length, key_dim, value_dim, item=2, multiprocessors=132, **options)


SHAPES = [(64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("length", [1, 64, 1000, 4096, 65536])
@pytest.mark.parametrize("batch", [1, 8, 500])
def test_three_launches_at_most_and_every_token_in_a_segment(dims, length, batch):
    of = sizes(batch=batch, length=length, key_dim=dims[0], value_dim=dims[1])
    for made in (forward_plan(of), backward_plan(of)):
        assert 1 <= len(made.launches) <= 3
        assert made.tokens * made.per_sequence >= length > made.tokens * (made.per_sequence - 1)
        assert made.tokens % made.chunk == 0
        assert made.segments == batch * made.per_sequence
        assert made.chunks <= plan.MOST_CHUNKS
        assert all(launch.programs > 0 for launch in made.launches)


def test_the_parallel_form_is_one_launch():
    of = sizes(batch=64, heads=12, length=197, key_dim=64, value_dim=64, decay_grad=True)
    for backward, parts in ((False, 1), (True, 3)):
        (launch,) = plan.parallel_plan(of, backward).launches
        assert launch.programs == 64 * 12 * 4 * parts


def test_the_gradient_of_the_decay_is_one_launch_more():
    names = [launch.kernel for launch in backward_plan(sizes(decay_grad=True)).launches]
    assert names == ["prepare", "join", "slope", "core"]


def test_few_heads_are_cut_into_segments_and_many_are_not():
    few, many = forward_plan(sizes(heads=4)), forward_plan(sizes(batch=32, heads=32, length=1024))
    assert few.split
    assert few.launches[-1].programs >= 2 * 132
    assert [launch.kernel for launch in many.launches] == ["one_pass"]


def test_a_packed_row_has_room_for_the_last_segment_of_every_sequence():
    of = sizes(batch=50, length=10_000, packed=True)
    made = forward_plan(of)
    worst = -(-10_000 // made.tokens) + 50
    assert made.segments >= worst


@pytest.mark.parametrize("number", [1, 7, 100, 5000])
@pytest.mark.parametrize("heads", [2, 96])
def test_a_packed_row_needs_memory_for_its_tokens_and_not_for_each_sequence_as_long_as_the_row(number, heads):
    made = backward_plan(sizes(batch=number, heads=heads, length=10_000, packed=True))
    assert made.segments * made.tokens <= 2 * 10_000 + 128 * number + made.tokens


def of_fla(key_dim, value_dim, chunk=64):
    """Bytes a token and head of flash-linear-attention's chunk_retention, bfloat16 and float32 states: (f, b)."""
    k, v, kv = key_dim, value_dim, key_dim * value_dim / chunk
    return 6 * k + 6 * v + 4 * kv, 16 * k + 12 * v + 20 * kv


@pytest.mark.parametrize(
    ("dims", "options", "forward", "backward"),
    [
        ((128, 128), {"batch": 8, "heads": 64, "length": 4096}, 0.5, 0.45),
        ((128, 128), {"heads": 16, "length": 16384}, 0.65, 0.45),
        ((256, 256), {"heads": 16, "length": 16384}, 0.6, 0.3),
        ((256, 512), {"heads": 8, "length": 16384}, 0.6, 0.3),
    ],
)
def test_fewer_bytes_than_flash_linear_attention(dims, options, forward, backward):
    of = sizes(key_dim=dims[0], value_dim=dims[1], **options)
    tokens = of.sequences * of.length * of.heads
    theirs = of_fla(*dims)
    assert forward_plan(of).bytes / tokens <= forward * theirs[0]
    assert backward_plan(of).bytes / tokens <= backward * theirs[1]


def test_the_backward_pass_of_the_narrowest_heads_misses_its_aim_by_this_much():
    """The aim is 0.7 of the bytes. dscores are stored in both orders, and narrow heads feel each stored matrix most."""
    of = sizes(batch=8, heads=64, length=4096, key_dim=64, value_dim=64)
    tokens, theirs = of.sequences * of.length * of.heads, of_fla(64, 64)
    assert forward_plan(of).bytes / tokens <= 0.5 * theirs[0]
    assert backward_plan(of).bytes / tokens / theirs[1] == pytest.approx(0.708, abs=5e-4)


def test_the_bytes_of_one_pass_are_those_of_its_inputs_and_output():
    of = sizes(batch=8, heads=64, length=4096)
    assert forward_plan(of).bytes == 2 * (2 * 128 + 2 * 128) * 8 * 64 * 4096
