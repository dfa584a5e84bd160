"""Whether a running plan still fits what it is used for, and which plan would be better by more than a dead band.

Two questions keep a plan from swinging. Has anything left what the plan was made for: the rate by more than a band, or
an LLM's load per execution by more than the band and more than the chance in so few executions explains? And is the
best plan now better than the running one, on the same workload at the same rate, by more than the dead band?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.moves import plan_moves
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import keep_in_place, optimize, plan_choices, predict
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.requirements import NO_REQUIREMENTS, Requirements
from scepsy_optimizer.robust import load_factors
from scepsy_optimizer.workload import Workload

BAND = 0.2
DEAD_BAND = 0.1
_NOISE_QUANTILE = 0.975


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What has left the plan's assumptions, in words; nothing if it still fits.

    `loads` is each LLM's load per execution as a multiple of what was planned for. `latency_s` is what the running plan
    is predicted to give now, infinite where it is overloaded.
    """

    rate_rps: float
    loads: Mapping[str, float]
    latency_s: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A plan that is better by more than the dead band, and the part of the latency that it saves (1: all was lost)."""

    plan: Plan
    saved: float


def find_drift(plan: Plan, workload: Workload, profiles: Profiles, *, rate_rps: float, band: float = BAND) -> Drift:
    """Compare a running plan with what is asked of it now: executions like the workload's, `rate_rps` of them.

    `band` is how far rate and loads may be off, as a part of what was planned. Raises ScepsyError for a rate or a band
    that is no positive number.
    """
    for name, value in (("rate", rate_rps), ("band", band)):
        if not 0 < value < float("inf"):
            raise ScepsyError(f"{name} {value:g}: must be a positive number")
    reasons = []
    if plan.rate_rps > 0 and not 1 / (1 + band) <= rate_rps / plan.rate_rps <= 1 + band:
        reasons.append(f"{rate_rps:.3g} executions/s, planned for {plan.rate_rps:.3g}")
    known = {part.llm for part in plan.llms}
    missing = sorted(demand.llm for demand in workload.demands if demand.llm not in known)
    if missing:
        reasons.append(f"calls of {', '.join(missing)}, which the plan does not have")
        return Drift(rate_rps=rate_rps, loads={}, latency_s=float("inf"), reasons=tuple(reasons))
    now = predict(workload, profiles, plan.cluster, plan_choices(plan), rate_rps=rate_rps)
    before, after = _loads(plan), _loads(now)
    loads = {llm: after.get(llm, 0.0) / load for llm, load in before.items() if load > 0}
    noise = load_factors(workload, quantile=_NOISE_QUANTILE, rng=np.random.default_rng(0))
    for llm, ratio in sorted(loads.items()):
        most = max(1 + band, noise.get(llm, 1.0))
        if not 1 / most <= ratio <= most:
            reasons.append(f"{llm}: {ratio:.2g} times the load per execution that was planned for")
    latency_s = now.prediction.latency_s if now.prediction is not None else float("inf")
    if not np.isfinite(latency_s):
        full = ", ".join(sorted({part.llm for part in now.llms if part.utilisation >= 1}))
        reasons.append(f"{full} cannot keep up")
    return Drift(rate_rps=rate_rps, loads=loads, latency_s=latency_s, reasons=tuple(reasons))


def propose(
    plan: Plan,
    workload: Workload,
    profiles: Profiles,
    drift: Drift,
    *,
    dead_band: float = DEAD_BAND,
    requirements: Requirements = NO_REQUIREMENTS,
    replay_seed: int | None = None,
) -> Proposal | None:
    """The best plan for what is asked now on the same cluster, with what can stay in its place; None if not worth it.

    It is worth it where something has drifted, any replica would start or stop, and the new plan saves more than
    `dead_band` of the latency that the running one gives. Raises ScepsyError where no plan carries the rate.
    """
    if not drift.reasons:
        return None
    best = optimize(
        workload,
        profiles,
        plan.cluster,
        rate_rps=drift.rate_rps,
        requirements=requirements,
        provenance=plan.provenance,
        replay_seed=replay_seed,
    )
    best = keep_in_place(best, plan, requirements)
    assert best.prediction is not None  # noqa: S101 - every optimized plan has one
    saved = 1 - best.prediction.latency_s / drift.latency_s
    is_worth_it = saved > dead_band and plan_moves(plan, best).steps
    return Proposal(plan=best, saved=saved) if is_worth_it else None


def _loads(plan: Plan) -> dict[str, float]:
    """Devices' worth of work that each LLM has, per execution per second."""
    found: dict[str, float] = {}
    for part in plan.llms:
        if plan.rate_rps > 0:
            found[part.llm] = found.get(part.llm, 0.0) + part.utilisation * part.device_count / plan.rate_rps
    return found
