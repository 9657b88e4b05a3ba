"""`retention train` and `retention generate`."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import datasets
import pytest
import torch
import transformers
from short_runs import QUICK, SMALL, command, diverge_after
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from retention.cli import app
from retention.integrations.transformers import RetNetForCausalLM
from retention.integrations.transformers.decoding import stream
from retention.integrations.transformers.training import train as training
from retention.integrations.transformers.training.codec import ByteCodec
from retention.integrations.transformers.training.settings import Settings
from retention.model import PRESETS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_trains_resumes_and_generates(text, tmp_path, monkeypatch, dtype):
    monkeypatch.setitem(PRESETS, "test", SMALL)
    run, out = CliRunner(), str(tmp_path / "run")
    options = [
        "--preset",
        "test",
        "--steps",
        "3",
        "--batch",
        "2",
        "--context",
        "16",
        "--dtype",
        dtype,
        "--sample",
        "20",
    ]
    result = run.invoke(app, ["train", str(text), "--out", out, *options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "bits per byte; the model is in" in result.output
    assert "A sample" in result.output
    assert json.loads((tmp_path / "run" / Settings.FILE).read_text())["steps"] == 3

    again = run.invoke(app, ["train", str(text), "--out", out, *options])
    assert again.exit_code == 2
    assert "holds a run already; continue it with --resume, or name another --out" in again.output

    texts = [
        run.invoke(
            app, ["generate", "--model", out, "--prompt", "7 squared", "--tokens", "9", "--device", "cpu", *more]
        )
        for more in (
            [],
            ["--backend", "eager", "--form", "recurrent"],
            ["--seed", "1"],
            ["--temperature", "0", "--top-k", "3"],
        )
    ]
    assert all(result.exit_code == 0 for result in texts), texts[0].output
    assert texts[0].stdout.startswith("7 squared")
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout


@pytest.mark.slow
def test_a_model_of_bytes_writes_from_an_empty_prompt(settings, tmp_path):
    settings.steps = 1
    training.train(settings, tmp_path / "run")
    assert ByteCodec().prompt("") == [0]  # which ends a document, so that another begins
    written = command("generate", "--model", tmp_path / "run", "--prompt", "", "--tokens", 5)
    model = RetNetForCausalLM.from_pretrained(tmp_path / "run")
    chance = torch.Generator().manual_seed(0)
    new = [token.item() for token in stream(model, torch.tensor([[0]]), 5, temperature=0.8, generator=chance)]
    assert written == "".join(ByteCodec().text([0], new)) + "\n"


BAD = [
    (["train", "--preset", "huge"], "preset must be one of tiny, .*; got preset 'huge'"),
    (["train", "no/such/file"], "no such file or folder: .*no/such/file"),
    (["train", "--lr", "-1"], "lr must be above 0; got lr -1"),
    (["train", "--backend", "eager", "--form", "chunkwise"], "backend 'eager' cannot run .*not chunkwise"),
    (["train", "--steps", "0"], "steps must be at least 1; got steps 0"),
    (["train", "--context", "1"], "context must be at least 2; got context 1"),
    (["train", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16; got dtype 'int8'"),
    (
        ["train", "--backend", "magic"],
        "backend must be 'auto' or one of triton, chunked, eager, xformers, fla; got backend 'magic'",
    ),
    (["train", "--form", "magic"], "form must be one of .*; got form 'magic'"),
    (["train", "--device", "abacus"], "device must be one of auto, cpu, cuda, mps; got device 'abacus'"),
    (["train", "--accumulate", "0"], "accumulate must be at least 1; got accumulate 0"),
    (["train", "--warmup", "1201"], "warmup must be between 0 and steps, 1200; got warmup 1201"),
    (["train", "--weight-decay", "-1"], "weight_decay must be at least 0; got weight_decay -1"),
    (["train", "--config", "nowhere"], "no such config: nowhere"),
    (["train", "--config", "nowhere", "--preset", "tiny"], "preset and config must not both be given; got 'tiny' and"),
    (
        ["train", "--tokenizer", "/nowhere"],
        "tokenizer must be a folder, a tokenizer.json, a GGUF file or a name on the hub; '/now",
    ),
    (["train", "--report-to", "paper"], "report_to must be one of none, all.*; got report_to 'paper'"),
    (["train", "--tensor-parallel", "0"], "tensor_parallel must be at least 1; got tensor_parallel 0"),
    (["train", "--context", "3", "--context-parallel", "4"], "context must have a token for each .*got context 3, con"),
    (["train", "--context-parallel", "2"], "context_parallel times .* 2, tensor_parallel 1, 1 process; .*_node 2"),
    (["train", "--fsdp"], "fsdp shards weights among .* tensor_parallel 1, 1 process; leave fsdp out, or start more"),
    (["train", "--resume"], "nothing to resume in runs/retnet: it has no training.json"),
    (["generate", "--model", "nowhere"], "no model in nowhere: it has no config.json"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_bad_options_are_named_and_nothing_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert re.search(f"error: {message}", result.output, re.DOTALL), result.output
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_later_process_alone_is_told_too(tmp_path, monkeypatch):
    """Where the first has it too, torchrun ends the others while they wait."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    result = CliRunner().invoke(app, ["train", "--lr", "-1", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "process 3: error: lr must be above 0; got lr -1" in result.output
    assert waited == [10]


@pytest.mark.parametrize("place", ["run", "run/inside"])
@pytest.mark.parametrize("words", [["train"], ["swap", "model"], ["train", "--resume"]])
def test_out_on_a_file_says_so(words, place, tmp_path):
    (tmp_path / "run").write_text("")
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / place)])
    assert result.exit_code == 2
    assert f"error: out must be a folder; {tmp_path}/run is a file; name another --out" in result.output


def test_a_divergence_is_a_failure_in_one_line(settings, text, tmp_path, monkeypatch):
    diverge_after(2, monkeypatch)
    words = ["train", str(text), "--preset", "test", "--out", str(tmp_path / "run"), *QUICK, "--steps", "9"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "error: the training diverged at step 3: the loss is nan; begin a new run with" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_command_says_how_to_go_on_and_by_its_code_what_stopped_it(
    name, settings, tmp_path, monkeypatch
):
    number = getattr(signal, name)

    class Heard(training.SaveOnInterrupt):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                signal.raise_signal(number)

    monkeypatch.setattr(training, "SaveOnInterrupt", Heard)
    before = signal.getsignal(number)
    words = ["--preset", "test", "--steps", "12", "--batch", "2", "--context", "32", "--device", "cpu"]
    result = CliRunner().invoke(app, ["train", settings.files[0], "--out", str(tmp_path / "run"), *words])
    assert result.exit_code == 128 + number
    assert f"stopped and saved; continue with: retention train --resume --out {tmp_path}/run" in result.output
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert signal.getsignal(number) is before


BAD_SETTINGS = [
    ('{"speed": 1, "files": []}', "has settings that this version does not know: speed; install the newer version"),
    ("", "training.json .*; begin a new run in another folder"),
    ('{"steps"', "training.json must be JSON"),
    ("[1]", "must hold the settings of a run; got list"),
    ('{"steps": "12"}', "steps in .* must be int; got '12'"),
    ('{"steps": true}', "steps in .* must be int; got True"),
    ('{"files": "a.txt"}', r"files in .* must be list\[str\]; got 'a.txt'"),
    ('{"files": [1]}', r"files in .* must be list\[str\]"),
    ('{"warmup": 1.5}', r"warmup in .* must be int \| None"),
    ('{"config": []}', r"config in .* must be dict"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("written", "message"), BAD_SETTINGS)
def test_kept_settings_that_this_version_did_not_write_are_refused(written, message, tmp_path):
    (tmp_path / Settings.FILE).write_text(written)
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert re.search(f"error: .*{message}", result.output), result.output


@pytest.mark.slow
def test_a_resumed_run_keeps_its_settings(settings, tmp_path):
    out = tmp_path / "run"
    settings.steps = 4
    training.train(settings, out)
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--lr", "0.5"])
    assert result.exit_code == 2
    assert "a resumed run keeps its settings; got lr 0.5, the run has 0.004" in result.output


@pytest.mark.slow
def test_a_changed_corpus_cannot_be_resumed(settings, text, tmp_path):
    training.train(settings, tmp_path / "run")
    text.write_text(text.read_text().upper())
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "the corpus has changed since the run began" in result.output


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_again(settings, tmp_path):
    loss = training.train(settings, tmp_path / "whole").loss
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / Settings.FILE).write_text(json.dumps(dataclasses.asdict(settings)))
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path / "run"), "--sample", "0"])
    assert result.exit_code == 0, result.output
    assert f"validation {loss:.4f} nats" in result.output


@pytest.mark.slow
def test_a_config_is_the_models(text, tmp_path):
    options = {"dim": 24, "num_layers": 1, "num_heads": 3, "retention": {"rotary": None}}
    (tmp_path / "small.json").write_text(json.dumps(options))
    out = tmp_path / "run"
    command("train", text, "--out", out, "--config", tmp_path / "small.json", *QUICK)
    model = RetNetForCausalLM.from_pretrained(out)
    assert (model.config.dim, model.config.num_layers, model.config.vocab_size) == (24, 1, 256)
    assert model.model.backbone.blocks[0].retention.num_heads == 3
    # The folder of a model is a config too; more tokens than are needed may be there.
    (out / "config.json").write_text(json.dumps({**json.loads((out / "config.json").read_text()), "vocab_size": 300}))
    command("train", text, "--out", tmp_path / "again", "--config", out, *QUICK)
    assert RetNetForCausalLM.from_pretrained(tmp_path / "again").model.embed_tokens.weight.shape == (300, 24)
    assert "A sample" not in command("generate", "--model", tmp_path / "again", "--tokens", 5)


BAD_CONFIGS = [
    ({"dimm": 8, "layers": 2, "dim": 8}, "has options that no RetNet has: dimm, layers; correct or remove them"),
    ({"retention": {"gama": 1}}, "has options that no RetNet has: gama; correct"),
    ({"model_type": "llama"}, "model_type must be 'retention'; .* is of a 'llama'"),
    ({"dim": "wide"}, "has an option that cannot be: "),
    ([1], "must hold options of a RetNet"),
    ({"vocab_size": 255}, "vocab_size must be at least 256, the number of tokens; got 255"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS, ids=str)
def test_bad_configs_are_named(options, message, text, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(options))
    words = ["train", str(text), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "bad.json"), *QUICK]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert re.search(f"error: .*{message}", result.output, re.DOTALL), result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_trains_on_tokens_and_generates_with_them(text, tokenizer_folder, small, tmp_path):
    out = tmp_path / "run"
    printed = command("train", text, "--out", out, "--tokenizer", tokenizer_folder, *small, "--sample", 5)
    config = RetNetForCausalLM.from_pretrained(out).config
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert (tmp_path / "run/checkpoint-2/tokenizer.json").exists()
    assert "2 sequences x 16 tokens = 32 tokens a step" in printed
    nats, perplexity, bits = map(
        float,
        re.search(r"validation (.*) nats per token, perplexity (.*), (.*) bits per byte; the m", printed).groups(),
    )
    held_out = text.read_text()[(text.stat().st_size + 1) * 19 // 20 :]
    per_byte = (len(tokenizer.encode(held_out)) + 1) / (len(held_out) + 1)
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert bits == pytest.approx(nats * per_byte / math.log(2), abs=1e-3)
    assert "A sample" in printed

    written = [
        command("generate", "--model", out, "--tokens", 9, "--prompt", "7 squared", *more)
        for more in ([], ["--seed", 1])
    ]
    assert all(text.startswith("7 squared") for text in written)
    assert written[0] != written[1]
    model, start = RetNetForCausalLM.from_pretrained(out), tokenizer.encode("7 squared")
    chance = torch.Generator().manual_seed(0)
    new = [token.item() for token in stream(model, torch.tensor([start]), 9, temperature=0.8, generator=chance)]
    assert written[0].rstrip("\n") == tokenizer.decode(start + new).rstrip("\n")


@pytest.mark.slow
def test_the_command_trains_on_a_saved_dataset(tokenizer_folder, small, tmp_path):
    texts = [f"{n} squared is {n * n}.\n" * 5 for n in range(60)]
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(tmp_path / "data")
    words = ["--out", tmp_path / "run", "--tokenizer", tokenizer_folder, "--text-column", "body", *small]
    assert "bits per byte; the model" in command("train", tmp_path / "data", *words)
    command("train", "--resume", "--out", tmp_path / "run", "--sample", "0")
    datasets.Dataset.from_dict({"body": texts[::-1]}).save_to_disk(tmp_path / "other")
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path / "run"), str(tmp_path / "other")])
    assert "a resumed run keeps its settings; got files" in result.output


@pytest.mark.slow
def test_tokens_without_a_tokenizer_are_trained_on_and_not_read(small, tmp_path):
    datasets.Dataset.from_dict({"input_ids": [[n, 2 * n, 7] * 9 for n in range(99)]}).save_to_disk(tmp_path / "data")
    printed = command("train", tmp_path / "data", "--out", tmp_path / "run", *small)
    assert re.search(r"nats per token, perplexity [\d.]+; the model", printed)
    assert "no sample: the corpus came as token ids" in printed
    result = CliRunner().invoke(app, ["generate", "--model", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "must hold the model's tokenizer, for it was trained on token ids" in result.output


@pytest.mark.slow
def test_a_changed_tokenizer_or_config_cannot_be_resumed(text, tokenizer_folder, small, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "a.json").write_text('{"dim": 16, "num_layers": 1, "num_heads": 2}')
    words = ["--out", out, "--tokenizer", tokenizer_folder, "--config", tmp_path / "a.json", *QUICK, "--sample", 0]
    command("train", text, *words)
    (tmp_path / "a.json").write_text('{"dim": 32}')
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--config", str(tmp_path / "a.json")])
    assert "a resumed run keeps its settings; got config {'dim': 32}, the run has {'dim': 16" in result.output
    command("train", "--resume", "--out", out, "--sample", 0)  # what the run began with is kept with it
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens("seventeen")
    tokenizer.save_pretrained(tokenizer_folder)
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(out)])
    assert result.exit_code == 2
    assert "the tokenizer has changed since the run began" in result.output


def torchrun(*words, interrupt_after=None):
    """A training on two processes, which Ctrl-C may interrupt after a line with a certain text. What it prints."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "retention.cli", "train"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    lines = []
    with subprocess.Popen([*launch, *map(str, words)], **pipes, env=environment, start_new_session=True) as process:
        too_long = threading.Timer(240, os.killpg, (process.pid, signal.SIGKILL))
        too_long.start()
        for line in process.stdout:
            lines.append(line)
            if interrupt_after and interrupt_after in line:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
                interrupt_after = None
        too_long.cancel()
    return "".join(lines)


@pytest.mark.slow
@pytest.mark.skipif(
    transformers.__version__.startswith("5.16."), reason='on CPUs it cannot load the optimiser of several, onto "cpu:0"'
)
def test_two_processes_train_stop_and_resume_as_one(text, tokenizer_folder, tmp_path):
    config = tmp_path / "small.json"
    config.write_text(json.dumps({"dim": 16, "num_layers": 1, "num_heads": 2}))
    options = ["--config", config, "--tokenizer", tokenizer_folder, "--steps", 100, "--context", 32]
    options += ["--eval-every", 10, "--lr", 1e-3, "--device", "cpu", "--sample", 0]
    two, one = tmp_path / "two", tmp_path / "one"
    begun = torchrun(text, "--out", two, "--batch", 2, *options, interrupt_after="step 10:")
    assert begun.count("2 sequences x 2 processes x 32 tokens = 128 tokens a step") == 1, begun
    assert begun.count("stopped and saved") == 1
    (checkpoint,) = two.glob("checkpoint-*")
    assert 10 <= int(checkpoint.name.split("-")[1]) < 100
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(two), "--context-parallel", "3"])
    assert "must divide the number of processes; got context_parallel 3, tensor_parallel 1, 1 process;" in result.output
    shutil.copytree(two, alone := tmp_path / "alone")

    ended = torchrun("--resume", "--out", two)
    whole = command("train", text, "--out", one, "--batch", 4, *options)
    resumed = command("train", "--resume", "--out", alone)
    assert "4 sequences x 32 tokens = 128 tokens a step" in resumed
    assert json.loads((alone / Settings.FILE).read_text())["processes"] == 2
    for printed, out in ((ended, two), (resumed, alone)):
        assert validation(printed) == pytest.approx(validation(whole), rel=1e-4)
        assert losses(out / "checkpoint-100") == pytest.approx(losses(one / "checkpoint-100"), rel=1e-4)


def validation(printed):
    return float(re.findall(r"validation (\S+) nats\b.*; the model is in", printed)[0])


def losses(checkpoint):
    """The losses that a run has logged, those of evaluations too."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {(entry["step"], name): entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry}


@pytest.mark.slow
def test_two_processes_with_parts_of_the_sequences_train_as_one(text, tmp_path):
    config = tmp_path / "small.json"
    config.write_text(json.dumps({"dim": 16, "num_layers": 2, "num_heads": 2, "z_loss_coeff": 1e-2}))
    options = ["--config", config, "--steps", 12, "--batch", 3, "--accumulate", 2, "--context", 33, "--eval-every", 6]
    options += ["--save-every", 6, "--lr", 1e-3, "--device", "cpu", "--sample", 0]
    two, one = tmp_path / "two", tmp_path / "one"
    printed = torchrun(text, "--out", two, "--context-parallel", 2, *options)
    whole = command("train", text, "--out", one, *options)
    assert printed.count("3 sequences x 2 accumulated x 33 bytes = 198 bytes a step") == 1, printed
    assert losses(two / "checkpoint-12") == pytest.approx(losses(one / "checkpoint-12"), rel=1e-5)
    assert validation(printed) == validation(whole)

    shutil.rmtree(two / "checkpoint-12")  # as if it had ended before
    command("train", "--resume", "--out", two, "--context-parallel", 1, "--sample", 0)
    assert losses(two / "checkpoint-12") == pytest.approx(losses(one / "checkpoint-12"), rel=1e-5)
