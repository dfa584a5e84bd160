"""Whole profiles of emulated engines, whose truth is known; and what is fitted from measured points."""

import random
from dataclasses import replace

import pytest

from scepsy.deployment import list_deployments
from scepsy.profiling import (
    EngineChoice,
    EngineFlags,
    Lengths,
    Limits,
    profile_model,
    shipped_profiles,
    traced_lengths,
)
from scepsy.profiling.arrivals import LoadPlan, three_shapes
from scepsy.profiling.calibrating import Correction, ServingPoint, calibrate, calibrate_and_check, corrected
from scepsy.profiling.engines import fit_slowdown, joined
from scepsy.profiling.probing import DecodePoint, PrefillPoint
from scepsy.profiling.serving import Load, predict_response
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.profile import FractionSlowdown, StepClock

GENERATOR = shipped_profiles("H100")["generator"]
LIMITS = Limits(max_num_seqs=2, max_model_len=300)
LENGTHS = tuple(Lengths(input_tokens=i, output_tokens=o) for i, o in ((30, 4), (60, 6), (45, 5)))


@pytest.fixture(scope="module")
def truth():
    return replace(GENERATOR, max_num_seqs=2, max_model_len=300)


@pytest.fixture(scope="module")
def profiled(truth, tmp_path_factory):
    folder = tmp_path_factory.mktemp("journals")
    events = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCEPSY_HOME", str(tmp_path_factory.mktemp("home")))
        profile = profile_model(
            truth.model,
            llm="generator",
            device_type="H100",
            tensor_parallel_sizes=(1, 2),
            fractions=(1.0, 0.5),
            lengths=LENGTHS,
            requests_per_load=3,
            limits=LIMITS,
            choice=EngineChoice(engine="emulator", profiles={"generator": truth}),
            folder=folder,
            on_progress=events.append,
        )
        left = list_deployments()
    return profile, folder, events, left


def test_profiles_every_size_and_fraction(profiled):
    profile, folder, events, left = profiled
    assert [steps.tensor_parallel_size for steps in profile.steps] == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == [
        "fraction_0.5.jsonl",
        "tensor_parallel_size_1.jsonl",
        "tensor_parallel_size_2.jsonl",
    ]
    assert profile.provenance.enforcement == "emulated"
    assert profile.provenance.hardware == "emulated"
    assert profile.provenance.note.count("calibrated by 10 measured points") == 2
    assert profile.provenance.note.count("left out") == 2
    assert any("requests/s" in event.text for event in events)
    assert events[-1].done == events[-1].points
    assert events[-1].left_s == 0
    assert left == ()


def test_finds_the_truth_of_each(profiled, truth):
    profile = profiled[0]
    for size in (1, 2):
        found, expected = StepClock(profile, size, 1.0), StepClock(truth, size, 1.0)
        for step in ((1, 88, 0), (2, 88, 0), (0, 0.0, 200)):
            # A machine that does other things makes them longer, and calibration then follows what it saw.
            assert 0.75 * expected.step_s(*step) < found.step_s(*step) < 1.6 * expected.step_s(*step) + 0.003
    assert 0 <= profile.slowdown.decode_beta < 1
    assert 0 <= profile.slowdown.prefill_beta < 1.5


def test_fractions_need_a_whole_device_beside_them(tmp_path):
    with pytest.raises(ScepsyError, match="add it to the sizes"):
        profile_model(
            "m", llm="m", device_type="H100", tensor_parallel_sizes=(2,), fractions=(1.0, 0.5), folder=tmp_path
        )
    with pytest.raises(ScepsyError, match="'H10' is not known"):
        profile_model("m", llm="m", device_type="H10", folder=tmp_path)


@pytest.mark.parametrize("betas", [(0.69, 0.18, 0.40), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_slowdown_is_found_again(betas):
    true = FractionSlowdown(prefill_beta=betas[0], decode_beta=betas[1], decode_beta_large=betas[2])
    slow = replace(GENERATOR, slowdown=true, host_s=0.0)
    whole = replace(GENERATOR, host_s=0.0)
    measured = []
    for fraction in (0.5, 0.2):
        clock = StepClock(slow, 1, fraction)
        prefill = [PrefillPoint(tokens=n, step_s=clock.step_s(0, 0, n), request_s=0.0) for n in (256, 1024)]
        decode = [
            DecodePoint(batch=batch, context_tokens=88, step_s=clock.step_s(batch, 88, 0))
            for batch in (1, 8, 32, 64, 128)
        ]
        measured.append((fraction, (prefill, decode)))
    found = fit_slowdown(whole, measured)
    assert found.prefill_beta == pytest.approx(true.prefill_beta, abs=1e-9)
    assert found.decode_beta == pytest.approx(true.decode_beta, abs=1e-9)
    assert found.decode_beta_large == pytest.approx(true.decode_beta_large, abs=1e-9)
    assert found.down_to == 0.2


def test_an_engine_that_a_fraction_makes_faster_has_no_slowdown():
    clock = StepClock(GENERATOR, 1, 1.0)
    prefill = [PrefillPoint(tokens=512, step_s=0.9 * clock.step_s(0, 0, 512), request_s=0.0)]
    decode = [DecodePoint(batch=1, context_tokens=88, step_s=0.9 * clock.step_s(1, 88, 0))]
    assert fit_slowdown(GENERATOR, [(0.5, (prefill, decode))]) == FractionSlowdown(
        prefill_beta=0.0, decode_beta=0.0, decode_beta_large=0.0, down_to=0.5
    )


def test_joining_keeps_every_step_time():
    parts = [replace(GENERATOR, steps=(GENERATOR.at(size),), host_s=0.001 * size) for size in (1, 2)]
    whole = joined(parts)
    assert whole.host_s == 0
    for part, size in zip(parts, (1, 2), strict=True):
        for step in ((8, 1000, 0), (0, 0.0, 500)):
            assert StepClock(whole, size, 1.0).step_s(*step) == pytest.approx(StepClock(part, size, 1.0).step_s(*step))


def test_three_shapes_stay_within_the_model():
    lengths = [
        Lengths(input_tokens=100, output_tokens=20, cached_tokens=60),
        Lengths(input_tokens=900, output_tokens=60),
    ]
    same, prompts, answers = three_shapes(lengths, 1024)
    assert same == tuple(lengths)
    assert prompts == (
        Lengths(input_tokens=200, output_tokens=10, cached_tokens=120),
        Lengths(input_tokens=993, output_tokens=30),
    )
    assert answers == (
        Lengths(input_tokens=50, output_tokens=40, cached_tokens=30),
        Lengths(input_tokens=450, output_tokens=120),
    )
    assert len(LoadPlan(shapes=(same, prompts, answers)).guesses_s("one")) == 10


def test_lengths_of_traced_calls():
    call = Call(llm="a", input_tokens=100, output_tokens=0, cached_tokens=100)
    root = Span(id="0", parent=None, name="w", kind="workflow", start_s=0, end_s=2)
    one = Span(id="1", parent="0", name="a", kind="llm", start_s=0, end_s=1, call=call)
    executions = [Execution(id="x", workflow="w", spans=(root, one))]
    assert traced_lengths(executions, "a") == (Lengths(input_tokens=100, output_tokens=1, cached_tokens=99),)
    with pytest.raises(ScepsyError, match="no call of 'b'; they have calls of: a"):
        traced_lengths(executions, "b")


def test_points_left_out_tell_the_error_of_the_rest():
    rng = random.Random(1)
    true = corrected(GENERATOR, Correction(decode_scale=1.2), 0)
    points = []
    for tokens, generated in ((500, 200), (2000, 100), (200, 400)):
        for rate in (0.5, 1.5, 3.0):
            load = Load(input_tokens=tokens, output_tokens=generated, rate_rps=rate)
            seen = predict_response(true, 1, load)
            noisy = replace(seen, per_token_s=seen.per_token_s * rng.uniform(0.98, 1.02))
            points.append(ServingPoint(tensor_parallel_size=1, load=load, measured=noisy))
    found, errors = calibrate_and_check(GENERATOR, points)
    assert found == calibrate(GENERATOR, points)
    assert len(errors) == 9
    assert sum(abs(error) for error in errors) / 9 < 0.03
    # As fitting again without one of them says.
    left = predict_response(calibrate(GENERATOR, [*points[:4], *points[5:]]), 1, points[4].load)
    tokens = points[4].load.output_tokens
    assert errors[4] == pytest.approx(left.call_s(tokens) / points[4].measured.call_s(tokens) - 1, abs=0.002)


def test_flags_are_what_the_engine_is_started_with():
    assert EngineFlags().max_num_seqs == Limits().max_num_seqs
    assert EngineFlags().max_num_batched_tokens == Limits().max_num_batched_tokens
