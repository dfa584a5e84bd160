"""How many calls per second replay does on one core, beside a plain SimPy model of the same system in the same run.

The SimPy model is what one would write without an engine model that skips steps: a process per execution and per
replica, an event per engine step, the same step times, balancing and arrivals. Both must give the same mean latency;
single executions differ ("each") where things that happen at the same moment are taken in another order.
"""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from benchmarks.outcome import Bound, finish
from benchmarks.workflows import WORKFLOWS
from scepsy.profiling import shipped_profiles
from scepsy_optimizer.allocation import Choice, Groups
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.profile import LLMProfile, StepClock
from scepsy_optimizer.replay import Replay, poisson_arrivals_s, replay
from scepsy_optimizer.timeline import Timeline, compile_timeline

EXECUTIONS = 4000
SIMPY_EXECUTIONS = 300
CLUSTER = parse_cluster("2x8xH100")
# Workflow, rate, allocation: a fan-out over two LLMs, a chain of long prompts, a fan-out of short calls.
SYSTEMS: tuple[tuple[str, float, dict[str, Groups]], ...] = (
    (
        "map-reduce",
        6.0,
        {
            "generator": (Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=3),),
            "writer": (Choice(tensor_parallel_size=2, fraction=Fraction(1), replicas=3),),
        },
    ),
    ("tool-agent", 6.0, {"generator": (Choice(tensor_parallel_size=2, fraction=Fraction(1), replicas=3),)}),
    (
        "retrieval",
        8.0,
        {
            "reranker": (Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=2),),
            "writer": (Choice(tensor_parallel_size=4, fraction=Fraction(1), replicas=2),),
        },
    ),
)


def main() -> int:
    """Run every system both ways, print, judge."""
    profiles = shipped_profiles("H100")
    print(
        f"{'system':>12} {'calls':>7} {'calls/min':>9} {'SimPy':>9} {'times':>5} {'mean s':>7} {'SimPy':>7} {'each':>5}"
    )
    rows = []
    for name, rate_rps, choices in SYSTEMS:
        rng = random.Random(name)
        timelines = [compile_timeline(WORKFLOWS[name](rng, f"e{number}")) for number in range(EXECUTIONS)]
        arrivals_s = poisson_arrivals_s(np.random.default_rng(0), rate_rps=rate_rps, executions=EXECUTIONS)
        plan = hand_made_plan(choices, profiles, CLUSTER)
        long, ours_s = timed(plan, profiles, timelines, arrivals_s)
        some = timelines[:SIMPY_EXECUTIONS]
        start_s = time.process_time()
        simpy_latencies_s = SimPyModel(plan, profiles, some).run(arrivals_s[:SIMPY_EXECUTIONS])
        simpy_s = time.process_time() - start_s
        short, _ = timed(plan, profiles, some, arrivals_s[:SIMPY_EXECUTIONS])
        per_min = 60 * len(long.calls) / ours_s
        simpy_per_min = 60 * len(short.calls) / simpy_s
        row = {
            "system": name,
            "calls": len(long.calls),
            "calls_per_min": per_min,
            "simpy_calls_per_min": simpy_per_min,
            "mean_s": float(short.latencies_s.mean()),
            "simpy_mean_s": float(simpy_latencies_s.mean()),
            "difference": float(np.abs(simpy_latencies_s / short.latencies_s - 1).mean()),
        }
        rows.append(row)
        print(
            f"{name:>12} {len(long.calls):>7} {per_min:>10,.0f} {simpy_per_min:>9,.0f} {per_min / simpy_per_min:>6.1f} "
            f"{row['mean_s']:>7.3f} {row['simpy_mean_s']:>7.3f} {row['difference']:>6.1%}"
        )
    bounds = [
        Bound(name="calls per minute", value=min(row["calls_per_min"] for row in rows), at_least=200_000),
        Bound(
            name="times a SimPy model",
            value=min(row["calls_per_min"] / row["simpy_calls_per_min"] for row in rows),
            at_least=1,
        ),
        Bound(
            name="difference of mean latencies",
            value=max(abs(row["simpy_mean_s"] / row["mean_s"] - 1) for row in rows),
            at_most=0.01,
        ),
    ]
    return finish("replay_speed", bounds, {"rows": rows})


def timed(
    plan: Plan, profiles: dict[str, LLMProfile], timelines: Sequence[Timeline], arrivals_s: NDArray[np.float64]
) -> tuple[Replay, float]:
    """A replay, and the processor time that it took."""
    start_s = time.process_time()
    found = replay(plan, profiles, timelines, arrivals_s)
    return found, time.process_time() - start_s


@dataclass
class Request:
    """A call on its way."""

    prompt_left: int
    context: int
    output_left: int
    done: simpy.Event


@dataclass
class Server:
    """A replica: what waits, what runs, and the bell that wakes it."""

    clock: StepClock
    kv_tokens: int
    max_num_seqs: int
    budget: int
    bell: simpy.Event
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    outstanding: int = 0


class SimPyModel:
    """The same system as processes and events."""

    def __init__(self, plan: Plan, profiles: dict[str, LLMProfile], timelines: Sequence[Timeline]) -> None:
        """Nothing has arrived yet."""
        self._env = simpy.Environment()
        self._timelines = timelines
        self._outside_s = {llm: profile.outside_s for llm, profile in profiles.items()}
        self._servers: dict[str, list[Server]] = {}
        for part in plan.llms:
            profile = profiles[part.llm]
            for _ in range(part.replicas):
                server = Server(
                    clock=StepClock(profile, part.tensor_parallel_size, part.fraction),
                    kv_tokens=profile.kv_tokens(part.tensor_parallel_size, part.fraction),
                    max_num_seqs=profile.max_num_seqs,
                    budget=profile.max_num_batched_tokens,
                    bell=self._env.event(),
                )
                self._servers.setdefault(part.llm, []).append(server)
                self._env.process(self._serve(server))
        self._latencies_s = np.zeros(len(timelines))

    def run(self, arrivals_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """The executions' latencies."""
        runs = [self._env.process(self._execute(index, float(at_s))) for index, at_s in enumerate(arrivals_s)]
        self._env.run(simpy.AllOf(self._env, runs))
        return self._latencies_s

    def _execute(self, index: int, arrival_s: float) -> Generator[Any, Any, None]:
        yield self._env.timeout(arrival_s)
        timeline = self._timelines[index]
        events: list[simpy.Process] = []
        for event, before in enumerate(timeline.predecessors):
            events.append(self._env.process(self._happen(timeline, event, [events[one] for one in before])))
        yield events[timeline.sink]
        self._latencies_s[index] = self._env.now - arrival_s

    def _happen(self, timeline: Timeline, event: int, before: list[simpy.Process]) -> Generator[Any, Any, None]:
        yield simpy.AllOf(self._env, before)
        yield self._env.timeout(max(0.0, timeline.delay_s[event]))
        if timeline.call_of[event] < 0:
            return
        call = timeline.calls[timeline.call_of[event]]
        yield self._env.timeout(self._outside_s[call.llm])
        server = min(self._servers[call.llm], key=lambda one: one.outstanding)
        request = Request(max(1, call.input_tokens), 0, max(1, call.output_tokens), self._env.event())
        server.outstanding += 1
        server.waiting.append(request)
        if not server.bell.triggered:
            server.bell.succeed()
        yield request.done
        server.outstanding -= 1

    def _serve(self, server: Server) -> Generator[Any, Any, None]:
        while True:
            if not server.waiting and not server.running:
                server.bell = self._env.event()
                yield server.bell
            decoding = [one for one in server.running if not one.prompt_left]
            budget = server.budget - len(decoding)
            chunks = []
            for one in server.running:
                if one.prompt_left and budget > 0:
                    chunks.append((one, min(one.prompt_left, budget)))
                    budget -= chunks[-1][1]
            used = sum(one.context + one.prompt_left for one in server.running) + len(decoding)
            while server.waiting and budget > 0 and len(server.running) < server.max_num_seqs:
                one = server.waiting[0]
                used += one.prompt_left + 1
                if used > server.kv_tokens:
                    break
                server.running.append(server.waiting.popleft())
                chunks.append((one, min(one.prompt_left, budget)))
                budget -= chunks[-1][1]
            context = sum(one.context for one in decoding) / len(decoding) if decoding else 0.0
            tokens = sum(chunk for _, chunk in chunks)
            pairs = sum((one.context + chunk) ** 2 - one.context**2 for one, chunk in chunks)
            yield self._env.timeout(server.clock.step_s(len(decoding), context, tokens, pairs))
            for one, chunk in chunks:
                one.prompt_left -= chunk
                one.context += chunk
                if not one.prompt_left:
                    decoding.append(one)
            for one in decoding:
                one.context += 1
                one.output_left -= 1
                if not one.output_left:
                    server.running.remove(one)
                    one.done.succeed()


if __name__ == "__main__":
    sys.exit(main())
