"""The closed form against the laws it is made of, and against the step-by-step engine."""

import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy.profiling import shipped_profiles
from scepsy_optimizer.allocation import Choice, evaluate_groups
from scepsy_optimizer.cluster import DEVICE_MEMORY_GB_S, parse_cluster
from scepsy_optimizer.engine import Engine
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.planner import predict
from scepsy_optimizer.profile import GIB, PROPORTIONAL, StepClock
from scepsy_optimizer.replay import poisson_arrivals_s, replay
from scepsy_optimizer.replica import CallShape, check_range, loaded_speeds, max_batch, saturation_rps
from scepsy_optimizer.workload import aggregate

SHAPE = CallShape(input_tokens=1000, cached_tokens=0, output_tokens=200, overlap=1.0)


def call_s(profile, rate, shape=SHAPE, fraction=1.0, overlap=1.0):
    speeds = loaded_speeds(profile, 1, fraction, shape, np.array([rate]), np.array([overlap]))
    return float(
        speeds.fixed_s[0] + speeds.input_s[0] * shape.computed_tokens + speeds.output_s[0] * shape.generated_tokens
    )


def simulate(profile, rate, *, calls=1500, fraction=1.0, seed=7):
    """Mean time of Poisson calls of exponential lengths through the engine, after a tenth for warming up."""
    rng = random.Random(seed)
    engine = Engine(profile, tensor_parallel_size=1, fraction=fraction)
    arrivals, now = [], 0.0
    for _ in range(calls):
        now += rng.expovariate(rate)
        arrivals.append((now, max(1, round(rng.expovariate(1 / 1000))), max(1, round(rng.expovariate(1 / 200)))))
    now, nxt, times = 0.0, 0, []
    while True:
        while nxt < calls and arrivals[nxt][0] <= now:
            engine.submit(nxt, prompt_tokens=arrivals[nxt][1], output_tokens=arrivals[nxt][2])
            nxt += 1
        step = engine.step()
        if step is None:
            if nxt == calls:
                return sum(times[calls // 10 :]) / len(times[calls // 10 :])
            now = arrivals[nxt][0]
            continue
        now += step.duration_s
        times += [now - arrivals[request][0] for request in step.finished]


def test_an_idle_replica_takes_prefill_plus_decode_steps(make_profile):
    profile = make_profile("m", host_s=0.001)
    clock = StepClock(profile, 1, 1.0)
    expected = clock.prefill_s(1000) + 0.001 + 199 * (clock.decode_s(1, 1100) + 0.001)
    assert call_s(profile, 1e-9) == pytest.approx(expected, rel=1e-3)


def test_siblings_prompts_are_computed_in_the_same_step(make_profile):
    profile = make_profile("m")
    clock = StepClock(profile, 1, 1.0)
    four = CallShape(input_tokens=2048, cached_tokens=0, output_tokens=200, overlap=4.0, burst=4.0)
    # As many calls at once, but short ones beside a long one: what is in the way is not the mean prompt.
    alone_s = call_s(profile, 1e-9, replace(four, beside_tokens=0.0), overlap=4.0)
    # Four prompts' attention is that of four short ones.
    longer_s = clock.prefill_s(8192, 4 * 2048**2) - clock.prefill_s(2048)
    for siblings in (four, replace(four, beside_tokens=3 * 2048.0)):
        assert call_s(profile, 1e-9, siblings, overlap=4.0) - alone_s == pytest.approx(longer_s, rel=1e-3)


def test_siblings_count_as_the_time_sees_them_that_an_execution_waits(make_profile):
    profile = make_profile("m")
    seen_by_calls = replace(SHAPE, overlap=3.0, parallelism=2.0)
    assert call_s(profile, 1e-9, seen_by_calls, overlap=3.0) == pytest.approx(call_s(profile, 1e-9, overlap=2.0))
    # Where only four run at once, a fan-out of hundreds fills all of the batch, however it is counted.
    narrow = make_profile("m", max_num_seqs=4)
    wide = replace(SHAPE, overlap=300.0, parallelism=100.0)
    assert call_s(narrow, 1e-9, wide, overlap=300.0) == pytest.approx(call_s(narrow, 1e-9, overlap=4.0))


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_the_last_of_three_halves_has_its_device_to_itself(make_execution, replicas):
    profiles = {"m": replace(shipped_profiles("H100")["llama-3.1-8b"], llm="m")}
    halves = {"m": (Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=replicas),)}
    workload = aggregate([make_execution("e", [("m", 0, 1)], tokens=(500, 200))])
    rate = 0.35 * evaluate_groups(workload.demand("m"), [profiles["m"]], halves["m"], calls_rps=1e-6).max_rps
    plan = predict(workload, profiles, parse_cluster("2xH100"), halves, rate_rps=rate)
    arrivals = poisson_arrivals_s(np.random.default_rng(0), rate_rps=rate, executions=500)
    replayed = replay(plan, profiles, [workload.timelines[0]] * 500, arrivals)
    assert plan.prediction.latency_s == pytest.approx(replayed.latencies_s[50:].mean(), rel=0.04)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("load", [0.1, 0.4, 0.7])
def test_the_closed_form_follows_the_engine(make_profile, load, fraction):
    profile = make_profile("m")
    rate = load * saturation_rps(profile, 1, fraction, SHAPE)
    simulated = [simulate(profile, rate, fraction=fraction, seed=seed) for seed in (1, 2, 3)]
    assert call_s(profile, rate, fraction=fraction) == pytest.approx(sum(simulated) / 3, rel=0.08)


def test_the_engine_saturates_where_the_closed_form_says(make_profile):
    profile = make_profile("m")
    engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
    for request in range(2000):
        engine.submit(request, prompt_tokens=1000, output_tokens=200)
    now = 0.0
    while (step := engine.step()) is not None:
        now += step.duration_s
    assert 2000 / now == pytest.approx(saturation_rps(profile, 1, 1.0, SHAPE), rel=0.1)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_occupies_the_engine_is_added_to_the_demand_of_each_call(make_profile, fraction):
    roomy = {"slowdown": PROPORTIONAL, "max_num_seqs": 64, "request_s": 0.02}
    free = make_profile("m", **roomy)
    occupied = make_profile("m", **roomy, request_occupies=True)
    demand_s = [1 / saturation_rps(profile, 1, fraction, SHAPE) for profile in (free, occupied)]
    assert demand_s[1] - demand_s[0] == pytest.approx(0.02 / fraction)
    # An idle one cannot tell who was waited for.
    light = [call_s(profile, 1e-6, fraction=fraction) for profile in (free, occupied)]
    assert light[1] - light[0] == pytest.approx(0.02 / fraction - 0.02, abs=1e-4)


def test_the_closed_form_follows_the_engine_whose_core_the_server_shares(make_profile):
    profile = make_profile("m", request_s=0.02, request_occupies=True)
    rate = 0.7 * saturation_rps(profile, 1, 1.0, SHAPE)
    assert call_s(profile, rate) == pytest.approx(simulate(profile, rate), rel=0.15)


def test_fractions_never_carry_more_than_their_part(make_profile):
    # A device without a data sheet reads no more than the fastest step of the profile does.
    profile = replace(make_profile("m", weights_gib=2.0), device_type="other")
    whole = saturation_rps(profile, 1, 1.0, SHAPE)
    for fraction in (0.5, 0.2, 0.1):
        assert 0 < saturation_rps(profile, 1, fraction, SHAPE) <= fraction * whole
    slow = profile.with_slowdown(PROPORTIONAL)
    assert call_s(slow, 1e-9, fraction=0.5) == pytest.approx(2 * call_s(slow, 1e-9), rel=1e-3)
    assert call_s(profile, 1e-9) < call_s(profile, 1e-9, fraction=0.5) < call_s(slow, 1e-9, fraction=0.5)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_all_fractions_of_a_device_read_no_more_than_it_can(make_profile, scale):
    """At a tenth of the times a device would have to read its weights faster than it can, but for its neighbours."""
    profile = make_profile("m", weights_gib=2.0, scale=scale)
    answer = replace(SHAPE, input_tokens=1)
    for fraction in (0.5, 0.2, 0.1):
        tokens_per_s = saturation_rps(profile, 1, fraction, answer) * answer.generated_tokens
        steps_per_s = tokens_per_s / max_batch(profile, 1, fraction, answer)
        assert steps_per_s * profile.at(1).weights_gib * GIB / fraction <= 1e9 * DEVICE_MEMORY_GB_S["H100"]


def test_halves_of_a_device_that_waits_carry_more_than_the_whole(make_profile):
    waiting = make_profile("m", weights_gib=0.5, host_s=0.02)
    answer = replace(SHAPE, input_tokens=1)
    whole = saturation_rps(waiting, 1, 1.0, answer)
    assert 0.6 * whole < saturation_rps(waiting, 1, 0.5, answer) < whole


def test_what_does_not_fit_has_no_capacity(make_profile):
    profile = make_profile("m")
    assert saturation_rps(profile, 1, 0.1, SHAPE) == 0
    long = CallShape(input_tokens=1000, cached_tokens=0, output_tokens=10, overlap=1, longest_tokens=10**7)
    assert max_batch(profile, 1, 1.0, long) == 0
    assert np.isinf(loaded_speeds(profile, 1, 0.1, SHAPE, np.array([1.0]), np.array([1.0])).output_s).all()


@settings(max_examples=60, deadline=None)
@given(
    load=st.floats(0.01, 0.84),
    prompt=st.integers(1, 6000),
    output=st.integers(0, 800),
    overlap=st.floats(1, 8),
)
def test_more_load_is_never_faster(make_profile, load, prompt, output, overlap):
    profile = make_profile("m")
    shape = CallShape(input_tokens=prompt, cached_tokens=0, output_tokens=output, overlap=overlap)
    saturation = saturation_rps(profile, 1, 1.0, shape)
    light, heavy = call_s(profile, saturation * load / 2, shape), call_s(profile, saturation * load, shape)
    assert 0 < light <= heavy * (1 + 1e-9) < float("inf")


def test_calls_longer_than_the_profile_knows_are_refused(make_profile, make_execution):
    profile = make_profile("m", max_model_len=4096)
    demand = aggregate([make_execution("e", [("m", 0, 1)], tokens=(4000, 90))]).demand("m")
    check_range(profile, demand)
    longer = aggregate([make_execution("e", [("m", 0, 1)], tokens=(4000, 100))]).demand("m")
    with pytest.raises(ScepsyError, match="reach 4,100 tokens, its profile on H100 is for engines with max_model_len"):
        check_range(profile, longer)
    beyond = aggregate([make_execution("e", [("m", 0, 1)], tokens=(9000, 100))]).demand("m")
    with pytest.raises(
        ScepsyError, match="decode at 9,050 tokens of context on average, its profile on H100 ends at 8,192"
    ):
        check_range(make_profile("m"), beyond)
