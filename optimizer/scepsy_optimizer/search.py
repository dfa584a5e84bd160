"""The search: which option each LLM gets, so that the mean latency is least within the cluster's devices.

For one pipeline (one linearisation of the mean makespan) the problem is a multiple-choice knapsack, solved exactly by
dynamic programming over tenths of a device. The true mean makespan is at least every pipeline, so the best solution of
each pipeline bounds the optimum from below; the search keeps building pipelines at the best allocation found until
bound and allocation meet, or nothing new comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from scepsy_optimizer.allocation import (
    MAX_UTILISATION,
    Choice,
    Option,
    OptionTable,
    list_options,
    replica_kinds,
)
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.knapsack import solve
from scepsy_optimizer.pipeline import Pipeline, build_pipeline
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replica import CallShape, saturation_rps
from scepsy_optimizer.workload import Workload

_MAX_CUTS = 24
_GAP_GOAL = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The options found, the mean latency they give, and a proven lower bound on that of any allocation."""

    options: Mapping[str, Option]
    latency_s: float
    lower_bound_s: float


def find_allocation(
    workload: Workload,
    profiles: Mapping[str, LLMProfile],
    *,
    rate_rps: float,
    units: int,
    max_tensor_parallel_size: int,
    max_utilisation: float = MAX_UTILISATION,
) -> Allocation | None:
    """The allocation of least mean latency at `rate_rps` executions per second within `units` tenths of a device.

    Returns None where no allocation carries the rate. Raises ScepsyError for a rate that is not positive or an LLM
    without a profile.
    """
    _check(workload, profiles, rate_rps)
    tables = {
        demand.llm: list_options(
            demand,
            profiles[demand.llm],
            calls_rps=rate_rps * demand.visits,
            max_units=units,
            max_tensor_parallel_size=max_tensor_parallel_size,
            max_utilisation=max_utilisation,
        )
        for demand in workload.demands
    }
    pipeline = build_pipeline(workload)
    bound_s = 0.0
    best: tuple[float, dict[str, Option]] | None = None
    seen: set[tuple[Choice, ...]] = set()
    for _ in range(_MAX_CUTS):
        found = _solve(pipeline, tables, units)
        if found is None:
            return None
        chosen, linear_s = found
        bound_s = max(bound_s, linear_s)
        pipeline = build_pipeline(workload, {llm: option.speed for llm, option in chosen.items()})
        if best is None or pipeline.built_latency_s < best[0]:
            best = (pipeline.built_latency_s, chosen)
        key = tuple(option.choice for option in chosen.values())
        if key in seen or bound_s >= best[0] * (1 - _GAP_GOAL):
            break
        seen.add(key)
    assert best is not None  # noqa: S101 - the loop has run at least once
    return Allocation(options=best[1], latency_s=best[0], lower_bound_s=min(bound_s, best[0]))


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
    profiles: Mapping[str, LLMProfile],
    *,
    units: int,
    max_tensor_parallel_size: int,
    max_utilisation: float = MAX_UTILISATION,
) -> tuple[float, str]:
    """The highest rate of executions that some allocation carries, and the LLM that is the bottleneck there.

    Exact to one part in a million: each LLM is given the fewest units that carry the rate. Raises ScepsyError where
    the LLMs do not even fit at the lowest rate.
    """
    _check(workload, profiles, 1.0)
    needs = {
        demand.llm: _unit_need(
            profiles[demand.llm],
            CallShape.of(demand),
            max_tensor_parallel_size=max_tensor_parallel_size,
            max_utilisation=max_utilisation,
        )
        for demand in workload.demands
    }
    visits = {demand.llm: demand.visits for demand in workload.demands}

    def need(rate_rps: float) -> float:
        return sum(needs[llm](rate_rps * visits[llm]) for llm in needs)

    low = 0.0
    if need(low) > units:
        floor = ", ".join(f"{llm} {needs[llm](0.0) / 10:g}" for llm in needs)
        raise ScepsyError(
            f"the LLMs do not fit into {units / 10:g} devices even without load; least devices: {floor}. "
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


def _unit_need(
    profile: LLMProfile, shape: CallShape, *, max_tensor_parallel_size: int, max_utilisation: float
) -> Callable[[float], float]:
    """The fewest units that carry a rate of calls, as a function of that rate; infinite where the LLM never fits."""
    kinds = []
    for size, fraction in replica_kinds(profile, max_tensor_parallel_size=max_tensor_parallel_size):
        capacity = saturation_rps(profile, size, float(fraction), shape) * max_utilisation
        units = Choice(tensor_parallel_size=size, fraction=fraction, replicas=1).units
        if capacity > 0:
            kinds.append((capacity, units))

    def need(calls_rps: float) -> float:
        if not kinds:
            return float("inf")
        return min(float(units * max(1, np.ceil(calls_rps / capacity - 1e-9))) for capacity, units in kinds)

    return need


def _check(workload: Workload, profiles: Mapping[str, LLMProfile], rate_rps: float) -> None:
    if not rate_rps > 0 or not np.isfinite(rate_rps):
        raise ScepsyError(f"rate {rate_rps:g}: executions per second must be a positive number")
    missing = [demand.llm for demand in workload.demands if demand.llm not in profiles]
    if missing:
        raise ScepsyError(
            f"no profile for {', '.join(missing)}; there are profiles for {', '.join(sorted(profiles)) or 'nothing'}"
        )
