"""Why there is no plan: which rate, limit or shape is in the way, and the least or most that could be had instead."""

from __future__ import annotations

from dataclasses import replace

from scepsy_optimizer.allocation import MAX_UTILISATION, UNITS_PER_DEVICE
from scepsy_optimizer.choosing import Allocation
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.pipeline import workflow_latencies_s
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.requirements import Requirements
from scepsy_optimizer.search import budget_units, find_allocation, highest_rate
from scepsy_optimizer.workload import Workload

_ABOVE_ALL_OTHERS = 1e4
_PRECISION = 1e-3
NO_LOAD_RPS = 1e-6
"""A rate up to which no call waits for another: what is out of reach there is so at any rate."""


def explain_no_plan(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rate_rps: float,
    max_units: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements,
) -> str:
    """One sentence for a rate at which the search has found no plan that can be placed.

    Raises ScepsyError where the LLMs do not fit even without load.
    """

    def least(required: Requirements) -> Allocation | None:
        return find_allocation(
            workload,
            profiles,
            cluster,
            rate_rps=rate_rps,
            max_units=max_units,
            max_utilisation=max_utilisation,
            requirements=required,
        )

    where = f"on {budget_units(cluster, max_units) / UNITS_PER_DEVICE:g} {cluster.device_type}"
    rate, bottleneck = highest_rate(
        workload,
        profiles,
        cluster,
        max_units=max_units,
        max_utilisation=max_utilisation,
        requirements=requirements,
    )
    if rate < rate_rps:
        return (
            f"a rate of {rate_rps:g} executions/s is out of reach {where}: the highest is {rate:.3g}/s, limited by "
            f"{bottleneck!r}. Ask for less, add devices, or make {bottleneck!r} smaller"
        )
    limits = requirements.latency_limits_s
    at, remedy = f"at {rate_rps:g} executions/s {where}", "ask for a lower rate, or add devices"
    if rate_rps <= NO_LOAD_RPS:
        at, remedy = f"{where}, even without load", "or use faster devices or smaller models"
    for workflow, limit_s in limits.items():
        found = least(_favouring(requirements, workflow))
        if found is not None and (least_s := _latencies_s(workload, found)[workflow]) > limit_s * (1 + _PRECISION):
            return (
                f"a mean latency of {limit_s:g} s of workflow {workflow!r} is out of reach {at}: the least "
                f"is {least_s:.3g} s. Allow more, {remedy}"
            )
    free = least(_raised(requirements, None))
    if limits and free is not None:
        # The best allocation without limits keeps them when they are raised that far.
        latencies = _latencies_s(workload, free)
        low, high = 1.0, max(latencies[workflow] / limit_s for workflow, limit_s in limits.items())
        while high - low > _PRECISION * high:
            middle = (low + high) / 2
            low, high = (low, middle) if least(_raised(requirements, middle)) is not None else (middle, high)
        return (
            f"the latency limits of {' and '.join(sorted(limits))} cannot be kept together {at}: raise them by "
            f"{high - 1:.1%}, {remedy}"
        )
    return (
        f"at {rate_rps:g} executions/s the LLMs fit {where} by number, but their groups do not fit into its nodes and "
        "fast-link domains: use more devices, or allow them more nodes"
    )


def _favouring(requirements: Requirements, workflow: str) -> Requirements:
    """The same without latency limits, and with one workflow that counts far above all others."""
    free = _raised(requirements, None)
    favoured = replace(free.of_workflow(workflow), weight=_ABOVE_ALL_OTHERS)
    others = {name: replace(one, weight=1.0) for name, one in free.workflows.items()}
    return replace(free, workflows={**others, workflow: favoured})


def _raised(requirements: Requirements, factor: float | None) -> Requirements:
    """The same with latency limits that many times as high; without any for None."""
    return replace(
        requirements,
        workflows={
            name: replace(
                one,
                latency_limit_s=None if factor is None or one.latency_limit_s is None else one.latency_limit_s * factor,
            )
            for name, one in requirements.workflows.items()
        },
    )


def _latencies_s(workload: Workload, found: Allocation) -> dict[str, float]:
    return workflow_latencies_s(workload, {llm: option.speed for llm, option in found.options.items()})
