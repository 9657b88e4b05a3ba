"""What is prepared for a GPU works as far as it can without one: the steps, their report, the compiled kernels."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu import compiled, report, steps
from benchmarks.gpu.compiled import Compiled

RUN = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def on_cpu(monkeypatch):
    """The steps on a CPU, where another backend stands for the kernels."""
    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setattr(steps, "OURS", "chunked")


@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
def test_a_case_is_checked_with_its_gradients(kind, on_cpu):
    row = steps.checked(steps.Case(torch.float32, 4, 6, kind=kind, length=30, heads=2, kv_heads=1))
    assert row["sound"], row
    assert all(0 < row[name] < 1e-5 for name in ("out", "state", "dq", "dk", "dv", "dlog_decay", "dstate"))


def test_a_wrong_result_and_a_failure_are_lines_too(on_cpu, monkeypatch):
    assert not steps.checked(steps.Case(torch.float32, 4, 6, length=30, decays=(0.1, 0.2)))["sound"]
    monkeypatch.setattr(steps, "OURS", "no such")
    row = steps.checked(steps.Case(torch.float32, 4, 6))
    assert not row["sound"]
    assert "backend must be" in row["failure"]


def test_every_option_is_among_the_cases():
    cases = list(steps.parity_cases())
    assert {case.kind for case in cases} == {"plain", "masked", "packed"}
    assert {case.dtype for case in cases} == set(steps.BOUNDS)
    assert any(case.heads != case.kv_heads for case in cases)
    assert max(case.key_dim for case in cases) == 256
    assert max(case.value_dim for case in cases) == 512


def test_a_step_keeps_each_line_as_soon_as_it_is_found(tmp_path, monkeypatch):
    def failing():
        yield {"a": 1.23456, "b": "x|y"}
        raise RuntimeError("the device is lost")

    monkeypatch.setitem(steps.STEPS, "speed", failing)
    with pytest.raises(RuntimeError, match="lost"):
        steps.main("speed", tmp_path / "speed.jsonl")
    assert json.loads((tmp_path / "speed.jsonl").read_text()) == {"a": 1.23456, "b": "x|y"}
    text = report.report(tmp_path)
    assert "| a | b |\n| --- | --- |\n| 1.23 | x/y |" in text
    assert "## parity\n\nNothing was found" in text


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the step succeeds on a GPU")
def test_a_failed_step_costs_no_other_step(tmp_path):
    done = subprocess.run([sys.executable, RUN, tmp_path, "capture"], capture_output=True, text=True, check=True)
    assert "capture: failed with exit code 1" in done.stdout
    assert "## capture\n\nNothing was found" in (tmp_path / "report.md").read_text()


# --- what the kernels compile to --------------------------------------------------------------------------------------

SOUND = Compiled("core", 90, "BM=64", 4, 2, 128, 0, 64.0, True)


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"spilled": 8}, ["8 bytes spilled"]),
        ({"shared": 228.0}, ["228 KiB of shared memory"]),
        ({"shared": 164.0, "capability": 80}, ["164 KiB of shared memory"]),
        ({"tensor_cores": False}, ["no tensor cores"]),
        ({"tensor_cores": False, "kernel": "join"}, []),
    ],
)
def test_what_is_wrong_with_a_compiled_kernel(change, faults):
    assert SOUND._replace(**change).faults() == faults


@needs_triton
def test_every_kernel_is_among_those_that_are_compiled():
    narrow = compiled.launches(90, torch.bfloat16, 64, 64)
    assert {launch.kernel for launch, _ in narrow} == {
        *("prepare", "join", "one_pass", "slope", "core", "step", "parallel")
    }
    assert {launch.kernel for launch, _ in compiled.launches(90, torch.bfloat16, 256, 512)} >= {"core"}


@needs_triton
@pytest.mark.slow
def test_the_gate_compiles_a_kernel_and_reads_its_registers():
    """In a process of its own, since the interpreter and the compiler exclude each other."""
    command = ["gpu-compile", "--capability", "90", "--dtype", "bfloat16", "--dims", "64x64", "--kernel", "join"]
    done = subprocess.run([sys.executable, "-m", "benchmarks", *command], capture_output=True, text=True, check=True)
    assert "sm_90 bfloat16  64/64  join" in done.stdout
    assert "registers" in done.stdout


def test_a_broken_configuration_fails_the_gate(monkeypatch):
    from benchmarks.__main__ import app

    monkeypatch.setattr(compiled, "compiled", lambda *_: [SOUND._replace(spilled=8)])
    done = CliRunner().invoke(app, ["gpu-compile", "--capability", "90", "--dims", "64x64", "--dtype", "bfloat16"])
    assert done.exit_code == 1
    assert "8 BYTES SPILLED" in done.stdout
    assert "1 configurations are broken" in done.stdout
