"""Kill training and replacing again and again, and see that their results do not change.

    python -m tests.crash --kills 100

Each run is killed at a random moment, by a signal that it may answer, while it renames or removes, or in the middle of
a write, of each file in turn; then it is resumed, and killed again. At its end its weights must be those of the run
that nothing interrupted, bit for bit, and its losses too. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from retention import cli
from retention.integrations.transformers.training import swapping  # noqa: F401  what every child would import anew

ENOUGH = 5  # kills of one run, which then may end
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
QUICK = ["--batch", "2", "--context", "32", "--device", "cpu", "--sample", "0"]


@dataclass
class Kill:
    """How a run ends. kind: moment, signal, change or write. seconds: of the first two. file: that is being written.
    nth: change or write that is the last. size: bytes of the file that still come onto the disk."""

    kind: str
    seconds: float = 0
    file: str = ""
    nth: int = 1
    size: int = 0

    def __str__(self) -> str:
        return f"in {self.file}" if self.file else self.kind


@dataclass
class Command:
    """What is run, and what it gives when nothing interrupts it."""

    words: list[str]
    seconds: float = 0
    files: dict[str, list[int]] = field(default_factory=dict)  # that it writes, by name, and their sizes
    result: object = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(crash(Path(folder), given.kills, given.seed, say=print), flush=True)  # noqa: T201


def crash(folder: Path, kills: int, seed: int, say=lambda line: None) -> str:
    """Kill so many times. Returns: what was killed, in words. Raises: AssertionError if a result differs."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    commands = prepared(folder)
    for name, command in commands.items():
        begun = time.perf_counter()
        code, output = run([*command.words, "--out", str(folder / f"whole-{name}")], None)
        assert code == 0, output
        command.seconds = time.perf_counter() - begun
        command.files, command.result = files_of(folder / f"whole-{name}"), result_of(folder / f"whole-{name}")
        say(f"{name} takes {command.seconds:.1f} s and writes {', '.join(command.files)}")
    counts: Counter[str] = Counter()
    plans = {name: planned(command, chance) for name, command in commands.items()}
    runs = 0
    for name, command in cycle(commands.items()):
        if counts.total() >= kills:
            break
        out = folder / f"run-{runs}"
        done = killed_and_resumed(command, out, plans[name], kills - counts.total())
        assert result_of(out) == command.result, f"{name} gives something else after {', '.join(map(str, done))}"
        runs += 1
        counts.update(f"{name} {kill}" for kill in done)
        shutil.rmtree(out)
        say(f"{name}, killed {len(done)} times ({', '.join(map(str, done))}): the same; {counts.total()} so far")
    lines = (f"  {counts[key]:4} {key}" for key in sorted(counts))
    return "\n".join(
        [f"{counts.total()} kills in {runs} runs; every run ended with the same weights and losses", *lines]
    )


def prepared(folder: Path) -> dict[str, Command]:
    text = folder / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(200)))  # some epochs
    config = folder / "config.json"
    config.write_text(json.dumps({"dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.1}))
    host = folder / "host"
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=None, bos_token_id=None)
    ).save_pretrained(host)
    steps = ["--transfer-steps", "10", "--tuning-steps", "14", "--parts", "2", "--eval-every", "6"]
    every = ["--save-every", "9", "--eval-every", "30"]
    return {
        "train": Command(["train", str(text), "--config", str(config), "--steps", "90", *every, *QUICK]),
        "swap": Command(["swap", str(host), str(text), *steps, "--save-every", "3", *QUICK]),
    }


def planned(command: Command, chance: random.Random) -> Iterator[Kill]:
    """Kills of every kind; of the writes each file in turn."""
    for file in cycle(command.files):
        sizes = command.files[file]
        yield Kill("write", file=file, nth=chance.randint(1, min(3, len(sizes))), size=chance.randrange(max(sizes)))
        yield Kill("moment", seconds=chance.uniform(0, command.seconds))
        yield Kill("change", nth=chance.randint(1, 40))
        if chance.random() < 0.3:
            yield Kill("signal", seconds=chance.uniform(0, command.seconds))


def killed_and_resumed(command: Command, out: Path, plan: Iterator[Kill], most: int) -> list[Kill]:
    """A run in `out` to its end. Returns: what stopped it before, at most so often."""
    done: list[Kill] = []
    while True:
        kill = next(plan) if len(done) < min(ENOUGH, most) else None
        begun = any((out / name).exists() for name in ("training.json", "swap.json"))
        words = [command.words[0], "--resume"] if begun else command.words
        code, output = run([*words, "--out", str(out)], kill)
        if code == 0:
            return done
        assert kill is not None, output
        assert code < 0 or (kill.kind == "signal" and code - 128 in SIGNALS), f"exit code {code}, {kill}:\n{output}"
        done.append(kill)


def run(words: list[str], kill: Kill | None) -> tuple[int, str]:
    """The command in its own process. Returns: its exit code, or minus the signal that killed it; what it printed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        os.dup2(writer, 1), os.dup2(writer, 2)
        obey(words, kill)
    os.close(writer)
    timed = kill is not None and kill.kind in ("moment", "signal")
    end, output = time.perf_counter() + (kill.seconds if timed else 600), b""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0, end - time.perf_counter()))
        part = os.read(reader, 1 << 16) if ready else b""
        output += part
        if ready and not part:
            break
        if not ready:
            os.kill(child, SIGNALS[len(output) % 3] if timed and kill.kind == "signal" else signal.SIGKILL)
            end += 600
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.decode(errors="replace")


def obey(words: list[str], kill: Kill | None) -> None:
    """Run the command and leave this process."""
    code = 1
    try:
        if kill is not None and kill.kind == "change":
            kill_at_changes(kill)
        if kill is not None and kill.kind == "write":
            kill_in_writes(kill)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.argv = ["retention", *words]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(code)


def kill_at_changes(kill: Kill) -> None:
    left = kill.nth

    def hear(event: str, _: tuple) -> None:
        nonlocal left
        if event in CHANGES:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def kill_in_writes(kill: Kill) -> None:
    """Let the system kill this process when a file becomes longer than it may, from the nth write of one on."""
    left = kill.nth
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def begin(file: object) -> None:
        nonlocal left
        if os.path.basename(os.fsdecode(file)) == kill.file:
            left -= 1
            if not left:
                resource.setrlimit(resource.RLIMIT_FSIZE, (kill.size, kill.size))

    def hear(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR):
            begin(args[0])

    # Neither of these opens its file through Python.
    save, serialize = torch.save, safetensors.torch.serialize_file

    def save_begun(what: object, file: object, *args: object, **options: object) -> None:
        begin(file)
        save(what, file, *args, **options)

    def serialize_begun(tensors: object, file: object, *args: object, **options: object) -> None:
        begin(file)
        serialize(tensors, file, *args, **options)

    torch.save, safetensors.torch.serialize_file = save_begun, serialize_begun
    sys.addaudithook(hear)


def files_of(out: Path) -> dict[str, list[int]]:
    """The names of all files in a run's folder that hold something, with the sizes of each that has the name."""
    found: dict[str, list[int]] = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.stat().st_size:
            found.setdefault(path.name, []).append(path.stat().st_size)
    return found


def result_of(out: Path) -> object:
    """The weights and the losses of a run that has ended."""
    losses = {
        str(state.parent.relative_to(out)): [
            (entry["step"], entry.get("loss"), entry.get("eval_loss"))
            for entry in json.loads(state.read_text())["log_history"]
        ]
        for state in sorted(out.rglob("trainer_state.json"))
    }
    return (out / "model.safetensors").read_bytes(), last_of_each(losses)


def last_of_each(losses: dict[str, list]) -> dict[str, list]:
    """Of the checkpoints in each folder the newest, which has the losses of all before."""
    newest: dict[str, tuple[int, list]] = {}
    for name, history in losses.items():
        folder, _, step = name.rpartition("checkpoint-")
        newest[folder] = max(newest.get(folder, (0, [])), (int(step), history), key=lambda pair: pair[0])
    return {folder: history for folder, (_, history) in newest.items()}


if __name__ == "__main__":
    main()
