"""Planning for more than the mean: each LLM's load at an upper quantile of what the traces leave open.

A few dozen executions tell an LLM's demand to within some ten per cent. The bootstrap says how far: executions are
drawn anew with replacement, and each LLM's service time per execution is taken at a quantile of what the draws give.
A plan for those loads carries any one of them; what it loses at the mean is its price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import plan_choices, predict
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.workload import Workload

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderLoad:
    """A plan when every LLM has its load at the quantile: mean latency, and the highest utilisation of any LLM.

    The latency is infinite beyond saturation; above the highest utilisation that is planned for it is a rough figure.
    """

    latency_s: float
    utilisation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """What planning for a quantile costs and what it buys.

    `factors` say how many times its mean load each LLM is planned for, `plain` is the plan without this caution: what
    it does better at the traced means is the price. `at_quantile` and `plain_at_quantile` are both plans under the
    loads of the quantile.
    """

    quantile: float
    factors: Mapping[str, float]
    plain: Plan
    at_quantile: UnderLoad
    plain_at_quantile: UnderLoad


def plan_robustly(
    ask: Callable[[Workload], Plan],
    workload: Workload,
    profiles: Profiles,
    *,
    quantile: float,
    rng: np.random.Generator,
) -> tuple[Plan, Robustness]:
    """The answer to a question about a workload when it is asked for the loads at a quantile, and what that costs.

    The plan's prediction is for the traced means, with the bound of the plain plan where both are for the same rate.
    Raises ScepsyError where `ask` does, which may be for the loads at the quantile only.
    """
    factors = load_factors(workload, quantile=quantile, rng=rng)
    loaded = loaded_workload(workload, factors)
    plain = ask(workload)
    cautious = ask(loaded)
    plan = _predicted(cautious, workload, profiles, cautious.rate_rps)
    if plan.prediction and plain.prediction and plan.rate_rps == plain.rate_rps:
        bound_s = min(plain.prediction.lower_bound_s, plan.prediction.latency_s)
        gap = 1 - bound_s / plan.prediction.latency_s
        plan = replace(plan, prediction=replace(plan.prediction, lower_bound_s=bound_s, gap=gap))
    return plan, Robustness(
        quantile=quantile,
        factors=factors,
        plain=plain,
        at_quantile=_under_load(_predicted(plan, loaded, profiles, plan.rate_rps)),
        plain_at_quantile=_under_load(_predicted(plain, loaded, profiles, plain.rate_rps)),
    )


def load_factors(workload: Workload, *, quantile: float, rng: np.random.Generator) -> dict[str, float]:
    """How many times its mean load each LLM has at a quantile of the bootstrap over executions, and at least 1.

    Load is service time per execution, as traced and without known queueing. Executions are drawn by their own number
    and keep their weights. Raises ScepsyError for a quantile outside [0.5, 1).
    """
    if not 0.5 <= quantile < 1:
        raise ScepsyError(f"robust {quantile:g}: the quantile must be at least 0.5 and below 1, such as 0.9")
    llms = [demand.llm for demand in workload.demands]
    column = {llm: index for index, llm in enumerate(llms)}
    rows = len(workload.timelines)
    load_s = np.zeros((rows, len(llms)))
    for row, (timeline, weight) in enumerate(zip(workload.timelines, workload.weights, strict=True)):
        for call, traced_s in zip(timeline.calls, timeline.traced_s, strict=True):
            load_s[row, column[call.llm]] += weight * max(0.0, traced_s - (call.queue_s or 0.0))
    draws = rng.multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES)
    means = (draws @ load_s) / (draws @ np.array(workload.weights))[:, None]
    mean = load_s.sum(axis=0)
    upper = np.quantile(means, quantile, axis=0)
    factors = np.maximum(1.0, np.divide(upper, mean, out=np.ones_like(mean), where=mean > 0))
    return dict(zip(llms, factors.tolist(), strict=True))


def loaded_workload(workload: Workload, factors: Mapping[str, float]) -> Workload:
    """The workload with each LLM called that many times as often; the executions themselves stay as traced.

    So the load of every LLM rises, while the calls on an execution's critical path stay what they were.
    """
    return replace(
        workload,
        demands=tuple(
            replace(
                demand,
                visits=demand.visits * factors[demand.llm],
                visits_by_role={role: visits * factors[demand.llm] for role, visits in demand.visits_by_role.items()},
            )
            for demand in workload.demands
        ),
    )


def _predicted(plan: Plan, workload: Workload, profiles: Profiles, rate_rps: float) -> Plan:
    """What the plan does under another load; its replicas stay where requirements have put them."""
    found = predict(workload, profiles, plan.cluster, plan_choices(plan), rate_rps=rate_rps, provenance=plan.provenance)
    slots = {llm: iter([part.slots for part in plan.parts(llm)]) for llm in {part.llm for part in plan.llms}}
    return replace(found, llms=tuple(replace(part, slots=next(slots[part.llm])) for part in found.llms))


def _under_load(plan: Plan) -> UnderLoad:
    assert plan.prediction is not None  # noqa: S101 - every predicted plan has one
    return UnderLoad(latency_s=plan.prediction.latency_s, utilisation=max(part.utilisation for part in plan.llms))
