"""Two LLMs on halves of one H100 under MPS, by Scepsy's own endpoint: predicted against measured (tests/data/h100)."""

from __future__ import annotations

import asyncio
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scepsy.files import load_profile
from scepsy_optimizer.allocation import MAX_UTILISATION, Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.planner import predict
from scepsy_optimizer.profile import StepClock
from scepsy_optimizer.steady_state import replay_steady_state
from scepsy_optimizer.workload import Workload, aggregate

ROOT = Path(__file__).parents[2]
H100 = ROOT / "tests" / "data" / "h100"
CLUSTER = parse_cluster("1xH100")
PROFILES = {llm: load_profile(H100 / f"{llm}.yaml") for llm in ("large", "small")}
HALVES = dict.fromkeys(PROFILES, (Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=1),))
MEASURED = [json.loads(line) for line in (H100 / "shared.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def workloads() -> dict[str, Workload]:
    """What was sent, as traces: the lengths that the benchmark draws, at any duration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks.one_gpu import TRACED, WORKFLOWS

        return {
            name: aggregate([asyncio.run(traced(name, flow, number)) for number in range(TRACED)])
            for name, flow in WORKFLOWS.items()
        }


async def traced(name: str, flow: Any, number: int) -> Execution:
    """An execution whose every token takes a millisecond."""
    spans: list[Span] = []
    now_s = 0.0

    async def call(llm: str, input_tokens: int, output_tokens: int) -> None:
        nonlocal now_s
        asked = Call(llm=llm, input_tokens=input_tokens, output_tokens=output_tokens)
        end_s = now_s + 0.001 * (input_tokens + output_tokens)
        spans.append(Span(id=f"{len(spans)}", parent="r", name=llm, kind="llm", start_s=now_s, end_s=end_s, call=asked))
        # Those that are asked at once begin before any of them ends.
        await asyncio.sleep(0)
        now_s = max(now_s, end_s)

    await flow(call, random.Random(f"{name} traced {number}"))
    root = Span(id="r", parent=None, name=name, kind="workflow", start_s=0.0, end_s=now_s)
    return Execution(id=f"{name} {number}", workflow=name, spans=(root, *spans))


@pytest.mark.parametrize("seen", [row for row in MEASURED if row["rate_rps"]], ids=str)
def test_latencies_on_a_shared_gpu_are_as_predicted_and_as_replayed(
    seen: dict[str, Any], workloads: dict[str, Workload]
) -> None:
    workload = workloads[seen["workflow"]]
    plan = predict(workload, PROFILES, CLUSTER, HALVES, rate_rps=seen["rate_rps"])
    replayed = replay_steady_state(plan, PROFILES, workload, rng=np.random.default_rng(0))
    assert plan.prediction is not None
    assert replayed is not None
    assert plan.prediction.latency_s == pytest.approx(seen["mean_latency_s"], rel=0.17)
    assert replayed.mean_s == pytest.approx(seen["mean_latency_s"], rel=0.17)


def test_half_of_a_gpu_carries_what_the_half_that_waits_for_it_leaves(workloads: dict[str, Workload]) -> None:
    (seen,) = [row for row in MEASURED if row["workflow"] == "draft-and-check" and row["rate_rps"] is None]
    plan = predict(workloads["draft-and-check"], PROFILES, CLUSTER, HALVES, rate_rps=1e-6)
    assert plan.prediction is not None
    assert plan.prediction.bottleneck == "large"
    assert plan.prediction.max_rate_rps / MAX_UTILISATION == pytest.approx(seen["sustained_rps"], rel=0.1)


def test_a_small_llm_leaves_most_of_the_bandwidth_to_its_neighbour() -> None:
    large, small = (StepClock(PROFILES[llm], 1, 0.5).bandwidth_share(1, 300) for llm in ("large", "small"))
    assert 0.6 < large < 0.9
    assert small < 0.4
