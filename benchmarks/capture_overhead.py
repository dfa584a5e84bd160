"""What capture costs: microseconds added per run, beside the other instrumentations on the same frameworks.

One process prepares the frameworks and forks: one child stays as it is, each of the others turns one instrumentation
on. In every round each child runs a batch of every column, one child after the other, so that what the machine does
meanwhile hits all alike. A cost is the processor time of all threads beyond that of the bare child in the same round;
the table and the bounds hold the medians over the rounds, a comparison the ratio of two such medians. How much a long
prompt adds to Scepsy's cost is told apart from the machine's noise by rounds of their own: short and long, bare and
not, right after one another. Spans go to a processor that drops them; Scepsy is measured twice, the default way (its
own trace files, the writing included) and on the same SDK provider as the others. HTTP is answered within the process,
so client and transport are in the bare child as well. Memory is what 100,000 calls leave behind, every twentieth of
them cancelled.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from statistics import median
from typing import Any

from benchmarks import rivals
from benchmarks.outcome import Bound, finish
from benchmarks.overhead_columns import Column, all_columns
from benchmarks.paired import Typical

WARM_ROUNDS = 3
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_LIMIT_S = 9, 61, 180.0
LEAST_FLAT_ROUNDS, MOST_FLAT_ROUNDS, FLAT_LIMIT_S = 15, 101, 150.0
LONG = ", 200 kB"
MEMORY_CALLS = 100_000
PER_RUN_BOUND_US = 60.0
FLAT_BOUND_US = 10.0
BARE = "bare"


class _Child:
    """A fork of this process in which one instrumentation is on, told column by column what to run."""

    def __init__(self, name: str, columns: dict[str, Column], before: list[_Child]) -> None:
        self.name = name
        self.connection, there = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for child in (self, *before):
                child.connection.close()  # so that the children's ends break when the parent is gone
            code = 1
            try:
                _serve(name, columns, there)
                code = 0
            finally:
                os._exit(code)
        there.close()

    def measure(self, column: str) -> tuple[float, int]:
        """Microseconds of a run now, and how many spans the batch has made (-1: not counted)."""
        self.connection.send(column)
        answer: tuple[float, int] = self.connection.recv()
        return answer

    def stop(self) -> None:
        """End it."""
        self.connection.close()
        os.waitpid(self.pid, 0)


def _serve(name: str, columns: dict[str, Column], connection: Connection) -> None:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    class Drop(SpanProcessor):
        """Spans are made, counted and dropped."""

        ended = 0

        def on_end(self, span: Any) -> None:  # noqa: ARG002 - the processor interface has it
            self.ended += 1

    drop = Drop()
    provider = TracerProvider()
    provider.add_span_processor(drop)
    settle: Callable[[], object] = lambda: None  # noqa: E731 - replaced below where there is something to settle
    with tempfile.TemporaryDirectory() as directory:
        if name != BARE:
            rivals.turn_on(name, provider, directory)
        if name == "scepsy":
            from scepsy.capture import flush

            settle = flush
        while True:
            try:
                column = connection.recv()
            except EOFError:
                return
            drop.ended = 0
            us = columns[column].seconds(settle) * 1e6
            connection.send((us, -1 if name in (BARE, "scepsy") else drop.ended))


def _rounds_worker() -> None:
    """All rounds: microseconds of each column in each child, and what was captured at all."""
    columns = all_columns()
    for known in columns.values():
        known.seconds(lambda: None)  # what is made at first use is made before the fork
    gc.collect()
    gc.freeze()
    children: list[_Child] = []
    for name in (BARE, *rivals.NAMES):
        children.append(_Child(name, columns, children))
    us: dict[str, dict[str, list[float]]] = {child.name: {column: [] for column in columns} for child in children}
    captured = {child.name: dict.fromkeys(columns, False) for child in children}
    try:
        deadline_s = time.monotonic() + ROUNDS_LIMIT_S
        for number in range(-WARM_ROUNDS, MOST_ROUNDS):
            if number >= LEAST_ROUNDS and time.monotonic() > deadline_s:
                break
            turn = number % len(children)
            for column in columns:
                for child in children[turn:] + children[:turn]:
                    spent, spans = child.measure(column)
                    if number >= 0:
                        us[child.name][column].append(spent)
                        captured[child.name][column] |= spans != 0
        beyond = _flat_rounds(children[0], children[1], [column for column in columns if column.endswith(LONG)])
    finally:
        for child in children:
            child.stop()
    print(json.dumps({"us": us, "captured": captured, "beyond": beyond}), flush=True)


def _flat_rounds(bare: _Child, ours: _Child, columns: list[str]) -> dict[str, list[float]]:
    """Per round, by how many microseconds `ours` costs more with a long prompt than with a short one."""
    beyond: dict[str, list[float]] = {column: [] for column in columns}
    deadline_s = time.monotonic() + FLAT_LIMIT_S
    for number in range(MOST_FLAT_ROUNDS):
        if number >= LEAST_FLAT_ROUNDS and time.monotonic() > deadline_s:
            break
        for column in columns:
            turns = [(child, name) for name in (column.removesuffix(LONG), column) for child in (bare, ours)]
            if number % 2:
                turns.reverse()
            us = {(child.name, name): child.measure(name)[0] for child, name in turns}
            added = [us["scepsy", name] - us[BARE, name] for name in (column, column.removesuffix(LONG))]
            beyond[column].append(added[0] - added[1])
    return beyond


def _memory_worker(name: str) -> None:
    """Bytes left behind per call, over many calls of which some are cancelled."""
    import resource

    from langchain_core.language_models.chat_models import BaseChatModel
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_core.outputs import ChatGeneration, ChatResult
    from opentelemetry.sdk.trace import TracerProvider

    class Model(BaseChatModel):
        def _generate(self, *_args: Any, **_kwargs: Any) -> ChatResult:
            raise NotImplementedError

        async def _agenerate(self, messages: Any, *_args: Any, **_kwargs: Any) -> ChatResult:
            if messages[0].content == "wait":
                await asyncio.sleep(3600)
            return ChatResult(generations=[ChatGeneration(message=AIMessage("x"))])

        @property
        def _llm_type(self) -> str:
            return "model"

    model = Model()
    go, wait = [HumanMessage("go")], [HumanMessage("wait")]

    async def many(count: int) -> None:
        for start in range(0, count, 200):
            tasks = [
                asyncio.create_task(model.ainvoke(wait if index % 20 == 0 else go))
                for index in range(start, min(start + 200, count))
            ]
            await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            for task in tasks[::20]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with tempfile.TemporaryDirectory() as directory:
        rivals.turn_on(name, TracerProvider(), directory)
        asyncio.run(many(MEMORY_CALLS // 10))
        gc.collect()
        before = _resident_bytes()
        asyncio.run(many(MEMORY_CALLS))
        gc.collect()
        if name.startswith("scepsy"):
            from scepsy.capture import flush, recorder

            flush()
            left = len(recorder.open)
        else:
            left = -1
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        grown = (_resident_bytes() - before) / MEMORY_CALLS
        print(json.dumps({"bytes_per_call": grown, "left_open": left, "peak_mib": peak_mib}), flush=True)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - one short read of the kernel's file
        return int(file.read().split()[1]) * 4096


def _added(us: dict[str, dict[str, list[float]]], name: str, column: str) -> list[float]:
    return [mine - bare for mine, bare in zip(us[name][column], us[BARE][column], strict=True)]


def main() -> int:
    """Measure all, print the table, judge."""
    rivals.prepare()
    measured = rivals.run_worker("benchmarks.capture_overhead", "rounds", timeout_s=3600)
    us, captured = measured["us"], measured["captured"]
    columns = list(us[BARE])
    typical = {name: {column: Typical.of(_added(us, name, column)) for column in columns} for name in rivals.NAMES}
    added = {name: {column: found.median for column, found in of.items()} for name, of in typical.items()}
    beyond = {column: Typical.of(differences) for column, differences in measured["beyond"].items()}
    print(f"medians over {len(us[BARE][columns[0]])} rounds, and where the true median lies in 95 of 100 cases")
    print(f"{'µs added per':<36}{'(bare)':>8}" + "".join(f"{title:>28}" for title in rivals.NAMES.values()))
    for column in columns:
        cells = (f"{typical[name][column]}" if captured[name][column] else "captures nothing" for name in rivals.NAMES)
        print(f"{column:<36}{median(us[BARE][column]):>8.0f}" + "".join(f"{cell:>28}" for cell in cells))
    print(f"\nµs that 200 kB add to what Scepsy adds, over {len(next(iter(measured['beyond'].values())))} rounds:")
    for column, found in beyond.items():
        print(f"  {column.removesuffix(LONG)}: {found}")
    memory = {
        name: rivals.run_worker("benchmarks.capture_overhead", f"memory:{name}") for name in ("scepsy", "scepsy-sdk")
    }
    print(f"\nmemory over {MEMORY_CALLS:,} calls, one in 20 cancelled:")
    for name, figures in memory.items():
        print(
            f"  {rivals.NAMES[name]}: {figures['bytes_per_call']:.1f} bytes per call, {figures['left_open']} left open"
        )
    ours = added["scepsy"]
    bounds = [
        Bound(name=f"{column}: µs", value=ours[column], at_most=PER_RUN_BOUND_US)
        for column in columns
        if column.startswith("LangC")
    ]
    for column in columns:
        others = [name for name in rivals.NAMES if not name.startswith("scepsy") and captured[name][column]]
        best = min(others, key=lambda name: added[name][column])
        part = ours[column] / added[best][column]
        bounds.append(Bound(name=f"{column}: part of {rivals.NAMES[best]}", value=part, at_most=1 / 3))
    bounds += [
        Bound(name=f"{column}: µs beyond a small one", value=found.median, at_most=FLAT_BOUND_US)
        for column, found in beyond.items()
    ]
    bounds.append(Bound(name="bytes left per call", value=memory["scepsy"]["bytes_per_call"], at_most=50))
    bounds.append(Bound(name="calls left open", value=memory["scepsy"]["left_open"], at_most=0))
    figures = {
        "added_us": added,
        "intervals_us": {name: {column: [f.low, f.high] for column, f in of.items()} for name, of in typical.items()},
        "long_prompt_us": {column: [f.median, f.low, f.high] for column, f in beyond.items()},
    }
    return finish("capture_overhead", bounds, figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        wanted = sys.argv[2]
        if wanted.startswith("memory:"):
            _memory_worker(wanted.removeprefix("memory:"))
        else:
            _rounds_worker()
        sys.exit(0)
    sys.exit(main())
