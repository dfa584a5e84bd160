"""Replicas of different speed behind one name: the pipeline's prediction against replay.

The search offers mixes (a whole device and a part of another, tensor parallelism 4 beside 1), and `workflow_accuracy`
draws none. Here the seven made-up workflows run over allocations in which most LLMs have one, at 10, 40 and 70 % of
what each carries; once with fractions as slow as measured under MPS, once as slow as a quota or MIG makes them (1/f). A
mix's speed in the closed form is the mean over its calls. Calls that are made together wait for the slowest of them,
which only the replay sees: so the candidates of a plan are replayed, the best one without any mix among them.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction

import numpy as np

from benchmarks.outcome import Bound, finish
from benchmarks.workflow_accuracy import KINDS, Profiles, made_up_workload, one_point
from benchmarks.workflows import WORKFLOWS
from scepsy_optimizer.allocation import Choice, Groups
from scepsy_optimizer.planner import describe_choices
from scepsy_optimizer.profile import PROPORTIONAL
from scepsy_optimizer.workload import LLMDemand, Workload

LOADS = (0.1, 0.4, 0.7)
ALLOCATIONS = 6
MIXED = 0.75
"""How likely an LLM gets a mix."""

Kind = tuple[int, Fraction]
MIXES: tuple[tuple[Kind, Kind], ...] = (
    ((1, Fraction(1)), (1, Fraction(3, 10))),
    ((1, Fraction(1)), (1, Fraction(1, 2))),
    ((1, Fraction(3, 5)), (1, Fraction(2, 5))),
    ((2, Fraction(1)), (1, Fraction(2, 5))),
    ((2, Fraction(1)), (1, Fraction(1))),
    ((4, Fraction(1)), (1, Fraction(1))),
)
SLOWDOWNS = {"MPS": None, "1/f": PROPORTIONAL}


def main() -> int:
    """Every workflow under both slowdowns, and the bounds."""
    print(f"{'fractions':>9} {'workflow':>18} {'points':>6} {'error':>6} {'bias':>6} {'worst':>6}  with")
    jobs = [(slowdown, name, number) for slowdown in SLOWDOWNS for name in WORKFLOWS for number in range(ALLOCATIONS)]
    rows: list[dict[str, object]] = []
    errors: dict[str, list[float]] = {slowdown: [] for slowdown in SLOWDOWNS}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(jobs, pool.map(one_allocation, jobs), strict=True))
    for slowdown in SLOWDOWNS:
        for name in WORKFLOWS:
            points = [point for number in range(ALLOCATIONS) for point in found[slowdown, name, number]]
            worst, words = max(points, key=lambda point: abs(point[0]))
            each = np.array([error for error, _ in points])
            errors[slowdown] += each.tolist()
            print(
                f"{slowdown:>9} {name:>18} {len(points):>6} {np.abs(each).mean():>6.1%} {each.mean():>+6.1%} "
                f"{worst:>+6.1%}  {words}"
            )
            rows.append(
                {"fractions": slowdown, "workflow": name, "points": len(points), "error": float(np.abs(each).mean())}
                | {"bias": float(each.mean()), "worst": worst, "allocation": words}
            )
    bounds = [
        Bound(name=f"mean error, fractions {slowdown}", value=float(np.abs(each).mean()), at_most=0.05)
        for slowdown, each in errors.items()
    ]
    biases = {slowdown: float(np.mean(each)) for slowdown, each in errors.items()}
    return finish("mix_accuracy", bounds, {"bias": biases, "rows": rows})


def one_allocation(job: tuple[str, str, int]) -> list[tuple[float, str]]:
    """The error of the mean latency at each load, and what runs."""
    slowdown, name, number = job
    rng = random.Random(f"{name} {number}")
    workload, profiles = made_up_workload(name, random.Random(name))
    changed = SLOWDOWNS[slowdown]
    if changed is not None:
        profiles = {llm: profile.with_slowdown(changed) for llm, profile in profiles.items()}
    choices = {demand.llm: draw_groups(rng, demand, profiles) for demand in workload.demands}
    # At least one mix, or it would say nothing.
    while all(len(groups) == 1 for groups in choices.values()):
        choices = {demand.llm: draw_groups(rng, demand, profiles) for demand in workload.demands}
    return [(error(workload, profiles, choices, load), describe_choices(choices)) for load in LOADS]


def error(workload: Workload, profiles: Profiles, choices: dict[str, Groups], load: float) -> float:
    """Of the predicted mean latency, relative to the replay."""
    predicted_s, _, _, replayed_s, _ = one_point(workload, profiles, choices, load, seed=0, replays=1)
    return predicted_s / replayed_s - 1


def draw_groups(rng: random.Random, demand: LLMDemand, profiles: Profiles) -> Groups:
    """A mix, or replicas of one kind, as many of each as chance says."""
    profile = profiles[demand.llm]

    def hold(kinds: Sequence[Kind]) -> bool:
        return all(
            any(steps.tensor_parallel_size == size for steps in profile.steps)
            and profile.kv_tokens(size, float(fraction)) > 4 * demand.longest_tokens
            for size, fraction in kinds
        )

    mixes = [mix for mix in MIXES if hold(mix)]
    if mixes and rng.random() < MIXED:
        return tuple(
            Choice(tensor_parallel_size=size, fraction=fraction, replicas=rng.randint(1, 2))
            for size, fraction in rng.choice(mixes)
        )
    size, fraction = rng.choice([kind for kind in KINDS if hold([kind])])
    return (Choice(tensor_parallel_size=size, fraction=fraction, replicas=rng.randint(1, 4)),)


if __name__ == "__main__":
    sys.exit(main())
