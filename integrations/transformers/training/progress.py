"""Progress bars, reports and plots of a training, and its stop on signals."""

from __future__ import annotations

import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..compat import ProgressCallback
from .plot import draw

if TYPE_CHECKING:
    from typing_extensions import Self

    from .corpus import Corpus

__all__ = ["PLOT", "Batch", "Plot", "Progress", "SaveOnInterrupt", "Stopped", "progress_bar"]

PLOT = "losses.png"


@dataclass
class Batch:
    """The size of an optimiser step. `str()` explains it.

    Attributes:
        sequences: sequences per process and forward pass.
        accumulate: forward passes per step.
        processes: number of processes.
        context: length of a sequence, in `unit`.
        unit: "tokens" or "bytes".
    """

    sequences: int
    accumulate: int
    processes: int
    context: int
    unit: str

    @property
    def tokens(self) -> int:
        """The number of tokens or bytes per optimiser step."""
        return self.sequences * self.accumulate * self.processes * self.context

    def __str__(self) -> str:
        factors = [f"{self.sequences} sequences"]
        factors += [f"{self.accumulate} accumulated"] * (self.accumulate > 1)
        factors += [f"{self.processes} processes"] * (self.processes > 1)
        return f"{' x '.join(factors)} x {self.context} {self.unit} = {self.tokens:,} {self.unit} a step"


def progress_bar(what: str | None = None, **options: Any) -> tqdm:
    """Return a tqdm bar that shows the remaining time, for work that may take long.

    Args:
        what: its title; None for the bar of a training, which stays after its end.
        options: options of tqdm.
    """
    often = 0.1 if sys.stderr.isatty() else 20  # seconds between updates; few lines for a log file
    leave = what is None  # the bar of a training stays visible
    return tqdm(desc=what, leave=leave, dynamic_ncols=True, mininterval=often, **options)


class Progress(ProgressCallback):
    """Shows loss and speed on the progress bar, and a line for each evaluation."""

    def __init__(self, batch: Batch, corpus: Corpus):
        super().__init__()
        self.batch, self.corpus = batch, corpus
        self.last = (0.0, 0)  # time and step of the last report

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Open the bar at the current step."""
        if not state.is_world_process_zero:
            return
        self.current_step = state.global_step  # not 0 in a resumed run
        self.training_bar = bar = progress_bar(total=state.max_steps, initial=state.global_step, unit="step")
        bar.write(self.headline(args, model))
        self.last = time.perf_counter(), state.global_step

    def headline(self, args: Any, model: Any) -> str:
        """Return the first line of a training: numbers of parameters and tokens, and its batch."""
        sizes = f"{model.num_parameters():,} parameters, {self.corpus.train.tokens:,} {self.batch.unit} to train on"
        return f"{sizes}; {self.batch}"

    def report(self, args: Any, loss: float) -> str:
        """Describe the validation loss."""
        return self.corpus.report(loss)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Advance the bar of an evaluation."""
        if self.prediction_bar is None and state.is_world_process_zero:
            # During training, an evaluation shorter than a second shows no bar of its own.
            delay = 0 if self.training_bar is None else 1
            self.prediction_bar = progress_bar("evaluating", total=len(eval_dataloader), unit="batch", delay=delay)
        if self.prediction_bar is not None:
            self.prediction_bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show a loss on the bar, or an evaluation as a line."""
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
    """Plots the losses after each evaluation."""

    def __init__(self, batch: Batch, file: Path):
        self.batch, self.file = batch, file

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Draw the plot."""
        if state.is_world_process_zero:
            tokens, unit = self.batch.tokens, self.batch.unit
            seen = f"{state.global_step * tokens:,} {unit} seen"
            title = f"{type(model).__name__}, {model.num_parameters():,} parameters; {seen}"
            draw(state.log_history, tokens, unit, self.file, title)


class Stopped(KeyboardInterrupt):
    """A signal ended a run.

    Attributes:
        number: the number of the signal.
        saved: True if a checkpoint holds all that was trained.
    """

    def __init__(self, number: int, *, saved: bool):
        super().__init__(signal.Signals(number).name)
        self.number, self.saved = number, saved


class SaveOnInterrupt(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGHUP, ends the current step, saves a checkpoint and stops.

    A second signal stops at once, and so does the first outside of training. Enter it as a context before the training,
    and pass it to the Trainer as a callback; it raises `Stopped` when the training ends. Signals that the process
    ignores, as under nohup, stay ignored.

    With several processes, each receives signals at its own time, and torchrun repeats them. They stop together after
    the step at whose end one of them has received a signal, and never at once.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.asked = 0  # number of the received signal; 0 before
        self.alone, self.training = True, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the number of processes, and that a training runs."""
        self.alone, self.training = args.world_size == 1, True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises: Stopped if a signal came during the training."""
        self.training = False
        if self.asked:
            raise Stopped(self.asked, saved=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process has received a signal."""
        if not self.alone:
            asked = torch.tensor(self.asked, device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = int(asked.item())
        if self.asked:
            control.should_save = control.should_training_stop = True

    def _ask(self, number: int, _: Any) -> None:
        at_once = (self.alone and bool(self.asked)) or not self.training
        self.asked = number
        if at_once:
            raise Stopped(number, saved=False)
