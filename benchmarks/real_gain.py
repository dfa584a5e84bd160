"""What a plan is worth on the real vLLM: our plan beside what people do by hand, predicted beside measured.

Two workflows, beam search and retrieval with a reranker, on two models of different size with random weights. Cores are
devices, fractions of them quotas of the kernel's scheduler; of each core a fifth is left to the endpoint and to the
clients, which on a GPU machine have cores of their own. Executions are traced, `scepsy profile` measures both
engines, and then these allocations are deployed one after another:

* even: as many devices for each LLM;
* alone: each LLM scaled alone, as a horizontal autoscaler does, by replicas of half of what a device has for engines;
* by size: such halves dealt out in proportion to the models' sizes, as a careful user would;
* plan: what Scepsy finds for 80 % of the highest rate that it thinks possible, within as much of the devices.

Of each are measured: executions per second while more are always waiting (the sustained rate), and the latency of
Poisson arrivals at a rate that all of them carry. Two allocations that are the same are measured once. Seeds come one
after another, each on all allocations, the next in the opposite order: a machine that becomes slower meanwhile, as
virtual ones do by a half, does so for all of them alike.

    python -m benchmarks.real_gain                           # on two CPU cores; needs .venv-vllm (make test-vllm)
    python -m benchmarks.real_gain --cluster 4xH100 --model large=Qwen/Qwen3-14B --model small=Qwen/Qwen3-1.7B

The machine must be otherwise idle: what others took of it is printed beside every figure. About 40 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil

from benchmarks.cpu_engines import (
    COMMAND,
    ENVIRONMENT,
    Call,
    client,
    execute,
    is_missing,
    make_models,
    poisson,
    profile,
    saturate,
    trace,
)
from benchmarks.machine_noise import probe_s, watched
from benchmarks.outcome import Bound, finish
from scepsy.deployment import deploy, list_deployments
from scepsy_optimizer.allocation import MAX_UTILISATION, UNITS_PER_DEVICE, Choice, Groups
from scepsy_optimizer.baselines import autoscaled, even_split, split_by_weight
from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import describe_choices, optimize, plan_choices, predict
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.search import highest_rate
from scepsy_optimizer.steady_state import replay_steady_state
from scepsy_optimizer.workload import Workload

MODELS = {"large": (512, 8), "small": (256, 4)}
"""Hidden size and layers of each LLM, the larger first."""

TARGET = 0.8
"""The rate that the plan is made for, as a part of the highest that is thought possible."""

LIGHT = 0.6
"""The rate at which latencies are measured, as a part of the least highest rate of all allocations."""

TRACED = 300
ROUND_S, LEAD_S, TAIL_S = 26.0, 4.0, 2.0
SATURATED, SATURATION_S = 24, 26.0
_CORES_FOR_ENGINES = Fraction(4, 5)
_RESAMPLED = 1000

Choices = Mapping[str, Groups]


async def beam_search(call: Call, rng: random.Random) -> None:
    """Up to three rounds: two lines are each continued twice by the large LLM, and the small one grades each result."""
    steps = rng.randint(40, 80)
    for _ in range(rng.choice((1, 2, 2, 3))):
        drafts = [rng.randint(8, 20) for _ in range(4)]

        async def extend(draft: int, steps: int = steps) -> None:
            await call("large", steps, draft)
            await call("small", steps + draft, 2)

        await asyncio.gather(*(extend(draft) for draft in drafts))
        steps += max(drafts)


async def retrieval(call: Call, rng: random.Random) -> None:
    """Up to two rounds in which the small LLM grades six passages; then the large one answers from the best."""
    passages = [rng.randint(60, 140) for _ in range(6)]
    for _ in range(rng.choice((1, 1, 2))):
        await asyncio.gather(*(call("small", passage, 2) for passage in passages))
    await call("large", sum(sorted(passages)[-2:]), rng.randint(16, 40))


WORKFLOWS = {"beam-search": beam_search, "retrieval": retrieval}


@dataclass(slots=True, kw_only=True)
class Policy:
    """One allocation for one workflow: what it is predicted to do, and what was measured of it, seed by seed."""

    workflow: str
    names: list[str]
    plan: Plan
    predicted_s: float
    predicted_p95_s: float
    predicted_rps: float
    sustained_rps: list[float] = field(default_factory=list)
    latencies_s: list[list[float]] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    slower: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Executions per second while more are always waiting."""
        return statistics.mean(self.sustained_rps)

    @property
    def all_s(self) -> list[float]:
        """Latencies over all seeds."""
        return [latency_s for seed in self.latencies_s for latency_s in seed]

    @property
    def mean_s(self) -> float:
        """Mean latency at the light rate."""
        return statistics.mean(self.all_s)

    @property
    def p95_s(self) -> float:
        """95th percentile of the latency at the light rate."""
        return float(np.percentile(self.all_s, 95))

    def interval_s(self) -> tuple[float, float]:
        """95 % interval of the mean latency: a bootstrap over executions."""
        rng = np.random.default_rng(0)
        means = rng.choice(np.array(self.all_s), (_RESAMPLED, len(self.all_s))).mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)


def main() -> int:
    """Trace, profile, allocate in every way, measure all of them, judge."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun_s = time.perf_counter()
    cluster = parse_cluster(args.cluster)
    on_cpu = cluster.device_type == "CPU"
    if on_cpu and is_missing():
        return 2
    named = dict(pair.split("=", 1) for pair in args.model)
    if not on_cpu and sorted(named) != sorted(MODELS):
        print(f"on {cluster.device_type} give --model for each of {', '.join(MODELS)}", file=sys.stderr)
        return 2
    engine, command = ("vllm-cpu", COMMAND) if on_cpu else ("vllm", ("vllm", "serve"))
    flows = {name: WORKFLOWS[name] for name in args.workflow or WORKFLOWS}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        os.environ |= {"SCEPSY_HOME": f"{folder}/home"} | (ENVIRONMENT if on_cpu else {})
        models = make_models(MODELS, folder) if on_cpu else {llm: Path(model) for llm, model in named.items()}
        workloads = asyncio.run(trace(flows, tuple(MODELS), TRACED, folder / "traces"))
        tell(begun_s, f"traced {TRACED} executions of each workflow; profiling")
        profiles = {
            llm: profile(
                llm, models[llm], folder / "traces", folder / f"{llm}.yaml", cluster.device_type, engine, command
            )
            for llm in MODELS
        }
        quickest = probe_s()
        policies: list[Policy] = []
        for name, workload in workloads.items():
            part = _CORES_FOR_ENGINES if on_cpu else Fraction(1)
            found, light_rps = allocate(name, workload, profiles, cluster, part)
            policies += found
            for seed in range(args.seeds):
                for policy in found if seed % 2 == 0 else reversed(found):
                    runs = describe_choices(plan_choices(policy.plan))
                    tell(begun_s, f"{name}, seed {seed}: {', '.join(policy.names)}: {runs}")
                    with deploy(policy.plan, engine=engine, command=command, name="measured") as running:
                        asyncio.run(measure(running.url, policy, light_rps, seed, quickest))
            for policy in found:
                show(policy)
        left = len(psutil.Process().children(recursive=True)) + len(list_deployments())
    notes = {llm: one.provenance.note for llm, one in profiles.items()}
    return judge(policies, {"profiles": notes, "seconds": time.perf_counter() - begun_s}, left)


def arguments() -> argparse.Namespace:
    """What to measure, and where."""
    parser = argparse.ArgumentParser(description="Our plan beside allocations by hand, on the real vLLM.")
    parser.add_argument("--cluster", default="2xCPU", help="where, as 4xH100 (default: 2xCPU)")
    parser.add_argument("--model", action="append", default=[], metavar="LLM=MODEL", help="on GPUs: what is served")
    parser.add_argument("--workflow", action="append", choices=list(WORKFLOWS), help="only this one")
    parser.add_argument("--seeds", type=int, default=2, help="rounds of each allocation (default: 2)")
    return parser.parse_args()


def allocate(
    workflow: str, workload: Workload, profiles: Mapping[str, LLMProfile], cluster: Cluster, part: Fraction
) -> tuple[list[Policy], float]:
    """Every way to allocate `part` of each device, those that come to the same as one, and the rate that all carry."""
    units = int(cluster.devices * part * UNITS_PER_DEVICE)
    highest_rps, _ = highest_rate(workload, profiles, cluster, max_units=units)
    ours = optimize(workload, profiles, cluster, rate_rps=TARGET * highest_rps, max_units=units, replay_seed=0)
    llms = [demand.llm for demand in workload.demands]
    halves = {llm: on_part(profiles[llm], part / 2) for llm in llms}
    limit, devices = cluster.largest_domain, 2 * cluster.devices
    sizes = {llm: profiles[llm].steps[0].weights_gib for llm in llms}
    even = even_split(llms, profiles, devices=cluster.devices, max_tensor_parallel_size=limit)
    alone = autoscaled(workload, halves, rate_rps=highest_rps, devices=devices, max_tensor_parallel_size=1)
    by_size = split_by_weight(sizes, halves, devices=devices, max_tensor_parallel_size=1)
    ways: dict[str, Choices] = {
        "even": {llm: tuple(sized(choice, part) for choice in groups) for llm, groups in even.items()},
        "alone": {llm: tuple(sized(choice, part / 2) for choice in groups) for llm, groups in alone.items()},
        "by size": {llm: joined(groups, part) for llm, groups in by_size.items()},
        "plan": plan_choices(ours),
    }
    plans: dict[str, Plan] = {}
    names: dict[str, list[str]] = {}
    for name, choices in ways.items():
        words = describe_choices(choices)
        plans[words] = predict(workload, profiles, cluster, choices, rate_rps=1e-6)
        names.setdefault(words, []).append(name)
    highest = {words: prediction(plan).max_rate_rps for words, plan in plans.items()}
    light_rps = LIGHT * min(highest.values())
    found = []
    for words, plan in plans.items():
        loaded = predict(workload, profiles, cluster, plan_choices(plan), rate_rps=light_rps)
        replayed = replay_steady_state(loaded, profiles, workload, rng=np.random.default_rng(0))
        found.append(
            Policy(
                workflow=workflow,
                names=names[words],
                plan=loaded,
                predicted_s=prediction(loaded).latency_s,
                predicted_p95_s=replayed.p95_s if replayed else float("nan"),
                predicted_rps=highest[words] / MAX_UTILISATION,
            )
        )
    return found, light_rps


def on_part(whole: LLMProfile, part: Fraction) -> LLMProfile:
    """An LLM on a part of a device, as if that were a device of its own: the unit of those who deal out by hand."""
    decode, prefill = whole.slowdown.decode(float(part), 1), whole.slowdown.prefill(float(part))
    steps = tuple(
        replace(
            one,
            decode_s=tuple(tuple(value * decode for value in row) for row in one.decode_s),
            prefill_s=tuple(value * prefill for value in one.prefill_s),
        )
        for one in whole.steps
        if one.tensor_parallel_size == 1
    )
    return replace(whole, steps=steps, device_memory_gib=whole.device_memory_gib * float(part))


def sized(choice: Choice, part: Fraction) -> Choice:
    """Replicas of that part of a device each; those that take whole ones together keep them."""
    return replace(choice, fraction=part) if choice.tensor_parallel_size == 1 else choice


def joined(groups: Groups, part: Fraction) -> Groups:
    """So many halves of `part` as wholes of it, and a half if one is left."""
    (group,) = groups
    whole, rest = divmod(group.replicas, 2)
    found = [replace(group, fraction=part, replicas=whole)] if whole else []
    return (*found, replace(group, fraction=part / 2, replicas=1)) if rest else tuple(found)


def prediction(plan: Plan):
    """The prediction that every plan made for a workload has."""
    assert plan.prediction is not None
    return plan.prediction


async def measure(url: str, policy: Policy, light_rps: float, seed: int, quickest: Sequence[float]) -> None:
    """A round of both kinds."""
    name, flow = policy.workflow, WORKFLOWS[policy.workflow]

    async def one(number: int) -> None:
        await execute(session, url, name, flow, f"{seed} {number}")

    async with client() as session:
        await asyncio.gather(*(execute(session, url, name, flow, f"warm-up {number}") for number in range(8)))
        slower = [slowness(quickest)]
        with watched() as disturbance:
            arrived = await poisson(one, rate_rps=light_rps, seconds=ROUND_S, seed=f"{name} {seed}")
            slower.append(slowness(quickest))
            finished = await saturate(one, at_once=SATURATED, seconds=SATURATION_S)
        await asyncio.sleep(TAIL_S)
        slower.append(slowness(quickest))
    policy.latencies_s.append([each.latency_s for each in arrived if LEAD_S < each.sent_s < ROUND_S - TAIL_S])
    # The first lead is how long the engines take to fill up, the second how long a wave of executions does.
    counted = sum(each.done_s > 2 * LEAD_S for each in finished)
    policy.sustained_rps.append(counted / (SATURATION_S - 2 * LEAD_S))
    policy.others.append(disturbance.others)
    policy.slower.append(statistics.mean(slower))


def slowness(quickest: Sequence[float]) -> float:
    """How much slower the cores are now than they were at their quickest."""
    return statistics.mean(now / best for now, best in zip(probe_s(), quickest, strict=True)) - 1


def show(policy: Policy) -> None:
    """What was measured of one allocation."""
    low, high = policy.interval_s()
    rates = ", ".join(f"{rate:.2f}" for rate in policy.sustained_rps)
    print(
        f"{policy.workflow:>12} {' = '.join(policy.names):>22}  sustained {rates}/s "
        f"(predicted {policy.predicted_rps:.2f}), "
        f"at {policy.plan.rate_rps:.2f}/s mean {policy.mean_s:.3f} s [{low:.3f}, {high:.3f}] "
        f"(predicted {policy.predicted_s:.3f}), p95 {policy.p95_s:.3f} s (replayed {policy.predicted_p95_s:.3f}); "
        f"others {max(policy.others):.1%}, cores slower by {statistics.mean(policy.slower):.1%}",
        flush=True,
    )


def judge(policies: Sequence[Policy], figures: Mapping[str, object], left: int) -> int:
    """The table, and what the plan gains over each of the others."""
    print(
        f"\n{'workflow':>12} {'allocation':>22} {'sustained/s':>11} {'predicted':>9} {'gain':>6} {'mean s':>7} "
        f"{'predicted':>9} {'gain':>6} {'p95 s':>7} {'replayed':>8}  what runs"
    )
    rows, rate_gains, latency_gains, errors = [], [], [], []
    for policy in policies:
        ours = next(one for one in policies if one.workflow == policy.workflow and "plan" in one.names)
        rate_gain, latency_gain = ours.rate / policy.rate, policy.mean_s / ours.mean_s
        if policy is not ours:
            rate_gains.append(rate_gain)
            latency_gains.append(latency_gain)
        errors += [abs(policy.predicted_s / policy.mean_s - 1), abs(policy.predicted_rps / policy.rate - 1)]
        runs = describe_choices(plan_choices(policy.plan))
        print(
            f"{policy.workflow:>12} {' = '.join(policy.names):>22} {policy.rate:>11.2f} {policy.predicted_rps:>9.2f} "
            f"{rate_gain:>5.2f}x {policy.mean_s:>7.3f} {policy.predicted_s:>9.3f} {latency_gain:>5.2f}x "
            f"{policy.p95_s:>7.3f} {policy.predicted_p95_s:>8.3f}  {runs}"
        )
        rows.append(
            {"workflow": policy.workflow, "allocation": policy.names, "runs": runs, "rate_rps": policy.plan.rate_rps}
            | {"sustained_rps": policy.sustained_rps, "predicted_rps": policy.predicted_rps}
            | {"mean_s": policy.mean_s, "interval_s": policy.interval_s(), "predicted_s": policy.predicted_s}
            | {"p95_s": policy.p95_s, "replayed_p95_s": policy.predicted_p95_s, "executions": len(policy.all_s)}
            | {"others": max(policy.others), "slower": statistics.mean(policy.slower)}
        )
    bounds = [
        Bound(name="least gain of the sustained rate over another allocation", value=min(rate_gains), at_least=1),
        Bound(name="mean error of predicted latencies and rates", value=statistics.mean(errors), at_most=0.15),
        Bound(name="processes left", value=left, at_most=0),
    ]
    gains = {"rate_gains": rate_gains, "latency_gains": latency_gains}
    return finish("real_gain", bounds, {**figures, **gains, "allocations": rows})


def tell(begun_s: float, text: str) -> None:
    """Where it is, and since when."""
    print(f"[{time.perf_counter() - begun_s:5.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
