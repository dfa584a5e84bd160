"""Allocations: which tensor parallelism, device fraction and number of replicas an LLM can get, and what each gives.

An LLM gets one or more groups of equal replicas. Its calls spread over them as the endpoint balances them: by what a
replica carries and how soon it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile, find_profile
from scepsy_optimizer.replica import CallShape, CallSpeed, loaded_speeds, saturation_rps
from scepsy_optimizer.workload import LLMDemand

Ints = NDArray[np.int_]
Floats = NDArray[np.float64]

UNITS_PER_DEVICE = 10
"""Devices are divided into tenths; every offered fraction is a whole number of them."""

FRACTIONS = tuple(Fraction(tenths, UNITS_PER_DEVICE) for tenths in range(UNITS_PER_DEVICE, 0, -1))
"""Offered fractions: a whole device, and every number of tenths of one."""

MAX_UTILISATION = 0.85
"""Loads above this part of saturation are not planned for: the closed form does not hold there, and nobody wants it."""

UTILISATION_TOLERANCE = 0.02
"""How far beyond the highest utilisation a plan may go, as a part of it, where one that keeps it is slower.

Saturation is known to no better than some per cent, and at the highest rate only what has the largest saturation keeps
the limit: that can be a quarter slower than what has one per cent less.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaKind:
    """What one replica takes: `tensor_parallel_size` devices of a type, or a fraction of one."""

    tensor_parallel_size: int
    fraction: Fraction
    device_type: str = ""

    @property
    def units(self) -> int:
        """Tenths of a device that one replica takes."""
        return int(self.tensor_parallel_size * self.fraction * UNITS_PER_DEVICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A group of equal replicas: `replicas` times `tensor_parallel_size` devices, or a fraction of one device.

    `device_type` may be left empty where the cluster has only one type. What one LLM gets is one or more such groups.
    """

    tensor_parallel_size: int
    fraction: Fraction
    replicas: int
    device_type: str = ""

    @property
    def units(self) -> int:
        """Tenths of a device that all replicas take."""
        return int(self.replicas * self.tensor_parallel_size * self.fraction * UNITS_PER_DEVICE)


def kind_of(group: Choice) -> ReplicaKind:
    """What one replica of a group takes."""
    return ReplicaKind(
        tensor_parallel_size=group.tensor_parallel_size, fraction=group.fraction, device_type=group.device_type
    )


Groups = tuple[Choice, ...]
"""What one LLM gets; an allocation maps each LLM to its groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Groups for one LLM with what they give at the planned rate: `speed` of a call, `utilisation`, and `max_rps`.

    `max_rps` is the rate of calls at which the utilisation reaches the highest that is planned for.
    """

    groups: Groups
    speed: CallSpeed
    utilisation: float
    max_rps: float

    @property
    def units(self) -> int:
        """Tenths of a device that all groups take."""
        return sum(group.units for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OptionTable:
    """The options of one LLM as columns, one row each.

    `counts` has a row per option and a column per kind: how many replicas of that kind. `speeds` has the columns of
    `CallSpeed`: fixed_s, input_s, output_s. Columns rather than objects, because an LLM has thousands of options on a
    large cluster.
    """

    kinds: tuple[ReplicaKind, ...]
    counts: Ints
    speeds: Floats
    utilisation: Floats
    max_rps: Floats

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def units(self) -> Ints:
        """Tenths of a device that each option takes, of all types together."""
        units: Ints = self.counts @ np.array([kind.units for kind in self.kinds], dtype=int)
        return units

    def units_of(self, device_type: str) -> Ints:
        """Tenths of a device of that type that each option takes."""
        each = [kind.units if kind.device_type == device_type else 0 for kind in self.kinds]
        units: Ints = self.counts @ np.array(each, dtype=int)
        return units

    @property
    def replicas(self) -> Ints:
        """Replicas of each option, of all kinds together."""
        replicas: Ints = self.counts.sum(axis=1)
        return replicas

    def select(self, rows: Ints | NDArray[np.bool_]) -> OptionTable:
        """Those rows only, given by their numbers or by a mask."""
        return OptionTable(
            kinds=self.kinds,
            counts=self.counts[rows],
            speeds=self.speeds[rows],
            utilisation=self.utilisation[rows],
            max_rps=self.max_rps[rows],
        )

    def option(self, row: int) -> Option:
        """One row as a value."""
        fixed_s, input_s, output_s = (float(value) for value in self.speeds[row])
        return Option(
            groups=tuple(
                Choice(
                    tensor_parallel_size=kind.tensor_parallel_size,
                    fraction=kind.fraction,
                    replicas=int(count),
                    device_type=kind.device_type,
                )
                for kind, count in zip(self.kinds, self.counts[row], strict=True)
                if count
            ),
            speed=CallSpeed(fixed_s=fixed_s, input_s=input_s, output_s=output_s),
            utilisation=float(self.utilisation[row]),
            max_rps=float(self.max_rps[row]),
        )


def replica_kinds(
    profile: LLMProfile, *, max_tensor_parallel_size: int, fractions: Sequence[Fraction] = FRACTIONS
) -> list[ReplicaKind]:
    """The kinds of replicas that can hold the LLM; fractions only at tensor parallelism 1."""
    return [
        ReplicaKind(tensor_parallel_size=steps.tensor_parallel_size, fraction=fraction, device_type=profile.device_type)
        for steps in profile.steps
        if steps.tensor_parallel_size <= max_tensor_parallel_size
        for fraction in (fractions if steps.tensor_parallel_size == 1 else (Fraction(1),))
        if profile.kv_tokens(steps.tensor_parallel_size, float(fraction)) > 0
    ]


def evaluate_groups(
    demand: LLMDemand,
    profiles: Sequence[LLMProfile],
    groups: Sequence[Choice],
    *,
    calls_rps: float,
    max_utilisation: float = MAX_UTILISATION,
) -> Option:
    """What given groups of one LLM give together, feasible or not: beyond saturation the speed is infinite.

    Raises ScepsyError where the LLM does not fit into a group's memory at all.
    """
    return table_of(demand, profiles, groups, calls_rps=calls_rps, max_utilisation=max_utilisation).option(0)


def table_of(
    demand: LLMDemand,
    profiles: Sequence[LLMProfile],
    groups: Sequence[Choice],
    *,
    calls_rps: float,
    max_utilisation: float = MAX_UTILISATION,
) -> OptionTable:
    """`evaluate_groups` as a table of one row, for an LLM that has no other option."""
    shape = CallShape.of(demand)
    kinds, capacities = _kinds_of(demand, profiles, groups, shape)
    counts = np.array([[group.replicas for group in groups]])
    return evaluate_counts(
        profiles, kinds, capacities, shape, calls_rps=calls_rps, counts=counts, max_utilisation=max_utilisation
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLoad:
    """One group's part of an LLM's calls: their rate, how fast they are there, and what a replica carries at most.

    `replica_rps` is the rate of calls at which a replica reaches the highest utilisation that is planned for; it is
    what the endpoint weighs replicas by.
    """

    calls_rps: float
    speed: CallSpeed
    utilisation: float
    replica_rps: float


def group_loads(
    demand: LLMDemand,
    profiles: Sequence[LLMProfile],
    groups: Sequence[Choice],
    *,
    calls_rps: float,
    max_utilisation: float = MAX_UTILISATION,
) -> tuple[GroupLoad, ...]:
    """How an LLM's calls spread over its groups, one entry per group.

    Raises ScepsyError where the LLM does not fit into a group's memory at all.
    """
    shape = CallShape.of(demand)
    kinds, capacities = _kinds_of(demand, profiles, groups, shape)
    total = np.array([np.array([group.replicas for group in groups]) @ capacities])
    call = np.array([1.0, shape.computed_tokens, shape.generated_tokens])
    speeds, draws = [], []
    for group, kind, capacity in zip(groups, kinds, capacities.tolist(), strict=True):
        found, _ = _kind_speeds(profiles, kind, capacity, shape, calls_rps, total)
        draws.append(group.replicas * float(_draw(capacity, found @ call, calls_rps / total)[0]))
        fixed_s, input_s, output_s = found[0].tolist()
        speeds.append(CallSpeed(fixed_s=fixed_s, input_s=input_s, output_s=output_s))
    return tuple(
        GroupLoad(
            calls_rps=calls_rps * draw / sum(draws),
            speed=speed,
            utilisation=calls_rps * draw / sum(draws) / (group.replicas * capacity),
            replica_rps=capacity * max_utilisation,
        )
        for group, speed, draw, capacity in zip(groups, speeds, draws, capacities.tolist(), strict=True)
    )


def _draw(capacity: float, call_s: Floats, utilisation: Floats) -> Floats:
    """How much of the calls one replica draws beside others, in any unit.

    The endpoint keeps equal the calls in flight per capacity, so by Little's law a replica draws its capacity by the
    time of a call. The nearer to saturation, the less it can take beyond its capacity: the time counts with the power
    1 - u^2 at a utilisation u. That is within 2 % of replays for the mixes that were tried, up to tensor parallelism 4
    beside 1.
    """
    room = np.maximum(0.0, 1 - utilisation**2)
    drawn: Floats = capacity / call_s**room
    return drawn


def _kinds_of(
    demand: LLMDemand, profiles: Sequence[LLMProfile], groups: Sequence[Choice], shape: CallShape
) -> tuple[list[ReplicaKind], Floats]:
    """The kind of each group's replicas, and the calls per second that saturate one of them."""
    kinds, capacities = [], []
    for group in groups:
        profile = find_profile(profiles, group.device_type)
        fraction = float(group.fraction)
        capacity = saturation_rps(profile, group.tensor_parallel_size, fraction, shape)
        if capacity == 0:
            raise ScepsyError(
                f"{demand.llm!r} ({profile.model}) does not fit into {fraction:g} of {group.tensor_parallel_size} "
                f"{profile.device_type} of {profile.device_memory_gib:g} GiB: give it more memory or tensor parallelism"
            )
        kinds.append(kind_of(group))
        capacities.append(capacity)
    return kinds, np.array(capacities)


def evaluate_counts(
    profiles: Sequence[LLMProfile],
    kinds: Sequence[ReplicaKind],
    capacities: Floats,
    shape: CallShape,
    *,
    calls_rps: float,
    counts: Ints,
    max_utilisation: float = MAX_UTILISATION,
) -> OptionTable:
    """What each row of replica counts gives: the kinds' speeds weighted by their parts of the calls.

    `capacities` are the calls per second that saturate a replica of each kind.
    """
    totals: Floats = counts @ capacities
    speeds = np.zeros((len(counts), 3))
    weights = np.zeros(len(counts))
    call = np.array([1.0, shape.computed_tokens, shape.generated_tokens])
    for column, kind in enumerate(kinds):
        rows = np.flatnonzero(counts[:, column])
        if len(rows):
            capacity = float(capacities[column])
            found, _ = _kind_speeds(profiles, kind, capacity, shape, calls_rps, totals[rows])
            weight = counts[rows, column] * _draw(capacity, found @ call, calls_rps / totals[rows])
            speeds[rows] += found * weight[:, None]
            weights[rows] += weight
    return OptionTable(
        kinds=tuple(kinds),
        counts=counts,
        speeds=speeds / weights[:, None],
        utilisation=calls_rps / totals,
        max_rps=totals * max_utilisation,
    )


def _kind_speeds(
    profiles: Sequence[LLMProfile],
    kind: ReplicaKind,
    capacity: float,
    shape: CallShape,
    calls_rps: float,
    totals: Floats,
) -> tuple[Floats, Floats]:
    """Speeds (columns of `CallSpeed`) and utilisation of one kind's replicas, where all replicas carry `totals`.

    `totals` are calls per second. A replica gets its part of the calls, and of the siblings of one execution.
    """
    part = capacity / totals
    profile = find_profile(profiles, kind.device_type)
    overlaps = 1 + (shape.overlap - 1) * part
    rates = calls_rps * part
    size, fraction = kind.tensor_parallel_size, float(kind.fraction)
    loaded = loaded_speeds(profile, size, fraction, shape, rates, overlaps, replicas=1 / part)
    return np.column_stack([loaded.fixed_s, loaded.input_s, loaded.output_s]), loaded.utilisation
