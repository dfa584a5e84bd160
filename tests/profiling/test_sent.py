"""Requests one by one on the engine: what is told of them is what they did."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scepsy.profiling import shipped_profiles
from scepsy.profiling.calibrating import Correction, ServingPoint, corrected, fit_correction
from scepsy.profiling.sent import Lengths, Sent, emulate
from scepsy.profiling.serving import Load, predict_response
from scepsy_optimizer.profile import StepClock
from scepsy_optimizer.replica import CallShape, saturation_rps

PROFILE = replace(shipped_profiles("H100")["generator"], max_num_seqs=8)
CLOCK = StepClock(PROFILE, 1, 1.0)


def test_a_request_alone_takes_its_prefill_and_its_steps():
    one = Lengths(input_tokens=1000, output_tokens=51)
    found = emulate(PROFILE, 1, Sent(lengths=(one,), edge=0, at_s=(5.0,)))
    assert found.first_token_s == pytest.approx(PROFILE.request_s + CLOCK.step_s(0, 0, 1000))
    assert found.per_token_s == pytest.approx(CLOCK.step_s(1, 1025, 0), rel=1e-3)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=12), st.integers(1, 40))
def test_open_requests_are_never_quicker_than_alone(gaps, output):
    at_s, moment = [], 0.0
    for gap in gaps:
        moment += gap
        at_s.append(moment)
    lengths = (Lengths(input_tokens=500, output_tokens=output),) * len(gaps)
    alone = emulate(PROFILE, 1, Sent(lengths=lengths[:1], edge=0, at_s=(0.0,)))
    found = emulate(PROFILE, 1, Sent(lengths=lengths, edge=0, at_s=tuple(at_s)))
    assert found.first_token_s >= alone.first_token_s - 1e-9
    assert found.call_s(output) >= alone.call_s(output) - 1e-9


def test_a_crowd_is_served_at_the_saturation_rate():
    lengths = (Lengths(input_tokens=300, output_tokens=100),) * 320
    sent = Sent(lengths=lengths, edge=16, clients=16)
    shape = CallShape(input_tokens=300, cached_tokens=0, output_tokens=100, overlap=1)
    rate_rps = 16 / emulate(PROFILE, 1, sent).call_s(100)
    assert rate_rps == pytest.approx(saturation_rps(PROFILE, 1, 1.0, shape), rel=0.05)


def test_only_what_lies_within_the_edges_counts():
    lengths = (Lengths(input_tokens=100, output_tokens=9), *(Lengths(input_tokens=4000, output_tokens=2),) * 2)
    far = (0.0, 100.0, 200.0)
    middle = emulate(PROFILE, 1, Sent(lengths=lengths, edge=1, at_s=far))
    alone = emulate(PROFILE, 1, Sent(lengths=lengths[1:2], edge=0, at_s=(0.0,)))
    assert middle.first_token_s == pytest.approx(alone.first_token_s)
    assert middle.per_token_s == pytest.approx(alone.per_token_s)


def test_a_load_that_was_over_before_it_was_steady_corrects_nothing_that_is_right():
    # Eight requests at 95 % of what the engine carries: the mean of a steady state is far away.
    shape = CallShape(input_tokens=300, cached_tokens=0, output_tokens=100, overlap=1)
    rate_rps = 0.95 * saturation_rps(PROFILE, 1, 1.0, shape)
    sent = Sent(
        lengths=(Lengths(input_tokens=300, output_tokens=100),) * 8,
        edge=0,
        at_s=tuple(number / rate_rps for number in range(8)),
    )
    load = Load(input_tokens=300, output_tokens=100, rate_rps=rate_rps)
    measured = emulate(PROFILE, 1, sent)
    assert predict_response(PROFILE, 1, load).call_s(100) > 1.2 * measured.call_s(100)
    right = fit_correction(PROFILE, [ServingPoint(tensor_parallel_size=1, load=load, measured=measured, sent=sent)])
    assert right.decode_scale == pytest.approx(1, abs=1e-6)
    slow = corrected(PROFILE, Correction(decode_scale=1.3), 0)
    point = ServingPoint(tensor_parallel_size=1, load=load, measured=emulate(slow, 1, sent), sent=sent)
    assert fit_correction(PROFILE, [point]).decode_scale > 1.15
