"""One GPU that two LLMs share under MPS, on the real vLLM: predicted beside measured.

Two Llamas of 8 and of 1 billion parameters, weights made up by vLLM itself, are profiled by `scepsy profile` on the
whole GPU and on parts of it. Then each gets half of it from `scepsy deploy`, and two workflows are sent to the endpoint
as Poisson arrivals, and as fast as they are answered. Needs a GPU of at least 40 GiB, NVIDIA's MPS, and vLLM in this
Python; the GPU must be idle. About 8 minutes.

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
from fractions import Fraction
from pathlib import Path

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
from scepsy_optimizer.allocation import MAX_UTILISATION, Choice, Groups
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan, Prediction
from scepsy_optimizer.planner import hand_made_plan, predict
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.workload import Workload

SHAPES = {"large": (4096, 32, 32, 8, 14336, 128256), "small": (2048, 16, 32, 8, 8192, 128256)}
"""Hidden size, layers, heads, heads of keys and values, intermediate size, vocabulary: Llama 3.1 8B and 3.2 1B."""

COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--load-format", "dummy")
OPTIONS = ("--requests", "30", "--max-num-seqs", "64", "--max-num-batched-tokens", "4096", "--max-model-len", "4096")
HALVES: Mapping[str, Groups] = dict.fromkeys(
    SHAPES, (Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=1),)
)
LOADS = (0.3, 0.6)
TRACED = 100
ROUND_S, LEAD_S, TAIL_S = 20.0, 3.0, 2.0
SATURATED, SATURATION_S = 48, 16.0


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
        tell(begun_s, f"traced {TRACED} executions of each workflow; profiling")
        options = (*OPTIONS, "--fractions", args.fractions)
        profiles = {
            llm: profile(
                llm, folder / llm, folder / "traces", kept / f"{llm}.yaml", args.device_type, "vllm", COMMAND, options
            )
            for llm in SHAPES
        }
        for llm, one in profiles.items():
            print(f"{llm}: {one.provenance.note}; {one.slowdown}", flush=True)
        tell(begun_s, "deploying")
        plan = hand_made_plan(HALVES, profiles, parse_cluster(f"1x{args.device_type}"))
        with deploy(plan, engine="vllm", command=COMMAND, name="shared") as running:
            rows = asyncio.run(measure(running.url, workloads, profiles, args.device_type))
        left = len(psutil.Process().children(recursive=True)) + len(list_deployments())
    return judge(rows, {"seconds": time.perf_counter() - begun_s}, left)


async def measure(
    url: str, workloads: Mapping[str, Workload], profiles: Mapping[str, LLMProfile], device_type: str
) -> list[dict[str, object]]:
    """Each workflow at each load, and as fast as it goes."""
    cluster = parse_cluster(f"1x{device_type}")
    names = [traced_name(number) for number in range(TRACED)]
    rows: list[dict[str, object]] = []
    print(f"{'workflow':>16} {'load':>5} {'rate/s':>7} {'runs':>5} {'predicted':>10} {'measured':>9} {'error':>7}")
    async with client() as session:
        for name, flow in WORKFLOWS.items():
            workload = workloads[name]
            await asyncio.gather(*(execute(session, url, name, flow, f"warm-up {number}") for number in range(16)))
            saturation_rps = predicted(predict(workload, profiles, cluster, HALVES, rate_rps=1e-6)).max_rate_rps
            saturation_rps /= MAX_UTILISATION
            for load in (*LOADS, None):
                rate_rps = saturation_rps if load is None else load * saturation_rps
                count = TRACED if load is None else round(rate_rps * ROUND_S)
                drawn = await draw_evenly(name, flow, names * (count // TRACED + 1), count, f"{name} {load}")

                async def one(number: int, load: float | None = load, drawn: list[str] = drawn) -> None:
                    again = f"{load} {number}"
                    await execute(session, url, name, flow, drawn[number % len(drawn)], again)  # noqa: B023 - awaited here

                if load is None:
                    finished = await saturate(one, at_once=SATURATED, seconds=SATURATION_S)
                    counted = [each for each in finished if each.done_s > 2 * LEAD_S]
                    guess, seen = saturation_rps, len(counted) / (SATURATION_S - 2 * LEAD_S)
                    await asyncio.sleep(TAIL_S)
                else:
                    finished = await poisson(one, rate_rps=rate_rps, seconds=ROUND_S, seed=f"{name} {load}")
                    counted = [each for each in finished if LEAD_S < each.sent_s < ROUND_S - TAIL_S]
                    guess = predicted(predict(workload, profiles, cluster, HALVES, rate_rps=rate_rps)).latency_s
                    seen = statistics.mean(each.latency_s for each in counted)
                unit = "/s" if load is None else " s"
                print(
                    f"{name:>16} {'full' if load is None else f'{load:.0%}':>5} {rate_rps:>7.2f} {len(counted):>5} "
                    f"{guess:>8.3f}{unit} {seen:>7.3f}{unit} {guess / seen - 1:>+7.1%}",
                    flush=True,
                )
                rows.append(
                    {"workflow": name, "load": load, "rate_rps": rate_rps, "runs": len(counted)}
                    | {"predicted": guess, "measured": seen, "error": guess / seen - 1}
                )
    return rows


def predicted(plan: Plan) -> Prediction:
    """The prediction that every plan made for a workload has."""
    assert plan.prediction is not None
    return plan.prediction


def judge(rows: list[dict[str, object]], figures: Mapping[str, object], left: int) -> int:
    """The bounds."""

    def mean_error(*, full: bool) -> float:
        return statistics.mean(abs(float(str(row["error"]))) for row in rows if (row["load"] is None) == full)

    bounds = [
        Bound(name="mean error of the mean latency", value=mean_error(full=False), at_most=0.10),
        Bound(name="mean error of the saturation rate", value=mean_error(full=True), at_most=0.10),
        Bound(name="processes left", value=left, at_most=0),
    ]
    return finish("one_gpu", bounds, {**figures, "points": rows})


def tell(begun_s: float, text: str) -> None:
    """Where it is, and since when."""
    print(f"[{time.perf_counter() - begun_s:5.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
