"""Replay against the laws of queueing theory."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from scepsy.profiling import shipped_profiles
from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.profile import LLMProfile, Provenance, StepClock, StepTimes
from scepsy_optimizer.replay import poisson_arrivals_s, replay
from scepsy_optimizer.replica import CallShape, loaded_speeds
from scepsy_optimizer.timeline import compile_timeline

STEP_S = 0.02
CLUSTER = parse_cluster("1xH100")


def one_call(tokens):
    root = Span(id="r", parent=None, name="w", kind="workflow", start_s=0, end_s=1)
    call = Call(llm="m", input_tokens=1, output_tokens=tokens)
    span = Span(id="c", parent="r", name="m", kind="llm", start_s=0, end_s=1, call=call)
    return compile_timeline(Execution(id="e", workflow="w", spans=(root, span)))


def server(*, sharing):
    """One call at a time, a step per token; or, `sharing`, a step for all that is as much longer as there are calls."""
    batches = (1, 1000) if sharing else (1,)
    prefill_s = 1e-6 if sharing else STEP_S
    steps = StepTimes(
        tensor_parallel_size=1,
        batch_sizes=batches,
        context_tokens=(1,),
        decode_s=tuple((STEP_S * batch,) for batch in batches),
        prefill_tokens=(1,),
        prefill_s=(prefill_s,),
        weights_gib=1,
        overhead_gib=1,
        kv_bytes_per_token=1000,
    )
    return LLMProfile(
        llm="m",
        model="m",
        device_type="H100",
        device_memory_gib=80,
        steps=(steps,),
        provenance=Provenance(source="estimate", tool="made up", engine="none", date="2026-01-01"),
        max_num_seqs=1000 if sharing else 1,
    )


def run(profile, tokens, rate, seed=3):
    tokens = [int(count) for count in tokens]
    timelines = {count: one_call(count) for count in set(tokens)}
    profiles = {"m": profile}
    plan = hand_made_plan({"m": (Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=1),)}, profiles, CLUSTER)
    arrivals = poisson_arrivals_s(np.random.default_rng(seed), rate_rps=rate, executions=len(tokens))
    arrivals *= len(tokens) / rate / arrivals[-1]
    return replay(plan, profiles, [timelines[count] for count in tokens], arrivals)


@pytest.mark.parametrize("load", [0.4, 0.7])
@pytest.mark.parametrize("lengths", ["geometric", "two"])
def test_one_at_a_time_is_the_m_g_1_queue(load, lengths):
    """Pollaczek and Khinchine: mean wait = rate E[S^2] / (2 (1 - load)); geometric lengths are nearly M/M/1."""
    rng = np.random.default_rng(8)
    tokens = rng.geometric(0.1, 8_000) if lengths == "geometric" else rng.choice([2, 18], 8_000)
    service = tokens * STEP_S
    rate = load / service.mean()
    found = run(server(sharing=False), tokens, rate)
    wait = rate * (service**2).mean() / (2 * (1 - load))
    assert found.latencies_s.mean() == pytest.approx(service.mean() + wait, rel=0.06)
    if lengths == "geometric":
        assert found.latencies_s.mean() == pytest.approx(service.mean() / (1 - load), rel=0.1)
    # Work is conserved, and what runs and waits is the rate times the time in the system (Little).
    (use,) = found.uses
    span_s = found.calls[-1].end_s - min(call.start_s for call in found.calls)
    assert use.busy == pytest.approx(service.sum() / span_s, rel=1e-6)
    assert use.running == pytest.approx(use.busy)
    inside = sum(call.end_s - call.start_s for call in found.calls) / span_s
    assert use.running + use.waiting == pytest.approx(inside, rel=0.05)


@pytest.mark.parametrize("load", [0.4, 0.7])
@pytest.mark.parametrize("lengths", ["same", "two", "geometric"])
def test_decoding_together_is_processor_sharing(load, lengths):
    """M/G/1-PS: E[S] / (1 - load), whatever the distribution of the lengths; the closed form says the same."""
    rng = np.random.default_rng(9)
    count = 5000
    drawn = {"same": np.full(count, 40), "two": rng.choice([10, 70], count), "geometric": rng.geometric(1 / 40, count)}
    tokens = drawn[lengths]
    # a call's first token comes with its prompt, which takes no time
    service = (tokens - 1) * STEP_S
    rate = load / service.mean()
    profile = server(sharing=True)
    found = run(profile, tokens, rate).latencies_s.mean()
    assert found == pytest.approx(service.mean() / (1 - load), rel=0.1)
    shape = CallShape(input_tokens=1, cached_tokens=0, output_tokens=float(tokens.mean()), overlap=1)
    speeds = loaded_speeds(profile, 1, 1.0, shape, np.array([rate]), np.array([1.0]))
    predicted = speeds.fixed_s[0] + speeds.input_s[0] + speeds.output_s[0] * tokens.mean()
    assert predicted == pytest.approx(service.mean() / (1 - load), rel=0.06)


def test_neighbours_on_a_device_share_its_bandwidth():
    """Two halves decode at once: each is as much slower as both together ask for more bandwidth than there is."""
    shipped = shipped_profiles("H100")["llama-3.1-8b"]
    profiles = {name: replace(shipped, llm=name) for name in ("a", "b")}
    half = (Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=1),)
    plan = hand_made_plan({"a": half, "b": half}, profiles, CLUSTER)
    assert plan.llms[0].slots == plan.llms[1].slots
    root = Span(id="r", parent=None, name="w", kind="workflow", start_s=0, end_s=9)

    def calls(*llms):
        spans = [
            Span(
                id=llm,
                parent="r",
                name=llm,
                kind="llm",
                start_s=0,
                end_s=9,
                call=Call(llm=llm, input_tokens=1, output_tokens=300),
            )
            for llm in llms
        ]
        return compile_timeline(Execution(id="e", workflow="w", spans=(root, *spans)))

    alone = replay(plan, profiles, [calls("a")], [0.0]).latencies_s[0]
    together = replay(plan, profiles, [calls("a", "b")], [0.0]).latencies_s[0]
    clock = StepClock(profiles["a"], 1, 0.5)
    share = clock.bandwidth_share(1, 150)
    assert 0.5 < share < 1
    assert together / alone == pytest.approx(2 * share, rel=0.02)
