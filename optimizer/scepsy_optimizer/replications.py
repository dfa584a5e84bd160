"""A plan replayed several times under different arrivals, or once under recorded ones: what it gives, and how sure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Execution
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.replay import LLMUse, poisson_arrivals_s, replay
from scepsy_optimizer.steady_state import sample_executions, steady_span
from scepsy_optimizer.timeline import compile_timeline
from scepsy_optimizer.workload import Workload

# Student's t, two-sided 95 %, for 1 to 9 degrees of freedom.
_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
MAX_RUNS = len(_STUDENT_T) + 1
_LEAST_EXECUTIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The mean of a figure over runs, and half the width of its 95 % interval (Student's t; 0 for a single run)."""

    value: float
    half_width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replications:
    """Latencies of executions over several replays: mean and percentiles in seconds, each with its interval.

    `executions` arrive in each of the `runs`, of which the first and last tenth do not count, unless their arrivals
    were recorded. `uses` are the means over the runs.
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
    if count < _LEAST_EXECUTIONS:
        raise ScepsyError(f"{count} executions are too few to tell anything: replay at least 10")
    figures = []
    uses: list[tuple[LLMUse, ...]] = []
    for number, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        arrivals_s = poisson_arrivals_s(rng, rate_rps=rate_rps, executions=count)
        timelines = [workload.timelines[index] for index in sample_executions(workload, rng, count)]
        replayed = replay(plan, profiles, timelines, arrivals_s)
        figures.append(_figures(replayed.latencies_s[count // 10 : count - count // 10]))
        uses.append(replayed.uses)
        if on_run is not None:
            on_run(number + 1)
    return _replications(rate_rps, count, figures, uses)


def recorded_rate_rps(executions: Sequence[Execution]) -> float:
    """Executions per second, from the first start to the last.

    Raises ScepsyError where they do not tell: fewer than ten, without their starts, or all at the same moment.
    """
    if len(executions) < _LEAST_EXECUTIONS:
        raise ScepsyError(f"{len(executions)} executions are too few to tell anything: replay at least 10")
    unknown = sum(execution.started_ns == 0 for execution in executions)
    if unknown:
        raise ScepsyError(f"{unknown} of {len(executions)} executions do not say when they started")
    moments = [execution.started_ns for execution in executions]
    if min(moments) == max(moments):
        raise ScepsyError(f"all {len(executions)} executions started at the same moment: that is no rate")
    return (len(executions) - 1) / ((max(moments) - min(moments)) / 1e9)


def replay_recorded(
    plan: Plan, profiles: Profiles, executions: Sequence[Execution], *, rate_rps: float | None = None
) -> Replications:
    """Replay every execution once, at the moment of its recorded start.

    With `rate_rps` time between the starts is stretched or shortened to that rate. Raises ScepsyError as `replay` and
    `recorded_rate_rps`.
    """
    recorded_rps = recorded_rate_rps(executions)
    asked_rps = recorded_rps if rate_rps is None else rate_rps
    ordered = sorted(executions, key=lambda execution: (execution.started_ns, execution.id))
    first_ns = ordered[0].started_ns
    arrivals_s = [(execution.started_ns - first_ns) / 1e9 * recorded_rps / asked_rps for execution in ordered]
    replayed = replay(plan, profiles, [compile_timeline(execution) for execution in ordered], arrivals_s)
    return _replications(asked_rps, len(ordered), [_figures(replayed.latencies_s)], [replayed.uses])


def _figures(latencies_s: NDArray[np.float64]) -> list[float]:
    return [float(latencies_s.mean()), *np.percentile(latencies_s, [50, 95, 99]).tolist()]


def _replications(
    rate_rps: float, executions: int, figures: Sequence[Sequence[float]], uses: Sequence[tuple[LLMUse, ...]]
) -> Replications:
    mean_s, p50_s, p95_s, p99_s = (_estimate(column) for column in zip(*figures, strict=True))
    return Replications(
        rate_rps=rate_rps,
        runs=len(figures),
        executions=executions,
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
