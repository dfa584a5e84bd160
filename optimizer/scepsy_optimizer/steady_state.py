"""A plan's latency in steady state, by replay: what its percentiles are, and what the pipeline has missed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.plan import Plan, ReplayedLatency
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.replay import poisson_arrivals_s, replay
from scepsy_optimizer.workload import Workload

_LEAST_EXECUTIONS = 400
_SPAN_IN_LATENCIES = 12.0
_WARM_UP_IN_LATENCIES = 2.0


def replay_steady_state(
    plan: Plan,
    profiles: Profiles,
    workload: Workload,
    *,
    rng: np.random.Generator,
    max_calls: int = 100_000,
    settling_s: float | None = None,
) -> ReplayedLatency | None:
    """Replay Poisson arrivals of the workload's executions at the plan's rate, and measure what is steady.

    The run lasts for at least twelve mean latencies, of which the first two, while the engines fill, do not count, nor
    the last tenth of the arrivals, while they empty. With `settling_s` instead of the plan's own predicted mean, plans
    of one rate meet the same executions at the same moments if their `rng` is the same. Returns None where that takes
    more than `max_calls` calls, or the plan has no finite prediction to start from. Raises ScepsyError where the plan
    cannot serve the workload.
    """
    if plan.prediction is None or not np.isfinite(plan.prediction.latency_s):
        return None
    latency_s = plan.prediction.latency_s if settling_s is None else settling_s
    if replayed_calls(plan, workload) > max_calls:
        return None
    count = steady_span(plan.rate_rps, latency_s)
    arrivals_s = poisson_arrivals_s(rng, rate_rps=plan.rate_rps, executions=count)
    timelines = [workload.timelines[index] for index in sample_executions(workload, rng, count)]
    replayed = replay(plan, profiles, timelines, arrivals_s)
    counted = arrivals_s > arrivals_s[0] + _WARM_UP_IN_LATENCIES * latency_s
    counted[-max(1, count // 10) :] = False
    found = replayed.latencies_s[counted] if counted.any() else replayed.latencies_s
    p50_s, p95_s, p99_s = (float(value) for value in np.percentile(found, [50, 95, 99]))
    return ReplayedLatency(
        mean_s=float(found.mean()), p50_s=p50_s, p95_s=p95_s, p99_s=p99_s, executions=int(counted.sum())
    )


def replayed_calls(plan: Plan, workload: Workload) -> float:
    """How many calls a replay of the plan takes; 0 where it has no prediction to start from."""
    if plan.prediction is None:
        return 0.0
    each = sum(demand.visits for demand in workload.demands)
    return each * steady_span(plan.rate_rps, plan.prediction.latency_s)


def steady_span(rate_rps: float, latency_s: float) -> int:
    """Executions that arrive in twelve latencies, within which a replay gets steady; at least 400."""
    return int(max(_LEAST_EXECUTIONS, np.ceil(rate_rps * latency_s * _SPAN_IN_LATENCIES)))


def sample_executions(workload: Workload, rng: np.random.Generator, count: int) -> NDArray[np.int_]:
    """Indices of executions by their weights, evenly spread (systematic sampling) and then in random order."""
    edges = np.cumsum(workload.weights)
    positions = (np.arange(count) + rng.random()) / count * edges[-1]
    found: NDArray[np.int_] = np.minimum(np.searchsorted(edges, positions, side="right"), len(edges) - 1)
    rng.shuffle(found)
    return found
