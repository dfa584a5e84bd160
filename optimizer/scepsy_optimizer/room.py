"""What replicas take of a cluster, as linear rows, and whether some can be placed side by side, exactly.

Tensor-parallel groups: for each size, groups of that size and larger, counted in groups of that size, may be as many as
the fast-link domains hold. Where every size divides the next larger one, what keeps to that can be placed.

Fractions are bin packing, tenths into devices. Its linear relaxation (a mixture of fillings of a device) has as its
dual the functions u with u(filling) <= 1 for every filling, of which few are extreme. Each is a row: the sum of u over
all replicas may be the number of devices. Together these rows say all that any linear rows can say (dual feasible
functions: Lueker 1983; Alves, Clautiaux, Valerio de Carvalho, Rietz, Dual-Feasible Functions, 2016). What is left is
rounding, which `holds` decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scepsy_optimizer.allocation import UNITS_PER_DEVICE, Ints, ReplicaKind
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.packing import fewest_bins, pack

DUAL_FEASIBLE = (
    (0, 0, 0, 0, 1, 2, 2, 2, 2, 2),
    (0, 0, 0, 1, 1, 1, 2, 2, 2, 2),
    (0, 0, 1, 2, 2, 2, 3, 4, 4, 4),
    (0, 0, 2, 2, 3, 4, 4, 6, 6, 6),
    (0, 1, 2, 2, 3, 4, 4, 5, 6, 6),
    (0, 2, 2, 4, 5, 6, 8, 8, 10, 10),
    (0, 2, 3, 4, 5, 6, 7, 8, 10, 10),
)
"""The extreme ones for tenths: what 1, 2, ..., 9 tenths and a whole device count, in whole numbers.

The eighth, which counts tenths, is the budget itself.
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Room:
    """The rows of a cluster for some kinds of replicas: what each takes, a row per kind, and what there is of each."""

    cluster: Cluster
    max_units: int | None
    kinds: tuple[ReplicaKind, ...]
    takes: Ints
    budgets: Ints

    @property
    def breaks_groups(self) -> bool:
        """Whether groups of some size leave devices of the fast-link domains over, so that smaller ones pack better."""
        return any(
            self.cluster.groups_of(device_type, size) * size < self.cluster.devices_of(device_type)
            for device_type in self.cluster.device_types
            for size in {kind.tensor_parallel_size for kind in self.kinds if _type(kind, self.cluster) == device_type}
        )

    def taken(self, kinds: Sequence[ReplicaKind], counts: Ints) -> Ints:
        """What rows of counts of some of the kinds take, a column for each budget."""
        index = {kind: number for number, kind in enumerate(self.kinds)}
        taken: Ints = counts @ self.takes[[index[kind] for kind in kinds]]
        return taken

    def holds(self, replicas: Mapping[ReplicaKind, int]) -> bool:
        """Whether replicas that keep to the rows can be placed; undecided counts as no."""
        return all(
            _fits(self.cluster, device_type, replicas, self._devices(device_type))
            for device_type in self.cluster.device_types
        )

    def _devices(self, device_type: str) -> int:
        return _devices(self.cluster, device_type, self.max_units)


def room_of(cluster: Cluster, kinds: Iterable[ReplicaKind], max_units: int | None = None) -> Room:
    """The rows of a cluster, of which `max_units` tenths of a device may be given out.

    There is one for the tenths of each device type, one for those of all types where `max_units` is less, one for each
    size of tensor-parallel groups that does not fill the domains, and those of the fractions.
    """
    several = len(cluster.device_types) > 1
    known = tuple(dict.fromkeys(kinds))
    rows: list[list[int]] = []
    budgets: list[int] = []

    def row(device_type: str, budget: int, take: Callable[[ReplicaKind], int]) -> None:
        rows.append([take(kind) if device_type in ("", _type(kind, cluster)) else 0 for kind in known])
        budgets.append(budget)

    whole = cluster.devices * UNITS_PER_DEVICE
    for device_type in cluster.device_types:
        units = cluster.devices_of(device_type) * UNITS_PER_DEVICE
        row(device_type, units if several or max_units is None else min(units, max_units), lambda kind: kind.units)
    if several and max_units is not None and max_units < whole:
        row("", max_units, lambda kind: kind.units)
    for device_type in cluster.device_types:
        mine = [kind for kind in known if _type(kind, cluster) == device_type]
        for size in sorted({kind.tensor_parallel_size for kind in mine}):
            groups = cluster.groups_of(device_type, size)
            if groups * size < cluster.devices_of(device_type):
                row(device_type, groups, lambda kind, size=size: kind.tensor_parallel_size // size)  # type: ignore[misc]
        if any(kind.fraction < 1 for kind in mine):
            devices = _devices(cluster, device_type, max_units)
            for counted in DUAL_FEASIBLE:
                row(device_type, devices * counted[-1], lambda kind, counted=counted: _counts(kind, counted))  # type: ignore[misc]
    return Room(
        cluster=cluster,
        max_units=max_units,
        kinds=known,
        takes=np.array(rows, dtype=int).reshape(len(rows), len(known)).T,
        budgets=np.array(budgets, dtype=int),
    )


def undominated(taken: Ints) -> Ints:
    """The rows of which no other takes less or as much of everything; `taken` has no row twice."""
    left, kept = taken[np.argsort(taken.sum(axis=1), kind="stable")], []
    while len(left):
        least = left[0]
        kept.append(least)
        left = left[~(left >= least).all(axis=1)]
    return np.array(kept, dtype=int).reshape(-1, taken.shape[1])


def _type(kind: ReplicaKind, cluster: Cluster) -> str:
    return kind.device_type or cluster.device_type


def _devices(cluster: Cluster, device_type: str, max_units: int | None) -> int:
    """The devices of a type that may be used: those that `max_units` needs, where there is no other type."""
    devices = cluster.devices_of(device_type)
    if max_units is None or len(cluster.device_types) > 1:
        return devices
    return min(devices, -(-max_units // UNITS_PER_DEVICE))


def _counts(kind: ReplicaKind, counted: Sequence[int]) -> int:
    return kind.tensor_parallel_size * counted[-1] if kind.fraction == 1 else counted[kind.units - 1]


def _fits(cluster: Cluster, device_type: str, replicas: Mapping[ReplicaKind, int], devices: int) -> bool:
    parts: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for kind, count in replicas.items():
        if count and _type(kind, cluster) == device_type:
            if kind.fraction < 1:
                parts[kind.units] += count
            else:
                sizes[kind.tensor_parallel_size] += count
    left = devices - sum(size * count for size, count in sizes.items())
    shared = fewest_bins(UNITS_PER_DEVICE, parts, most=left)
    if shared is None:
        return False
    if all(larger % smaller == 0 for smaller, larger in pairwise(sorted({1, *sizes}))):
        return True
    sizes[1] += shared
    return pack(cluster.domain_sizes_of(device_type), sizes) is not None
