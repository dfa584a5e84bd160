"""Predicted against measured, on the real vLLM: two models on two CPU cores, two workflows at three rates.

The whole way of a user: executions are traced through an endpoint (of emulators: only their calls and lengths count),
`scepsy profile` measures both models on engines that it starts, latency and saturation are predicted, and only then are
the engines deployed together and the workflows sent to their endpoint as Poisson arrivals, several seeds each: the
traced executions with new prompts. Models have random weights, and answers are as long as they are asked to be.

Two cores carry engines, endpoint and clients, so the machine must be otherwise idle. Beside each profile and before and
after each round a fixed loop is timed on each core, and during the round the time that other processes take is counted.
A round that was disturbed, or whose cores were not as fast as when the engines were profiled, is repeated; every round
is printed.

Needs .venv-vllm (make test-vllm makes it). Takes about 20 minutes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil

from benchmarks.cpu_engines import (
    COMMAND,
    ENVIRONMENT,
    WHOLE,
    Call,
    client,
    draw_evenly,
    execute,
    is_missing,
    make_models,
    poisson,
    profile,
    saturate,
    trace,
    traced_name,
)
from benchmarks.machine_noise import probe_s, watched
from benchmarks.outcome import Bound, finish
from scepsy.deployment import deploy, list_deployments
from scepsy_optimizer.allocation import MAX_UTILISATION
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.plan import Plan, Prediction
from scepsy_optimizer.planner import hand_made_plan, predict
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.steady_state import replay_steady_state
from scepsy_optimizer.workload import Workload

MODELS = {"checker": (512, 8), "writer": (1024, 12)}
"""Hidden size and layers of each LLM."""

CLUSTER = parse_cluster("2xCPU")
WHOLE_CORES = dict.fromkeys(MODELS, WHOLE)
LOADS = (0.25, 0.45, 0.65)
SEEDS = (1, 2)
TRACED = 300
ROUND_S, LEAD_S, TAIL_S = 34.0, 4.0, 2.0
"""How long executions arrive in a round, and how much of it is not counted: engines fill up and run empty."""

SATURATED, SATURATION_S = 24, 36.0
"""Executions in flight at saturation, and for how long."""

# A round is disturbed when others take more of the cores than this, or when a core computes that much slower.
OTHERS, SLOWER = 0.03, 0.06
REPEATS = 2
BUDGET_S = 17 * 60
"""After this no round is repeated any more."""


async def draft_and_check(call: Call, rng: random.Random) -> None:
    """A chain: one LLM drafts, the other one reads prompt and draft and gives a verdict."""
    prompt, draft = rng.randint(60, 180), rng.randint(12, 36)
    await call("writer", prompt, draft)
    await call("checker", prompt + draft, rng.randint(4, 12))


async def vote_and_judge(call: Call, rng: random.Random) -> None:
    """A fan-out: three answers at once by one LLM, which the other one reads to judge."""
    answers = [rng.randint(12, 36) for _ in range(3)]
    question = rng.randint(40, 120)
    await asyncio.gather(*(call("checker", question, tokens) for tokens in answers))
    await call("writer", question + sum(answers), rng.randint(6, 18))


WORKFLOWS = {"draft-and-check": draft_and_check, "vote-and-judge": vote_and_judge}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One measurement: latencies of the executions that count, and how much the machine was disturbed meanwhile.

    `others` is the part of the cores that others took, `slower` how much longer or shorter a core needed for a fixed
    loop, before or after, than beside the profiles.
    """

    seed: int
    latencies_s: tuple[float, ...]
    finished_rps: float
    others: float
    slower: float

    @property
    def disturbed(self) -> bool:
        """Whether the machine did too much else."""
        return self.others > OTHERS or abs(self.slower) > SLOWER


@dataclass(slots=True, kw_only=True)
class Point:
    """One workflow at one rate, or saturated (`load` is None then): what is predicted, and every round measured."""

    workflow: str
    load: float | None
    rate_rps: float
    predicted_s: float = 0.0
    replayed_s: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    @property
    def counted(self) -> list[Round]:
        """Of each seed the undisturbed round, or the least disturbed one."""
        return [
            min((one for one in self.rounds if one.seed == seed), key=lambda one: (one.disturbed, abs(one.slower)))
            for seed in sorted({one.seed for one in self.rounds})
        ]

    @property
    def measured(self) -> float:
        """Mean latency over all executions that count, or executions finished per second at saturation."""
        if self.load is None:
            return statistics.mean(one.finished_rps for one in self.counted)
        return statistics.mean(latency_s for one in self.counted for latency_s in one.latencies_s)

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return (self.rate_rps if self.load is None else self.predicted_s) / self.measured - 1

    @property
    def spread(self) -> float:
        """Half of the range of the seeds' means: what chance and the machine do to one point."""
        means = [one.finished_rps if self.load is None else statistics.mean(one.latencies_s) for one in self.counted]
        return (max(means) - min(means)) / 2 / self.measured


def main() -> int:
    """Trace, profile, predict, deploy, measure, judge."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun_s = time.perf_counter()
    if is_missing():
        return 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= ENVIRONMENT | {"SCEPSY_HOME": f"{folder}/home"}
        models = make_models(MODELS, Path(folder))
        traces = Path(folder) / "traces"
        workloads = asyncio.run(trace(WORKFLOWS, tuple(MODELS), TRACED, traces))
        tell(begun_s, f"traced {TRACED} executions of each workflow; profiling")
        loops_s = [probe_s()]
        profiles = {}
        for llm in MODELS:
            profiles[llm] = profile(llm, models[llm], traces, Path(folder) / f"{llm}.yaml")
            loops_s.append(probe_s())
        usual_s = [statistics.median(core) for core in zip(*loops_s, strict=True)]
        points = predictions(workloads, profiles)
        plan = hand_made_plan(WHOLE_CORES, profiles, CLUSTER)
        tell(begun_s, "deploying")
        with deploy(plan, engine="vllm-cpu", command=COMMAND, name="measured") as running:
            asyncio.run(measure(running.url, points, begun_s, usual_s))
        left = len(psutil.Process().children(recursive=True)) + len(list_deployments())
    seconds = time.perf_counter() - begun_s
    notes = {llm: one.provenance.note for llm, one in profiles.items()}
    return judge(points, {"profiles": notes, "seconds": seconds}, left)


def predictions(workloads: Mapping[str, Workload], profiles: Mapping[str, LLMProfile]) -> list[Point]:
    """Every point before anything of it is measured."""
    points = []
    for name, workload in workloads.items():
        idle = predicted(predict(workload, profiles, CLUSTER, WHOLE_CORES, rate_rps=1e-6))
        saturation_rps = idle.max_rate_rps / MAX_UTILISATION
        for load in LOADS:
            plan = predict(workload, profiles, CLUSTER, WHOLE_CORES, rate_rps=load * saturation_rps)
            replayed = replay_steady_state(plan, profiles, workload, rng=np.random.default_rng(0))
            points.append(
                Point(
                    workflow=name,
                    load=load,
                    rate_rps=plan.rate_rps,
                    predicted_s=predicted(plan).latency_s,
                    replayed_s=replayed.mean_s if replayed else float("nan"),
                )
            )
        points.append(Point(workflow=name, load=None, rate_rps=saturation_rps))
    return points


def predicted(plan: Plan) -> Prediction:
    """The prediction that every plan made for a workload has."""
    assert plan.prediction is not None
    return plan.prediction


async def measure(url: str, points: Sequence[Point], begun_s: float, usual_s: Sequence[float]) -> None:
    """Rounds of every point and seed. Seeds are the outer loop: a point's rounds then lie minutes apart."""
    print(
        f"{'workflow':>16} {'load':>5} {'rate/s':>7} {'seed':>4} {'predicted':>10} {'measured':>9} {'others':>7} "
        f"{'slower':>7}"
    )
    async with client() as session:
        for name, flow in WORKFLOWS.items():
            await asyncio.gather(*(execute(session, url, name, flow, f"warm-up {number}") for number in range(8)))
        before_s = probe_s()
        for seed in SEEDS:
            for point in points:
                for _ in range(1 + REPEATS):
                    with watched() as disturbance:
                        latencies_s, finished_rps = await one_round(session, url, point, seed)
                    after_s = probe_s()
                    ratios = [
                        now / usual for took in (before_s, after_s) for now, usual in zip(took, usual_s, strict=True)
                    ]
                    slower = max((ratio - 1 for ratio in ratios), key=abs)
                    before_s = after_s
                    found = Round(
                        seed=seed,
                        latencies_s=latencies_s,
                        finished_rps=finished_rps,
                        others=disturbance.others,
                        slower=slower,
                    )
                    point.rounds.append(found)
                    show(point, found)
                    if not found.disturbed or time.perf_counter() - begun_s > BUDGET_S:
                        break


async def one_round(
    session: aiohttp.ClientSession, url: str, point: Point, seed: int
) -> tuple[tuple[float, ...], float]:
    """Latencies of the executions that count, and how many were finished per second."""

    flow, drawn = WORKFLOWS[point.workflow], f"{point.workflow} {point.load} {seed}"
    count = TRACED if point.load is None else round(point.rate_rps * ROUND_S)
    names = await draw_evenly(point.workflow, flow, [traced_name(number) for number in range(TRACED)], count, drawn)
    # Every prompt is new, or the engines would find it in their prefix caches.
    again = f"{drawn} {len(point.rounds)}"

    async def one(number: int) -> None:
        name = names[number % count]
        await execute(session, url, point.workflow, flow, name, f"{again} {number}")

    if point.load is None:
        finished = await saturate(one, at_once=SATURATED, seconds=SATURATION_S)
        # Nothing of it may be left when the next round begins.
        await asyncio.sleep(TAIL_S)
        counted = [each for each in finished if each.done_s > 2 * LEAD_S]
        return (), len(counted) / (SATURATION_S - 2 * LEAD_S)
    finished = await poisson(one, rate_rps=point.rate_rps, seconds=ROUND_S, seed=drawn)
    counted = [each for each in finished if LEAD_S < each.sent_s < ROUND_S - TAIL_S]
    return tuple(each.latency_s for each in counted), len(finished) / ROUND_S


def show(point: Point, found: Round) -> None:
    """A line for one round."""
    if point.load is None:
        load, expected, seen = "full", f"{point.rate_rps:.3f}/s", f"{found.finished_rps:.3f}/s"
    else:
        load, expected = f"{point.load:.0%}", f"{point.predicted_s:.3f} s"
        seen = f"{statistics.mean(found.latencies_s):.3f} s"
    print(
        f"{point.workflow:>16} {load:>5} {point.rate_rps:>7.3f} {found.seed:>4} {expected:>10} {seen:>9} "
        f"{found.others:>7.1%} {found.slower:>+7.1%}{'  disturbed' if found.disturbed else ''}",
        flush=True,
    )


def judge(points: Sequence[Point], figures: Mapping[str, object], left: int) -> int:
    """Print each point over all of its seeds, and the bounds."""
    print(
        f"\n{'workflow':>16} {'load':>5} {'runs':>5} {'predicted':>9} {'replayed':>9} {'measured':>9} {'error':>7} "
        f"{'spread':>7}"
    )
    for point in points:
        load = "full" if point.load is None else f"{point.load:.0%}"
        runs = sum(len(one.latencies_s) for one in point.counted)
        expected = point.rate_rps if point.load is None else point.predicted_s
        print(
            f"{point.workflow:>16} {load:>5} {runs:>5} {expected:>9.3f} {point.replayed_s:>9.3f} "
            f"{point.measured:>9.3f} {point.error:>+7.1%} {point.spread:>7.1%}"
        )
    latencies = [point for point in points if point.load is not None]
    saturations = [point for point in points if point.load is None]
    rounds = [one for point in points for one in point.rounds]
    counted = [one for point in points for one in point.counted]
    slower = max(abs(one.slower) for one in counted)
    print(
        f"{len(rounds)} rounds, {sum(one.disturbed for one in rounds)} disturbed, of which "
        f"{sum(one.disturbed for one in counted)} had to count; others took "
        f"{statistics.mean(one.others for one in counted):.1%} of the cores in those that count, at most "
        f"{max(one.others for one in counted):.1%}; a core was slower or faster by at most {slower:.1%}"
    )
    bounds = [
        Bound(
            name="mean error of the mean latency",
            value=statistics.mean(abs(point.error) for point in latencies),
            at_most=0.10,
        ),
        Bound(
            name="mean error of the saturation rate",
            value=statistics.mean(abs(point.error) for point in saturations),
            at_most=0.10,
        ),
        Bound(
            name="executions measured below 70 % load",
            value=sum(len(one.latencies_s) for point in latencies for one in point.counted),
            at_least=200,
        ),
        Bound(name="processes left", value=left, at_most=0),
    ]
    rows = [
        {"workflow": point.workflow, "load": point.load, "rate_rps": point.rate_rps, "error": point.error}
        | {"predicted_s": point.predicted_s, "replayed_s": point.replayed_s, "measured": point.measured}
        | {"spread": point.spread, "disturbed_rounds": sum(one.disturbed for one in point.rounds)}
        for point in points
    ]
    return finish("vllm_accuracy", bounds, {**figures, "points": rows})


def tell(begun_s: float, text: str) -> None:
    """Where it is, and since when."""
    print(f"[{time.perf_counter() - begun_s:5.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
