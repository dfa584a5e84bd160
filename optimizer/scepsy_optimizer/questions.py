"""Other questions to the same search: the highest rate within a latency, and the fewest devices for both."""

from __future__ import annotations

from collections.abc import Mapping

from scepsy_optimizer.allocation import MAX_UTILISATION, UNITS_PER_DEVICE
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import check_profiles, optimize
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.search import find_allocation, highest_rate
from scepsy_optimizer.workload import Workload

_LOWEST_RATE_RPS = 1e-6
_RATE_PRECISION = 1e-3


def optimize_rate(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    latency_s: float,
    max_utilisation: float = MAX_UTILISATION,
    provenance: Mapping[str, str] | None = None,
    replay_seed: int | None = None,
) -> Plan:
    """The plan for the highest rate whose mean latency is at most `latency_s`, to one part in a thousand.

    Raises ScepsyError where no rate, however low, has that latency, with the least that there is.
    """
    check_profiles(workload, profiles, cluster)
    _check_latency(latency_s)

    def least_s(rate_rps: float) -> float:
        return _least_latency_s(workload, profiles, cluster, rate_rps, None, max_utilisation)

    high, _ = highest_rate(workload, profiles, cluster, max_utilisation=max_utilisation)
    low = _LOWEST_RATE_RPS
    if (least := least_s(low)) > latency_s:
        raise ScepsyError(
            f"a mean latency of {latency_s:g} s is out of reach on {cluster.devices} {cluster.device_type}, even "
            f"without load: the least is {least:.3g} s. Allow more, or use faster devices or smaller models"
        )
    if least_s(high) <= latency_s:
        low = high
    while high - low > _RATE_PRECISION * high:
        middle = (low + high) / 2
        if least_s(middle) <= latency_s:
            low = middle
        else:
            high = middle
    return optimize(
        workload,
        profiles,
        cluster,
        rate_rps=low,
        max_utilisation=max_utilisation,
        provenance=provenance,
        replay_seed=replay_seed,
    )


def optimize_devices(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rate_rps: float,
    latency_s: float,
    max_utilisation: float = MAX_UTILISATION,
    provenance: Mapping[str, str] | None = None,
    replay_seed: int | None = None,
) -> Plan:
    """The plan that takes the fewest tenths of a device for a rate within a mean latency; the rest stays free.

    Raises ScepsyError where the whole cluster does not reach the rate, or not the latency at that rate.
    """
    _check_latency(latency_s)
    whole = optimize(workload, profiles, cluster, rate_rps=rate_rps, max_utilisation=max_utilisation)
    if whole.prediction is not None and whole.prediction.latency_s > latency_s:
        raise ScepsyError(
            f"a mean latency of {latency_s:g} s at {rate_rps:g} executions/s is out of reach on {cluster.devices} "
            f"{cluster.device_type}: the least is {whole.prediction.latency_s:.3g} s. Allow more, ask for a lower "
            "rate, or add devices"
        )
    low, high = 0, cluster.devices * UNITS_PER_DEVICE
    while high - low > 1:
        middle = (low + high) // 2
        latency = _least_latency_s(workload, profiles, cluster, rate_rps, middle, max_utilisation)
        low, high = (low, middle) if latency <= latency_s else (middle, high)
    return optimize(
        workload,
        profiles,
        cluster,
        rate_rps=rate_rps,
        max_units=high,
        max_utilisation=max_utilisation,
        provenance=provenance,
        replay_seed=replay_seed,
    )


def _check_latency(latency_s: float) -> None:
    if not latency_s > 0:
        raise ScepsyError(f"a mean latency of {latency_s:g} s: the limit must be a positive number of seconds")


def _least_latency_s(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    rate_rps: float,
    max_units: int | None,
    max_utilisation: float,
) -> float:
    """The least mean latency at a rate within a budget; infinite where the rate is out of reach."""
    found = find_allocation(
        workload, profiles, cluster, rate_rps=rate_rps, max_units=max_units, max_utilisation=max_utilisation
    )
    return float("inf") if found is None else found.latency_s
