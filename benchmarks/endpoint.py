"""What stands between agents and engines: what it costs, what it carries, and what it does to requests.

A bare server answers and a bare client asks, both on this machine, directly and through each router in turn; a direct
block is measured beside each block through a router, because the machine is not always equally fast. Processor time is
the router's own, of all its processes. Where client and server are the bottleneck, a router shows the rates that they
reach directly.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Final

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import routers
from benchmarks.endpoint_cases import CASES, judge
from benchmarks.endpoint_load import ask, follow, request, run_echo, run_server
from benchmarks.outcome import Bound, finish
from benchmarks.routers import AbsentError, Running

GATEWAY: Final = "scepsy"
RECORDING: Final = "scepsy, recording"
FRONTED: Final = "scepsy, haproxy"
ROUTERS: Final[Mapping[str, Callable[[int], AbstractContextManager[Running]]]] = {
    GATEWAY: routers.gateway,
    RECORDING: routers.recording,
    FRONTED: routers.behind_haproxy,
    "HAProxy": routers.plain_haproxy,
    "vllm-router": routers.vllm_router,
    "SMG": routers.smg,
}
OURS: Final = (GATEWAY, RECORDING, FRONTED)
BLOCKS, BLOCK = 10, 200
REQUESTS, CLIENTS, REPEATS = 3000, 32, 3
STREAMS, PIECES, PIECE_EVERY_MS = 64, 200, 5
MANY_STREAMS, MANY_PIECES, MANY_EVERY_MS = 1000, 40, 100
NAMES: Final = {
    "added_p50_us": "added latency p50, us",
    "added_p99_us": "added latency p99, us",
    "requests_per_s": "requests of 1 kB per second",
    "cpu_us_per_request": "CPU per request of 1 kB, us",
    "cpu_us_per_request_64k": "CPU per request of 64 kB, us",
    "pieces_per_s": "chunks streamed per second",
    "cpu_us_per_piece": "CPU per streamed chunk, us",
    "lost_pieces": "chunks lost of 1,000 streams",
    "memory_mib": "memory, MiB",
    "memory_streams_mib": "memory with 1,000 streams, MiB",
}


def quantile(values: list[float], part: float) -> float:
    """The value that this part of all do not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


def measure(server: int, router: Running | None) -> dict[str, float]:
    """All figures of one router, or of asking directly."""
    port = router.port if router is not None else server
    small, large = request(1000), request(64_000)
    uvloop.run(ask(port, small, 8, 400))
    through: list[float] = []
    direct: list[float] = []
    for _ in range(BLOCKS):
        direct += uvloop.run(ask(server, small, 1, BLOCK))
        through += uvloop.run(ask(port, small, 1, BLOCK))
    figures = {
        f"added_p{part}_us": (quantile(through, part / 100) - quantile(direct, part / 100)) * 1e6 for part in (50, 99)
    }

    rates, costs = _repeated(router, lambda: REQUESTS / _seconds(port, small))
    figures |= {"requests_per_s": max(rates), "cpu_us_per_request": statistics.median(costs) / REQUESTS}
    _, costs = _repeated(router, lambda: _seconds(port, large))
    figures["cpu_us_per_request_64k"] = statistics.median(costs) / REQUESTS
    count = STREAMS * PIECES
    rates, _ = _repeated(router, lambda: count / uvloop.run(follow(port, STREAMS, PIECES, 0))[1])
    figures["pieces_per_s"] = max(rates)
    _, costs = _repeated(router, lambda: uvloop.run(follow(port, STREAMS, PIECES, PIECE_EVERY_MS))[1])
    figures["cpu_us_per_piece"] = statistics.median(costs) / count
    figures["memory_mib"] = router.memory_mib() if router is not None else math.nan
    figures["lost_pieces"], _ = uvloop.run(follow(port, MANY_STREAMS, MANY_PIECES, MANY_EVERY_MS))
    # Nothing that was needed at once is given back so soon.
    figures["memory_streams_mib"] = router.memory_mib() if router is not None else math.nan
    return figures


def _seconds(port: int, sent: bytes) -> float:
    begun_s = time.perf_counter()
    uvloop.run(ask(port, sent, CLIENTS, REQUESTS))
    return time.perf_counter() - begun_s


def _repeated(router: Running | None, work: Callable[[], float]) -> tuple[list[float], list[float]]:
    """What the work returns, and the processor time in microseconds that the router spends on it, a few times."""
    values, costs = [], []
    for _ in range(REPEATS):
        before_us = router.cpu_us() if router is not None else math.nan
        values.append(work())
        costs.append((router.cpu_us() if router is not None else math.nan) - before_us)
    return values, costs


def measure_all(
    server: int, echo: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, str]], dict[str, str]]:
    """Figures and what becomes of each case, by router, and why those are absent that are."""
    figures, verdicts, absent = {"direct": measure(server, None)}, {}, {}
    for name, start in ROUTERS.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            with start(server) as router:
                found = measure(server, router)
            judged = {}
            # Where calls are recorded, the span of one takes the place of its client's: that is what it is for.
            if name != RECORDING:
                with start(echo) as router:
                    judged = {case.name: judge(router.port, case) for case in CASES}
        except (AbsentError, OSError, TimeoutError) as error:
            if name in OURS:
                raise
            absent[name] = str(error) or type(error).__name__
            continue
        figures[name] = found
        if judged:
            verdicts[name] = judged
    return figures, verdicts, absent


def show(
    figures: Mapping[str, Mapping[str, float]], verdicts: Mapping[str, Mapping[str, str]], absent: Mapping[str, str]
) -> None:
    """Both tables."""
    table = Table("", *figures)
    for key, title in NAMES.items():
        cells = (one[key] for one in figures.values())
        table.add_row(title, *("" if math.isnan(value) else f"{value:,.{1 if value < 100 else 0}f}" for value in cells))
    cases = Table("", *verdicts)
    for case in CASES:
        cases.add_row(case.name, *(one[case.name] for one in verdicts.values()))
    console = Console(width=200)
    console.print(table, cases)
    for name, reason in absent.items():
        console.print(f"absent: {name}: {reason}", markup=False)


def bounds(figures: Mapping[str, Mapping[str, float]], verdicts: Mapping[str, Mapping[str, str]]) -> Iterator[Bound]:
    """What the endpoint must keep, either kind of it."""
    for name in (GATEWAY, FRONTED):
        found = figures[name]
        yield Bound(name=f"{name}: added latency p50, us", value=found["added_p50_us"], at_most=1000)
        yield Bound(name=f"{name}: CPU per request of 1 kB, us", value=found["cpu_us_per_request"], at_most=300)
        yield Bound(name=f"{name}: CPU per streamed chunk, us", value=found["cpu_us_per_piece"], at_most=15)
        yield Bound(name=f"{name}: chunks lost of 1,000 streams", value=found["lost_pieces"], at_most=0)
        changed = sum(verdict != "ok" for verdict in verdicts[name].values())
        yield Bound(name=f"{name}: requests not passed on as they were", value=changed, at_most=0)
    added = figures[RECORDING]["cpu_us_per_request"] - figures[GATEWAY]["cpu_us_per_request"]
    yield Bound(name="CPU that recording adds per request of 1 kB, us", value=added, at_most=150)


def main() -> int:
    """Measure, print, judge."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with routers.process(run_server) as (server, _), routers.process(run_echo) as (echo, _):
        figures, verdicts, absent = measure_all(server, echo)
    show(figures, verdicts, absent)
    # What there is nothing of is null: NaN is no JSON.
    told = {
        name: {key: None if math.isnan(value) else round(value, 1) for key, value in found.items()}
        for name, found in figures.items()
    }
    return finish(
        "endpoint", list(bounds(figures, verdicts)), {"routers": told, "passed_on": verdicts, "absent": absent}
    )


if __name__ == "__main__":
    sys.exit(main())
