"""What a training shows and writes while it runs, and how it stops."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..compat import ProgressCallback
from .corpus import Corpus
from .plot import draw

PLOT = "losses.png"


@dataclass
class Batch:
    """What one optimiser step takes: `sequences` of `context` bytes or tokens on each process, `accumulate` times."""

    sequences: int
    accumulate: int
    processes: int
    context: int
    unit: str

    @property
    def tokens(self) -> int:
        return self.sequences * self.accumulate * self.processes * self.context

    def __str__(self) -> str:
        factors = [f"{self.sequences} sequences"]
        factors += [f"{self.accumulate} accumulated"] * (self.accumulate > 1)
        factors += [f"{self.processes} processes"] * (self.processes > 1)
        return f"{' x '.join(factors)} x {self.context} {self.unit} = {self.tokens:,} {self.unit} a step"


class Progress(ProgressCallback):
    """Loss and speed on the progress bar; a line for each evaluation."""

    def __init__(self, batch: Batch, corpus: Corpus):
        super().__init__()
        self.batch, self.corpus = batch, corpus
        self.last = (0.0, 0)  # time and step of the last report

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.current_step = state.global_step  # not 0 in a resumed run
        self.training_bar = bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 20,  # seconds; a log file wants few lines
        )
        bar.write(self.headline(args, model))
        self.last = time.perf_counter(), state.global_step

    def headline(self, args: Any, model: Any) -> str:
        sizes = f"{model.num_parameters():,} parameters, {self.corpus.train.tokens:,} {self.batch.unit} to train on"
        return f"{sizes}; {self.batch}"

    def report(self, args: Any, loss: float) -> str:
        """Of an evaluation, in words."""
        return self.corpus.report(loss)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """No second bar: an evaluation takes seconds."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        if "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: {self.report(args, logs['eval_loss'])}")
        elif "loss" in logs:
            now, (then, step) = time.perf_counter(), self.last
            speed = (state.global_step - step) * self.batch.tokens / (now - then)
            self.training_bar.set_postfix_str(
                f"loss {float(logs['loss']):.3f}, {speed:,.0f} {self.batch.unit}/s", refresh=False
            )
        self.last = time.perf_counter(), state.global_step


class Plot(TrainerCallback):
    """Draws the losses at every evaluation."""

    def __init__(self, batch: Batch, file: Path):
        self.batch, self.file = batch, file

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw(state.log_history, self.batch.tokens, self.batch.unit, self.file)


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C ends the current step, saves and stops; a second one stops at once.

    Of several processes each hears it at a time of its own, and torchrun sends it once more: they stop together after
    the step at whose end one has heard, and never at once.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.alone = args.world_size == 1
        self.before = signal.signal(signal.SIGINT, self._ask)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, self.before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.alone:
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked.item())
        if self.asked:
            control.should_save = control.should_training_stop = True

    def _ask(self, *_: Any) -> None:
        self.asked = True
        if self.alone:
            signal.signal(signal.SIGINT, self.before)
