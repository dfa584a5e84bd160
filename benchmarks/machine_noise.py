"""How quiet the machine is while something is timed: a fixed piece of work, and what others computed meanwhile."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

_LOOP = 1_000_000
_REPEATS = 3


@dataclass(slots=True, kw_only=True)
class Disturbance:
    """What else this machine did: `others` is the part of its cores that processes not ours and the host took."""

    others: float = 0.0


def probe_s() -> list[float]:
    """Time of a fixed loop of pure computing on each core, one after another: the median of three."""
    allowed = os.sched_getaffinity(0)
    found = []
    try:
        for core in sorted(allowed):
            os.sched_setaffinity(0, {core})
            found.append(statistics.median(_loop_s() for _ in range(_REPEATS)))
    finally:
        os.sched_setaffinity(0, allowed)
    return found


@contextmanager
def watched() -> Iterator[Disturbance]:
    """Within the block, count what is computed by processes other than this one and those below it."""
    found = Disturbance()
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    busy_s, own_s, begun_s = _busy_s(), _own_s(ours), time.perf_counter()
    yield found
    elapsed_s = time.perf_counter() - begun_s
    others_s = (_busy_s() - busy_s) - (_own_s(ours) - own_s)
    found.others = max(0.0, others_s / elapsed_s / (os.cpu_count() or 1))


def _loop_s() -> float:
    begun_s = time.perf_counter()
    total = 0
    for number in range(_LOOP):
        total += number
    return time.perf_counter() - begun_s


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _own_s(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
