"""Workflow latency: the pipeline's prediction and the paper's formula against replay.

Seven made-up workflows (their token lengths and branching drawn at random) over many allocations, each at 20, 50 and
80 % of what that allocation carries. Replay runs every traced execution through step-by-step engines under Poisson
arrivals; it stands for the truth here. Errors are relative to it, at the mean and at the 95th percentile.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from benchmarks.outcome import Bound, finish
from benchmarks.workflows import WORKFLOWS
from scepsy.profiling import shipped_profiles
from scepsy_optimizer.allocation import Choice, Groups, evaluate_groups
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.executions import Execution
from scepsy_optimizer.pipeline import build_pipeline, call_durations_s, paper_latency_s
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replay import poisson_arrivals_s, replay
from scepsy_optimizer.workload import Workload, aggregate

LOADS = (0.2, 0.5, 0.8)
ALLOCATIONS = 10
TRACED = 300
REPLAYED = 1200
CLUSTER = parse_cluster("8x8xH100")
KINDS = ((1, Fraction(1)), (2, Fraction(1)), (4, Fraction(1)), (1, Fraction(1, 2)), (1, Fraction(1, 5)))


def main() -> int:
    """Run every workflow, print, judge."""
    profiles = shipped_profiles("H100")
    print(f"{'workflow':>22} {'load':>5} {'mean s':>7} {'ours':>7} {'p95':>7} {'paper':>7} {'bias':>7} {'rank':>6}")
    rows = []
    for name, make in WORKFLOWS.items():
        rows += one_workflow(name, make, profiles)
    ours = float(np.mean([row["error"] for row in rows]))
    worst_rank = min(row["rank"] for row in rows)
    bounds = [
        Bound(name="mean error of the mean latency", value=ours, at_most=0.05),
        Bound(name="least rank correlation of allocations", value=worst_rank, at_least=0.98),
    ]
    return finish("workflow_accuracy", bounds, {"paper": float(np.mean([row["paper"] for row in rows])), "rows": rows})


def one_workflow(
    name: str, make: Callable[[random.Random, str], Execution], profiles: dict[str, LLMProfile]
) -> list[dict[str, object]]:
    """One row per load: mean absolute errors over the allocations, and how well they are ranked."""
    rng = random.Random(name)
    workload = aggregate([make(rng, f"e{number}") for number in range(TRACED)])
    choices = [draw_allocation(rng, workload, profiles) for _ in range(ALLOCATIONS)]
    rows = []
    for load in LOADS:
        # The same arrivals for every allocation: what differs between them is then not chance.
        results = [one_point(workload, profiles, choice, load, seed=1) for choice in choices]
        truth, mean, p95, paper, p95_truth = (np.array(column) for column in zip(*results, strict=True))
        row = {
            "workflow": name,
            "load": load,
            "latency_s": float(truth.mean()),
            "error": float(np.abs(mean / truth - 1).mean()),
            "p95_error": float(np.abs(p95 / p95_truth - 1).mean()),
            "paper": float(np.abs(paper / truth - 1).mean()),
            "bias": float((mean / truth - 1).mean()),
            "rank": rank_correlation(mean, truth),
        }
        rows.append(row)
        print(
            f"{name:>22} {load:>5.0%} {row['latency_s']:>7.2f} {row['error']:>7.1%} {row['p95_error']:>7.1%} "
            f"{row['paper']:>7.1%} {row['bias']:>+7.1%} {row['rank']:>6.3f}"
        )
    return rows


def draw_allocation(rng: random.Random, workload: Workload, profiles: dict[str, LLMProfile]) -> dict[str, Groups]:
    """Random kinds and numbers of replicas that hold each LLM."""
    choices = {}
    for demand in workload.demands:
        profile = profiles[demand.llm]
        fitting = [
            (size, fraction)
            for size, fraction in KINDS
            if any(steps.tensor_parallel_size == size for steps in profile.steps)
            and profile.kv_tokens(size, float(fraction)) > 4 * demand.longest_tokens
        ]
        size, fraction = rng.choice(fitting)
        choices[demand.llm] = (Choice(tensor_parallel_size=size, fraction=fraction, replicas=rng.randint(1, 3)),)
    return choices


def one_point(
    workload: Workload, profiles: dict[str, LLMProfile], choices: dict[str, Groups], load: float, *, seed: int
) -> tuple[float, float, float, float, float]:
    """Replayed mean, predicted mean and 95th percentile, the paper's mean, and the replayed 95th percentile."""

    def options(rate_rps: float) -> dict[str, object]:
        return {
            demand.llm: evaluate_groups(
                demand,
                [profiles[demand.llm]],
                choices[demand.llm],
                calls_rps=rate_rps * demand.visits,
                max_utilisation=1,
            )
            for demand in workload.demands
        }

    saturation_rps = min(option.max_rps / workload.demand(llm).visits for llm, option in options(1e-6).items())
    rate_rps = load * saturation_rps
    speeds = {llm: option.speed for llm, option in options(rate_rps).items()}
    makespans = [timeline.makespan_s(call_durations_s(timeline, speeds)) for timeline in workload.timelines]
    plan = hand_made_plan(choices, profiles, CLUSTER)
    rng = np.random.default_rng(seed)
    picked = np.concatenate([rng.permutation(TRACED) for _ in range(REPLAYED // TRACED)])
    replayed = replay(
        plan,
        profiles,
        [workload.timelines[index] for index in picked],
        poisson_arrivals_s(rng, rate_rps=rate_rps, executions=len(picked)),
    )
    # Without the first and last tenth: the engines fill up and run empty there.
    steady = replayed.latencies_s[len(picked) // 10 : -len(picked) // 10]
    return (
        float(steady.mean()),
        build_pipeline(workload, speeds).built_latency_s,
        float(np.percentile(makespans, 95)),
        paper_latency_s(workload, speeds),
        float(np.percentile(steady, 95)),
    )


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's coefficient."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    sys.exit(main())
