"""`retention swap`: a model goes in, one with retention and the same quality comes out."""

import dataclasses
import json
import re
import shutil
import signal

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from retention.cli import app
from retention.integrations.swap import Swapped
from retention.integrations.transformers import load_swapped
from retention.integrations.transformers.decoding import stream
from retention.integrations.transformers.training import swapping
from retention.integrations.transformers.training.saving import alone_in
from retention.integrations.transformers.training.swapping import SwapSettings

RATES = ["--transfer-lr", "0.04", "--tuning-lr", "3e-4"]
SMALL = ["--transfer-steps", "8", "--tuning-steps", "4", "--batch", "2", "--context", "32", "--eval-every", "4", *RATES]
QUIET = [*SMALL, "--device", "cpu", "--sample", "20"]


@pytest.fixture
def host(tmp_path):
    """A GPT-2 that reads bytes."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.3))
    model.save_pretrained(tmp_path / "host")
    return tmp_path / "host"


def run(*words):
    return CliRunner().invoke(app, ["swap", *map(str, words)])


@pytest.mark.slow
def test_the_command_replaces_trains_and_writes(host, text, tmp_path):
    out = tmp_path / "out"
    result = run(host, text, "--out", out, *QUIET)
    assert result.exit_code == 0, result.output
    assert "retention in 2 layers: transformer.h.0.attn, transformer.h.1.attn" in result.output
    losses = json.loads((out / "recovery.json").read_text())
    teacher, tuned = re.search(r"teacher (.*?); .* tuned (.*?) nats per token", result.output).groups()
    assert losses["teacher"] == pytest.approx(float(teacher), abs=1e-3)
    assert losses["tuned"] == pytest.approx(float(tuned), abs=1e-3)
    assert losses["tokens"] == 12 * 2 * 32
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    history = json.loads((out / "part-1/transfer/checkpoint-8/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 9))  # the plot has a training line
    assert "A sample" in result.output

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert all(isinstance(block.attn, Swapped) for block in model.transformer.h)
    start = torch.tensor([list(b"def ")])
    new = torch.cat(list(stream(model, start, 9, temperature=0)), 1)
    assert torch.equal(model.generate(start, max_new_tokens=9, do_sample=False)[:, 4:], new)
    written = CliRunner().invoke(app, ["generate", "--model", str(out), "--tokens", "9", "--device", "cpu"])
    assert written.exit_code == 0, written.output
    assert written.output.startswith("def ")
    too_long = CliRunner().invoke(app, ["generate", "--model", str(out), "--tokens", "61"])
    assert "tokens must be at most 60, for which the model has positions left; got 61" in too_long.output


@pytest.mark.slow
def test_the_plot_names_the_model_and_shows_all_parts(host, text, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(swapping, "draw_recovery", lambda *args: drawn.append(args))
    result = run(host, text, "--out", tmp_path / "out", *QUIET, "--parts", "2", "--sample", 0)
    assert result.exit_code == 0, result.output
    parts, tokens_per_step, unit, file, title = drawn[-1]
    assert (tokens_per_step, unit, file) == (2 * 32, "bytes", tmp_path / "out/losses.png")
    losses = [[entry["step"] for entry in stage if "loss" in entry] for part in parts.values() for stage in part]
    assert losses == [[1, 2, 3, 4], [1, 2]] * 2
    assert re.fullmatch(r"host, [\d,]+ parameters, with retention in 2 layers; training on 768 bytes", title)


@pytest.mark.slow
def test_layers_are_replaced_in_parts(host, text, tmp_path):
    options = ["--layers", "1,0", "--parts", "2", "--window", "9", "--sinks", "0"]
    result = run(host, text, "--out", tmp_path / "out", *QUIET, *options)
    assert result.exit_code == 0, result.output
    assert "part-2/tuning: " in result.stderr + result.output
    first, second = (load_part(tmp_path / "out" / f"part-{n}" / "tuning" / "checkpoint-2") for n in (1, 2))
    assert {name.split(".")[2] for name in first if ".retention." in name} == {"1"}
    assert {name.split(".")[2] for name in second if ".retention." in name} == {"0", "1"}
    best = torch.load(tmp_path / "out" / "part-2" / "tuning" / "best.pt", weights_only=True)["weights"]
    model = load_swapped(tmp_path / "out")
    assert [(block.attn.retention.window, block.attn.retention.sinks) for block in model.transformer.h] == [(9, 0)] * 2
    for name, weight in model.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(weight, best[f"model.{name}"]), name


@pytest.mark.slow
def test_longer_sequences_follow_and_their_losses_are_told_and_plotted(host, text, tmp_path, monkeypatch):
    drawn, out = [], tmp_path / "out"
    monkeypatch.setattr(swapping, "draw_recovery", lambda *args: drawn.append(args))
    options = ["--longer", "48", "--longer", "64", "--longer-steps", "2", "--tune", "lora", "--rank", "2"]
    result = run(host, text, "--out", out, *QUIET, *options, "--sample", 0)
    assert result.exit_code == 0, result.output
    told = dict(re.findall(r"^(?:context (\d+): )?teacher .* after ([\d,]+) tokens$", result.output, re.MULTILINE))
    assert told == {"": "768", "48": "96", "64": "128"}
    assert "1 sequences x 48 bytes = 48 bytes a step" in result.stderr + result.output
    losses = json.loads((out / "recovery.json").read_text())
    assert losses["longer"]["64"]["tuned"] <= losses["longer"]["64"]["replaced"]
    parts, tokens_per_step, *_, title = drawn[-1]
    assert {name: [entry["step"] for entry in tuning if "loss" in entry] for name, (_, tuning) in parts.items()} == {
        "part 1": [1, 2, 3, 4],
        "context 48": [0.75, 1.5],  # steps of the axis, which has 64 bytes a step
        "context 64": [1, 2],
    }
    assert tokens_per_step == 64
    assert title.endswith("training on 768 bytes, then on sequences of 48, then on sequences of 64")
    model = load_swapped(out)
    assert {type(module).__module__.split(".")[0] for module in model.modules()} == {
        "torch",
        "transformers",
        "retention",
    }


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((64, 48), "longer must be different contexts, from short to long; got longer [64, 48]"),
        ((48, 48), "longer must be different contexts, from short to long; got longer [48, 48]"),
        ((32,), "longer must be above context, 32; got longer 32"),
        ((48, 65), "longer must be at most 64, the positions of "),
    ],
)
def test_lengths_that_cannot_follow_are_refused_before_anything_is_written(lengths, message, host, text, tmp_path):
    longer = [word for length in lengths for word in ("--longer", length)]
    result = run(host, text, "--out", tmp_path / "out", *QUIET, *longer)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "window", "sinks"),
    [([], 64, 4), (["--window", "0"], None, 4), (["--sinks", "0"], 64, 0), (["--no-features"], None, 0)],
)
def test_the_window_and_the_sinks_are_kept_unless_said_otherwise(host, words, window, sinks, monkeypatch):
    found = []
    monkeypatch.setattr(swapping, "swap", lambda settings, *_, **__: found.append(settings.replacement) or 1 / 0)
    run(host, *words)
    assert (found[0]["window"], found[0]["sinks"]) == (window, sinks)


def test_a_run_that_began_with_former_names_of_settings_goes_on(tmp_path):
    settings = dataclasses.asdict(SwapSettings(model="m", num_decays=3))
    settings["scales"] = settings.pop("num_decays")
    (tmp_path / "swap.json").write_text(json.dumps(settings))
    assert SwapSettings.read(tmp_path) == SwapSettings(model="m", num_decays=3)


def load_part(checkpoint):
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_gives_what_an_uninterrupted_run_gives(host, text, tmp_path, monkeypatch):
    words = [host, text, *QUIET, "--sample", "0"]
    assert run(*words, "--out", tmp_path / "whole").exit_code == 0

    class Interrupted(swapping.SaveOnInterrupt):
        def on_step_begin(self, args, state, control, **kwargs):
            if args.output_dir.endswith(stage) and state.global_step == 1:
                signal.raise_signal(signal.SIGINT)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(swapping, "SaveOnInterrupt", Interrupted)
        for stage, resume in (("transfer", []), ("tuning", ["--resume"])):  # noqa: B007
            result = run(*(words if not resume else []), "--out", out, *resume)
            assert result.exit_code == 130, result.output
            assert f"stopped and saved; continue with: retention swap --resume --out {out}" in result.output
            assert not (out / "config.json").exists()
    assert run("--resume", "--out", out).exit_code == 0
    whole, cut = (load_swapped(tmp_path / name).state_dict() for name in ("whole", "cut"))
    for name, weight in whole.items():
        assert torch.equal(weight, cut[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_of_a_cluster_saves_too(name, host, text, tmp_path, monkeypatch):
    class Heard(swapping.SaveOnInterrupt):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(swapping, "SaveOnInterrupt", Heard)
    result = run(host, text, "--out", tmp_path / "out", *QUIET)
    assert result.exit_code == 128 + getattr(signal, name)
    assert f"stopped and saved; continue with: retention swap --resume --out {tmp_path}/out" in result.output
    assert (tmp_path / "out/part-1/transfer/checkpoint-3").is_dir()


def test_a_signal_outside_of_the_steps_stops_at_once(host, text, tmp_path, monkeypatch):
    monkeypatch.setattr(swapping, "replace_in_parts", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    out = tmp_path / "out"
    result = run(host, text, "--out", out, *QUIET)
    assert result.exit_code == 143
    assert f"stopped by SIGTERM; continue with: retention swap --resume --out {out}" in result.output
    monkeypatch.setattr(swapping, "read_corpus", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = run(host, text, "--out", tmp_path / "other", *QUIET)
    assert result.exit_code == 130
    assert "stopped by SIGINT; nothing was begun" in result.output
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_stage_gives_the_same_whether_the_one_before_was_trained_or_loaded(text, tmp_path):
    """With dropout, whose random numbers the first stage would use up."""
    sizes = dict(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.3)).save_pretrained(tmp_path / "host")
    words = [tmp_path / "host", text, *QUIET, "--sample", "0"]
    assert run(*words, "--out", tmp_path / "whole").exit_code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/part-1/tuning")
    assert run("--resume", "--out", tmp_path / "cut").exit_code == 0
    whole, cut = (load_swapped(tmp_path / name).state_dict() for name in ("whole", "cut"))
    for name, weight in whole.items():
        assert torch.equal(weight, cut[name]), name


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_stage_is_left_out_with_a_line(host, text, tmp_path):
    out = tmp_path / "out"
    words = [host, text, "--out", out, *QUIET, "--sample", "0", "--save-every", "2"]
    assert run(*words).exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    state = out / "part-1/transfer/checkpoint-8/trainer_state.json"
    state.write_text(state.read_text()[:99])
    result = run("--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{state.parent} is left out: its trainer_state.json is damaged" in result.output
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_host_whose_weights_changed_cannot_be_resumed(host, text, tmp_path):
    out = tmp_path / "out"
    assert run(host, text, "--out", out, *QUIET, "--sample", "0").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(host)
    model.transformer.h[1].mlp.c_fc.bias.data[3] += 1e-3
    model.save_pretrained(host)
    result = run("--resume", "--out", out)
    assert result.exit_code == 2
    told = "the weights of the model have changed since the run began; restore them, or begin a new run"
    assert told in result.output


def test_a_second_run_in_the_same_folder_is_refused(host, text, tmp_path):
    with alone_in(tmp_path / "out"):
        result = run(host, text, "--out", tmp_path / "out", *QUIET)
    assert result.exit_code == 2
    assert "another run writes to" in result.output


@pytest.mark.slow
def test_every_phase_shows_its_progress(host, text, tmp_path):
    result = run(host, text, "--out", tmp_path / "out", *QUIET)
    bars = ["Loading weights", "digest of the weights", "calibrating", "evaluating", "Writing model shards"]
    assert [bar for bar in bars if not re.search(rf"{bar}: +0%\|.*<\?", result.stderr)] == []
    assert result.stderr.startswith("loading the libraries\n")


@pytest.mark.slow
def test_a_training_that_diverges_says_so(host, text, tmp_path):
    result = run(host, text, "--out", tmp_path / "out", *QUIET, "--transfer-lr", "1e30")
    assert result.exit_code == 1
    assert "error: the training diverged at step " in result.output
    assert "begin a new run with a lower learning rate (it was 1e+30)" in result.output


def test_a_missing_model_is_called_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert f"no model in {tmp_path}/empty: it has no config.json" in run("empty").output
    result = run("nowhere")
    assert "model must be a folder, a GGUF file or a name on the hub; 'nowhere' cannot be loaded" in result.output
    assert "tokenizer" not in result.output
    assert result.exit_code == 2


@pytest.mark.slow
def test_a_resumed_run_keeps_its_settings(host, text, tmp_path):
    out = tmp_path / "out"
    assert run(host, text, "--out", out, *QUIET, "--sample", "0").exit_code == 0
    assert "holds a run already; continue it with --resume" in run(host, text, "--out", out).output
    assert "a resumed run keeps its settings; got gate 'relu'" in run("--resume", "--out", out, "--gate", "relu").output
    text.write_text("other " * 9999)
    assert "the corpus has changed" in run("--resume", "--out", out).output
    assert dataclasses.asdict(SwapSettings.read(out))["transfer_steps"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name a model: retention swap MODEL"),
        (["HOST", "--layers", "a"], "layers must be numbers with commas, such as 0,2,-1; got 'a'"),
        (["HOST", "--layers", "7"], "layers must be from -2 to 1; got 7"),
        (["HOST", "--window", "-1"], "Input should be greater than or equal to 0"),
        (["HOST", "--no-features", "--sinks", "2"], "window and sinks need features=True, whose scores have a sum"),
        (["HOST", "--gate", "tanh"], "gate must be one of 'silu'"),
        (["HOST", "--context", "65"], "context must be at most 64, the positions of "),
        (
            ["HOST", "--parts", "3", "--transfer-steps", "3", "--tuning-steps", "3"],
            "parts must be at most 2, the layers",
        ),
        (["HOST", "--parts", "3"], "tuning_steps must be a multiple of parts, 3, at least 0"),
        (["HOST", "--batch", "0"], "batch must be at least 1; got batch 0"),
        (["HOST", "--decay", "fast"], "decay must be one of 'paper'"),
        (["HOST", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(host, text, tmp_path, words, told, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = [host if word == "HOST" else word for word in words]
    result = run(*words[:1], *([text] if words else []), "--out", tmp_path / "out", *words[1:])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_that_has_retention_or_knows_too_few_tokens_is_refused(host, text, tmp_path):
    assert run(host, text, "--out", tmp_path / "out", *QUIET, "--sample", "0").exit_code == 0
    assert (
        "has retention already; name the model as it was" in run(tmp_path / "out", text, "--out", tmp_path / "2").output
    )
    model = AutoModelForCausalLM.from_pretrained(host)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "few")
    assert "must know all 256 tokens of the corpus; it knows 100" in " ".join(
        run(tmp_path / "few", text, "--out", tmp_path / "3", *QUIET).output.split()
    )


@pytest.mark.slow
def test_a_sample_that_fails_is_one_line_and_what_was_trained_is_saved_and_said_before_it(
    host, text, tmp_path, monkeypatch
):
    def broken(*args, **kwargs):
        raise TypeError("no such argument")

    monkeypatch.setattr("retention.integrations.transformers.decoding.stream", broken)
    out = tmp_path / "out"
    result = run(host, text, "--out", out, *QUIET)
    assert result.exit_code == 0
    assert "no sample: TypeError: no such argument" in result.output
    assert result.output.index(f"the model is in {out}") < result.output.index("no sample")
    assert "Traceback" not in result.output
    assert isinstance(load_swapped(out).transformer.h[0].attn, Swapped)


@pytest.mark.slow
def test_the_cheapest_layers_are_chosen_once_and_replaced(host, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = run(host, text, "--out", out, *QUIET, "--choose", "1")
    assert result.exit_code == 0, result.output
    costs = json.loads((out / "layers.json").read_text())
    cheapest = min(range(2), key=costs["fitted"].__getitem__)
    assert costs["chosen"] == [cheapest]
    assert f"retention in 1 layers: transformer.h.{cheapest}.attn" in result.output
    assert "untrained" in result.output
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert [isinstance(block.attn, Swapped) for block in load_swapped(out).transformer.h].index(True) == cheapest
    monkeypatch.delattr(swapping, "choose_layers")  # a resumed run keeps what was chosen
    assert run("--resume", "--out", out).exit_code == 0
    refused = run(host, text, "--out", tmp_path / "2", *QUIET, "--choose", "1", "--layers", "0")
    assert "choose and layers must not both be given; got choose 1, layers [0]" in refused.output
    refused = run(host, text, "--out", tmp_path / "2", *QUIET, "--choose", "3")
    assert "choose must be at most 2, the layers of the model; got choose 3" in refused.output
