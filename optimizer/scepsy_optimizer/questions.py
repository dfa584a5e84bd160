"""Other questions to the same search: the highest rate, with or without a latency limit, and the fewest devices.

Every answer is a plan that has been placed and that keeps the limit itself: the mean by its prediction, a percentile by
its replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scepsy_optimizer.allocation import MAX_UTILISATION, UNITS_PER_DEVICE
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.infeasible import NO_LOAD_RPS, explain_no_plan
from scepsy_optimizer.judging import MAX_REPLAYED, least_replayed, with_replay
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import check_profiles, find_plans, optimize
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.requirements import NO_REQUIREMENTS, Requirements
from scepsy_optimizer.search import highest_rate
from scepsy_optimizer.workload import Workload

PERCENTILES = (50, 95, 99)
"""The percentiles that a replay tells and a limit may be on."""

_MEAN_PRECISION = 1e-3
_REPLAY_PRECISION = 1e-2
_TRIED = 3
"""Plans that are replayed at each rate that is tried for a percentile."""


def optimize_rate(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    latency_s: float | None = None,
    percentile: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
    provenance: Mapping[str, str] | None = None,
    replay_seed: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Plan:
    """The plan for the highest rate, or for the highest whose latency is at most `latency_s`.

    The latency is the mean, to one part in a thousand of the rate, or the `percentile` of a replay, to one in a
    hundred. `on_progress` is told the part of the bisection that is done. Raises ScepsyError where no rate, however
    low, has that latency, with the least that there is.
    """
    check_profiles(workload, profiles, cluster)
    asked = _Asked(
        workload, profiles, cluster, latency_s, percentile, max_utilisation, requirements, provenance, replay_seed
    )
    high, _ = highest_rate(workload, profiles, cluster, max_utilisation=max_utilisation, requirements=requirements)
    low = NO_LOAD_RPS
    plans = asked.plans(low, most=1 if percentile is None else _TRIED)
    if not plans:
        raise ScepsyError(
            explain_no_plan(
                workload,
                profiles,
                cluster,
                rate_rps=low,
                max_utilisation=max_utilisation,
                requirements=requirements,
            )
        )
    if (least_s := min(asked.value_s(plan) for plan in plans)) > asked.limit_s:
        raise ScepsyError(
            f"a {asked.words} of {asked.limit_s:g} s is out of reach on {cluster.devices} {cluster.device_type}, even "
            f"without load: the least is {least_s:.3g} s. Allow more, or use faster devices or smaller models"
        )
    if asked.within(high):
        low = high
    tell = _bisection_progress(high - low, asked.precision * high, on_progress)
    while high - low > asked.precision * high:
        tell(high - low)
        middle = (low + high) / 2
        low, high = (middle, high) if asked.within(middle) else (low, middle)
    return asked.answer(low)


def optimize_devices(
    workload: Workload,
    profiles: Profiles,
    cluster: Cluster,
    *,
    rate_rps: float,
    latency_s: float,
    percentile: int | None = None,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
    provenance: Mapping[str, str] | None = None,
    replay_seed: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Plan:
    """The plan that takes the fewest tenths of a device for a rate within a latency; the rest stays free.

    The latency is the mean, or the `percentile` of a replay. `on_progress` is told the part of the bisection that is
    done. Raises ScepsyError where the whole cluster does not reach the rate, or not the latency at that rate.
    """
    check_profiles(workload, profiles, cluster)
    asked = _Asked(
        workload, profiles, cluster, latency_s, percentile, max_utilisation, requirements, provenance, replay_seed
    )
    whole = optimize(
        workload,
        profiles,
        cluster,
        rate_rps=rate_rps,
        max_utilisation=max_utilisation,
        requirements=requirements,
        provenance=provenance,
    )
    if (least_s := asked.value_s(whole)) > latency_s:
        raise ScepsyError(
            f"a {asked.words} of {latency_s:g} s at {rate_rps:g} executions/s is out of reach on {cluster.devices} "
            f"{cluster.device_type}: the least is {least_s:.3g} s. Allow more, ask for a lower rate, or add devices"
        )
    low, high = 0, cluster.devices * UNITS_PER_DEVICE
    tell = _bisection_progress(high - low, 1, on_progress)
    while high - low > 1:
        tell(high - low)
        middle = (low + high) // 2
        low, high = (low, middle) if asked.within(rate_rps, middle) else (middle, high)
    return asked.answer(rate_rps, high, otherwise=whole)


def _bisection_progress(
    width: float, end_width: float, on_progress: Callable[[float], None] | None
) -> Callable[[float], None]:
    """Tells the part of the halvings that is done, by the width that is left."""
    if on_progress is None or width <= end_width:
        return lambda _left: None
    halvings = math.log2(width / end_width)
    return lambda left: on_progress(min(1.0, math.log2(width / left) / halvings))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question with a latency limit: which plans there are at a rate within a budget, and what the limit is on."""

    workload: Workload
    profiles: Profiles
    cluster: Cluster
    latency_s: float | None
    percentile: int | None
    max_utilisation: float
    requirements: Requirements
    provenance: Mapping[str, str] | None
    replay_seed: int | None

    def __post_init__(self) -> None:
        if self.latency_s is not None and not self.latency_s > 0:
            raise ScepsyError(f"a {self.words} of {self.latency_s:g} s: the limit must be a positive number of seconds")
        if self.percentile is not None and self.latency_s is None:
            raise ScepsyError("a percentile belongs to a latency limit: give that as well")
        if self.percentile is not None and self.percentile not in PERCENTILES:
            raise ScepsyError(f"percentile {self.percentile}: a replay tells {', '.join(map(str, PERCENTILES))}")

    @property
    def limit_s(self) -> float:
        return float("inf") if self.latency_s is None else self.latency_s

    @property
    def words(self) -> str:
        return "mean latency" if self.percentile is None else f"p{self.percentile} latency"

    @property
    def precision(self) -> float:
        return _MEAN_PRECISION if self.percentile is None else _REPLAY_PRECISION

    def plans(self, rate_rps: float, max_units: int | None = None, *, most: int) -> tuple[Plan, ...]:
        return find_plans(
            self.workload,
            self.profiles,
            self.cluster,
            rate_rps=rate_rps,
            max_units=max_units,
            max_utilisation=self.max_utilisation,
            requirements=self.requirements,
            provenance=self.provenance,
            most=most,
        )

    def replayed(self, plan: Plan) -> Plan:
        return with_replay(plan, self.profiles, self.workload, self.replay_seed or 0)

    def value_s(self, plan: Plan) -> float:
        """What the limit is on, of one plan; replayed for it where that has not been done."""
        assert plan.prediction is not None  # noqa: S101 - every plan that is found has one
        if self.percentile is None:
            return plan.prediction.latency_s
        replay = plan.prediction.replayed
        if replay is None:
            again = self.replayed(plan).prediction
            replay = None if again is None else again.replayed
        if replay is None:
            raise ScepsyError(
                f"a {self.words} at {plan.rate_rps:g} executions/s takes too long to replay: ask for the mean latency"
            )
        return float({50: replay.p50_s, 95: replay.p95_s, 99: replay.p99_s}[self.percentile])

    @property
    def tried(self) -> int:
        # By its mean the first is the best; by a percentile another one may be.
        return 1 if self.percentile is None else _TRIED

    def within(self, rate_rps: float, max_units: int | None = None) -> bool:
        return any(self.value_s(plan) <= self.limit_s for plan in self.plans(rate_rps, max_units, most=self.tried))

    def answer(self, rate_rps: float, max_units: int | None = None, *, otherwise: Plan | None = None) -> Plan:
        """The best of the plans within the limit: by percentile, else by replayed mean, else by mean.

        `otherwise` is one within it that the search at the strict limit on utilisation may not meet.
        """
        is_replayed = self.percentile is not None or self.replay_seed is not None
        kept: list[Plan] = []
        # The more candidates are asked for the more are met, but maybe not each of the few that were tried.
        for most in (MAX_REPLAYED if is_replayed else 1, self.tried):
            plans = () if kept else self.plans(rate_rps, max_units, most=most)
            if self.percentile is not None:
                plans = tuple(self.replayed(plan) for plan in plans)
            kept += [plan for plan in plans if self.value_s(plan) <= self.limit_s]
        if not kept and otherwise is not None:
            kept = [otherwise if self.percentile is None else self.replayed(otherwise)]
        if self.percentile is not None:
            return min(kept, key=self.value_s)
        if not is_replayed:
            return kept[0]
        return self.replayed(least_replayed(kept, self.profiles, self.workload, self.replay_seed or 0))
