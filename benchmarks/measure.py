"""Time and memory on machines that are noisy: the sides of a comparison take turns in one process."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import re
import resource
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from timeit import Timer

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark.utils.timer import timer as clock

Run = Callable[[], object]
Seconds = dict[str, list[float]]
Quartiles = tuple[float, float, float]  # the median first

TURN = 0.02  # seconds that a turn takes at least, of as many runs as that needs
LONG = 2.0  # seconds of a run that is not warmed up
NEW_MEMORY = 2000  # page faults that a round may have: 8 MB, some milliseconds
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Side:
    """One side of a comparison. prepare: makes the inputs, and returns what is timed.

    needs: bytes, roughly, where that may be more than there are. why_not: what stands against it, if known beforehand.
    """

    prepare: Callable[[], Run]
    needs: float = 0
    why_not: str = ""


@dataclass
class Measured:
    """Of one side: seconds of a run in each round, and the peak of its memory in bytes; or why there are none."""

    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


def race(sides: Mapping[str, Side], limit: float = 3.0, device: str = "cpu") -> dict[str, Measured]:
    """Measure all sides against each other, in some `limit` seconds, but three rounds at least.

    A round is a turn of each side, so seconds of one round were measured side by side. What takes more than twice the
    limit by itself is not measured.
    """
    found, runs = {name: Measured() for name in sides}, {}
    for name, side in sides.items():
        _give_back_memory()
        try:
            _check_room(side, device)
            run = side.prepare()
            run()
            once = _turn(run, 1, device)
            if once > 2 * limit:
                raise TimeoutError(f"takes {once:.1f} s; the limit for all sides is {limit:g} s")
            found[name].memory = extra_memory(run, device)
        except Exception as error:  # whatever it is, it is the result of this side
            found[name].failure = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            runs[name] = run
    numbers = {name: _runs_a_turn(run, device) for name, run in runs.items()}
    once = _settle(runs, numbers, device)
    for name, seconds in _rounds(runs, numbers, min(31, max(3, int(limit / max(once, 1e-9)))), device).items():
        found[name].seconds = seconds
    return found


def take_turns(sides: Mapping[str, Run], rounds: int = 9, device: str = "cpu") -> Seconds:
    """Seconds of a run of each side in each round, once they have settled."""
    _give_back_memory()
    numbers = {name: _runs_a_turn(run, device) for name, run in sides.items()}
    _settle(sides, numbers, device)
    return _rounds(sides, numbers, rounds, device)


def _settle(sides: Mapping[str, Run], numbers: Mapping[str, int], device: str) -> float:
    """Rounds until one touches hardly any new memory, four at most; seconds of the last."""
    for _ in range(4):
        start, before = clock(), _page_faults()
        _rounds(sides, numbers, 1, device)
        if _page_faults() - before < NEW_MEMORY:
            break
    return clock() - start


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _rounds(sides: Mapping[str, Run], numbers: Mapping[str, int], rounds: int, device: str) -> Seconds:
    seconds: Seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(_turn(run, numbers[name], device))
    return seconds


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as jemalloc does, for the rest of the process.

    Otherwise the system hands out large tensors anew each time, page by page. That can take longer than the operation,
    and how long is chance: it depends on all that the process, and other machines on the same hardware, did before.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_MMAP_MAX, 0)
        _libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _give_back_memory() -> None:
    """What was kept of an earlier comparison, and may lie in pieces too small for the next."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _runs_a_turn(run: Run, device: str) -> int:
    once = min(_turn(run, 1, device) for _ in range(2))
    return max(1, math.ceil(TURN / max(once, 1e-9)))


def _turn(run: Run, number: int, device: str) -> float:
    """Seconds of one of `number` runs, by torch's clock.

    As with torch's Timer, runs warm up before each turn, for the other side has taken the cache and the memory that was
    touched; without, a layer of 300 ms takes 25 % longer. Only very long ones do not.
    """
    start = clock()
    run()
    spent = clock() - start
    if spent > LONG:
        return spent
    if device != "cuda":
        return Timer(run, timer=clock).timeit(number) / number
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(number):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / number


def ratio(above: list[float], below: list[float]) -> Quartiles:
    """Median of the ratios of each round, and their quartiles."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def quartiles(values: list[float]) -> Quartiles:
    """The median, then the lower and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


# --- memory -----------------------------------------------------------------------------------------------------------


def _check_room(side: Side, device: str) -> None:
    if side.why_not:
        raise RuntimeError(side.why_not)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if side.needs > 0.8 * free:
        raise MemoryError(f"needs some {side.needs / 2**30:.0f} GiB; {free / 2**30:.0f} GiB are free")


def extra_memory(run: Run, device: str = "cpu") -> int:
    """Bytes of tensors that `run` holds at its peak, beyond those that were there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    allocations = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for allocation in allocations:
        held += allocation.nbytes()
        peak = max(peak, held)
    return peak


def process_growth(prepare: Callable[..., Run], *args: object) -> int:
    """Bytes by which `prepare(*args)()`, without what `prepare` takes, raises the peak of a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_process_growth, (prepare, *args))


def _process_growth(prepare: Callable[..., Run], *args: object) -> int:
    run = prepare(*args)
    before = peak_memory()
    run()
    return peak_memory() - before


def peak_memory() -> int:
    """Bytes. From /proc where there is one: ru_maxrss of a child begins at that of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- what the machine can do ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """flops: of a product of 2048 x 2048 matrices, a second; bytes: read and written by a copy, a second."""

    flops: float
    bytes: float

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which nothing can be that does so many operations and moves so many bytes."""
        return max(flops / self.flops, moved / self.bytes)


@cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    side, size = 2048, 64 * 2**20
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device).unbind()
    seconds = take_turns({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 5, device)
    product, copy = (statistics.median(seconds[name]) for name in ("product", "copy"))
    return Rates(2 * side**3 / product, 2 * size / copy)
