"""Training with transformers' Trainer."""

import dataclasses
import json
import math
import os
import re
import signal

import pytest
import torch
from short_runs import SMALL, diverge_after
from transformers import TrainerCallback

from retention.integrations.transformers.training import progress
from retention.integrations.transformers.training import train as training
from retention.integrations.transformers.training.plot import draw
from retention.integrations.transformers.training.progress import Stopped
from retention.integrations.transformers.training.saving import alone_in
from retention.integrations.transformers.training.settings import Settings


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
        try:
            run = training.train(settings, out, **options)
        except Stopped:
            return None, None, record.seen
    return run.model, run.loss, record.seen


def replaced(arguments, **changes):
    for name, value in changes.items():
        setattr(arguments, name, value)
    return arguments


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes_from_the_last_complete_checkpoint(settings, tmp_path, monkeypatch):
    _, loss, _ = losses_of(settings, tmp_path / "run", monkeypatch)
    for name in ("checkpoint-8", "checkpoint-12"):
        assert (tmp_path / "run" / name).is_dir()
    (tmp_path / "run/checkpoint-12/trainer_state.json").unlink()
    _, same_loss, rest = losses_of(settings, tmp_path / "run", monkeypatch, resume=True)
    assert sorted(rest) == [9, 10, 11, 12]
    assert same_loss == loss


def history_of(checkpoint):
    """What a run has logged, without times."""
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if not name.startswith("eval_")} for entry in entries], [
        (entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry
    ]


@pytest.mark.slow
def test_after_a_resume_the_losses_are_those_of_the_whole_run(settings, tmp_path, monkeypatch):
    settings.steps = 24
    arguments = training._arguments
    monkeypatch.setattr(training, "_arguments", lambda *args: replaced(arguments(*args), logging_steps=10))
    training.train(settings, tmp_path / "whole")

    class Interrupted(training.SaveOnInterrupt):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 12:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "SaveOnInterrupt", Interrupted)
        with pytest.raises(Stopped):
            training.train(settings, tmp_path / "cut")
    assert (tmp_path / "cut/checkpoint-13").is_dir()
    training.train(settings, tmp_path / "cut", resume=True)
    whole, cut = (history_of(tmp_path / name / "checkpoint-24") for name in ("whole", "cut"))
    assert [entry["step"] for entry in whole[0] if "loss" in entry] == [10, 20]
    assert cut == whole


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (12, 1), (100, 5), (199, 9), (200, 10), (10_000, 10)])
def test_a_short_run_logs_a_loss_more_often(steps, every, settings, tmp_path):
    assert training._arguments(dataclasses.replace(settings, steps=steps), tmp_path).logging_steps == every


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_out_with_a_line_and_the_last_whole_one_is_taken(settings, tmp_path, capsys):
    out = tmp_path / "run"
    loss = training.train(settings, out).loss
    weights = (out / "model.safetensors").read_bytes()
    (out / "checkpoint-abc").mkdir()
    optimizer = out / "checkpoint-12/optimizer.pt"
    for damage in (optimizer.unlink, lambda: optimizer.write_bytes(b"")):
        damage()
        capsys.readouterr()
        assert training.train(settings, out, resume=True).loss == loss
        told = capsys.readouterr().out
        assert f"{out}/checkpoint-12 is left out: its optimizer.pt is" in told
        assert f"{out}/checkpoint-abc is left out: a checkpoint is called checkpoint- and the number" in told
        assert (out / "model.safetensors").read_bytes() == weights
        assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12", "checkpoint-abc"}


def test_a_second_run_in_the_same_folder_is_refused(settings, tmp_path):
    out = tmp_path / "run"
    with alone_in(out), pytest.raises(ValueError, match="another run writes to .*; wait for its end, or name another"):
        training.train(settings, out)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("step", "told"), [(5, "at step 6: the loss is nan"), (6, "at step 6: "), (8, "at step 8: ")])
def test_a_training_that_diverges_stops_before_that_is_saved(step, told, value, settings, tmp_path, monkeypatch):
    # At 6 an evaluation comes, at 8 a checkpoint.
    diverge_after(step, monkeypatch, value)
    message = f"the training diverged {told}.*begin a new run with a lower learning rate .it was 0.004.*checkpoint-4 is"
    with pytest.raises(FloatingPointError, match=message):
        training.train(settings, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_decay_that_is_not_finite_any_more_is_a_divergence(settings, tmp_path, monkeypatch):
    settings.config = {**SMALL, "retention": {"learnable_decay": True}}

    class Broken(training.Plot):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "decay" in name:
                        weight.fill_(math.nan)

    monkeypatch.setattr(training, "Plot", Broken)
    with pytest.raises(FloatingPointError, match="the training diverged at step 2: .*decay.* is not finite"):
        training.train(settings, tmp_path / "run")


@pytest.mark.slow
def test_a_finished_run_is_not_trained_further(settings, tmp_path, monkeypatch):
    _, loss, _ = losses_of(settings, tmp_path / "run", monkeypatch)
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    _, same_loss, steps = losses_of(settings, tmp_path / "run", monkeypatch, resume=True)
    assert same_loss == loss
    assert not steps
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_training_learns(settings, tmp_path):
    settings.steps, settings.batch, settings.lr = 150, 8, 1e-2
    assert training.train(settings, tmp_path / "run").loss < 1.5  # nats per byte; 5.5 before training


def test_a_corpus_that_is_too_short_is_named(tmp_path):
    (tmp_path / "text").write_text("short")
    with pytest.raises(ValueError, match="training part of .* must hold at least context bytes; got 5, context 128"):
        training.train(Settings(files=[str(tmp_path / "text")]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(settings, tmp_path, monkeypatch):
    settings.batch = 4
    _, loss, steps = losses_of(settings, tmp_path / "whole", monkeypatch)
    settings.batch, settings.accumulate = 2, 2
    _, same_loss, same_steps = losses_of(settings, tmp_path / "parts", monkeypatch)
    assert same_steps == pytest.approx(steps, rel=1e-4)
    assert same_loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(settings, tmp_path, monkeypatch):
    _, loss, steps = losses_of(settings, tmp_path / "plain", monkeypatch)
    settings.gradient_checkpointing = True
    model, same_loss, same_steps = losses_of(settings, tmp_path / "checkpointed", monkeypatch)
    assert model.model.backbone.gradient_checkpointing
    assert same_steps == pytest.approx(steps, rel=1e-5)
    assert same_loss == pytest.approx(loss, rel=1e-5)


def test_the_learning_rate_and_its_warmup_and_decay(settings, tmp_path):
    settings.warmup, settings.weight_decay = 5, 0.25
    args = training._arguments(settings, tmp_path)
    assert (args.warmup_steps, args.weight_decay, args.learning_rate) == (5, 0.25, 4e-3)
    settings.warmup = None
    assert training._arguments(settings, tmp_path).warmup_steps == 1  # a tenth of 12 steps
    settings.steps = 5000
    assert training._arguments(settings, tmp_path).warmup_steps == 100


@pytest.mark.slow
def test_the_validation_loss_is_the_cross_entropy_alone(settings, tmp_path):
    settings.config = {**SMALL, "gated": False, "moe_every": 1, "moe_num_experts": 2, "z_loss_coeff": 0.1}
    run = training.train(settings, tmp_path / "run")
    total = 0.0
    with torch.no_grad():
        for i in range(len(run.corpus.valid)):
            tokens = run.corpus.valid[i]["input_ids"][None]
            total += torch.nn.functional.cross_entropy(run.model.eval()(tokens).logits[0, :-1], tokens[0, 1:]).item()
    assert run.loss == pytest.approx(total / len(run.corpus.valid), rel=1e-5)


@pytest.mark.slow
def test_the_plot_shows_the_whole_run_after_a_resume(settings, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(progress, "draw", lambda *args: drawn.append(args) or draw(*args))
    losses_of(settings, tmp_path / "run", monkeypatch, interrupt_at=7)
    assert (tmp_path / "run/losses.png").read_bytes().startswith(b"\x89PNG")
    for _ in range(2):  # the rest; then a run that is finished
        losses_of(settings, tmp_path / "run", monkeypatch, resume=True)
        history, tokens_per_step, unit, file, title = drawn[-1]
        assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 13))
        assert {entry["step"] for entry in history if "eval_loss" in entry} == {6, 12}
        assert (tokens_per_step, unit, file) == (2 * 32, "bytes", tmp_path / "run/losses.png")
        assert re.fullmatch(r"RetNetForCausalLM, [\d,]+ parameters; 768 bytes seen", title)
