"""The search: which groups each LLM gets, so that the mean latency is least within the cluster's devices.

The true mean makespan is at least every tangent to it (a pipeline). For one tangent the problem is a multiple-choice
knapsack, which is solved exactly; that is all where the critical path does not move. Where it moves, the executions are
put into groups, each group keeps all of its tangents, and the choice that minimises the sum of the groups' largest
tangents is found by branch and bound (`branching.py`), until the bound and the best choice meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.allocation import (
    MAX_UTILISATION,
    UNITS_PER_DEVICE,
    Floats,
    Ints,
    Option,
    OptionTable,
    ReplicaKind,
    evaluate_groups,
    kind_of,
    table_of,
)
from scepsy_optimizer.branching import minimise
from scepsy_optimizer.cluster import Cluster, parts_of
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.makespans import Makespans
from scepsy_optimizer.master import Problem, can_pack
from scepsy_optimizer.neighbours import neighbours
from scepsy_optimizer.options import Offer, capacity_by_units, list_counts, list_options, make_offer
from scepsy_optimizer.profile import LLMProfile, Profiles, profiles_of
from scepsy_optimizer.requirements import (
    NO_REQUIREMENTS,
    LLMRequirements,
    Requirements,
    admitted_rows,
    allowed_types,
    max_units_of,
    objective_weights,
)
from scepsy_optimizer.room import Room, room_of, undominated
from scepsy_optimizer.workload import LLMDemand, Workload

T = TypeVar("T")

_GAP_GOAL = 1e-4
_MAX_GROUPS = 10
_NEAR = 0.05
"""How much slower than the best a candidate may be, as a part of its latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An option for each LLM, and the mean latency that they give together, workflows weighted as required."""

    options: Mapping[str, Option]
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The best candidate, others near it that differ in replicas, and a proven lower bound on any allocation's latency.

    The bound is for what is minimised: the mean latency, workflows weighted as required.
    """

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
    most: int = 1,
) -> Allocation | None:
    """The allocation of least mean latency at `rate_rps` executions per second on the cluster, and others near it.

    The requirements weigh the workflows in that mean, limit the mean latency of each, and what each LLM may get. With
    `max_units` it takes at most that many tenths of a device, of all device types together. There are up to `most`
    candidates, within five per cent of the best one. Returns None where no allocation carries the rate within the
    requirements. Raises ScepsyError for a rate that is not positive or an
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
    return choose(
        workload, Makespans(workload), cluster, tables, max_units=max_units, requirements=requirements, most=most
    )


def choose(
    workload: Workload,
    makespans: Makespans,
    cluster: Cluster,
    tables: Mapping[str, OptionTable],
    *,
    max_units: int | None = None,
    requirements: Requirements = NO_REQUIREMENTS,
    most: int = 1,
) -> Allocation | None:
    """The best option of each LLM from tables that are there already, such as those of a larger budget.

    `makespans` are those of the workload; the rest is as in `find_allocation`.
    """
    groups = _group(workload, requirements)
    offered = [tables[llm] for llm in makespans.llms]
    room = room_of(cluster, (kind for table in offered for kind in table.kinds), max_units)

    def is_possible(rows: tuple[int, ...]) -> bool:
        replicas: Counter[ReplicaKind] = Counter()
        for table, row in zip(offered, rows, strict=True):
            replicas.update(dict(zip(table.kinds, table.counts[row].tolist(), strict=True)))
        return room.holds(replicas)

    problem = Problem(
        speeds=[table.speeds for table in offered],
        units=[room.taken(table.kinds, table.counts) for table in offered],
        budgets=room.budgets,
        areas=len(cluster.device_types),
        accepts=is_possible,
        group_weights=groups.weights,
        limited=groups.limited,
        limits_s=groups.limits_s,
        scale_s=workload.latency_s,
    )

    def retime(speeds: Floats) -> tuple[Floats, Floats, Floats]:
        found = makespans.tangents(speeds)
        coefficients: Floats = np.tensordot(groups.members, found.coefficients, 1)
        return groups.members @ found.makespans_s, groups.members @ found.fixed_s, coefficients

    found = minimise(problem, retime, gap=_GAP_GOAL)
    if not found.choices:
        return None
    choices = [found.choices[0]]
    if most > 1:
        labels = [_replicas_alike(table) for table in offered]
        choices = neighbours(problem, retime, choices[0][1], labels, within=_NEAR, most=most)
    candidates = tuple(
        Candidate(
            options={llm: table.option(row) for llm, table, row in zip(makespans.llms, offered, rows, strict=True)},
            latency_s=latency_s,
        )
        for latency_s, rows in choices
    )
    return Allocation(candidates=candidates, lower_bound_s=found.lower_bound_s)


def _replicas_alike(table: OptionTable) -> Ints:
    """The same number for options of as many groups of each size and as many fractions, whatever these are."""
    whole = np.array([kind.fraction == 1 for kind in table.kinds])
    shapes = np.column_stack([table.counts[:, whole], table.counts[:, ~whole].sum(axis=1)])
    labels: Ints = np.unique(shapes, axis=0, return_inverse=True)[1].ravel()
    return labels


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Executions in groups, each of one workflow.

    `members[g, e]` is what execution e counts in group g, so that the groups of a workflow add up to its mean makespan;
    `weights[g]` what a group counts in the objective; `limited` has a row for each limit, with its workflow's groups.
    """

    members: Floats
    weights: Floats
    limited: NDArray[np.bool_]
    limits_s: Floats


def _group(workload: Workload, requirements: Requirements) -> _Groups:
    """Several groups for each workflow: the sum of their bounds is tighter than one bound on the whole."""
    objective = np.array(objective_weights(workload, requirements))
    load = np.array(workload.weights)
    by_workflow: dict[str, list[int]] = {}
    for number, timeline in enumerate(workload.timelines):
        by_workflow.setdefault(timeline.workflow, []).append(number)
    each = max(1, _MAX_GROUPS // len(by_workflow))
    names, weights, members = [], [], []
    for workflow, numbers in by_workflow.items():
        mean = load[numbers] / load[numbers].sum()
        for first in range(min(each, len(numbers))):
            row = np.zeros(len(load))
            row[numbers[first::each]] = mean[first::each]
            members.append(row)
            names.append(workflow)
            weights.append(float(objective[numbers].sum()))
    limits_s = requirements.latency_limits_s
    limited = [[name == workflow for name in names] for workflow in limits_s]
    return _Groups(
        members=np.array(members),
        weights=np.array(weights),
        limited=np.array(limited, dtype=bool).reshape(len(limits_s), len(names)),
        limits_s=np.array(list(limits_s.values()), dtype=float),
    )


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
    offers = _offers(workload, profiles, cluster, requirements)
    fewest = dict.fromkeys((demand.llm for demand in workload.demands), 0.0)
    if len(cluster.device_types) == 1:
        needs = _unit_needs(workload, offers, cluster, max_utilisation, requirements)
        fewest = {demand.llm: needs[demand.llm](rate_rps * demand.visits) for demand in workload.demands}
    spare = budget_units(cluster, max_units) - sum(fewest.values())
    if spare < 0:
        return None
    tables = {}
    for demand in workload.demands:
        required = requirements.of_llm(demand.llm)
        offer = offers[demand.llm]
        calls_rps = rate_rps * demand.visits
        if required.fixed:
            tables[demand.llm] = table_of(
                demand, offer.profiles, required.fixed, calls_rps=calls_rps, max_utilisation=max_utilisation
            )
            continue
        table = list_options(
            offer,
            calls_rps=calls_rps,
            max_units=int(fewest[demand.llm] + spare),
            max_utilisation=max_utilisation,
            min_replicas=required.min_replicas,
        )
        tables[demand.llm] = table.select(admitted_rows(required, cluster, replicas=table.replicas, units=table.units))
        if len(tables[demand.llm]) == 0:
            return None
    return tables


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

    Exact to one part in a million, where packing is what its linear rows say. Raises ScepsyError where the LLMs do not
    even fit at the lowest rate.
    """
    _check(workload, profiles, 1.0)
    if requirements.max_nodes is not None and requirements.max_nodes < len(cluster.nodes):
        free = replace(requirements, max_nodes=None)

        def highest(part: Cluster) -> tuple[float, str]:
            return highest_rate(
                workload, profiles, part, max_units=max_units, max_utilisation=max_utilisation, requirements=free
            )

        return max(over_parts(cluster, requirements.max_nodes, highest))
    offers = _offers(workload, profiles, cluster, requirements)
    units = budget_units(cluster, max_units)
    visits = {demand.llm: demand.visits for demand in workload.demands}
    kinds = [kind for offer in offers.values() for kind in offer.kinds]
    kinds += [kind_of(group) for required in requirements.llms.values() for group in required.fixed]
    room = room_of(cluster, kinds, max_units)
    needs: dict[str, Callable[[float], float]] = {}
    if len(cluster.device_types) == 1:
        # Devices counted alone, without what packs: much quicker, and nearly always that is all.
        needs = _unit_needs(workload, offers, cluster, max_utilisation, requirements)
        _require_room(needs, units, cluster)

    def fits(rates_rps: Mapping[str, float]) -> bool:
        fewest = {llm: need(rates_rps[llm] * visits[llm]) for llm, need in needs.items()}
        if sum(fewest.values()) > units:
            return False
        taken = []
        for demand in workload.demands:
            most = max_units_of(requirements.of_llm(demand.llm), cluster)
            if needs:
                # What takes a device more than it must is never what makes room.
                most = min(most, int(fewest[demand.llm]) + UNITS_PER_DEVICE)
            offer, required = offers[demand.llm], requirements.of_llm(demand.llm)
            needed_rps = rates_rps[demand.llm] * demand.visits / max_utilisation
            taken.append(_least_taken(demand, offer, room, needed_rps, most, required))
        return all(len(rows) for rows in taken) and can_pack(taken, room.budgets)

    def at(rate_rps: float) -> dict[str, float]:
        return dict.fromkeys(visits, rate_rps)

    if needs:
        low, high = _limit_of(lambda rate_rps: sum(needs[llm](rate_rps * visits[llm]) for llm in needs) <= units)
        if fits(at(low)):
            # Past the limit, the LLM that asks for more units than at it is the one in the way.
            steps = {llm: needs[llm](high * 1.000001 * visits[llm]) - needs[llm](low * visits[llm]) for llm in needs}
            return low, max(steps, key=lambda llm: steps[llm])
    if not fits(at(0.0)):
        raise ScepsyError(
            f"the LLMs do not fit into {units / UNITS_PER_DEVICE:g} {cluster.device_type} even without load: use a "
            "larger cluster or smaller models"
        )
    low, high = _limit_of(lambda rate_rps: fits(at(rate_rps)))
    in_the_way = [llm for llm in visits if not fits(at(low) | {llm: high})]
    return low, (in_the_way or list(visits))[0]


def over_parts(cluster: Cluster, nodes: int, ask: Callable[[Cluster], T]) -> list[T]:
    """What `ask` answers about each part of so many nodes; raises its ScepsyError where it has no answer about any."""
    answers, refused = [], None
    for part in parts_of(cluster, nodes):
        try:
            answers.append(ask(part))
        except ScepsyError as error:
            refused = refused or error
    if refused is not None and not answers:
        raise refused
    return answers


def _require_room(needs: Mapping[str, Callable[[float], float]], units: int, cluster: Cluster) -> None:
    """Raise ScepsyError where the LLMs take more tenths of a device than there are, even without load."""
    floors = {llm: need(0.0) / UNITS_PER_DEVICE for llm, need in needs.items()}
    if sum(floors.values()) * UNITS_PER_DEVICE <= units:
        return
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


def _least_taken(
    demand: LLMDemand, offer: Offer, room: Room, needed_rps: float, max_units: int, required: LLMRequirements
) -> Ints:
    """What those options of an LLM take that carry a rate of calls, but for those that take more than another."""
    if required.fixed:
        table = table_of(demand, offer.profiles, required.fixed, calls_rps=1e-9, max_utilisation=1.0)
        return room.taken(table.kinds, table.counts)[table.max_rps >= needed_rps * (1 - 1e-9)]
    counts = list_counts(offer, needed_rps=needed_rps, max_units=max_units, min_replicas=required.min_replicas)
    return undominated(np.unique(room.taken(offer.kinds, counts), axis=0))


def _limit_of(is_reached: Callable[[float], bool]) -> tuple[float, float]:
    """The highest rate that is reached and the lowest that is not, one part in a million apart."""
    low, high = 0.0, 1.0
    while is_reached(high):
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        if is_reached(middle):
            low = middle
        else:
            high = middle
        if high - low <= 1e-6 * high:
            break
    return low, high


def _offers(workload: Workload, profiles: Profiles, cluster: Cluster, requirements: Requirements) -> dict[str, Offer]:
    """What each LLM can be offered on the device types that it may use."""
    return {
        demand.llm: make_offer(
            demand, _offered_profiles(profiles, demand.llm, cluster, requirements.of_llm(demand.llm)), cluster
        )
        for demand in workload.demands
    }


def _unit_needs(
    workload: Workload,
    offers: Mapping[str, Offer],
    cluster: Cluster,
    max_utilisation: float,
    requirements: Requirements,
) -> dict[str, Callable[[float], float]]:
    """`_unit_need` of each LLM."""
    return {
        demand.llm: _unit_need(demand, offers[demand.llm], cluster, max_utilisation, requirements.of_llm(demand.llm))
        for demand in workload.demands
    }


def _unit_need(
    demand: LLMDemand, offer: Offer, cluster: Cluster, max_utilisation: float, required: LLMRequirements
) -> Callable[[float], float]:
    """The fewest units that carry a rate of calls, as a function of that rate; infinite where nothing does."""
    if required.fixed:
        option = evaluate_groups(
            demand, offer.profiles, required.fixed, calls_rps=1e-9, max_utilisation=max_utilisation
        )
        return lambda calls_rps: option.units if calls_rps <= option.max_rps * (1 + 1e-9) else float("inf")
    most_rps = capacity_by_units(offer, max_units=max_units_of(required, cluster), min_replicas=required.min_replicas)

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
