"""Predicted latencies of a plan: not only their mean, but how they spread over the traced executions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scepsy_optimizer.allocation import evaluate_groups
from scepsy_optimizer.pipeline import call_durations_s
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import check_profiles, cluster_profiles, plan_choices
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedLatencies:
    """Mean and percentiles of the latency of an execution, in seconds."""

    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float


def predict_latencies(
    plan: Plan, workload: Workload, profiles: Profiles, *, rate_rps: float
) -> PredictedLatencies | None:
    """What the closed form says of the plan's allocation at a rate; None where that saturates an LLM.

    Every execution is retimed with its own lengths at the mean speeds of the load, so the percentiles are those of what
    executions ask for; what chance adds (queues, bursts) is in the speeds on average only. Raises ScepsyError where the
    plan does not serve an LLM of the workload, or an LLM has no profile, does not fit, or has calls beyond its profile.
    """
    check_profiles(workload, profiles, plan.cluster)
    choices = plan_choices(plan)
    speeds = {}
    for demand in workload.demands:
        plan.parts(demand.llm)
        offered = cluster_profiles(profiles, demand.llm, plan.cluster)
        option = evaluate_groups(demand, offered, choices[demand.llm], calls_rps=rate_rps * demand.visits)
        speeds[demand.llm] = option.speed
    makespans_s = np.array([timeline.makespan_s(call_durations_s(timeline, speeds)) for timeline in workload.timelines])
    if not np.isfinite(makespans_s).all():
        return None
    weights = np.array(workload.weights)
    order = np.argsort(makespans_s)
    reached = np.cumsum(weights[order])
    # Rounding of the sums must not move a percentile on to the next execution.
    places = np.searchsorted(reached, np.array([0.5, 0.95, 0.99]) * reached[-1] * (1 - 1e-9))
    p50_s, p95_s, p99_s = makespans_s[order[places]].tolist()
    return PredictedLatencies(mean_s=float(weights @ makespans_s), p50_s=p50_s, p95_s=p95_s, p99_s=p99_s)
