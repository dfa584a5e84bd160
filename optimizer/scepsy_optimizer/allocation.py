"""Allocations: which tensor parallelism, device fraction and number of replicas an LLM can get, and what each gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replica import CallShape, CallSpeed, loaded_speeds, saturation_rps
from scepsy_optimizer.workload import LLMDemand

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
) -> list[Option]:
    """Every option of one LLM that carries `calls_rps` within `max_utilisation` and `max_units` tenths of a device."""
    shape = CallShape.of(demand)
    found = []
    for size, fraction in replica_kinds(profile, max_tensor_parallel_size=max_tensor_parallel_size):
        saturation = saturation_rps(profile, size, float(fraction), shape)
        if saturation == 0:
            continue
        units = int(size * fraction * UNITS_PER_DEVICE)
        fewest = max(1, int(np.ceil(calls_rps / (saturation * max_utilisation) - 1e-9)))
        counts = np.arange(fewest, max_units // units + 1)
        if len(counts) == 0:
            continue
        found += _options(profile, size, fraction, shape, calls_rps, counts, saturation * max_utilisation)
    return found


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
    sizes = (choice.tensor_parallel_size, choice.fraction)
    return _options(profile, *sizes, shape, calls_rps, counts, saturation * max_utilisation)[0]


def _options(
    profile: LLMProfile,
    tensor_parallel_size: int,
    fraction: Fraction,
    shape: CallShape,
    calls_rps: float,
    counts: np.ndarray[tuple[int], np.dtype[np.int_]],
    replica_rps: float,
) -> list[Option]:
    """One option per number of replicas; siblings of one execution spread evenly over the replicas."""
    overlaps = 1 + (shape.overlap - 1) / counts
    speeds = loaded_speeds(profile, tensor_parallel_size, float(fraction), shape, calls_rps / counts, overlaps)
    return [
        Option(
            choice=Choice(tensor_parallel_size=tensor_parallel_size, fraction=fraction, replicas=int(count)),
            speed=CallSpeed(
                fixed_s=float(speeds.fixed_s[index]),
                input_s=float(speeds.input_s[index]),
                output_s=float(speeds.output_s[index]),
            ),
            utilisation=float(speeds.utilisation[index]),
            max_rps=float(count) * replica_rps,
        )
        for index, count in enumerate(counts)
    ]


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
