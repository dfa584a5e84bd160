"""A plan replayed several times under different arrivals: what it gives, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.replay import LLMUse, poisson_arrivals_s, replay
from scepsy_optimizer.steady_state import sample_executions, steady_span
from scepsy_optimizer.workload import Workload

# Student's t, two-sided 95 %, for 1 to 9 degrees of freedom.
_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
MAX_RUNS = len(_STUDENT_T) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The mean of a figure over runs, and half the width of its 95 % interval (Student's t; 0 for a single run)."""

    value: float
    half_width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replications:
    """Latencies of executions over several replays: mean and percentiles in seconds, each with its interval.

    `executions` arrive in each of the `runs`, of which the first and last tenth do not count. `uses` are the means over
    the runs.
    """

    rate_rps: float
    runs: int
    executions: int
    mean_s: Estimate
    p50_s: Estimate
    p95_s: Estimate
    p99_s: Estimate
    uses: tuple[LLMUse, ...]


def replay_often(
    plan: Plan,
    profiles: Profiles,
    workload: Workload,
    *,
    rate_rps: float,
    latency_s: float,
    seeds: Sequence[int],
    executions: int | None = None,
    on_run: Callable[[int], None] | None = None,
) -> Replications:
    """Replay Poisson arrivals of the workload's executions on the plan, once for each of up to ten seeds.

    `latency_s` says about how long an execution takes; without `executions` so many arrive in a run that it is steady
    by it. `on_run` is told how many runs are over. Raises ScepsyError where the plan cannot serve the workload, or for
    a rate or numbers that are out of range.
    """
    if not (rate_rps > 0 and np.isfinite(rate_rps)):
        raise ScepsyError(f"a rate of {rate_rps:g} executions/s cannot be replayed: give a positive number")
    if not 1 <= len(seeds) <= MAX_RUNS:
        raise ScepsyError(f"{len(seeds)} runs: replay a plan between 1 and {MAX_RUNS} times")
    count = steady_span(rate_rps, latency_s) if executions is None else executions
    if count < 10:
        raise ScepsyError(f"{count} executions are too few to tell anything: replay at least 10")
    figures = []
    uses: list[tuple[LLMUse, ...]] = []
    for number, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        arrivals_s = poisson_arrivals_s(rng, rate_rps=rate_rps, executions=count)
        timelines = [workload.timelines[index] for index in sample_executions(workload, rng, count)]
        replayed = replay(plan, profiles, timelines, arrivals_s)
        found = replayed.latencies_s[count // 10 : count - count // 10]
        figures.append([float(found.mean()), *np.percentile(found, [50, 95, 99]).tolist()])
        uses.append(replayed.uses)
        if on_run is not None:
            on_run(number + 1)
    mean_s, p50_s, p95_s, p99_s = (_estimate(column) for column in zip(*figures, strict=True))
    return Replications(
        rate_rps=rate_rps,
        runs=len(seeds),
        executions=count,
        mean_s=mean_s,
        p50_s=p50_s,
        p95_s=p95_s,
        p99_s=p99_s,
        uses=tuple(_mean_use(group) for group in zip(*uses, strict=True)),
    )


def _estimate(values: Sequence[float]) -> Estimate:
    if len(values) == 1:
        return Estimate(value=values[0], half_width=0.0)
    error = float(np.std(values, ddof=1)) / float(np.sqrt(len(values)))
    return Estimate(value=float(np.mean(values)), half_width=_STUDENT_T[len(values) - 2] * error)


def _mean_use(uses: Sequence[LLMUse]) -> LLMUse:
    return LLMUse(
        llm=uses[0].llm,
        busy=float(np.mean([use.busy for use in uses])),
        running=float(np.mean([use.running for use in uses])),
        waiting=float(np.mean([use.waiting for use in uses])),
        preemptions=round(float(np.mean([use.preemptions for use in uses]))),
    )
