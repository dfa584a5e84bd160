"""What one more device would buy, LLM by LLM: the others stay as they are in the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scepsy_optimizer.allocation import MAX_UTILISATION, UNITS_PER_DEVICE, Groups, Option, evaluate_groups
from scepsy_optimizer.options import list_options, make_offer
from scepsy_optimizer.pipeline import build_pipeline
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import cluster_profiles, plan_choices
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.requirements import NO_REQUIREMENTS, LLMRequirements, Requirements, admitted_rows, allowed_types
from scepsy_optimizer.what_if import add_device
from scepsy_optimizer.workload import LLMDemand, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class NextDevice:
    """One LLM with one device of a type more than in the plan.

    `groups` is what would make the mean latency least, `latency_s` that latency at the plan's rate, and
    `max_rate_rps` the highest rate that the plan carries when the LLM makes the most of the device for that instead.
    """

    llm: str
    device_type: str
    groups: Groups
    latency_s: float
    max_rate_rps: float


def next_device(
    workload: Workload,
    profiles: Profiles,
    plan: Plan,
    *,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
) -> tuple[NextDevice, ...]:
    """What one device more of each type would buy each LLM, the greatest gain in latency first.

    The device is counted, not placed. An LLM does not appear with a type that it has no profile for or must not use,
    and not at all where its groups are fixed. Of the requirements only those on LLMs are respected.
    """
    groups = plan_choices(plan)
    options = {
        demand.llm: evaluate_groups(
            demand,
            cluster_profiles(profiles, demand.llm, plan.cluster),
            groups[demand.llm],
            calls_rps=plan.rate_rps * demand.visits,
            max_utilisation=max_utilisation,
        )
        for demand in workload.demands
    }
    found = [
        _with_device(
            workload, profiles, plan, demand, device_type, options, max_utilisation, requirements.of_llm(demand.llm)
        )
        for demand in workload.demands
        if not requirements.of_llm(demand.llm).fixed
        for device_type in allowed_types(requirements.of_llm(demand.llm), plan.cluster)
        if any(one.device_type == device_type for one in cluster_profiles(profiles, demand.llm, plan.cluster))
    ]
    return tuple(sorted(found, key=lambda one: one.latency_s))


def _with_device(
    workload: Workload,
    profiles: Profiles,
    plan: Plan,
    demand: LLMDemand,
    device_type: str,
    options: Mapping[str, Option],
    max_utilisation: float,
    required: LLMRequirements,
) -> NextDevice:
    cluster = add_device(plan.cluster, device_type)
    table = list_options(
        make_offer(demand, cluster_profiles(profiles, demand.llm, cluster), cluster),
        calls_rps=plan.rate_rps * demand.visits,
        max_units=options[demand.llm].units + UNITS_PER_DEVICE,
        max_utilisation=max_utilisation,
        min_replicas=required.min_replicas,
    )
    # What other types give to the LLM stays what it is; of this type there is one device more.
    fits = admitted_rows(required, cluster, replicas=table.replicas, units=table.units)
    for name in plan.cluster.device_types:
        named = name if len(plan.cluster.device_types) > 1 else ""
        now = sum(group.units for group in options[demand.llm].groups if group.device_type in ("", name))
        fits &= table.units_of(named) <= now + (UNITS_PER_DEVICE if name == device_type else 0)
    table = table.select(fits)
    choices = [options[demand.llm], *(table.option(row) for row in range(len(table)))]
    pipeline = build_pipeline(workload, {llm: option.speed for llm, option in options.items()})
    stage = next(stage for stage in pipeline.stages if stage.llm == demand.llm)
    # The tangent at the plan bounds each option's latency from below: in that order, the search can stop early.
    choices.sort(key=lambda option: stage.latency_s(option.speed))
    best, best_s = options[demand.llm], pipeline.built_latency_s
    rest_s = pipeline.built_latency_s - stage.latency_s(best.speed)
    for option in choices:
        if rest_s + stage.latency_s(option.speed) >= best_s:
            break
        speeds = {llm: (option if llm == demand.llm else other).speed for llm, other in options.items()}
        latency_s = build_pipeline(workload, speeds).built_latency_s
        if latency_s < best_s:
            best, best_s = option, latency_s
    visits = {one.llm: one.visits for one in workload.demands}
    others = [option.max_rps / visits[llm] for llm, option in options.items() if llm != demand.llm]
    most = max(option.max_rps for option in choices) / demand.visits
    return NextDevice(
        llm=demand.llm,
        device_type=device_type,
        groups=best.groups,
        latency_s=best_s,
        max_rate_rps=min([most, *others]),
    )
