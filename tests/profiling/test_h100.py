"""Estimates, made without a GPU, against what was measured on one (tests/data/h100)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from scepsy.files import load_profile
from scepsy.profiling import Load, Response, ServingPoint, estimate, predict_response
from scepsy.profiling.engines import fit_slowdown
from scepsy.profiling.probing import DecodePoint, PrefillPoint
from scepsy_optimizer.profile import FractionSlowdown, LLMProfile, StepClock

H100 = Path(__file__).parents[1] / "data" / "h100"


@pytest.fixture(scope="module")
def measured() -> LLMProfile:
    return load_profile(H100 / "large.yaml")


@pytest.fixture(scope="module")
def estimated() -> LLMProfile:
    return estimate(
        "meta-llama/Meta-Llama-3.1-8B",
        "H100",
        llm="large",
        tensor_parallel_sizes=(1,),
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
    )


def points(name: str) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (H100 / name).read_text(encoding="utf-8").splitlines()]
    return {line["key"]: line["point"] for line in lines if "key" in line}


def steps(name: str) -> tuple[list[PrefillPoint], list[DecodePoint]]:
    found = {tuple(key.split()): point for key, point in points(name).items()}
    return (
        [PrefillPoint(tokens=int(key[1]), **point) for key, point in found.items() if key[0] == "prefill"],
        [
            DecodePoint(batch=int(key[1]), context_tokens=int(key[2]) + 16, **point)
            for key, point in found.items()
            if key[0] == "decode"
        ],
    )


def serving_points() -> list[ServingPoint]:
    return [
        ServingPoint(
            tensor_parallel_size=1,
            load=Load(input_tokens=one["input_tokens"], output_tokens=one["output_tokens"], rate_rps=one["rate_rps"]),
            measured=Response(first_token_s=one["first_token_s"], per_token_s=one["per_token_s"]),
        )
        for key, one in points("whole.jsonl").items()
        if key.startswith("load") and key != "load full"
    ]


def call_errors(profile: LLMProfile) -> list[float]:
    errors = []
    for point in serving_points():
        tokens = point.load.output_tokens
        found = predict_response(profile, 1, point.load).call_s(tokens)
        errors.append(abs(found / point.measured.call_s(tokens) - 1))
    return errors


def test_steps_of_a_real_gpu_are_as_estimated(estimated: LLMProfile) -> None:
    prefills, decodes = steps("whole.jsonl")
    clock = StepClock(estimated, 1, 1.0)
    decode_errors = [clock.step_s(one.batch, one.context_tokens, 0) / one.step_s - 1 for one in decodes]
    prefill_errors = [clock.step_s(0, 0, one.tokens) / one.step_s - 1 for one in prefills]
    assert len(decodes) == 12
    assert max(map(abs, decode_errors)) < 0.12
    assert len(prefills) == 5
    assert max(map(abs, prefill_errors)) < 0.3
    assert median(map(abs, prefill_errors)) < 0.12


def test_loads_of_a_real_gpu_are_as_predicted_without_one(estimated: LLMProfile, measured: LLMProfile) -> None:
    assert len(serving_points()) == 9
    assert mean(call_errors(estimated)) < 0.10
    assert mean(call_errors(measured)) < 0.10


def test_memory_of_a_real_engine_is_as_estimated(estimated: LLMProfile, measured: LLMProfile) -> None:
    assert estimated.at(1).weights_gib == pytest.approx(measured.at(1).weights_gib, rel=0.01)
    assert estimated.at(1).kv_bytes_per_token == measured.at(1).kv_bytes_per_token


def test_half_a_gpu_under_mps_is_no_slower_than_assumed(measured: LLMProfile) -> None:
    # The measured profile's tables are calibrated by loads; the betas came from the steps as they were.
    whole = replace(measured, slowdown=FractionSlowdown())
    fitted = fit_slowdown(whole, [(0.5, steps("half.jsonl"))])
    assumed = FractionSlowdown()
    assert fitted.prefill_beta == pytest.approx(assumed.prefill_beta, abs=0.15)
    assert fitted.decode_beta <= fitted.decode_beta_large <= assumed.decode_beta_large
    assert fitted.decode_beta <= assumed.decode_beta


def test_shares_under_mps_slow_work_as_the_model_of_fractions_says() -> None:
    lines = [json.loads(line) for line in (H100 / "mps_shares.jsonl").read_text(encoding="utf-8").splitlines()]
    alone = [one for one in lines if one["processes"] == 1]
    whole = next(one for one in alone if one["share_percent"] is None)
    assumed = FractionSlowdown()
    for one in alone:
        if one["share_percent"] is None:
            continue
        share = one["share_percent"] / 100
        assert one["sms"] / whole["sms"] == pytest.approx(share, abs=0.015)
        # Computing is held to the share nearly in proportion; reading weights is not until the share is small.
        assert assumed.prefill(share) <= one["matmul_s"] / whole["matmul_s"] <= 1.05 / share
        assert 1 <= one["weights_8_s"] / whole["weights_8_s"] <= assumed.decode(share, 8) * 1.02


def test_below_the_least_measured_fraction_the_assumed_betas_go_on(measured: LLMProfile) -> None:
    # Half the GPU reads weights as fast as the whole one; from that alone a tenth would seem to.
    lines = [json.loads(line) for line in (H100 / "mps_shares.jsonl").read_text(encoding="utf-8").splitlines()]
    reading = {one["share_percent"]: one["weights_8_s"] for one in lines if one["processes"] == 1}
    assert measured.slowdown.down_to == 0.5
    for percent in (30, 20, 10):
        seen = reading[percent] / reading[None]
        assert measured.slowdown.decode(percent / 100, 8) == pytest.approx(seen, rel=0.1)
    below = replace(measured.slowdown, down_to=0.0)
    assert below.decode(0.5, 8) == measured.slowdown.decode(0.5, 8)
    assert below.decode(0.1, 8) < 0.6 * reading[10] / reading[None]
