"""The frontier: which mean latencies, rates and numbers of devices can be had together.

Every pair of a rate and a number of devices is one search; what some other point beats in all three respects is left
out. Devices are counted here, not placed: a plan is made for the point that is chosen. What LLMs are offered is listed
once for each rate and the whole cluster, so a plan for fewer devices may find a mix that is a little better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scepsy_optimizer.allocation import MAX_UTILISATION, UNITS_PER_DEVICE, Groups
from scepsy_optimizer.choosing import Allocation, choose
from scepsy_optimizer.cluster import Cluster, parts_of
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.makespans import Makespans
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.requirements import NO_REQUIREMENTS, Requirements
from scepsy_optimizer.search import highest_rate, list_tables
from scepsy_optimizer.workload import Workload

EVERY_COUNT = 16
"""Up to so many devices every number of them is tried."""
_LOAD_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """The least mean latency at a rate on a number of devices, and the allocation that has it.

    `devices` is what the allocation takes, rounded up to whole devices; `lower_bound_s` is the proven bound on the
    latency of any allocation on as many.
    """

    devices: int
    rate_rps: float
    latency_s: float
    lower_bound_s: float
    allocation: Mapping[str, Groups]


def find_frontier(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rates_rps: Sequence[float] | None = None,
    more_rates_rps: Sequence[float] = (),
    more_devices: Sequence[int] = (),
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[FrontierPoint, ...]:
    """The points that no other beats, by rising rate and then rising devices.

    Without `rates_rps`, ten rates from a tenth of the highest rate of the whole cluster up to it, and those of
    `more_rates_rps`. All numbers of devices are tried up to `EVERY_COUNT`; of more, as many that grow evenly in
    proportion, and those of `more_devices`. `on_progress` is told the searches that are done and their total. Raises
    ScepsyError where the LLMs do not fit at all.
    """
    if requirements.max_nodes is not None:
        parts = parts_of(cluster, requirements.max_nodes)
        if len(parts) > 1:
            raise ScepsyError(
                f"a frontier on {requirements.max_nodes} nodes needs nodes that are alike: name those to use in a "
                "cluster file of their own"
            )
        (cluster,), requirements = parts, replace(requirements, max_nodes=None)
    most, _ = highest_rate(workload, profiles, cluster, max_utilisation=max_utilisation, requirements=requirements)
    levels = [most * level for level in _LOAD_LEVELS] if rates_rps is None else rates_rps
    rates = sorted({*levels, *more_rates_rps})
    if any(not 0 < rate < float("inf") for rate in rates):
        raise ScepsyError("the rates of a frontier must be positive numbers of executions per second")
    counts = sorted({*device_counts(cluster.devices), *more_devices})
    makespans = Makespans(workload)
    points = []
    for number, rate in enumerate(rates):
        tables = list_tables(
            workload, profiles, cluster, rate_rps=rate, max_utilisation=max_utilisation, requirements=requirements
        )
        # From the most devices down: an allocation that leaves some free is the answer for fewer as well.
        found: Allocation | None = None
        for done, count in enumerate(reversed(counts)):
            if on_progress is not None:
                on_progress(number * len(counts) + done, len(rates) * len(counts))
            if tables is None or (found is not None and _devices(found) <= count):
                continue
            units = count * UNITS_PER_DEVICE
            found = choose(workload, makespans, cluster, tables, max_units=units, requirements=requirements)
            if found is None:
                break
            points.append(_point(found, rate))
    return undominated(points)


def undominated(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """The points that no other beats: none has at most their devices and latency and at least their rate.

    Of points that are equal in all three, one stays.
    """
    order = sorted(points, key=lambda point: (-point.rate_rps, point.devices, point.latency_s))
    kept: list[FrontierPoint] = []
    for point in order:
        if not any(other.devices <= point.devices and other.latency_s <= point.latency_s for other in kept):
            kept.append(point)
    return tuple(sorted(kept, key=lambda point: (point.rate_rps, point.devices)))


def device_counts(devices: int) -> list[int]:
    """The numbers of devices that a frontier tries: all of few, of many some that grow evenly in proportion."""
    if devices <= EVERY_COUNT:
        return list(range(1, devices + 1))
    return sorted({round(count) for count in np.geomspace(1, devices, EVERY_COUNT).tolist()})


def _devices(allocation: Allocation) -> int:
    return -(-sum(option.units for option in allocation.options.values()) // UNITS_PER_DEVICE)


def _point(found: Allocation, rate_rps: float) -> FrontierPoint:
    return FrontierPoint(
        devices=_devices(found),
        rate_rps=rate_rps,
        latency_s=found.latency_s,
        lower_bound_s=found.lower_bound_s,
        allocation={llm: option.groups for llm, option in found.options.items()},
    )
