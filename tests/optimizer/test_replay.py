"""Replay against the pipeline at light load, against queueing theory, and against itself."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.planner import hand_made_plan, predict
from scepsy_optimizer.profile import LLMProfile, Provenance, StepTimes
from scepsy_optimizer.replay import poisson_arrivals_s, replay
from scepsy_optimizer.timeline import compile_timeline
from scepsy_optimizer.workload import aggregate

CLUSTER = parse_cluster("4xH100")


def choice(replicas, fraction=1, size=1):
    return (Choice(tensor_parallel_size=size, fraction=Fraction(fraction), replicas=replicas),)


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {"a": make_profile("a"), "b": make_profile("b", scale=0.5, weights_gib=4.0)}


@pytest.fixture(scope="module")
def runs(make_execution):
    rng = np.random.default_rng(5)
    made = []
    for number in range(40):
        first, second = rng.uniform(1, 3, 2)
        triples = [("a", 0, first), ("a", 0, second), ("b", max(first, second) + 0.2, max(first, second) + 1)]
        tokens = (int(rng.integers(100, 1500)), int(rng.integers(20, 250)))
        made.append(make_execution(f"e{number}", triples, tokens=tokens))
    return made


def test_light_load_equals_the_pipeline(runs, profiles):
    workload = aggregate(runs)
    choices = {"a": choice(2), "b": choice(1)}
    plan = predict(workload, profiles, CLUSTER, choices, rate_rps=0.01)
    arrivals = np.arange(len(runs)) * 1000.0
    replayed = replay(plan, profiles, workload.timelines, arrivals)
    assert plan.prediction is not None
    assert replayed.latencies_s.mean() == pytest.approx(plan.prediction.latency_s, rel=0.02)
    assert len(replayed.calls) == sum(len(timeline.calls) for timeline in workload.timelines)


def test_light_load_of_unequal_fan_outs_equals_the_pipeline(make_execution, profiles):
    """Most calls have many siblings, most executions do not: the pipeline counts executions."""
    runs = [make_execution(f"e{width}", [("a", 0, 2)] * width + [("b", 2, 3)]) for width in (1, 1, 1, 2, 4, 12)]
    workload = aggregate(runs)
    plan = predict(workload, profiles, CLUSTER, {"a": choice(1), "b": choice(1)}, rate_rps=1e-6)
    replayed = replay(plan, profiles, workload.timelines, np.arange(len(runs)) * 1000.0)
    assert plan.prediction is not None
    assert plan.prediction.latency_s == pytest.approx(replayed.latencies_s.mean(), rel=0.01)


def test_time_outside_the_engine_is_added_to_each_call_and_occupies_nothing(runs, profiles):
    workload = aggregate(runs)
    slower = {llm: replace(profile, request_s=0.25) for llm, profile in profiles.items()}
    found = []
    for used in (profiles, slower):
        plan = predict(workload, used, CLUSTER, {"a": choice(2), "b": choice(1)}, rate_rps=0.01)
        replayed = replay(plan, used, workload.timelines, np.arange(len(runs)) * 1000.0)
        assert plan.prediction is not None
        found.append((plan.prediction.latency_s, float(replayed.latencies_s.mean())))
        assert len(replayed.calls) == 3 * len(runs)
    # two calls on every critical path
    assert found[1][0] - found[0][0] == pytest.approx(0.5)
    assert found[1][1] - found[0][1] == pytest.approx(0.5, abs=0.01)


def test_moderate_load_is_near_the_pipeline(runs, profiles):
    workload = aggregate(runs)
    plan = predict(workload, profiles, CLUSTER, {"a": choice(1), "b": choice(1)}, rate_rps=3.0)
    assert plan.prediction is not None
    rng = np.random.default_rng(1)
    many = [workload.timelines[index] for index in rng.integers(0, len(runs), 1500)]
    replayed = replay(plan, profiles, many, poisson_arrivals_s(rng, rate_rps=3.0, executions=1500))
    assert replayed.latencies_s.mean() == pytest.approx(plan.prediction.latency_s, rel=0.08)


def one_at_a_time(service_s):
    """An engine that serves one request at a time, each in one step of `service_s`."""
    steps = StepTimes(
        tensor_parallel_size=1,
        batch_sizes=(1,),
        context_tokens=(1,),
        decode_s=((service_s,),),
        prefill_tokens=(1,),
        prefill_s=(service_s,),
        weights_gib=1,
        overhead_gib=1,
        kv_bytes_per_token=1000,
    )
    provenance = Provenance(source="estimate", tool="made up", engine="none", date="2026-01-01")
    return LLMProfile(
        llm="m",
        model="m",
        device_type="H100",
        device_memory_gib=80,
        steps=(steps,),
        provenance=provenance,
        max_num_seqs=1,
    )


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_at_a_time_is_the_m_d_1_queue(load):
    """Pollaczek and Khinchine: mean wait = load * service / (2 (1 - load)) for constant service times."""
    root = Span(id="r", parent=None, name="w", kind="workflow", start_s=0, end_s=1)
    span = Span(id="c", parent="r", name="m", kind="llm", start_s=0, end_s=1, call=Call(llm="m", output_tokens=1))
    timeline = compile_timeline(Execution(id="e", workflow="w", spans=(root, span)))
    profiles = {"m": one_at_a_time(1.0)}
    plan = hand_made_plan({"m": choice(1)}, profiles, CLUSTER)
    arrivals = poisson_arrivals_s(np.random.default_rng(2), rate_rps=load, executions=40_000)
    replayed = replay(plan, profiles, [timeline] * len(arrivals), arrivals)
    assert replayed.latencies_s.mean() == pytest.approx(1 + load / (2 * (1 - load)), rel=0.06)
    # Little's law: mean number in the system = rate * mean time in it
    span_s = max(call.end_s for call in replayed.calls) - arrivals[0]
    inside = sum(call.end_s - call.start_s for call in replayed.calls) / span_s
    assert inside == pytest.approx(load * replayed.latencies_s.mean(), rel=0.05)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.floats(0.1, 30))
def test_nothing_is_lost_and_calls_keep_their_order(runs, profiles, seed, rate):
    workload = aggregate(runs)
    plan = hand_made_plan({"a": choice(2, Fraction(1, 2)), "b": choice(2, Fraction(1, 5))}, profiles, CLUSTER)
    rng = np.random.default_rng(seed)
    arrivals = poisson_arrivals_s(rng, rate_rps=rate, executions=len(runs))
    replayed = replay(plan, profiles, workload.timelines, arrivals)
    seen = {(call.execution, call.call) for call in replayed.calls}
    assert len(seen) == len(replayed.calls) == sum(len(timeline.calls) for timeline in workload.timelines)
    assert (replayed.latencies_s > 0).all()
    for call in replayed.calls:
        assert arrivals[call.execution] <= call.start_s < call.end_s
    ends = {(call.execution, call.call): call.end_s for call in replayed.calls}
    for call in replayed.calls:
        if call.llm == "b":
            assert call.start_s >= max(ends[call.execution, 0], ends[call.execution, 1])
    again = replay(plan, profiles, workload.timelines, arrivals)
    assert (again.latencies_s == replayed.latencies_s).all()


def test_what_cannot_be_replayed_is_told(runs, profiles):
    plan = hand_made_plan({"a": choice(1)}, profiles, CLUSTER)
    timelines = [compile_timeline(run) for run in runs]
    with pytest.raises(ScepsyError, match="the executions call b, which the plan does not serve"):
        replay(plan, profiles, timelines, np.arange(len(runs)))
    with pytest.raises(ScepsyError, match="no profile for 'a'"):
        replay(plan, {}, timelines, np.arange(len(runs)))
