"""Allocations: which tensor parallelism, device fraction and number of replicas an LLM can get, and what each gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replica import CallShape, CallSpeed, loaded_speeds, saturation_rps
from scepsy_optimizer.workload import LLMDemand

Ints = NDArray[np.int_]
Floats = NDArray[np.float64]

UNITS_PER_DEVICE = 10
"""Devices are divided into tenths; every offered fraction is a whole number of them."""

FRACTIONS = (Fraction(1), Fraction(1, 2), Fraction(1, 5), Fraction(1, 10))
"""Offered fractions: any set of them that adds up to whole devices packs onto those devices without loss."""

MAX_UTILISATION = 0.85
"""Loads above this part of saturation are not planned for: the closed form does not hold there, and nobody wants it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one LLM gets: `replicas` replicas of `tensor_parallel_size` devices, or of a fraction of one device."""

    tensor_parallel_size: int
    fraction: Fraction
    replicas: int

    @property
    def units(self) -> int:
        """Tenths of a device that all replicas take."""
        return int(self.replicas * self.tensor_parallel_size * self.fraction * UNITS_PER_DEVICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A choice with what it gives at the planned rate: `speed` of a call, `utilisation`, and `max_rps` of calls.

    `max_rps` is the rate of calls at which the utilisation reaches the highest that is planned for.
    """

    choice: Choice
    speed: CallSpeed
    utilisation: float
    max_rps: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OptionTable:
    """The options of one LLM as columns, one row each, in the order of rising units.

    `speeds` has the columns of `CallSpeed`: fixed_s, input_s, output_s. Columns rather than objects, because an LLM has
    thousands of options on a large cluster.
    """

    tensor_parallel_size: Ints
    tenths: Ints
    replicas: Ints
    units: Ints
    speeds: Floats
    utilisation: Floats
    max_rps: Floats

    def __len__(self) -> int:
        return len(self.units)

    def option(self, row: int) -> Option:
        """One row as a value."""
        fixed_s, input_s, output_s = (float(value) for value in self.speeds[row])
        return Option(
            choice=Choice(
                tensor_parallel_size=int(self.tensor_parallel_size[row]),
                fraction=Fraction(int(self.tenths[row]), UNITS_PER_DEVICE),
                replicas=int(self.replicas[row]),
            ),
            speed=CallSpeed(fixed_s=fixed_s, input_s=input_s, output_s=output_s),
            utilisation=float(self.utilisation[row]),
            max_rps=float(self.max_rps[row]),
        )


def replica_kinds(
    profile: LLMProfile, *, max_tensor_parallel_size: int, fractions: Sequence[Fraction] = FRACTIONS
) -> list[tuple[int, Fraction]]:
    """Tensor parallelism and fraction of the replicas that can hold the LLM; fractions only at tensor parallelism 1."""
    return [
        (steps.tensor_parallel_size, fraction)
        for steps in profile.steps
        if steps.tensor_parallel_size <= max_tensor_parallel_size
        for fraction in (fractions if steps.tensor_parallel_size == 1 else (Fraction(1),))
        if profile.kv_tokens(steps.tensor_parallel_size, float(fraction)) > 0
    ]


def list_options(
    demand: LLMDemand,
    profile: LLMProfile,
    *,
    calls_rps: float,
    max_units: int,
    max_tensor_parallel_size: int,
    max_utilisation: float = MAX_UTILISATION,
) -> OptionTable:
    """Every option of one LLM that carries `calls_rps` within `max_utilisation` and `max_units` tenths of a device."""
    shape = CallShape.of(demand)
    tables = [_NO_OPTIONS]
    for size, fraction in replica_kinds(profile, max_tensor_parallel_size=max_tensor_parallel_size):
        saturation = saturation_rps(profile, size, float(fraction), shape)
        if saturation == 0:
            continue
        units = int(size * fraction * UNITS_PER_DEVICE)
        fewest = max(1, int(np.ceil(calls_rps / (saturation * max_utilisation) - 1e-9)))
        counts = np.arange(fewest, max_units // units + 1)
        if len(counts):
            tables.append(_options(profile, size, fraction, shape, calls_rps, counts, saturation * max_utilisation))
    order = np.argsort(np.concatenate([table.units for table in tables]), kind="stable")
    columns = {name: np.concatenate([getattr(table, name) for table in tables])[order] for name in _COLUMNS}
    return OptionTable(**columns)


def evaluate_choice(
    demand: LLMDemand,
    profile: LLMProfile,
    choice: Choice,
    *,
    calls_rps: float,
    max_utilisation: float = MAX_UTILISATION,
) -> Option:
    """What a given choice gives, feasible or not: beyond saturation the speed is infinite.

    Raises ScepsyError where the LLM does not fit into the choice's memory at all.
    """
    shape = CallShape.of(demand)
    fraction = float(choice.fraction)
    saturation = saturation_rps(profile, choice.tensor_parallel_size, fraction, shape)
    if saturation == 0:
        raise ScepsyError(
            f"{demand.llm!r} ({profile.model}) does not fit into {fraction:g} of {choice.tensor_parallel_size} "
            f"{profile.device_type} of {profile.device_memory_gib:g} GiB: give it more memory or tensor parallelism"
        )
    counts = np.array([choice.replicas])
    size, share = choice.tensor_parallel_size, choice.fraction
    return _options(profile, size, share, shape, calls_rps, counts, saturation * max_utilisation).option(0)


def _options(
    profile: LLMProfile,
    tensor_parallel_size: int,
    fraction: Fraction,
    shape: CallShape,
    calls_rps: float,
    counts: Ints,
    replica_rps: float,
) -> OptionTable:
    """One option per number of replicas; siblings of one execution spread evenly over the replicas."""
    overlaps = 1 + (shape.overlap - 1) / counts
    loaded = loaded_speeds(profile, tensor_parallel_size, float(fraction), shape, calls_rps / counts, overlaps)
    tenths = int(fraction * UNITS_PER_DEVICE)
    return OptionTable(
        tensor_parallel_size=np.full(len(counts), tensor_parallel_size),
        tenths=np.full(len(counts), tenths),
        replicas=counts,
        units=counts * tensor_parallel_size * tenths,
        speeds=np.column_stack([loaded.fixed_s, loaded.input_s, loaded.output_s]),
        utilisation=loaded.utilisation,
        max_rps=counts.astype(float) * replica_rps,
    )


_COLUMNS = ("tensor_parallel_size", "tenths", "replicas", "units", "speeds", "utilisation", "max_rps")
_NO_OPTIONS = OptionTable(
    **{name: np.zeros(0, dtype=int) for name in _COLUMNS[:4]},
    speeds=np.zeros((0, 3)),
    utilisation=np.zeros(0),
    max_rps=np.zeros(0),
)


def even_split(
    llms: Sequence[str], profiles: Mapping[str, LLMProfile], *, devices: int, max_tensor_parallel_size: int
) -> dict[str, Choice]:
    """The allocation that people make by hand: as many whole devices for each LLM, the first ones get what is left.

    Each LLM runs at the smallest tensor parallelism that holds it, with as many replicas as its devices allow. Raises
    ScepsyError where an LLM gets no device or does not fit into its part.
    """
    if devices < len(llms):
        raise ScepsyError(f"an even split needs a device for each of {len(llms)} LLMs, the cluster has {devices}")
    choices = {}
    for index, llm in enumerate(llms):
        part = devices // len(llms) + (index < devices % len(llms))
        kinds = replica_kinds(profiles[llm], max_tensor_parallel_size=max_tensor_parallel_size, fractions=FRACTIONS[:1])
        sizes = [size for size, _ in kinds if size <= part]
        if not sizes:
            raise ScepsyError(f"{llm!r} does not fit into its even part of {part} devices")
        size = min(sizes)
        choices[llm] = Choice(tensor_parallel_size=size, fraction=Fraction(1), replicas=part // size)
    return choices
