"""From a workload to a plan: search, place, and say what the result is predicted to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from scepsy_optimizer.allocation import (
    MAX_UTILISATION,
    UTILISATION_TOLERANCE,
    Choice,
    Groups,
    Option,
    evaluate_groups,
    group_loads,
)
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.colocation import calls_between
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.infeasible import explain_no_plan
from scepsy_optimizer.judging import MAX_REPLAYED, least_replayed, with_replay
from scepsy_optimizer.node_limits import place_on_few_nodes
from scepsy_optimizer.pipeline import build_pipeline, workflow_latencies_s
from scepsy_optimizer.placement import place
from scepsy_optimizer.plan import LLMPlan, Plan, Prediction, Slot
from scepsy_optimizer.profile import LLMProfile, Profiles, find_profile, profiles_of
from scepsy_optimizer.replica import check_range
from scepsy_optimizer.requirements import NO_REQUIREMENTS, Requirements, check_requirements, planned
from scepsy_optimizer.search import budget_units, find_allocation, has_room, over_parts
from scepsy_optimizer.workload import Workload


def optimize(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rate_rps: float,
    max_units: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
    provenance: Mapping[str, str] | None = None,
    replay_seed: int | None = None,
) -> Plan:
    """The plan of least mean latency for `rate_rps` executions per second on the cluster.

    With `replay_seed` the best few candidates that the search met are replayed under the same arrivals, and the one of
    least replayed mean latency is taken; the bound and its gap stay those of the closed form. With `max_units` the plan
    uses at most that many tenths of a device, and the bound is for that budget. A rate that some allocation carries
    within `max_utilisation` may get a quicker one that is beyond it by up to `UTILISATION_TOLERANCE`. `profiles` are by
    LLM name, for one or more of the cluster's device types. Raises ScepsyError where the rate is out of reach, with the
    highest reachable one and its bottleneck, or where an LLM has no profile or does not fit.
    """
    # A replay's mean knows no weights: where there are some, the order of the closed form stands.
    is_chosen_by_replay = replay_seed is not None and not requirements.weighs_workflows

    def find(limit: float) -> tuple[Plan, ...]:
        return find_plans(
            workload,
            profiles,
            cluster,
            rate_rps=rate_rps,
            max_units=max_units,
            max_utilisation=limit,
            requirements=requirements,
            provenance=provenance,
            most=MAX_REPLAYED if is_chosen_by_replay else 1,
        )

    plans = find(max_utilisation)
    if not plans:
        raise ScepsyError(
            explain_no_plan(
                workload,
                profiles,
                cluster,
                rate_rps=rate_rps,
                max_units=max_units,
                max_utilisation=max_utilisation,
                requirements=requirements,
            )
        )
    tolerated = max_utilisation * (1 + UTILISATION_TOLERANCE)
    if tolerated < 1 and _is_near_limit(plans[0]):
        is_near_highest = not has_room(
            workload,
            profiles,
            cluster,
            rate_rps=rate_rps * (1 + UTILISATION_TOLERANCE),
            max_units=max_units,
            max_utilisation=max_utilisation,
            requirements=requirements,
        )
        plans = (find(tolerated) if is_near_highest else ()) or plans
    if replay_seed is None:
        return plans[0]
    best = least_replayed(plans, profiles, workload, replay_seed)
    return with_replay(best, profiles, workload, replay_seed)


def _is_near_limit(plan: Plan) -> bool:
    """Whether some LLM of the plan is so near the limit that what is beyond it may be what is quick."""
    assert plan.prediction is not None  # noqa: S101 - every built plan has one
    return plan.prediction.max_rate_rps < plan.rate_rps * (1 + UTILISATION_TOLERANCE)


def find_plans(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rate_rps: float,
    max_units: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
    provenance: Mapping[str, str] | None = None,
    most: int = MAX_REPLAYED,
) -> tuple[Plan, ...]:
    """The best few plans that the search met and that can be placed, least mean latency first, `most` at most.

    Each is within five per cent of the best, but for the best whose LLMs each have replicas of one kind, and has the
    lower bound of the whole budget. Empty where no allocation
    carries the rate. Raises ScepsyError where an LLM has no profile.
    """
    check_profiles(workload, profiles, cluster)
    if requirements.max_nodes is not None and requirements.max_nodes < len(cluster.nodes):

        def within(part: Cluster) -> tuple[Plan, ...]:
            return find_plans(
                workload,
                profiles,
                part,
                rate_rps=rate_rps,
                max_units=max_units,
                max_utilisation=max_utilisation,
                requirements=replace(requirements, max_nodes=None),
                provenance=provenance,
                most=most,
            )

        return _merged(over_parts(cluster, requirements.max_nodes, within), cluster)[:most]
    units = budget_units(cluster, max_units)
    bound_s: float | None = None
    while units > 0:
        allocation = find_allocation(
            workload,
            profiles,
            cluster,
            rate_rps=rate_rps,
            max_units=units,
            max_utilisation=max_utilisation,
            requirements=requirements,
            most=most,
        )
        if allocation is None:
            break
        # The bound of the whole cluster holds, also where a smaller budget is what can be placed in the end.
        bound_s = allocation.lower_bound_s if bound_s is None else bound_s
        placed = (
            _bounded(plan, candidate.latency_s, bound_s, requirements)
            for candidate in allocation.candidates
            if (
                plan := _build(
                    workload,
                    profiles,
                    cluster,
                    candidate.options,
                    rate_rps=rate_rps,
                    max_utilisation=max_utilisation,
                    requirements=requirements,
                    provenance=provenance,
                )
            )
            and not check_requirements(plan, requirements)
        )
        if plans := tuple(islice(placed, most)):
            return plans
        # Groups did not fit into the domains side by side: plan for fewer devices and try again.
        units = sum(option.units for option in allocation.options.values()) - 1
    return ()


def _merged(found: Sequence[tuple[Plan, ...]], cluster: Cluster) -> tuple[Plan, ...]:
    """The plans for parts of a cluster as plans for it, best first, with the bound of the part that has the lowest."""
    ranked = sorted(
        (prediction.objective_s or prediction.latency_s, number, index, prediction)
        for number, plans in enumerate(found)
        for index, plan in enumerate(plans)
        if (prediction := plan.prediction)
    )
    bound_s = min((prediction.lower_bound_s for _, _, _, prediction in ranked), default=0.0)
    several = len(cluster.device_types) > 1
    merged = []
    for objective_s, number, index, prediction in ranked:
        plan = found[number][index]
        named = plan.cluster.device_type if several else ""
        merged.append(
            replace(
                plan,
                cluster=cluster,
                llms=tuple(replace(part, device_type=part.device_type or named) for part in plan.llms),
                prediction=replace(prediction, lower_bound_s=bound_s, gap=1 - bound_s / objective_s),
            )
        )
    return tuple(merged)


def keep_in_place(plan: Plan, old: Plan, requirements: Requirements = NO_REQUIREMENTS) -> Plan:
    """The same plan with what an old one has left where it is, as far as the allocation and requirements allow."""
    slots = place(plan_choices(plan), plan.cluster, spread=requirements.spread, prefer=old)
    if slots is None:
        return plan
    left = {llm: iter(groups) for llm, groups in slots.items()}
    kept = replace(plan, llms=tuple(replace(part, slots=next(left[part.llm])) for part in plan.llms))
    return plan if check_requirements(kept, requirements) else kept


def predict(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    choices: Mapping[str, Groups],
    *,
    rate_rps: float,
    provenance: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a given allocation, such as one made by hand, with its prediction.

    Its lower bound is 0: nothing was searched. An LLM beyond saturation makes the predicted latency infinite. Raises
    ScepsyError where the allocation cannot be placed, or an LLM does not fit or has no profile or no choice.
    """
    check_profiles(workload, profiles, cluster)
    missing = [demand.llm for demand in workload.demands if demand.llm not in choices]
    if missing:
        raise ScepsyError(f"the allocation gives nothing to {', '.join(missing)}, which the workload calls")
    options = {
        demand.llm: evaluate_groups(
            demand,
            cluster_profiles(profiles, demand.llm, cluster),
            choices[demand.llm],
            calls_rps=rate_rps * demand.visits,
        )
        for demand in workload.demands
    }
    plan = _build(
        workload,
        profiles,
        cluster,
        options,
        rate_rps=rate_rps,
        max_utilisation=MAX_UTILISATION,
        provenance=provenance,
    )
    if plan is None:
        raise ScepsyError(f"the allocation does not fit on {cluster.devices} devices: {describe_choices(choices)}")
    return plan


def hand_made_plan(choices: Mapping[str, Groups], profiles: Profiles, cluster: Cluster) -> Plan:
    """A plan of a given allocation without any workload to predict from, to start engines before anything is traced.

    Raises ScepsyError where it cannot be placed.
    """
    slots = place(choices, cluster)
    if slots is None:
        raise ScepsyError(f"the allocation does not fit on {cluster.devices} devices: {describe_choices(choices)}")
    parts = tuple(
        _part(llm, cluster_profiles(profiles, llm, cluster), choice, placed)
        for llm, groups in choices.items()
        for choice, placed in zip(groups, slots[llm], strict=True)
    )
    return Plan(cluster=cluster, rate_rps=0.0, llms=parts, provenance={"allocation": "made by hand"})


def describe_choices(choices: Mapping[str, Groups]) -> str:
    """An allocation in words."""
    return "; ".join(f"{llm}: {' + '.join(_describe(choice) for choice in groups)}" for llm, groups in choices.items())


def _describe(choice: Choice) -> str:
    each = (
        f"{float(choice.fraction):g} device"
        if choice.fraction < 1
        else f"tensor_parallel_size {choice.tensor_parallel_size}"
    )
    return f"{choice.replicas} x {each}" + (f" of {choice.device_type}" if choice.device_type else "")


def plan_choices(plan: Plan) -> dict[str, Groups]:
    """The allocation inside a plan."""
    return {llm: planned(plan, llm) for llm in dict.fromkeys(part.llm for part in plan.llms)}


def _bounded(plan: Plan, weighted_s: float, bound_s: float, requirements: Requirements) -> Plan:
    """The plan with the bound; `weighted_s` is what was minimised, the mean latency where workflows weigh alike."""
    assert plan.prediction is not None  # noqa: S101 - every built plan has one
    objective_s = weighted_s if requirements.weighs_workflows else plan.prediction.latency_s
    bound_s = min(bound_s, objective_s)
    prediction = replace(
        plan.prediction,
        lower_bound_s=bound_s,
        gap=1 - bound_s / objective_s,
        objective_s=objective_s if requirements.weighs_workflows else None,
    )
    return replace(plan, prediction=prediction)


def _build(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    options: Mapping[str, Option],
    *,
    rate_rps: float,
    max_utilisation: float,
    provenance: Mapping[str, str] | None,
    requirements: Requirements = NO_REQUIREMENTS,
) -> Plan | None:
    """Place the options and predict; None where they cannot be placed."""
    slots = place_on_few_nodes(
        {llm: option.groups for llm, option in options.items()},
        cluster,
        requirements.node_limits,
        calls=calls_between(workload) if len(cluster.nodes) > 1 else None,
        spread=requirements.spread,
    )
    if slots is None:
        return None
    speeds = {llm: option.speed for llm, option in options.items()}
    pipeline = build_pipeline(workload, speeds)
    limits = {demand.llm: options[demand.llm].max_rps / demand.visits for demand in workload.demands}
    bottleneck = min(limits, key=lambda llm: limits[llm])
    parts = []
    for demand in workload.demands:
        offered = cluster_profiles(profiles, demand.llm, cluster)
        groups = options[demand.llm].groups
        loads = group_loads(
            demand, offered, groups, calls_rps=rate_rps * demand.visits, max_utilisation=max_utilisation
        )
        computed = max(1.0, demand.input_tokens - demand.cached_tokens)
        parts += [
            replace(
                _part(demand.llm, offered, choice, placed),
                rate_rps=load.calls_rps,
                predicted_call_s=load.speed.call_s(computed, max(1.0, demand.output_tokens)),
                utilisation=load.utilisation,
                share=demand.share,
                replica_rps=load.replica_rps,
            )
            for choice, placed, load in zip(groups, slots[demand.llm], loads, strict=True)
        ]
    return Plan(
        cluster=cluster,
        rate_rps=rate_rps,
        llms=tuple(parts),
        prediction=Prediction(
            latency_s=pipeline.built_latency_s,
            max_rate_rps=limits[bottleneck],
            bottleneck=bottleneck,
            lower_bound_s=0.0,
            gap=1.0,
            tool_s=pipeline.fixed_s,
            workflow_latency_s=workflow_latencies_s(workload, speeds),
            llm_latency_s={stage.llm: stage.latency_s(speeds[stage.llm]) for stage in pipeline.stages},
        ),
        provenance=dict(provenance or {}),
    )


def _part(llm: str, profiles: Sequence[LLMProfile], choice: Choice, slots: tuple[Slot, ...]) -> LLMPlan:
    """One group without a prediction; a replica accepts no longer context than its KV cache holds."""
    profile = find_profile(profiles, choice.device_type)
    kv_tokens = profile.kv_tokens(choice.tensor_parallel_size, float(choice.fraction))
    return LLMPlan(
        llm=llm,
        model=profile.model,
        tensor_parallel_size=choice.tensor_parallel_size,
        fraction=float(choice.fraction),
        replicas=choice.replicas,
        slots=slots,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        max_model_len=min(profile.max_model_len, kv_tokens),
        gpu_memory_utilization=profile.gpu_memory_utilization,
        device_type=choice.device_type,
    )


def cluster_profiles(profiles: Profiles, llm: str, cluster: Cluster) -> tuple[LLMProfile, ...]:
    """The profiles of an LLM for the cluster's device types, in their order. Raises ScepsyError where it has none."""
    offered = profiles_of(profiles, llm)
    found = tuple(
        profile for device_type in cluster.device_types for profile in offered if profile.device_type == device_type
    )
    if not found:
        raise ScepsyError(
            f"the profile of {llm!r} is for {', '.join(profile.device_type for profile in offered)}, the cluster has "
            f"{cluster.device_type}: profile it for that device type"
        )
    return found


def check_profiles(workload: Workload, profiles: Profiles, cluster: Cluster) -> None:
    """Raise ScepsyError unless every LLM of the workload has a profile for a device type of the cluster."""
    missing = [demand.llm for demand in workload.demands if demand.llm not in profiles]
    if missing:
        known = ", ".join(sorted(profiles)) or "nothing"
        raise ScepsyError(f"no profile for {', '.join(missing)}; there are profiles for {known}")
    for demand in workload.demands:
        for profile in cluster_profiles(profiles, demand.llm, cluster):
            check_range(profile, demand)
