"""Who pays for whom, where several workflows share a cluster: what each uses, and what sharing does to its latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scepsy_optimizer.allocation import MAX_UTILISATION, UNITS_PER_DEVICE
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.search import find_allocation
from scepsy_optimizer.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowShare:
    """One workflow's side of a shared plan.

    `devices` is its part of the plan's devices: each LLM's, split by the service time that the workflows ask of it.
    `latency_s` is its mean latency in the shared plan, `alone_s` the least that it could have alone on the whole
    cluster, and `part_s` the least alone on as many devices as its part. The last two are infinite where its rate is
    out of reach: on a part that is too small to hold its LLMs, say, which sharing spares it.
    """

    workflow: str
    rate_rps: float
    devices: float
    latency_s: float
    alone_s: float
    part_s: float

    @property
    def gains(self) -> bool:
        """Whether it is faster in the shared plan than on its own part of the devices."""
        return self.latency_s <= self.part_s


def share_plan(
    plan: Plan,
    workload: Workload,
    alone: Mapping[str, Workload],
    profiles: Profiles,
    *,
    max_utilisation: float = MAX_UTILISATION,
) -> tuple[WorkflowShare, ...]:
    """What each workflow uses of a plan and what it gains or loses by sharing, in the order of their names.

    `workload` is the mix that the plan was made for, `alone` the workload of each of its workflows by itself; one that
    calls no LLM has none and is left out. Devices that stay free belong to nobody, and no requirements bind a workflow
    that is alone. Raises ScepsyError where the plan
    has no prediction.
    """
    if plan.prediction is None:
        raise ScepsyError("a plan without a prediction says nothing about its workflows: make it from traces")
    rates = dict.fromkeys(sorted(workload.workflows.keys() & alone.keys()), 0.0)
    for timeline, weight in zip(workload.timelines, workload.weights, strict=True):
        if timeline.workflow in rates:
            rates[timeline.workflow] += weight * plan.rate_rps
    used = _devices_used(plan, {workflow: alone[workflow] for workflow in rates}, rates)

    def least_s(workflow: str, max_units: int | None) -> float:
        found = find_allocation(
            alone[workflow],
            profiles,
            plan.cluster,
            rate_rps=rates[workflow],
            max_units=max_units,
            max_utilisation=max_utilisation,
        )
        return float("inf") if found is None else found.latency_s

    return tuple(
        WorkflowShare(
            workflow=workflow,
            rate_rps=rate,
            devices=used[workflow],
            latency_s=plan.prediction.workflow_latency_s[workflow],
            alone_s=least_s(workflow, None),
            part_s=least_s(workflow, round(used[workflow] * UNITS_PER_DEVICE)),
        )
        for workflow, rate in rates.items()
    )


def _devices_used(plan: Plan, alone: Mapping[str, Workload], rates: Mapping[str, float]) -> dict[str, float]:
    """Devices of the plan by workflow; of an LLM that no traced time was spent on, by calls."""
    used = dict.fromkeys(alone, 0.0)
    for llm in dict.fromkeys(part.llm for part in plan.llms):
        devices = sum(part.device_count for part in plan.parts(llm))
        demands = {
            workflow: (demand, rates[workflow])
            for workflow, workload in alone.items()
            for demand in workload.demands
            if demand.llm == llm
        }
        loads = {workflow: rate * demand.service_s for workflow, (demand, rate) in demands.items()}
        if not sum(loads.values()) > 0:
            loads = {workflow: rate * demand.visits for workflow, (demand, rate) in demands.items()}
        for workflow, load in loads.items():
            used[workflow] += devices * load / sum(loads.values())
    return used
