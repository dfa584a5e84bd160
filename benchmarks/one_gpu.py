"""One GPU that two LLMs share under MPS, on the real vLLM: predicted beside measured.

Two Llamas of 8 and of 1 billion parameters, weights made up by vLLM itself, are profiled by `scepsy profile` on the
whole GPU and on parts of it. Then `scepsy deploy` gives each half of it, and after that what Scepsy's plan says. Two
workflows are sent to each endpoint as Poisson arrivals, at the same rates to both, and as fast as they are answered.
Needs a GPU of at least 40 GiB, NVIDIA's MPS, and vLLM in this Python; the GPU must be idle. About 12 minutes, of which
8 are spared where the profiles are there already.

    python -m benchmarks.one_gpu --device-type H100 --keep profiles
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.cpu_engines import (
    ENVIRONMENT,
    ROOT,
    Call,
    client,
    draw_evenly,
    execute,
    poisson,
    profile,
    saturate,
    trace,
    traced_name,
)
from benchmarks.outcome import Bound, finish
from scepsy.deployment import deploy, list_deployments
from scepsy.deployment.machine import find_gpus
from scepsy.files import load_profile
from scepsy.traces import read_executions
from scepsy_optimizer.allocation import MAX_UTILISATION, Choice, Groups
from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan, Prediction
from scepsy_optimizer.planner import describe_choices, hand_made_plan, optimize, plan_choices, predict
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.questions import optimize_rate
from scepsy_optimizer.steady_state import replay_steady_state
from scepsy_optimizer.workload import Workload, aggregate

Row = dict[str, Any]
"""One figure: what was predicted, what was measured."""

SHAPES = {"large": (4096, 32, 32, 8, 14336, 128256), "small": (2048, 16, 32, 8, 8192, 128256)}
"""Hidden size, layers, heads, heads of keys and values, intermediate size, vocabulary: Llama 3.1 8B and 3.2 1B."""

COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--load-format", "dummy")
OPTIONS = ("--requests", "30", "--max-num-seqs", "64", "--max-num-batched-tokens", "4096", "--max-model-len", "4096")
HALVES: Mapping[str, Groups] = dict.fromkeys(
    SHAPES, (Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=1),)
)
LOADS = (0.3, 0.6)
"""The rates, as parts of the saturation rate of the halves."""

TARGET = 0.8
"""The rate that the plan is made for, as a part of the highest that is thought possible."""

TRACED = 100
ROUND_S, LEAD_S, TAIL_S = 16.0, 3.0, 2.0
SATURATED, SATURATION_S = 64, 14.0


async def draft_and_check(call: Call, rng: random.Random) -> None:
    """A chain: the large LLM drafts, the small one reads prompt and draft and gives a verdict."""
    prompt, draft = rng.randint(200, 1200), rng.randint(60, 180)
    await call("large", prompt, draft)
    await call("small", prompt + draft, rng.randint(10, 40))


async def vote_and_judge(call: Call, rng: random.Random) -> None:
    """A fan-out: four answers at once by the small LLM, which the large one reads to judge."""
    answers = [rng.randint(40, 160) for _ in range(4)]
    question = rng.randint(100, 800)
    await asyncio.gather(*(call("small", question, tokens) for tokens in answers))
    await call("large", question + sum(answers), rng.randint(20, 80))


WORKFLOWS = {"draft-and-check": draft_and_check, "vote-and-judge": vote_and_judge}


def main() -> int:
    """Profile, predict, deploy, measure, judge."""
    parser = argparse.ArgumentParser(description="Two LLMs on one GPU under MPS: predicted beside measured.")
    parser.add_argument("--device-type", default="H100", help="what the GPU is (default: H100)")
    parser.add_argument("--fractions", default="1,0.5", help="of the GPU, at which each is profiled (default: 1,0.5)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the profiles there")
    args = parser.parse_args()
    try:
        find_gpus()
    except ScepsyError as error:
        print(error, file=sys.stderr)
        return 2
    begun_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        kept = args.keep or folder
        kept.mkdir(parents=True, exist_ok=True)
        os.environ |= ENVIRONMENT | {"SCEPSY_HOME": f"{folder}/home"}
        for llm, shape in SHAPES.items():
            script = ROOT / "benchmarks" / "dummy_model.py"
            words = [sys.executable, str(script), str(folder / llm), *(str(number) for number in shape)]
            subprocess.run(words, check=True, capture_output=True)
        workloads = asyncio.run(trace(WORKFLOWS, tuple(SHAPES), TRACED, folder / "traces"))
        mix = aggregate(read_executions([folder / "traces"]).executions)
        tell(begun_s, f"traced {TRACED} executions of each workflow; profiling")
        options = (*OPTIONS, "--fractions", args.fractions)
        profiles = {}
        for llm in SHAPES:
            file, traces = kept / f"{llm}.yaml", folder / "traces"
            known = load_profile(file) if file.exists() else None
            found = known or profile(llm, folder / llm, traces, file, args.device_type, "vllm", COMMAND, options)
            profiles[llm] = replace(found, model=str(folder / llm))
            print(f"{llm}: {found.provenance.note}; {found.slowdown}", flush=True)
        cluster = parse_cluster(f"1x{args.device_type}")
        rate_rps = TARGET * optimize_rate(mix, profiles, cluster).rate_rps
        ours = plan_choices(optimize(mix, profiles, cluster, rate_rps=rate_rps, replay_seed=0))
        rows: list[Row] = []
        for name, choices in {"halves": HALVES, "plan": ours}.items():
            tell(begun_s, f"deploying {name}: {describe_choices(choices)}")
            plan = hand_made_plan(choices, profiles, cluster)
            with deploy(plan, engine="vllm", command=COMMAND, name="shared") as running:
                tell(begun_s, "measuring")
                rows += asyncio.run(measure(running.url, name, choices, workloads, profiles, cluster))
        left = len(psutil.Process().children(recursive=True)) + len(list_deployments())
    return judge(rows, {"seconds": time.perf_counter() - begun_s, "plan": describe_choices(ours)}, left)


async def measure(
    url: str,
    allocation: str,
    choices: Mapping[str, Groups],
    workloads: Mapping[str, Workload],
    profiles: Mapping[str, LLMProfile],
    cluster: Cluster,
) -> list[Row]:
    """Each workflow at each rate, and as fast as it goes."""
    names = [traced_name(number) for number in range(TRACED)]
    rows: list[Row] = []
    async with client() as session:
        for name, flow in WORKFLOWS.items():
            workload = workloads[name]

            def at(
                rate_rps: float, allocated: Mapping[str, Groups] = choices, workload: Workload = workload
            ) -> Prediction:
                return predicted(predict(workload, profiles, cluster, allocated, rate_rps=rate_rps))

            await asyncio.gather(*(execute(session, url, name, flow, f"warm-up {number}") for number in range(16)))
            saturation_rps = at(1e-6).max_rate_rps / MAX_UTILISATION
            halves_rps = at(1e-6, HALVES).max_rate_rps / MAX_UTILISATION
            for load in (*LOADS, None):
                rate_rps = saturation_rps if load is None else load * halves_rps
                count = TRACED if load is None else round(rate_rps * ROUND_S)
                drawn = await draw_evenly(name, flow, names * (count // TRACED + 1), count, f"{name} {load}")

                async def one(number: int, load: float | None = load, drawn: list[str] = drawn) -> None:
                    again = f"{load} {number}"
                    await execute(session, url, name, flow, drawn[number % len(drawn)], again)  # noqa: B023 - awaited here

                replayed = None
                if load is None:
                    finished = await saturate(one, at_once=SATURATED, seconds=SATURATION_S)
                    counted = [each for each in finished if each.done_s > 2 * LEAD_S]
                    guess, seen = saturation_rps, len(counted) / (SATURATION_S - 2 * LEAD_S)
                    await asyncio.sleep(TAIL_S)
                else:
                    finished = await poisson(one, rate_rps=rate_rps, seconds=ROUND_S, seed=f"{name} {load}")
                    counted = [each for each in finished if LEAD_S < each.sent_s < ROUND_S - TAIL_S]
                    guess, seen = at(rate_rps).latency_s, statistics.mean(each.latency_s for each in counted)
                    plan = predict(workload, profiles, cluster, choices, rate_rps=rate_rps)
                    steady = replay_steady_state(plan, profiles, workload, rng=np.random.default_rng(0))
                    replayed = None if steady is None else steady.mean_s
                rows.append(
                    {"allocation": allocation, "workflow": name, "load": load, "rate_rps": rate_rps}
                    | {"runs": len(counted), "predicted": guess, "replayed": replayed, "measured": seen}
                    | {"error": guess / seen - 1}
                )
                show(rows[-1])
    return rows


def show(row: Row) -> None:
    """One figure as it comes."""
    load, replayed = row["load"], row["replayed"]
    again = "" if replayed is None else f", replayed {replayed:.3f}"
    print(
        f"{row['allocation']:>7} {row['workflow']:>16} {'full' if load is None else f'{load:.0%}':>5} "
        f"{row['rate_rps']:>6.2f}/s {row['runs']:>4} runs: predicted {row['predicted']:.3f}{again}, "
        f"measured {row['measured']:.3f} {'/s' if load is None else ' s'}, {row['error']:+.1%}",
        flush=True,
    )


def predicted(plan: Plan) -> Prediction:
    """The prediction that every plan made for a workload has."""
    assert plan.prediction is not None
    return plan.prediction


def judge(rows: list[Row], figures: Mapping[str, object], left: int) -> int:
    """The bounds."""

    def mean_error(*, full: bool) -> float:
        return statistics.mean(abs(row["error"]) for row in rows if (row["load"] is None) == full)

    measured = {(row["allocation"], row["workflow"], row["load"]): row["measured"] for row in rows}
    gains = {
        (name, load): measured["halves", name, load] / measured["plan", name, load]
        for name in WORKFLOWS
        for load in (*LOADS, None)
    }
    for (name, load), halves in gains.items():
        what = f"carries {1 / halves:.2f} times" if load is None else f"at {load:.0%} is {halves:.2f} times as fast as"
        print(f"{name}: the plan {what} the halves")
    slower = [1 / gain for (_, load), gain in gains.items() if load is not None]
    slower += [gain for (_, load), gain in gains.items() if load is None]
    bounds = [
        Bound(name="mean error of the mean latency", value=mean_error(full=False), at_most=0.10),
        Bound(name="mean error of the saturation rate", value=mean_error(full=True), at_most=0.10),
        Bound(name="worst of the plan beside the halves", value=max(slower), at_most=1.05),
        Bound(name="processes left", value=left, at_most=0),
    ]
    return finish("one_gpu", bounds, {**figures, "points": rows})


def tell(begun_s: float, text: str) -> None:
    """Where it is, and since when."""
    print(f"[{time.perf_counter() - begun_s:5.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
