"""Measures time and memory on noisy machines: the sides of a comparison take turns in one process."""

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

TURN = 0.02  # least number of seconds of a turn, which repeats short runs
LONG = 2.0  # seconds; longer runs are not warmed up
NEW_MEMORY = 2000  # largest number of page faults of a warm round: 8 MB, some milliseconds
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        prepare: makes the inputs and returns the function to be timed.
        needs: rough number of bytes that it needs, if these may exceed the memory.
        why_not: the reason why it cannot run; "" if none is known beforehand.
    """

    prepare: Callable[[], Run]
    needs: float = 0
    why_not: str = ""


@dataclass
class Measured:
    """The result of one side.

    Attributes:
        seconds: time of a run in each round.
        memory: peak of its extra memory, in bytes.
        failure: the reason why there are no times.
    """

    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


def race(sides: Mapping[str, Side], limit: float = 3.0, device: str = "cpu") -> dict[str, Measured]:
    """Measure all sides for about `limit` seconds, and at least three rounds.

    In each round, every side has one turn, so that times of the same round can be compared. A side whose single run
    takes more than twice the limit is not measured.
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
        except Exception as error:  # any error is the result of this side
            found[name].failure = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            runs[name] = run
    numbers = {name: _runs_a_turn(run, device) for name, run in runs.items()}
    once = _settle(runs, numbers, device)
    for name, seconds in _rounds(runs, numbers, min(31, max(3, int(limit / max(once, 1e-9)))), device).items():
        found[name].seconds = seconds
    return found


def take_turns(sides: Mapping[str, Run], rounds: int = 9, device: str = "cpu") -> Seconds:
    """Return the seconds of a run of each side in each round, after warming up."""
    _give_back_memory()
    numbers = {name: _runs_a_turn(run, device) for name, run in sides.items()}
    _settle(sides, numbers, device)
    return _rounds(sides, numbers, rounds, device)


def _settle(sides: Mapping[str, Run], numbers: Mapping[str, int], device: str) -> float:
    """Run up to four rounds, until one touches hardly any new memory, and return the seconds of the last."""
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
    """Let glibc keep freed memory for the rest of the process, as jemalloc does.

    Otherwise the system allocates large tensors anew each time, page by page. That can take longer than the operation,
    and the time varies: it depends on earlier allocations of this process and of others on the same hardware.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_MMAP_MAX, 0)
        _libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _give_back_memory() -> None:
    """Return memory to the system that an earlier comparison freed, as its pieces may be too small for the next one."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _runs_a_turn(run: Run, device: str) -> int:
    once = min(_turn(run, 1, device) for _ in range(2))
    return max(1, math.ceil(TURN / max(once, 1e-9)))


def _turn(run: Run, number: int, device: str) -> float:
    """Return the mean seconds of `number` runs, by torch's clock.

    A run warms up each turn, as in torch's Timer, because the other side has replaced the contents of the caches;
    without it, a layer of 300 ms takes 25 % longer. Runs of more than `LONG` seconds are not warmed up.
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
    """Return median and quartiles of the ratios of all rounds."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def quartiles(values: list[float]) -> Quartiles:
    """Return the median, the lower quartile and the upper quartile."""
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
    """Return the peak number of bytes of the tensors that `run` allocates."""
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
    """Return the bytes by which the run that `prepare(*args)` returns raises the peak memory of a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_process_growth, (prepare, *args))


def _process_growth(prepare: Callable[..., Run], *args: object) -> int:
    run = prepare(*args)
    before = peak_memory()
    run()
    return peak_memory() - before


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, from /proc if possible, as ru_maxrss starts at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- what the machine can do ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Rates of the machine per second: `flops` of a product of 2048 x 2048 matrices, `bytes` that a copy moves."""

    flops: float
    bytes: float

    def floor(self, flops: float, moved: float) -> float:
        """Return a lower bound of the seconds for this many operations and moved bytes."""
        return max(flops / self.flops, moved / self.bytes)


@cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    side, size = 2048, 64 * 2**20
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device).unbind()
    seconds = take_turns({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 5, device)
    product, copy = (statistics.median(seconds[name]) for name in ("product", "copy"))
    return Rates(2 * side**3 / product, 2 * size / copy)
