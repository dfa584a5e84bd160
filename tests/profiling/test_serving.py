"""One replica under a load generator: closed forms, and the engine model step by step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scepsy.profiling import shipped_profiles
from scepsy.profiling.calibrating import Correction, ServingPoint, calibrate, corrected, fit_correction
from scepsy.profiling.serving import Load, Response, predict_response
from scepsy_optimizer.engine import Engine
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import StepClock

PROFILE = shipped_profiles("H100")["generator"]


def simulate(profile, clients, input_tokens, output_tokens, waves):
    """Mean response of a closed loop of clients on the engine model, all of them starting at once."""
    engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
    now, sent, first, done = 0.0, {}, {}, {}
    left = clients * waves
    for number in range(clients):
        engine.submit(number, prompt_tokens=input_tokens, output_tokens=output_tokens)
        sent[number] = now
    number, left = clients, left - clients
    while (step := engine.step()) is not None:
        now += step.duration_s
        for request in step.tokens:
            first.setdefault(request, now)
        for request in step.finished:
            done[request] = now
            if left > 0:
                engine.submit(number, prompt_tokens=input_tokens, output_tokens=output_tokens)
                sent[number] = now
                number, left = number + 1, left - 1
    first_s = sum(first[request] - sent[request] for request in sent) / len(sent)
    per_token_s = sum(done[request] - first[request] for request in sent) / len(sent) / (output_tokens - 1)
    return Response(first_token_s=first_s + profile.request_s, per_token_s=per_token_s)


def test_one_client_meets_an_idle_engine():
    load = Load(input_tokens=1000, output_tokens=101, concurrency=1)
    found = predict_response(PROFILE, 1, load)
    clock = StepClock(PROFILE, 1, 1.0)
    assert found.first_token_s == pytest.approx(PROFILE.request_s + clock.step_s(0, 0, 1000))
    assert found.per_token_s == pytest.approx(clock.step_s(1, 1050.5, 0))
    assert found.call_s(101) == found.first_token_s + 100 * found.per_token_s


@pytest.mark.parametrize("arrivals", [{"concurrency": 4}, {"rate_rps": 1.0}])
def test_what_is_cached_is_not_computed(arrivals):
    def first_s(**lengths):
        return predict_response(PROFILE, 1, Load(output_tokens=2, **lengths, **arrivals)).first_token_s

    cached = first_s(input_tokens=6000, cached_tokens=5000)
    assert first_s(input_tokens=1000) <= cached < first_s(input_tokens=2000)


def test_a_rate_near_zero_is_one_client():
    alone = predict_response(PROFILE, 2, Load(input_tokens=1000, output_tokens=100, concurrency=1))
    rare = predict_response(PROFILE, 2, Load(input_tokens=1000, output_tokens=100, rate_rps=1e-6))
    assert rare.first_token_s == pytest.approx(alone.first_token_s, rel=1e-3)
    assert rare.per_token_s == pytest.approx(alone.per_token_s, rel=1e-3)


@pytest.mark.parametrize(("clients", "lengths"), [(4, (1024, 256)), (16, (512, 128)), (32, (2048, 128))])
def test_agrees_with_the_engine_model(clients, lengths):
    found = predict_response(PROFILE, 1, Load(input_tokens=lengths[0], output_tokens=lengths[1], concurrency=clients))
    simulated = simulate(PROFILE, clients, *lengths, waves=10)
    assert found.call_s(lengths[1]) == pytest.approx(simulated.call_s(lengths[1]), rel=0.10)


@given(st.integers(1, 200), st.integers(16, 8192), st.integers(2, 1024))
def test_more_clients_never_wait_less(clients, input_tokens, output_tokens):
    def call_s(number):
        load = Load(input_tokens=input_tokens, output_tokens=output_tokens, concurrency=number)
        return predict_response(PROFILE, 1, load).call_s(output_tokens)

    assert call_s(2 * clients) >= call_s(clients) * (1 - 1e-6)


def test_beyond_the_cache_requests_queue():
    tight = replace(PROFILE, gpu_memory_utilization=0.25)
    load = Load(input_tokens=8000, output_tokens=200, concurrency=64)
    assert tight.kv_tokens(1, 1.0) < 64 * 8000
    assert predict_response(tight, 1, load).first_token_s > 2 * predict_response(PROFILE, 1, load).first_token_s
    none = replace(PROFILE, gpu_memory_utilization=0.1)
    assert predict_response(none, 1, load).per_token_s == float("inf")


def test_a_load_is_closed_or_open():
    for both in ({}, {"concurrency": 1, "rate_rps": 1.0}):
        with pytest.raises(ValueError, match="either a concurrency or a rate"):
            Load(input_tokens=1, output_tokens=1, **both)


def points_of(profile, loads, size=1):
    return [
        ServingPoint(tensor_parallel_size=size, load=load, measured=predict_response(profile, size, load))
        for load in loads
    ]


LOADS = [
    Load(input_tokens=lengths[0], output_tokens=lengths[1], concurrency=clients)
    for lengths in ((256, 64), (1024, 512), (6000, 200))
    for clients in (1, 8, 48)
]


def mean_error(profile, true):
    def call_s(which, load):
        return predict_response(which, 1, load).call_s(load.output_tokens)

    return sum(abs(call_s(profile, load) / call_s(true, load) - 1) for load in LOADS) / len(LOADS)


def test_calibration_without_points_changes_nothing():
    assert calibrate(PROFILE, []) is PROFILE


def test_calibration_leaves_a_right_profile_alone():
    found = fit_correction(PROFILE, points_of(PROFILE, LOADS))
    assert found.decode_scale == pytest.approx(1, abs=1e-6)
    assert found.prefill_scale == pytest.approx(1, abs=1e-6)
    assert found.step_s == pytest.approx(0, abs=1e-9)
    assert found.request_s == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "truth",
    [
        Correction(decode_scale=1.3),
        Correction(prefill_scale=0.7, request_s=0.02),
        Correction(decode_scale=0.85, prefill_scale=1.2, step_s=0.001, request_s=-0.01),
    ],
)
def test_two_points_correct_the_others(truth):
    true = corrected(PROFILE, truth, 0)
    found = calibrate(PROFILE, points_of(true, [LOADS[3], LOADS[5]]))
    assert mean_error(found, true) < mean_error(PROFILE, true)
    assert mean_error(calibrate(PROFILE, points_of(true, LOADS)), true) < 0.015
    assert "calibrated by 2 measured points" in found.provenance.note


def test_costs_do_not_become_negative():
    cheap = replace(PROFILE, host_s=0.0, request_s=0.0)
    found = calibrate(PROFILE, points_of(corrected(cheap, Correction(decode_scale=0.6), 0), LOADS))
    assert found.host_s >= 0
    assert found.request_s >= 0


def test_a_point_beyond_the_profile_is_refused():
    point = ServingPoint(
        tensor_parallel_size=1,
        load=Load(input_tokens=1000, output_tokens=100, rate_rps=1e6),
        measured=Response(first_token_s=1.0, per_token_s=0.01),
    )
    with pytest.raises(ScepsyError, match="beyond what the profile carries"):
        calibrate(PROFILE, [point])
