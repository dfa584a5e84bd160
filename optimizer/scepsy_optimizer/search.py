"""The search: what each LLM may get at a rate, the allocation of least latency among that, and the highest rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from scepsy_optimizer.allocation import (
    MAX_UTILISATION,
    UNITS_PER_DEVICE,
    Ints,
    OptionTable,
    evaluate_groups,
    kind_of,
    table_of,
)
from scepsy_optimizer.choosing import Allocation, choose
from scepsy_optimizer.cluster import Cluster, parts_of
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.makespans import Makespans
from scepsy_optimizer.master import can_pack
from scepsy_optimizer.options import Offer, capacity_by_units, list_counts, list_options, make_offer
from scepsy_optimizer.profile import LLMProfile, Profiles, profiles_of
from scepsy_optimizer.requirements import (
    NO_REQUIREMENTS,
    LLMRequirements,
    Requirements,
    admitted_rows,
    allowed_types,
    max_units_of,
)
from scepsy_optimizer.room import Room, room_of, undominated
from scepsy_optimizer.workload import LLMDemand, Workload

T = TypeVar("T")


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
    candidates: within five per cent of the best one, but for the best whose LLMs each have replicas of one kind.
    Returns None where no allocation carries the rate within the requirements. Raises ScepsyError for a rate that is not
    positive or an LLM without a profile.
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

    def fits(rates_rps: Mapping[str, float], *, spare: float = UNITS_PER_DEVICE) -> bool:
        """Whether the LLMs fit at these rates, each with at most so many tenths more than it must take."""
        fewest = {llm: need(rates_rps[llm] * visits[llm]) for llm, need in needs.items()}
        if sum(fewest.values()) > units:
            return False
        taken = []
        for demand in workload.demands:
            most = max_units_of(requirements.of_llm(demand.llm), cluster)
            if needs:
                most = int(min(most, fewest[demand.llm] + spare))
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
    # What takes over a device more than it must makes room only for what cannot bend: for groups that do not fill the
    # domains (more of smaller ones use what is left over) and beside fixed replicas (more of small ones use the gaps).
    # Looking at all of that takes several times as long.
    may_spend = bool(needs) and (room.breaks_groups or any(one.fixed for one in requirements.llms.values()))

    def fits_somehow(rates_rps: Mapping[str, float]) -> bool:
        return fits(rates_rps) or (may_spend and fits(rates_rps, spare=float("inf")))

    if not fits_somehow(at(0.0)):
        raise ScepsyError(
            f"the LLMs do not fit into {units / UNITS_PER_DEVICE:g} {cluster.device_type} even without load: use a "
            "larger cluster or smaller models"
        )
    low, high = _limit_of(lambda rate_rps: fits(at(rate_rps)))
    if may_spend and fits_somehow(at(high)):
        low, high = _limit_of(lambda rate_rps: fits_somehow(at(rate_rps)), low=low, high=high)
    in_the_way = [llm for llm in visits if not fits_somehow(at(low) | {llm: high})]
    return low, (in_the_way or list(visits))[0]


def has_room(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rate_rps: float,
    max_units: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
) -> bool:
    """Whether there are devices enough for a rate. On one type of devices they are only counted, which is quick."""
    if len(cluster.device_types) > 1:
        highest_rps, _ = highest_rate(
            workload,
            profiles,
            cluster,
            max_units=max_units,
            max_utilisation=max_utilisation,
            requirements=requirements,
        )
        return rate_rps <= highest_rps
    offers = _offers(workload, profiles, cluster, requirements)
    needs = _unit_needs(workload, offers, cluster, max_utilisation, requirements)
    fewest = sum(needs[demand.llm](rate_rps * demand.visits) for demand in workload.demands)
    return fewest <= budget_units(cluster, max_units)


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


def _limit_of(is_reached: Callable[[float], bool], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """The highest rate that is reached and the lowest that is not, one part in a million apart.

    `low` is one that is reached, `high` the first that is tried.
    """
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
