"""Workflow latency: the pipeline's prediction and the paper's formula against replay.

Seven made-up workflows (their token lengths and branching drawn at random; another `--seed` draws others) and real
executions of a coding agent over many allocations, each at 20, 50 and 80 % of what that allocation carries. Replay runs
every execution through step-by-step engines under Poisson arrivals; it stands for the truth here. Errors are relative
to it, at the mean and at the 95th percentile. Each point is replayed four times, with executions and arrivals that are
the same for all allocations, so that of two that differ in little the better one is known. "ceiling" is how well two of
the replays and the other two rank the allocations alike: what chance leaves to be ranked.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.outcome import Bound, finish
from benchmarks.workflows import WORKFLOWS
from scepsy.profiling import shipped_profiles
from scepsy.traces import read_executions
from scepsy_optimizer.allocation import Choice, Groups, Option, evaluate_groups
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.executions import Execution, Span
from scepsy_optimizer.pipeline import build_pipeline, call_durations_s, paper_latency_s
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replay import poisson_arrivals_s, replay
from scepsy_optimizer.workload import Workload, aggregate

LOADS = (0.2, 0.5, 0.8)
ALLOCATIONS = 16
TRACED = 300
REPLAYS = 4
SPAN_IN_LATENCIES = 8
LEAST_CALLS = 10_000
ROUNDS = (1, *(steps << doublings for doublings in range(20) for steps in (2, 3)))
CLUSTER = parse_cluster("8x8xH100")
KINDS = ((1, Fraction(1)), (2, Fraction(1)), (4, Fraction(1)), (1, Fraction(1, 2)), (1, Fraction(1, 5)))

REAL = Path(__file__).parents[1] / "tests" / "data" / "claude-code"
REAL_LLMS = {"claude-opus-4-5-20251101": "writer", "claude-haiku-4-5-20251001": "generator"}
# The real contexts reach 200,000 tokens, the profiles 32,768; and hours of a user's absence are no part of a workflow.
REAL_TOKENS = 1 / 8
REAL_PAUSE_S = 10.0

Profiles = dict[str, LLMProfile]


def main(arguments: list[str]) -> int:
    """Run every workflow, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws other executions and allocations (default: 0)")
    seed = parser.parse_args(arguments).seed
    print(
        f"{'workflow':>18} {'load':>5} {'mean s':>7} {'ours':>6} {'bias':>6} {'p95':>6} {'paper':>6} "
        f"{'rank':>6} {'paper':>6} {'ceiling':>7}"
    )
    rows = []
    jobs = [(name, load, seed) for name in (*WORKFLOWS, "claude-code") for load in LOADS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (name, load, _), row in zip(jobs, pool.map(one_load, *zip(*jobs, strict=True)), strict=True):
            print(
                f"{name:>18} {load:>5.0%} {row['latency_s']:>7.2f} {row['error']:>6.1%} {row['bias']:>+6.1%} "
                f"{row['p95_error']:>6.1%} {row['paper']:>6.1%} {row['rank']:>6.3f} {row['paper_rank']:>6.3f} "
                f"{row['ceiling']:>7.3f}",
                flush=True,
            )
            rows.append({"workflow": name, "load": load, **row})
    means = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("error", "p95_error", "paper", "rank", "paper_rank", "ceiling")
    }
    print(
        f"{'mean':>18} {'':>13} {means['error']:>6.1%} {'':>6} {means['p95_error']:>6.1%} {means['paper']:>6.1%} ",
        end="",
    )
    print(f"{means['rank']:>6.3f} {means['paper_rank']:>6.3f} {means['ceiling']:>7.3f}")
    bounds = [
        Bound(name="mean error of the mean latency", value=means["error"], at_most=0.05),
        Bound(name="mean rank correlation of allocations", value=means["rank"], at_least=0.98),
        Bound(name="least rank correlation of allocations", value=min(row["rank"] for row in rows), at_least=0.98),
    ]
    return finish("workflow_accuracy", bounds, {**means, "seed": seed, "rows": rows})


def one_load(name: str, load: float, seed: int) -> dict[str, float]:
    """Mean absolute errors over the allocations of one workflow at one load, and how well they are ranked."""
    rng = random.Random(f"{name} {seed}")
    workload, profiles = real_workload() if name == "claude-code" else made_up_workload(name, rng)
    choices: list[dict[str, Groups]] = []
    while len(choices) < ALLOCATIONS:
        drawn = draw_allocation(rng, workload, profiles)
        if drawn not in choices:
            choices.append(drawn)
    results = np.array([one_point(workload, profiles, choice, load, seed=seed) for choice in choices])
    mean, p95, paper = results[:, :3].T
    means, p95s = results[:, 3::2], results[:, 4::2]
    truth, p95_truth = means.mean(axis=1), p95s.mean(axis=1)
    return {
        "latency_s": float(truth.mean()),
        "error": float(np.abs(mean / truth - 1).mean()),
        "bias": float((mean / truth - 1).mean()),
        "p95_error": float(np.abs(p95 / p95_truth - 1).mean()),
        "paper": float(np.abs(paper / truth - 1).mean()),
        "rank": rank_correlation(mean, truth),
        "paper_rank": rank_correlation(paper, truth),
        "ceiling": rank_correlation(means[:, : REPLAYS // 2].sum(axis=1), means[:, REPLAYS // 2 :].sum(axis=1)),
    }


def made_up_workload(name: str, rng: random.Random) -> tuple[Workload, Profiles]:
    """Executions of one of the made-up workflows."""
    return aggregate([WORKFLOWS[name](rng, f"e{number}") for number in range(TRACED)]), shipped_profiles("H100")


def real_workload() -> tuple[Workload, Profiles]:
    """The real executions, their tokens scaled to what the profiles know and their pauses cut short."""
    shipped = shipped_profiles("H100")
    profiles = {llm: replace(shipped[stand_in], llm=llm) for llm, stand_in in REAL_LLMS.items()}

    def scaled(span: Span) -> Span:
        call = span.call
        if call is None:
            return span
        shorter = max(1, round(call.input_tokens * REAL_TOKENS))
        return replace(span, call=replace(call, input_tokens=shorter, cached_tokens=0))

    executions = [
        Execution(id=run.id, workflow=run.workflow, spans=tuple(scaled(span) for span in run.spans))
        for run in read_executions([REAL]).executions
    ]
    workload = aggregate(executions)
    timelines = tuple(
        replace(one, delay_s=tuple(min(delay, REAL_PAUSE_S) for delay in one.delay_s)) for one in workload.timelines
    )
    return replace(workload, timelines=timelines), profiles


def draw_allocation(rng: random.Random, workload: Workload, profiles: Profiles) -> dict[str, Groups]:
    """Random kinds and numbers of replicas that hold each LLM."""
    choices: dict[str, Groups] = {}
    for demand in workload.demands:
        profile = profiles[demand.llm]
        fitting = [
            (size, fraction)
            for size, fraction in KINDS
            if any(steps.tensor_parallel_size == size for steps in profile.steps)
            and profile.kv_tokens(size, float(fraction)) > 4 * demand.longest_tokens
        ]
        size, fraction = rng.choice(fitting)
        choices[demand.llm] = (Choice(tensor_parallel_size=size, fraction=fraction, replicas=rng.randint(1, 4)),)
    return choices


def one_point(
    workload: Workload,
    profiles: Profiles,
    choices: dict[str, Groups],
    load: float,
    *,
    seed: int,
    replays: int = REPLAYS,
) -> tuple[float, ...]:
    """Predicted mean and 95th percentile, the paper's mean, and the mean and 95th percentile of each replay."""

    def options(rate_rps: float) -> dict[str, Option]:
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
    mean_s = build_pipeline(workload, speeds).built_latency_s
    makespans_s = np.array([timeline.makespan_s(call_durations_s(timeline, speeds)) for timeline in workload.timelines])
    calls = sum(demand.visits for demand in workload.demands)
    traced = len(workload.timelines)
    # The engines fill up while the first of the longest executions run, and run empty while the last ones do.
    edge_s = float(makespans_s.max())
    needed = max(LEAST_CALLS / calls, rate_rps * (mean_s * SPAN_IN_LATENCIES + 2 * edge_s))
    # Whole rounds of all executions, in coarse steps: allocations that are much alike then get the same arrivals.
    rounds = next(rounds for rounds in ROUNDS if rounds * traced >= needed)
    count = rounds * traced
    plan = hand_made_plan(choices, profiles, CLUSTER)
    found = [mean_s, float(np.percentile(makespans_s, 95)), paper_latency_s(workload, speeds)]
    for number in range(replays):
        rng = np.random.default_rng((seed, number))
        arrivals_s = poisson_arrivals_s(rng, rate_rps=rate_rps, executions=count)
        # Exactly the rate on average: a run that happens to be busier would count as the prediction's error.
        arrivals_s *= count / rate_rps / arrivals_s[-1]
        # Each as often as the others, but in any order: of few long ones, some must be allowed to meet.
        picked = rng.permutation(np.repeat(np.arange(traced), rounds))
        replayed = replay(plan, profiles, [workload.timelines[index] for index in picked], arrivals_s)
        steady = (arrivals_s > edge_s) & (arrivals_s < arrivals_s[-1] - edge_s)
        latencies_s, predicted_s = replayed.latencies_s[steady], makespans_s[picked[steady]]
        # Nor count executions that happen to be longer than those of the workload (a ratio estimator).
        found.append(float(latencies_s.mean() * mean_s / predicted_s.mean()))
        found.append(float(np.percentile(latencies_s, 95) * found[1] / np.percentile(predicted_s, 95)))
    return tuple(found)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's coefficient."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
