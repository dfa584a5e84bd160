"""Which groups of replicas one LLM is offered: every number of equal replicas, and mixes where they help.

Latency and capacity fall and rise with what an LLM gets in steps, and mixes make the steps finer. Offered are

* every number of replicas of one kind (a tensor parallelism, or a fraction of a device, on a device type), of fractions
  up to a few devices together: beyond, whole devices carry as much and are faster;
* two neighbouring tensor parallelisms in any proportion, on a grid of counts that is dense where they are small;
* a number of replicas that about carries the load, and beside them a rest that is smaller than one more: whole devices
  in the largest pieces and one fraction of any tenths, or two fractions. Beside many devices, where a tenth matters
  little, only rests of halves, fifths and tenths, which always pack;
* with several device types, replicas of one kind on each of two types, on a grid as well.

Mixtures of more kinds lie between these in speed and size, since a mix is as fast as its kinds are on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, combinations_with_replacement, pairwise

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.allocation import (
    MAX_UTILISATION,
    UNITS_PER_DEVICE,
    Floats,
    Ints,
    OptionTable,
    ReplicaKind,
    evaluate_counts,
    replica_kinds,
)
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replica import CallShape, saturation_rps
from scepsy_optimizer.workload import LLMDemand

_GRID = 20
"""Counts of each of two kinds in a mix, at most: 1 to 8, then growing evenly in proportion."""

_TYPE_GRID = 8
"""The same for mixes over device types, whose kinds are many."""

_FRACTION_UNITS = 3 * UNITS_PER_DEVICE
"""Tenths of a device up to which an LLM may get nothing but fractions of one size."""

_FEW_UNITS = 8 * UNITS_PER_DEVICE
"""Tenths of a device that carry the load, up to which rests of any fractions are offered."""

_TENTHS_BESIDE_UNITS = 2 * UNITS_PER_DEVICE
"""Groups up to this size have such rests in tenths of a device, larger ones in whole devices."""

_DIVISIBLE_UNITS = (5, 2, 1)
"""Fractions, in tenths, of which any that add up to whole devices pack: mixed with much, and over device types."""

_FEW = 4
"""Replicas beside those that carry the load, up to which the rest of one more is offered in smaller ones."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Offer:
    """The kinds of replicas that can hold one LLM, and the calls per second that saturate a replica of each.

    `units` are the tenths of a device that a replica takes, `types` the numbers of the kinds' device types in the
    cluster's order, `limits` the tenths of a device of each type that there are.
    """

    shape: CallShape
    profiles: tuple[LLMProfile, ...]
    kinds: tuple[ReplicaKind, ...]
    capacities: Floats
    units: Ints
    types: Ints
    limits: Ints

    def units_by_type(self, counts: Ints) -> Ints:
        """Tenths of a device of each type (columns) that rows of counts take."""
        taken: Ints = counts @ (self.units[:, None] * (self.types[:, None] == np.arange(len(self.limits))))
        return taken


def make_offer(demand: LLMDemand, profiles: Sequence[LLMProfile], cluster: Cluster) -> Offer:
    """What one LLM can be offered on a cluster; `profiles` has one profile for each device type that it may use.

    The device type of the kinds stays empty where the cluster has only one.
    """
    shape = CallShape.of(demand)
    several = len(cluster.device_types) > 1
    kinds: list[ReplicaKind] = []
    capacities: list[float] = []
    types: list[int] = []
    for number, device_type in enumerate(cluster.device_types):
        largest = cluster.largest_domain_of(device_type)
        for profile in profiles:
            if profile.device_type != device_type:
                continue
            for kind in replica_kinds(profile, max_tensor_parallel_size=largest):
                capacity = saturation_rps(profile, kind.tensor_parallel_size, float(kind.fraction), shape)
                if capacity > 0:
                    kinds.append(kind if several else replace(kind, device_type=""))
                    capacities.append(capacity)
                    types.append(number)
    return Offer(
        shape=shape,
        profiles=tuple(profiles),
        kinds=tuple(kinds),
        capacities=np.array(capacities),
        units=np.array([kind.units for kind in kinds], dtype=int),
        types=np.array(types, dtype=int),
        limits=np.array([cluster.devices_of(one) * UNITS_PER_DEVICE for one in cluster.device_types], dtype=int),
    )


def list_options(
    offer: Offer,
    *,
    calls_rps: float,
    max_units: int,
    max_utilisation: float = MAX_UTILISATION,
    min_replicas: int = 1,
) -> OptionTable:
    """Every option of one LLM that carries `calls_rps` within `max_utilisation` and `max_units` tenths of a device."""
    counts = list_counts(offer, needed_rps=calls_rps / max_utilisation, max_units=max_units, min_replicas=min_replicas)
    return evaluate_counts(
        offer.profiles,
        offer.kinds,
        offer.capacities,
        offer.shape,
        calls_rps=calls_rps,
        counts=counts,
        max_utilisation=max_utilisation,
    )


def list_counts(offer: Offer, *, needed_rps: float, max_units: int, min_replicas: int = 1) -> Ints:
    """Replicas of each kind (columns) of every option (rows) that saturates at no less than `needed_rps`."""
    found = [np.zeros((0, len(offer.kinds)), dtype=int)]
    for number, limit in enumerate(offer.limits.tolist()):
        columns = np.flatnonzero(offer.types == number)
        units = min(limit, max_units)
        for column in columns.tolist():
            replicas = _replicas(offer, column, needed_rps, units, min_replicas)
            found.append(_times(replicas, offer, column))
            if offer.kinds[column].fraction == 1:
                found.append(_with_rests(offer, column, columns, needed_rps, units))
        for first, second in pairwise(_whole_by_size(offer, columns)):
            found.append(_pairs(offer, first, second, units, units, _GRID))
    for first, second in combinations(range(len(offer.limits)), 2):
        found += _across(offer, np.flatnonzero(offer.types == first), np.flatnonzero(offer.types == second), max_units)
    counts = np.concatenate(found)
    taken = offer.units_by_type(counts)
    fits = (taken <= offer.limits).all(axis=1) & (taken.sum(axis=1) <= max_units)
    fits &= counts.sum(axis=1) >= min_replicas
    carries = counts @ offer.capacities >= needed_rps * (1 - 1e-9)
    return _distinct(counts[fits & carries])


def _distinct(counts: Ints) -> Ints:
    """Each row once: two of the rules may offer the same mix."""
    if len(counts) == 0:
        return counts
    mixed = np.count_nonzero(counts, axis=1) > 1
    rows: Ints = np.concatenate([counts[~mixed], np.unique(counts[mixed], axis=0)])
    return rows


def _fewest(offer: Offer, column: int, needed_rps: float) -> int:
    return int(np.ceil(needed_rps / offer.capacities[column] - 1e-9))


def _replicas(offer: Offer, column: int, needed_rps: float, units: int, min_replicas: int) -> Ints:
    """How many replicas of one kind may stand alone."""
    size = int(offer.units[column])
    most = units // size
    if offer.kinds[column].fraction < 1:
        most = min(most, max(_FRACTION_UNITS // size, min_replicas))
    return np.arange(max(1, _fewest(offer, column, needed_rps)), most + 1)


def _times(replicas: Ints, offer: Offer, column: int) -> Ints:
    counts = np.zeros((len(replicas), len(offer.kinds)), dtype=int)
    counts[:, column] = replicas
    return counts


def _whole_by_size(offer: Offer, columns: Ints) -> list[int]:
    whole = [int(column) for column in columns if offer.kinds[column].fraction == 1]
    return sorted(whole, key=lambda column: int(offer.units[column]))


def _across(offer: Offer, firsts: Ints, seconds: Ints, max_units: int) -> list[Ints]:
    def mixed(columns: Ints) -> list[int]:
        kept = [offer.kinds[one].fraction == 1 or int(offer.units[one]) in _DIVISIBLE_UNITS for one in columns]
        return [int(one) for one in columns[np.array(kept, dtype=bool)]]

    return [
        _pairs(
            offer,
            first,
            second,
            min(max_units, int(offer.limits[offer.types[first]])),
            min(max_units, int(offer.limits[offer.types[second]])),
            _TYPE_GRID,
        )
        for first in mixed(firsts)
        for second in mixed(seconds)
    ]


def _pairs(offer: Offer, first: int, second: int, first_units: int, second_units: int, grid: int) -> Ints:
    """Some replicas of each of two kinds."""
    ones = _grid(first_units // int(offer.units[first]), grid)
    others = _grid(second_units // int(offer.units[second]), grid)
    counts = np.zeros((len(ones) * len(others), len(offer.kinds)), dtype=int)
    counts[:, first] = np.repeat(ones, len(others))
    counts[:, second] = np.tile(others, len(ones))
    return counts


def _grid(most: int, size: int) -> Ints:
    dense = np.arange(1, min(most, 8) + 1)
    if most <= 8:
        return dense
    grown: Ints = np.unique(np.concatenate([dense, np.round(np.geomspace(8, most, size - 7)).astype(int)]))
    return grown


def _with_rests(offer: Offer, column: int, columns: Ints, needed_rps: float, units: int) -> Ints:
    """A few counts of one kind, each with every rest."""
    fewest = _fewest(offer, column, needed_rps)
    bases = np.arange(max(0, fewest - 1), min(fewest + _FEW, units // int(offer.units[column])) + 1)
    rests = _rests(offer, column, columns, is_fine=fewest * int(offer.units[column]) <= _FEW_UNITS)
    counts = np.tile(rests, (len(bases), 1))
    counts[:, column] += np.repeat(bases, len(rests))
    return counts


def _rests(offer: Offer, column: int, columns: Ints, *, is_fine: bool) -> Ints:
    """What may stand beside replicas of one kind of whole devices: fewer devices than one of these, in smaller ones."""
    size = int(offer.units[column])
    whole = [one for one in _whole_by_size(offer, columns) if offer.units[one] < size][::-1]
    parts = [int(one) for one in columns if offer.kinds[one].fraction < 1]
    if is_fine:
        wholes = [row for units in range(0, size, UNITS_PER_DEVICE) for row in _largest_first(offer, whole, units)]
        ones = np.eye(len(offer.kinds), dtype=int)
        rows = [row + piece for row in wholes for piece in (0 * row, *(ones[part] for part in parts))]
        rows += [ones[one] + ones[other] for one, other in combinations_with_replacement(parts, 2)]
    else:
        step = 1 if size <= _TENTHS_BESIDE_UNITS else UNITS_PER_DEVICE
        pieces = [*whole, *(one for units in _DIVISIBLE_UNITS for one in parts if offer.units[one] == units)]
        rows = [row for units in range(step, size, step) for row in _largest_first(offer, pieces, units)]
    rests: Ints = np.array([row for row in rows if row.any()], dtype=int).reshape(-1, len(offer.kinds))
    return rests


def _largest_first(offer: Offer, pieces: Sequence[int], units: int) -> list[Ints]:
    """The counts of the kinds `pieces`, largest first, that make up so many tenths; empty where they do not."""
    row, left = np.zeros(len(offer.kinds), dtype=int), units
    for one in pieces:
        row[one], left = divmod(left, int(offer.units[one]))
    return [row] if left == 0 else []


def capacity_by_units(offer: Offer, *, max_units: int, min_replicas: int = 1) -> Floats:
    """The most calls per second that an option of at most that many tenths of a device saturates at.

    One entry for each number of tenths from 0 to `max_units`. For clusters of one device type.
    """
    best = np.zeros(max_units + 1)
    columns = np.arange(len(offer.kinds))

    def count(units: Ints, replicas: Ints, capacity: NDArray[np.floating]) -> None:
        kept = (replicas >= min_replicas) & (units <= max_units)
        np.maximum.at(best, units[kept], capacity[kept])

    for column in columns.tolist():
        size, each = int(offer.units[column]), float(offer.capacities[column])
        replicas = _replicas(offer, column, 0.0, max_units, min_replicas)
        count(replicas * size, replicas, replicas * each)
        if offer.kinds[column].fraction == 1:
            # The rule offers a rest beside any number that about carries the load: here, beside every number.
            few = min(_FEW_UNITS // size, max_units // size + 1)
            for is_fine, bases in ((True, np.arange(few)), (False, np.arange(few, max_units // size + 1))):
                rests, base = _rests(offer, column, columns, is_fine=is_fine), bases[:, None]
                count(
                    (base * size + rests @ offer.units).ravel(),
                    (base + rests.sum(axis=1)).ravel(),
                    (base * each + rests @ offer.capacities).ravel(),
                )
    for first, second in pairwise(_whole_by_size(offer, columns)):
        counts = _pairs(offer, first, second, max_units, max_units, _GRID)
        count(counts @ offer.units, counts.sum(axis=1), counts @ offer.capacities)
    most_rps: Floats = np.maximum.accumulate(best)
    return most_rps
