"""The paper's comparison, in replay: our plan beside allocations as others make them.

Beam search, retrieval with a reranker, and both together, on 4, 8 and 16 H100 (profiles by estimate), from light load
to beyond what our plan carries. Every policy makes its allocation for the rate at hand, or for the highest that it
can plan for; all then replay the same executions at the same Poisson arrivals, several seeds each. The highest
sustained rate is the one at which as much is done as arrives. Beyond it latency grows for as long as the load lasts:
up to five minutes here. Latency over rate is drawn into build/bench/plots.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks.outcome import Bound, finish
from benchmarks.workflows import WORKFLOWS
from scepsy.profiling import shipped_profiles
from scepsy_optimizer.baselines import Choices, autoscaled, paper_enumeration, split_by_weight
from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.planner import optimize, plan_choices, predict
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replay import Replay, poisson_arrivals_s, replay
from scepsy_optimizer.search import highest_rate
from scepsy_optimizer.time_sharing import replay_time_shared
from scepsy_optimizer.timeline import Timeline
from scepsy_optimizer.workload import Workload, aggregate

CLUSTERS = ("4xH100", "8xH100", "2x8xH100")
MIXES = {
    "beam search": ("beam-search",),
    "retrieval": ("retrieval",),
    "both": ("beam-search", "retrieval"),
}
LOADS = (0.05, 0.3, 0.6, 0.8, 1.0, 1.2)
"""Offered rates as a part of the highest rate that our plan is made for."""
NEARLY_NO_RATE_RPS = 1e-6
SEEDS = (1, 2, 3)
TRACED = 200
LEAST_EXECUTIONS = 400
OFFERED_FOR_S = 300.0
MOST_CALLS = 40_000
"""A run lasts for five minutes or this many calls, whichever is less."""
PLOTS = Path("build/bench/plots")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A workload on a cluster."""

    mix: str
    cluster: str


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Engines as some policy arranges them: in words, and how executions run on them."""

    allocation: str
    run: Callable[[Sequence[Timeline], np.ndarray], Replay]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One policy at one rate: its allocation replayed, one entry of each sequence per seed."""

    policy: str
    load: float
    rate_rps: float
    allocation: str
    mean_s: tuple[float, ...]
    p50_s: tuple[float, ...]
    p95_s: tuple[float, ...]
    p99_s: tuple[float, ...]

    @property
    def latency_s(self) -> float:
        """Mean latency over the seeds."""
        return float(np.mean(self.mean_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All points of one setting, and the sustained rate of each policy."""

    setting: Setting
    points: tuple[Point, ...]
    sustained_rps: Mapping[str, float]

    def of(self, policy: str) -> list[Point]:
        """The points of one policy by rising rate."""
        return [point for point in self.points if point.policy == policy]


@cache
def workload_of(mix: str) -> Workload:
    """The traced executions of a mix; its workflows arrive equally often."""
    names = MIXES[mix]
    rng = random.Random(mix)
    runs = [WORKFLOWS[name](rng, f"{name}{number}") for name in names for number in range(TRACED)]
    return aggregate(runs, rates_rps=dict.fromkeys(names, 1.0))


@cache
def profiles_of(cluster: str) -> dict[str, LLMProfile]:
    """The shipped profiles of the cluster's device type."""
    return shipped_profiles(parse_cluster(cluster).device_type)


def ours(setting: Setting, rate_rps: float) -> System:
    """The plan of least latency, its best candidates compared by replay."""
    workload, profiles, cluster = given(setting)
    return allocated(setting, plan_choices(optimize(workload, profiles, cluster, rate_rps=rate_rps, replay_seed=0)))


def by_hand(weigh: Callable[[Workload, Mapping[str, LLMProfile]], Mapping[str, float]]) -> Policy:
    """A policy of people: devices in proportion to something they know."""

    def policy(setting: Setting, _rate_rps: float) -> System:
        workload, profiles, cluster = given(setting)
        weights = weigh(workload, profiles)
        largest = cluster.largest_domain
        return allocated(
            setting,
            split_by_weight(weights, profiles, devices=cluster.devices, max_tensor_parallel_size=largest),
        )

    return policy


def by_autoscaler(setting: Setting, rate_rps: float) -> System:
    """Each LLM scaled alone."""
    workload, profiles, cluster = given(setting)
    choices = autoscaled(
        workload,
        profiles,
        rate_rps=rate_rps,
        devices=cluster.devices,
        max_tensor_parallel_size=cluster.largest_domain,
    )
    return allocated(setting, choices)


def by_paper(setting: Setting, rate_rps: float) -> System:
    """The paper's pruned enumeration, for the highest rate it can where the asked one is out of its reach."""
    for part in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        found = paper_enumeration(*given(setting), rate_rps=rate_rps * part)
        if found is not None:
            return allocated(setting, found.choices)
    raise ScepsyError("the pruned enumeration finds no allocation at any rate")


def by_time_sharing(setting: Setting, _rate_rps: float) -> System:
    """Every device serves every LLM in turns."""
    workload, profiles, cluster = given(setting)
    called = {demand.llm: profiles[demand.llm] for demand in workload.demands}
    return System(
        allocation=f"{cluster.devices} x all",
        run=lambda timelines, arrivals_s: replay_time_shared(called, timelines, arrivals_s, devices=cluster.devices),
    )


def allocated(setting: Setting, choices: Choices) -> System:
    """A system of engines as allocated; the endpoint knows what each replica carries, whoever made the allocation."""
    workload, profiles, cluster = given(setting)
    plan = predict(workload, profiles, cluster, choices, rate_rps=NEARLY_NO_RATE_RPS)
    return System(
        allocation=describe(choices),
        run=lambda timelines, arrivals_s: replay(plan, profiles, timelines, arrivals_s),
    )


def given(setting: Setting) -> tuple[Workload, dict[str, LLMProfile], Cluster]:
    """What every policy knows."""
    return workload_of(setting.mix), profiles_of(setting.cluster), parse_cluster(setting.cluster)


Policy = Callable[[Setting, float], System]

POLICIES: dict[str, Policy] = {
    "ours": ours,
    "even split": by_hand(lambda workload, _: {demand.llm: 1.0 for demand in workload.demands}),
    "by calls": by_hand(lambda workload, _: {demand.llm: demand.visits for demand in workload.demands}),
    "by size": by_hand(
        lambda workload, profiles: {
            demand.llm: profiles[demand.llm].steps[0].weights_gib for demand in workload.demands
        }
    ),
    "autoscaled": by_autoscaler,
    "time sharing": by_time_sharing,
    "paper": by_paper,
}


def run_setting(setting: Setting, *, loads: Sequence[float] = LOADS) -> Table:
    """Every policy at every rate; a sustained rate only where all of them are asked for."""
    most_rps = highest_rate(*given(setting))[0] * 0.999
    # Several policies often come to the same allocation: that is replayed once.
    points: dict[tuple[str, float], Point] = {}
    rates: dict[str, float] = {}
    found, sustained = [], {}
    for name, policy in POLICIES.items():
        for load in loads:
            system = policy(setting, min(load, 1.0) * most_rps)
            key = system.allocation, load
            if key not in points:
                points[key] = replay_point(setting, name, system, load, load * most_rps)
            found.append(replace(points[key], policy=name))
        if len(loads) < len(LOADS):
            continue
        if system.allocation not in rates:
            rates[system.allocation] = sustained_rps(setting, system, most_rps)
        sustained[name] = rates[system.allocation]
    return Table(setting=setting, points=tuple(found), sustained_rps=sustained)


def replay_point(setting: Setting, policy: str, system: System, load: float, rate_rps: float) -> Point:
    """Replay at a rate, once per seed; arrivals and executions depend on the seed and the rate alone."""
    found = []
    for seed in SEEDS:
        latencies_s, arrivals_s = run(setting, system, seed=seed, rate_rps=rate_rps)
        steady = latencies_s[len(arrivals_s) // 5 : -len(arrivals_s) // 10]
        found.append((float(steady.mean()), *(float(value) for value in np.percentile(steady, [50, 95, 99]))))
    mean_s, p50_s, p95_s, p99_s = (tuple(column) for column in zip(*found, strict=True))
    return Point(
        policy=policy,
        load=load,
        rate_rps=rate_rps,
        allocation=system.allocation,
        mean_s=mean_s,
        p50_s=p50_s,
        p95_s=p95_s,
        p99_s=p99_s,
    )


def sustained_rps(setting: Setting, system: System, most_rps: float) -> float:
    """The highest rate at which what arrives in the second half of a run is also done in it, but for a twentieth."""

    def kept_up(rate_rps: float) -> bool:
        latencies_s, arrivals_s = run(setting, system, seed=SEEDS[0], rate_rps=rate_rps)
        middle_s, end_s = arrivals_s[-1] / 2, arrivals_s[-1]
        done_s = arrivals_s + latencies_s
        done = np.count_nonzero((done_s > middle_s) & (done_s <= end_s))
        return bool(done >= 0.95 * np.count_nonzero(arrivals_s > middle_s))

    low, high = 0.0, most_rps
    while kept_up(high):
        low, high = high, 1.5 * high
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if kept_up(middle) else (low, middle)
    return low


def run(setting: Setting, system: System, *, seed: int, rate_rps: float) -> tuple[np.ndarray, np.ndarray]:
    """Latencies and arrivals over a time that does not depend on the system, the same executions for all."""
    workload = workload_of(setting.mix)
    rng = np.random.default_rng(seed)
    calls = sum(demand.visits for demand in workload.demands)
    count = max(LEAST_EXECUTIONS, int(min(rate_rps * OFFERED_FOR_S, MOST_CALLS / calls)))
    arrivals_s = poisson_arrivals_s(rng, rate_rps=rate_rps, executions=count)
    picked = rng.choice(len(workload.timelines), size=count, p=workload.weights)
    return system.run([workload.timelines[one] for one in picked], arrivals_s).latencies_s, arrivals_s


def show(table: Table) -> None:
    """Print one setting."""
    print(f"\n{table.setting.mix} on {table.setting.cluster}")
    print(
        f"{'rate/s':>8} {'policy':>12} {'mean s':>16} {'p50 s':>8} {'p95 s':>8} {'p99 s':>8} {'ours is':>9}  allocation"
    )
    for load in dict.fromkeys(point.load for point in table.points):
        points = [point for point in table.points if point.load == load]
        mine = next(point for point in points if point.policy == "ours")
        for point in points:
            spread = float(np.std(point.mean_s, ddof=1)) * 4.303 / np.sqrt(len(point.mean_s))
            print(
                f"{point.rate_rps:>8.3g} {point.policy:>12} {point.latency_s:>8.2f} +- {spread:<5.2f}"
                f"{np.mean(point.p50_s):>8.2f} {np.mean(point.p95_s):>8.2f} {np.mean(point.p99_s):>8.2f} "
                f"{point.latency_s / mine.latency_s:>8.2f}x  {point.allocation}"
            )
    for policy, rate_rps in table.sustained_rps.items():
        mine_rps = table.sustained_rps["ours"]
        print(f"  sustained by {policy:>12}: {rate_rps:8.2f}/s, ours {mine_rps / rate_rps:.2f}x")


def describe(choices: Choices) -> str:
    """An allocation, briefly."""
    return ", ".join(
        llm
        + " "
        + "+".join(
            f"{one.replicas}x{f'TP{one.tensor_parallel_size}' if one.fraction == 1 else f'{float(one.fraction):g}'}"
            for one in groups
        )
        for llm, groups in sorted(choices.items())
    )


def draw(tables: Sequence[Table], directory: Path) -> None:
    """One picture per setting: mean latency over rate, an axis of powers for what explodes."""
    import matplotlib.pyplot as plt  # only where a picture is asked for

    directory.mkdir(parents=True, exist_ok=True)
    for table in tables:
        figure, axes = plt.subplots(figsize=(6, 4))
        for policy in POLICIES:
            points = table.of(policy)
            axes.plot([point.rate_rps for point in points], [point.latency_s for point in points], "o-", label=policy)
        axes.set(xlabel="executions/s", ylabel="mean latency, s", yscale="log")
        axes.set_title(f"{table.setting.mix} on {table.setting.cluster} (replay, estimated profiles)")
        axes.legend()
        figure.tight_layout()
        figure.savefig(directory / f"{table.setting.mix}-{table.setting.cluster}.svg".replace(" ", "-"))
        plt.close(figure)


def main() -> int:
    """Run every setting, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plots", type=Path, default=PLOTS, help="directory for one SVG per setting")
    parser.add_argument("--clusters", nargs="*", default=CLUSTERS)
    parser.add_argument("--mixes", nargs="*", default=tuple(MIXES))
    parser.add_argument("--loads", nargs="*", type=float, default=LOADS, help="single points, without sustained rates")
    arguments = parser.parse_args()
    settings = [Setting(mix=mix, cluster=cluster) for cluster in arguments.clusters for mix in arguments.mixes]
    began_s = time.perf_counter()
    tables = []
    # The largest first, so that no process is left alone with it.
    with multiprocessing.Pool(2) as pool:
        for table in pool.imap(partial(run_setting, loads=arguments.loads), settings[::-1], chunksize=1):
            show(table)
            sys.stdout.flush()
            tables.append(table)
    draw(tables, arguments.plots)
    others = [policy for policy in POLICIES if policy not in ("ours", "paper")]
    throughput = [
        table.sustained_rps["ours"] / table.sustained_rps[other]
        for table in tables
        for other in others
        if table.sustained_rps
    ]
    latency, worst = [], []
    for table in tables:
        for mine, *rest in zip(*(table.of(policy) for policy in POLICIES), strict=True):
            worst += [mine.latency_s / point.latency_s for point in rest]
            latency += [point.latency_s / mine.latency_s for point in rest if point.policy != "paper"]
    sustained = [table.sustained_rps["ours"] / rate for table in tables for rate in table.sustained_rps.values()]
    bounds = [Bound(name="our mean latency over any other's, most", value=max(worst), at_most=1.02)]
    if throughput:
        name = "highest sustained rate over one by independent or hand-made means, most"
        bounds += [
            Bound(name="latency of independent or hand-made means over ours, most", value=max(latency), at_least=27),
            Bound(name=name, value=max(throughput), at_least=2.4),
            Bound(name="our sustained rate over any other's, least", value=min(sustained), at_least=0.98),
        ]
    figures = {
        "seconds": time.perf_counter() - began_s,
        "latency_median": float(np.median(latency)),
        "throughput_median": float(np.median(throughput)) if throughput else None,
        "points": [
            {
                "mix": table.setting.mix,
                "cluster": table.setting.cluster,
                "policy": point.policy,
                "rate_rps": point.rate_rps,
                "mean_s": point.latency_s,
            }
            for table in tables
            for point in table.points
        ],
    }
    return finish("paper_table", bounds, figures)


if __name__ == "__main__":
    sys.exit(main())
