"""The search: which option each LLM gets, so that the mean latency is least within the cluster's devices.

For one pipeline (one linearisation of the mean makespan) the problem is a multiple-choice knapsack, which is solved
exactly. The true mean makespan is at least every pipeline, hence at least every weighted mean of pipelines, which is a
pipeline itself: its best allocation bounds the optimum from below. The search builds a pipeline at each allocation that
it finds and solves for the newest while that helps; then it weighs all so that the bound rises (the weights of a
matrix game between pipelines and allocations: the Lagrangian dual of minimising their maximum), until bound and best
allocation meet, or neither moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scepsy_optimizer.allocation import (
    MAX_UTILISATION,
    UNITS_PER_DEVICE,
    Floats,
    Groups,
    Option,
    OptionTable,
    evaluate_groups,
    table_of,
)
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.knapsack import solve
from scepsy_optimizer.options import capacity_by_units, list_options, make_offer
from scepsy_optimizer.pipeline import Pipeline, Stage, build_pipeline
from scepsy_optimizer.profile import LLMProfile, Profiles, profiles_of
from scepsy_optimizer.replica import CallSpeed
from scepsy_optimizer.requirements import (
    NO_REQUIREMENTS,
    LLMRequirements,
    Requirements,
    admitted_rows,
    allowed_types,
    max_units_of,
)
from scepsy_optimizer.workload import LLMDemand, Workload

_MAX_CUTS = 40
_MAX_IDLE = 5
_GAP_GOAL = 1e-4
_GAME_ROUNDS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An option for each LLM, and the mean latency that they give together."""

    options: Mapping[str, Option]
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The candidates that the search met, best first, and a proven lower bound on the latency of any allocation."""

    candidates: tuple[Candidate, ...]
    lower_bound_s: float

    @property
    def options(self) -> Mapping[str, Option]:
        """The options of the best candidate."""
        return self.candidates[0].options

    @property
    def latency_s(self) -> float:
        """The mean latency of the best candidate."""
        return self.candidates[0].latency_s


def find_allocation(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rate_rps: float,
    max_units: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
) -> Allocation | None:
    """The allocation of least mean latency at `rate_rps` executions per second on the cluster.

    With `max_units` it takes at most that many tenths of a device, of all device types together. Returns None where
    no allocation carries the rate within the requirements. Raises ScepsyError for a rate that is not positive or an
    LLM without a profile.
    """
    _check(workload, profiles, rate_rps)
    tables = list_tables(
        workload,
        profiles,
        cluster,
        rate_rps=rate_rps,
        max_units=max_units,
        max_utilisation=max_utilisation,
        requirements=requirements,
    )
    if tables is None:
        return None
    units = budget_units(cluster, max_units)
    pipelines = [build_pipeline(workload)]
    pipeline = pipelines[0]
    bound_s = 0.0
    met: list[Candidate] = []
    speeds: dict[tuple[Groups, ...], dict[str, CallSpeed]] = {}
    idle = 0
    for _ in range(_MAX_CUTS):
        found = _solve(pipeline, tables, units)
        if found is None:
            return None
        chosen, linear_s = found
        idle = 0 if linear_s > bound_s * (1 + _GAP_GOAL) else idle + 1
        bound_s = max(bound_s, linear_s)
        key = tuple(option.groups for option in chosen.values())
        new = key not in speeds
        if new:
            speeds[key] = {llm: option.speed for llm, option in chosen.items()}
            pipelines.append(build_pipeline(workload, speeds[key]))
            latency_s = pipelines[-1].built_latency_s
            if all(latency_s < candidate.latency_s for candidate in met):
                idle = 0
            met.append(Candidate(options=chosen, latency_s=latency_s))
            met.sort(key=lambda candidate: candidate.latency_s)
        if bound_s >= met[0].latency_s * (1 - _GAP_GOAL) or idle >= _MAX_IDLE:
            break
        if new and idle == 0:
            pipeline = pipelines[-1]
        else:
            values = np.array([[cut.latency_s(speed) for speed in speeds.values()] for cut in pipelines])
            pipeline = _blend(pipelines, _maximin(values))
    return Allocation(candidates=tuple(met), lower_bound_s=min(bound_s, met[0].latency_s))


def list_tables(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rate_rps: float,
    max_units: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
) -> dict[str, OptionTable] | None:
    """The options of each LLM at a rate that its requirements admit, none larger than what the others leave.

    None where they do not all fit.
    """
    needs = _unit_needs(workload, profiles, cluster, max_utilisation, requirements)
    fewest = {demand.llm: needs[demand.llm](rate_rps * demand.visits) for demand in workload.demands}
    spare = budget_units(cluster, max_units) - sum(fewest.values())
    if spare < 0:
        return None
    tables = {}
    for demand in workload.demands:
        required = requirements.of_llm(demand.llm)
        offered = _offered_profiles(profiles, demand.llm, cluster, required)
        calls_rps = rate_rps * demand.visits
        if required.fixed:
            tables[demand.llm] = table_of(
                demand, offered, required.fixed, calls_rps=calls_rps, max_utilisation=max_utilisation
            )
            continue
        table = list_options(
            make_offer(demand, offered, cluster),
            calls_rps=calls_rps,
            max_units=int(fewest[demand.llm] + spare),
            max_utilisation=max_utilisation,
        )
        tables[demand.llm] = table.select(admitted_rows(required, cluster, replicas=table.replicas, units=table.units))
    return tables


def _maximin(values: Floats) -> Floats:
    """Weights of the rows for which the least weighted mean over the columns is greatest, nearly.

    Multiplicative weights (Freund and Schapire, 1999): rows gain where the column that answers best pays more. Any
    weights give a valid bound, so nearly is enough.
    """
    spread = float(values.max() - values.min())
    scaled = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    logs = np.zeros(len(values))
    mean = np.zeros(len(values))
    rate = np.sqrt(8 * np.log(max(2, len(values))) / _GAME_ROUNDS)
    for _ in range(_GAME_ROUNDS):
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        mean += weights / _GAME_ROUNDS
        logs += rate * scaled[:, int(np.argmin(weights @ scaled))]
    return mean


def _blend(pipelines: Sequence[Pipeline], weights: Floats) -> Pipeline:
    """The weighted mean of pipelines over the same LLMs; it bounds from below whatever each of them does."""
    stages = tuple(
        Stage(
            llm=column[0].llm,
            calls=float(weights @ np.array([stage.calls for stage in column])),
            input_tokens=float(weights @ np.array([stage.input_tokens for stage in column])),
            output_tokens=float(weights @ np.array([stage.output_tokens for stage in column])),
        )
        for column in zip(*(pipeline.stages for pipeline in pipelines), strict=True)
    )
    return Pipeline(
        stages=stages,
        fixed_s=float(weights @ np.array([pipeline.fixed_s for pipeline in pipelines])),
        built_latency_s=float(weights @ np.array([pipeline.built_latency_s for pipeline in pipelines])),
    )


def _solve(pipeline: Pipeline, tables: Mapping[str, OptionTable], units: int) -> tuple[dict[str, Option], float] | None:
    """The option of each LLM that minimises the pipeline's latency within the units, and that latency; exact."""
    offered = [tables[stage.llm] for stage in pipeline.stages]
    costs = [
        table.speeds @ np.array([stage.calls, stage.input_tokens, stage.output_tokens])
        for stage, table in zip(pipeline.stages, offered, strict=True)
    ]
    packing = solve([table.units for table in offered], costs, units)
    if packing is None:
        return None
    chosen = zip(pipeline.stages, offered, packing.rows, strict=True)
    return {stage.llm: table.option(row) for stage, table, row in chosen}, packing.cost + pipeline.fixed_s


def highest_rate(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    max_units: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
) -> tuple[float, str]:
    """The highest rate of executions that some allocation carries, and the LLM that is the bottleneck there.

    Exact to one part in a million: each LLM is given the fewest units that carry the rate. Raises ScepsyError where
    the LLMs do not even fit at the lowest rate.
    """
    _check(workload, profiles, 1.0)
    units = budget_units(cluster, max_units)
    needs = _unit_needs(workload, profiles, cluster, max_utilisation, requirements)
    visits = {demand.llm: demand.visits for demand in workload.demands}

    def need(rate_rps: float) -> float:
        return sum(needs[llm](rate_rps * visits[llm]) for llm in needs)

    low = 0.0
    if need(low) > units:
        floors = {llm: needs[llm](0.0) / UNITS_PER_DEVICE for llm in needs}
        if homeless := [llm for llm, least in floors.items() if least == float("inf")]:
            raise ScepsyError(
                f"{', '.join(homeless)} does not fit at any profiled tensor parallelism up to "
                f"{cluster.largest_domain}: use devices with more memory or a smaller model"
            )
        floor = ", ".join(f"{llm} {least:g}" for llm, least in floors.items())
        raise ScepsyError(
            f"the LLMs do not fit into {units / UNITS_PER_DEVICE:g} devices even without load; least devices: {floor}. "
            "Use a larger cluster or smaller models"
        )
    high = 1.0
    while need(high) <= units:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        if need(middle) <= units:
            low = middle
        else:
            high = middle
        if high - low <= 1e-6 * high:
            break
    # Past the limit, the LLM that asks for more units than at it is the one in the way.
    steps = {llm: needs[llm](high * 1.000001 * visits[llm]) - needs[llm](low * visits[llm]) for llm in needs}
    return low, max(steps, key=lambda llm: steps[llm])


def _unit_needs(
    workload: Workload, profiles: Profiles, cluster: Cluster, max_utilisation: float, requirements: Requirements
) -> dict[str, Callable[[float], float]]:
    """`_unit_need` of each LLM."""
    return {
        demand.llm: _unit_need(demand, profiles, cluster, max_utilisation, requirements.of_llm(demand.llm))
        for demand in workload.demands
    }


def _unit_need(
    demand: LLMDemand, profiles: Profiles, cluster: Cluster, max_utilisation: float, required: LLMRequirements
) -> Callable[[float], float]:
    """The fewest units that carry a rate of calls, as a function of that rate; infinite where nothing does."""
    offered = _offered_profiles(profiles, demand.llm, cluster, required)
    if required.fixed:
        option = evaluate_groups(demand, offered, required.fixed, calls_rps=0.0, max_utilisation=max_utilisation)
        return lambda calls_rps: option.units if calls_rps <= option.max_rps * (1 + 1e-9) else float("inf")
    most_rps = capacity_by_units(
        make_offer(demand, offered, cluster),
        max_units=max_units_of(required, cluster),
        min_replicas=required.min_replicas,
    )

    def need(calls_rps: float) -> float:
        needed_rps = calls_rps / max_utilisation * (1 - 1e-9)
        fewest = int(np.searchsorted(np.where(most_rps > 0, most_rps, -1.0), needed_rps))
        return float(fewest) if fewest < len(most_rps) else float("inf")

    return need


def _offered_profiles(
    profiles: Profiles, llm: str, cluster: Cluster, required: LLMRequirements
) -> tuple[LLMProfile, ...]:
    """The profiles of an LLM for the device types that it may use."""
    types = allowed_types(required, cluster)
    offered = tuple(profile for profile in profiles_of(profiles, llm) if profile.device_type in types)
    if not offered:
        raise ScepsyError(
            f"requirements: {llm!r} may use {', '.join(types) or 'no type'} only, and has no profile for it"
        )
    return offered


def budget_units(cluster: Cluster, max_units: int | None) -> int:
    """Tenths of a device that may be given out: the whole cluster, or `max_units` of it."""
    whole = cluster.devices * UNITS_PER_DEVICE
    return whole if max_units is None else min(whole, max_units)


def _check(workload: Workload, profiles: Profiles, rate_rps: float) -> None:
    if not rate_rps > 0 or not np.isfinite(rate_rps):
        raise ScepsyError(f"rate {rate_rps:g}: executions per second must be a positive number")
    missing = [demand.llm for demand in workload.demands if demand.llm not in profiles]
    if missing:
        raise ScepsyError(
            f"no profile for {', '.join(missing)}; there are profiles for {', '.join(sorted(profiles)) or 'nothing'}"
        )
