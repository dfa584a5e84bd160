"""What was measured of allocations on real engines beside what was predicted of them, and the tables of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import describe_choices, plan_choices

_RESAMPLED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A predicted mean latency at the light rate, and the predicted sustained rate."""

    latency_s: float
    rate_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What was measured with one seed, and what was predicted `at_speed`, that which the cores had meanwhile.

    `others` is the part of the cores that others took, `slower` how much longer a core needed for a fixed loop than
    beside the profiles.
    """

    latencies_s: tuple[float, ...]
    sustained_rps: float
    at_speed: Expected
    others: float
    slower: float


@dataclass(slots=True, kw_only=True)
class Policy:
    """One allocation for one workflow: what it is predicted to do, and what was measured of it, seed by seed."""

    workflow: str
    names: list[str]
    plan: Plan
    predicted: Expected
    replayed_s: float
    replayed_p95_s: float
    rounds: list[Round] = field(default_factory=list)

    @property
    def at_speed(self) -> Expected:
        """The predictions at the speeds of the rounds, on average."""
        return Expected(
            latency_s=statistics.mean(one.at_speed.latency_s for one in self.rounds),
            rate_rps=statistics.mean(one.at_speed.rate_rps for one in self.rounds),
        )

    @property
    def rate(self) -> float:
        """Executions per second while more are always waiting."""
        return statistics.mean(one.sustained_rps for one in self.rounds)

    @property
    def all_s(self) -> list[float]:
        """Latencies over all seeds."""
        return [latency_s for one in self.rounds for latency_s in one.latencies_s]

    @property
    def mean_s(self) -> float:
        """Mean latency at the light rate."""
        return statistics.mean(self.all_s)

    @property
    def p95_s(self) -> float:
        """95th percentile of the latency at the light rate."""
        return float(np.percentile(self.all_s, 95))

    def errors(self, predicted: Expected) -> list[float]:
        """Of a predicted latency and of a predicted rate, relative to what was measured."""
        return [abs(predicted.latency_s / self.mean_s - 1), abs(predicted.rate_rps / self.rate - 1)]

    def interval_s(self) -> tuple[float, float]:
        """95 % interval of the mean latency: a bootstrap over executions."""
        rng = np.random.default_rng(0)
        means = rng.choice(np.array(self.all_s), (_RESAMPLED, len(self.all_s))).mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)


def gain(policies: Sequence[Policy], over: Policy) -> tuple[float, float]:
    """How many times as many executions the plan of the same workflow carries, and how many times as quick it is."""
    ours = next(one for one in policies if one.workflow == over.workflow and "plan" in one.names)
    return ours.rate / over.rate, over.mean_s / ours.mean_s


def show(policy: Policy) -> None:
    """What was measured of one allocation."""
    low, high = policy.interval_s()
    rates = ", ".join(f"{one.sustained_rps:.2f}" for one in policy.rounds)
    slower = ", ".join(f"{one.slower:+.0%}" for one in policy.rounds)
    predicted, changed = policy.predicted, policy.at_speed
    print(
        f"{policy.workflow:>12} {' = '.join(policy.names):>22}  sustained {rates}/s "
        f"(predicted {predicted.rate_rps:.2f}, at speed {changed.rate_rps:.2f}), "
        f"at {policy.plan.rate_rps:.2f}/s mean {policy.mean_s:.3f} s [{low:.3f}, {high:.3f}] "
        f"(predicted {predicted.latency_s:.3f}, replayed {policy.replayed_s:.3f}, at speed {changed.latency_s:.3f}), "
        f"p95 {policy.p95_s:.3f} s (replayed {policy.replayed_p95_s:.3f}); "
        f"others {max(one.others for one in policy.rounds):.1%}, cores slower by {slower}",
        flush=True,
    )


def table(policies: Sequence[Policy]) -> list[dict[str, object]]:
    """Print a row for each allocation, with what the plan of its workflow gains over it; the same as figures."""
    print(
        f"\n{'workflow':>12} {'allocation':>22} {'sustained/s':>11} {'predicted':>9} {'at speed':>9} {'gain':>6} "
        f"{'mean s':>7} {'predicted':>9} {'at speed':>9} {'gain':>6} {'p95 s':>7} {'replayed':>8}  what runs"
    )
    rows: list[dict[str, object]] = []
    for policy in policies:
        rate_gain, latency_gain = gain(policies, policy)
        runs = describe_choices(plan_choices(policy.plan))
        predicted, changed = policy.predicted, policy.at_speed
        print(
            f"{policy.workflow:>12} {' = '.join(policy.names):>22} {policy.rate:>11.2f} {predicted.rate_rps:>9.2f} "
            f"{changed.rate_rps:>9.2f} {rate_gain:>5.2f}x {policy.mean_s:>7.3f} {predicted.latency_s:>9.3f} "
            f"{changed.latency_s:>9.3f} {latency_gain:>5.2f}x {policy.p95_s:>7.3f} {policy.replayed_p95_s:>8.3f}  "
            f"{runs}"
        )
        rows.append(
            {"workflow": policy.workflow, "allocation": policy.names, "runs": runs, "rate_rps": policy.plan.rate_rps}
            | {"mean_s": policy.mean_s, "interval_s": policy.interval_s(), "p95_s": policy.p95_s}
            | {"predicted": asdict(predicted), "at_speed": asdict(changed), "executions": len(policy.all_s)}
            | {"rate_gain": rate_gain, "latency_gain": latency_gain}
            | {"replayed_s": policy.replayed_s, "replayed_p95_s": policy.replayed_p95_s}
            | {"sustained_rps": [one.sustained_rps for one in policy.rounds]}
            | {"slower": [one.slower for one in policy.rounds], "others": [one.others for one in policy.rounds]}
        )
    return rows
