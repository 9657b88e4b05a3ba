"""RetNet in transformers' interface, and its training."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

from retention import RetNet, ShapeError
from retention.cli import app
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM, training
from retention.model import PRESETS

SMALL = dict(vocab_size=256, dim=16, num_layers=2, num_heads=2)


def make(**options):
    torch.manual_seed(0)
    return RetNetForCausalLM(RetNetConfig(**SMALL, **options)).eval()


# --- the model --------------------------------------------------------------------------------------------------------


def test_is_the_same_function_as_retnet():
    model, plain = make(retention={"decay": "log_linear"}), RetNet(256, 16, 2, 2, retention={"decay": "log_linear"})
    names = {"model.embed_tokens": "embedding", "model.backbone": "backbone", "lm_head": "head"}
    weights = {}
    for name, value in model.state_dict().items():
        old = next(old for old in names if name.startswith(old))
        weights[names[old] + name[len(old) :]] = value
    plain.load_state_dict(weights)
    tokens = torch.randint(256, (2, 7))
    assert torch.equal(model(tokens).logits, plain.eval()(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_round_trip(tmp_path, dtype):
    """Decays are no buffers, so loading cannot leave them uninitialised, nor half precision round them."""
    model = make(retention={"learnable_decay": True, "norm_affine": "shared"})
    torch.nn.init.constant_(model.model.backbone.blocks[1].retention.decay_shift, -2.0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(loaded, RetNetForCausalLM)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.randint(256, (2, 7))
    want = model.to(dtype)(tokens).logits
    torch.testing.assert_close(loaded.eval()(tokens).logits, want)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "RetNetModel"


def test_initialisation_is_the_layers_own():
    model = RetNetForCausalLM(RetNetConfig(dim=256, num_layers=1))
    block = model.model.backbone.blocks[0]
    bound = 2**-2.5 * math.sqrt(6 / (256 + 256))  # Xavier, gain 2^-2.5
    assert block.retention.q_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.lm_head.weight.std().item() == pytest.approx(256**-0.5, rel=0.03)


def test_a_head_of_somebody_elses_is_initialised_when_it_is_new(tmp_path):
    class Classifier(RetNetForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.score = torch.nn.Linear(16, 3)
            self.post_init()

    make().save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path)
    assert loaded.score.weight.std().item() == pytest.approx(16**-0.5, rel=0.3)
    assert not loaded.score.bias.any()


def test_config_goes_by_its_own_names_and_those_of_transformers():
    config = RetNetConfig(hidden_size=64, num_hidden_layers=3, retention={"decay": torch.tensor([-1.0] * 4)})
    assert (config.dim, config.num_layers) == (64, 3)
    assert config.initializer_range == pytest.approx(1 / 8)
    assert config.retention == {"decay": [-1.0] * 4}
    config = RetNetConfig(**PRESETS["tiny"])
    config.retention["rotary"] = None
    assert PRESETS["tiny"]["retention"]["rotary"] == "rope"


def test_loss_is_the_shifted_cross_entropy_and_ignores_padding():
    model, tokens = make(), torch.randint(256, (1, 9))
    out = model(tokens, labels=tokens)
    want = torch.nn.functional.cross_entropy(out.logits[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(out.loss, want)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    labels = padded.masked_fill(mask == 0, -100)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], out.logits)
    labels[:, 4] = -100
    torch.testing.assert_close(model(padded, attention_mask=mask, labels=labels).loss, want)


def test_streaming_is_recurrent_and_matches_the_full_forward():
    model, tokens = make(), torch.randint(256, (2, 5))
    new = torch.cat(list(model.stream(tokens, 6, temperature=0)), 1)
    whole = torch.cat([tokens, new], 1)
    assert torch.equal(model(whole).logits[:, 4:-1].argmax(-1), new)


def test_bad_input_is_named():
    model = make()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="attn_mask"):
        model(torch.zeros(1, 3, dtype=torch.long), attn_mask=torch.ones(1, 3))
    with pytest.raises(ShapeError, match=r"attention_mask must be \(batch, length\) \(1, 3\); got \(1, 4\)"):
        model(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 4))


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_the_default_corpus_is_python_with_files_held_out():
    train, valid = training.corpus()
    assert len(train) > 5_000_000
    assert 50_000 < len(valid) <= 100_000
    assert b"\ndef " in train
    assert b"\ndef " in valid
    first_held_out = valid.split(b"\0")[0]
    assert first_held_out not in train


def test_own_files_and_folders_are_taken_and_their_ends_held_out(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_bytes(b"a" * 99)
    (tmp_path / "b.txt").write_bytes(b"b" * 199)
    train, valid = training.corpus([tmp_path / "folder", tmp_path / "b.txt"])
    assert train == b"a" * 95 + b"b" * 190
    assert valid == b"a" * 4 + b"\0" + b"b" * 9 + b"\0"


def test_what_is_no_text_of_the_users_is_left_out(tmp_path):
    for name in (".git/objects/ab", "__pycache__/x.pyc", "run/training.json", "notes.txt", "weights.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\1\2" if name == "weights.bin" else name.encode())
    train, valid = training.corpus([tmp_path], skip=tmp_path / "run")
    assert train + valid == b"notes.txt\0"
    with pytest.raises(ValueError, match="must hold at least one text; got none in .*weights.bin"):
        training.corpus([tmp_path / "weights.bin"])


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(2000)))
    return file


@pytest.fixture
def settings(text, monkeypatch):
    monkeypatch.setitem(PRESETS, "test", SMALL)
    return training.Settings(
        files=[str(text)], preset="test", steps=12, batch=2, context=32, eval_every=6, save_every=4, device="cpu"
    )


class Losses(TrainerCallback):
    """Every step's loss, as it goes into the backward pass."""

    def __init__(self):
        self.seen = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen[state.global_step] = logs["loss"]


def losses_of(settings, out, monkeypatch, interrupt_at=None, **options):
    """Train, and give the loss of each step."""
    record = Losses()

    class Watched(training.SaveOnInterrupt):
        def on_log(self, *args, **kwargs):
            record.on_log(*args, **kwargs)

        def on_step_begin(self, args, state, control, **kwargs):
            if interrupt_at is not None and state.global_step == interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)

    each_step = lambda settings, out: replaced(arguments(settings, out), logging_steps=1)  # noqa: E731
    arguments = training._arguments
    with monkeypatch.context() as patch:
        patch.setattr(training, "SaveOnInterrupt", Watched)
        patch.setattr(training, "_arguments", each_step)
        model, loss = training.train(settings, out, **options)
    return model, loss, record.seen


def replaced(arguments, **changes):
    for name, value in changes.items():
        setattr(arguments, name, value)
    return arguments


def test_an_interrupted_run_resumes_exactly(settings, tmp_path, monkeypatch):
    whole, loss, steps = losses_of(settings, tmp_path / "whole", monkeypatch)
    _, nothing, begun = losses_of(settings, tmp_path / "cut", monkeypatch, interrupt_at=6)
    assert nothing is None
    assert (tmp_path / "cut/checkpoint-7/model.safetensors").exists()
    resumed, same_loss, rest = losses_of(settings, tmp_path / "cut", monkeypatch, resume=True)
    assert sorted(begun) == list(range(1, 8))
    assert sorted(rest) == list(range(8, 13))
    assert {**begun, **rest} == steps
    assert same_loss == loss
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_killed_while_saving_resumes_from_the_last_complete_checkpoint(settings, tmp_path, monkeypatch):
    _, loss, _ = losses_of(settings, tmp_path / "run", monkeypatch)
    for name in ("checkpoint-8", "checkpoint-12"):
        assert (tmp_path / "run" / name).is_dir()
    (tmp_path / "run/checkpoint-12/trainer_state.json").unlink()
    _, same_loss, rest = losses_of(settings, tmp_path / "run", monkeypatch, resume=True)
    assert sorted(rest) == [9, 10, 11, 12]
    assert same_loss == loss


def test_a_finished_run_is_not_trained_further(settings, tmp_path, monkeypatch):
    _, loss, _ = losses_of(settings, tmp_path / "run", monkeypatch)
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    _, same_loss, steps = losses_of(settings, tmp_path / "run", monkeypatch, resume=True)
    assert same_loss == loss
    assert not steps
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


def test_a_changed_corpus_cannot_be_resumed(settings, text, tmp_path):
    training.train(settings, tmp_path / "run")
    text.write_text(text.read_text().upper())
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "the corpus is not what it was when the run began" in result.output


def test_a_run_killed_before_its_first_checkpoint_begins_again(settings, tmp_path, monkeypatch):
    _, loss, _ = losses_of(settings, tmp_path / "whole", monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / training.SETTINGS).write_text(json.dumps(training.asdict(settings)))
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path / "run"), "--sample", "0"])
    assert result.exit_code == 0, result.output
    assert f"validation {loss:.4f} nats" in result.output


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda settings, out, resume: (None, None))
    result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run")])
    assert result.exit_code == 130
    assert f"stopped and saved; continue with: retention train --resume --out {tmp_path}/run" in result.output


def test_training_learns(settings, tmp_path):
    settings.steps, settings.batch, settings.lr = 150, 8, 1e-2
    _, loss = training.train(settings, tmp_path / "run")
    assert loss < 1.5  # nats per byte; 5.5 before training


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
    assert json.loads((tmp_path / "run" / training.SETTINGS).read_text())["steps"] == 3

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


BAD = [
    (["train", "--preset", "huge"], "preset must be one of tiny, .*; got preset 'huge'"),
    (["train", "no/such/file"], "no such file or folder: .*no/such/file"),
    (["train", "--lr", "-1"], "lr must be above 0; got lr -1"),
    (["train", "--backend", "eager", "--form", "chunkwise"], "backend 'eager' cannot run .*not chunkwise"),
    (["train", "--steps", "0"], "steps must be at least 1; got steps 0"),
    (["train", "--context", "1"], "context must be at least 2; got context 1"),
    (["train", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16; got dtype 'int8'"),
    (["train", "--backend", "magic"], "backend must be 'auto' or one of chunked, eager; got backend 'magic'"),
    (["train", "--form", "magic"], "form must be one of .*; got form 'magic'"),
    (["train", "--device", "abacus"], "device must be one of auto, cpu, cuda, mps; got device 'abacus'"),
    (["train", "--resume"], "nothing to resume in runs/retnet: it has no training.json"),
    (["generate", "--model", "nowhere"], "no model in nowhere: it has no config.json"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_bad_options_are_named_and_nothing_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert re.search(f"error: {message}", result.output, re.DOTALL), result.output
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_settings(settings, tmp_path):
    out = tmp_path / "run"
    settings.steps = 4
    training.train(settings, out)
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--lr", "0.5"])
    assert result.exit_code == 2
    assert "a resumed run keeps its settings; got lr 0.5, the run has 0.004" in result.output


def test_a_corpus_that_is_too_short_is_named(tmp_path):
    (tmp_path / "text").write_text("short")
    with pytest.raises(ValueError, match="training part of .* must hold at least context bytes; got 5, context 128"):
        training.train(training.Settings(files=[str(tmp_path / "text")]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_package_says_what_it_needs(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; import retention.integrations.transformers"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(tmp_path)
    )
    assert 'pip install "multiscale-retention[transformers]"' in result.stderr
