"""Measuring an emulated engine, whose true step times are known."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import pytest

from scepsy.files import save_profile
from scepsy.profiling import EngineFlags, Lengths, correct, measure, shipped_profiles
from scepsy.profiling.calibrating import Correction, corrected
from scepsy.profiling.endpoint import Endpoint, sum_samples
from scepsy.profiling.fitting import fit_steps
from scepsy.profiling.journal import Journal
from scepsy.profiling.probing import DecodePoint, PrefillPoint, probe_grid
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import StepClock

FLAGS = EngineFlags(max_num_seqs=8, max_num_batched_tokens=8192)


@pytest.fixture(scope="module")
def truth():
    profile = shipped_profiles("H100")["generator"]
    return replace(profile, max_num_seqs=8, max_model_len=1200)


@pytest.fixture(scope="module")
def endpoint(truth, tmp_path_factory):
    with emulated(truth, tmp_path_factory.mktemp("emulator")) as (url, _):
        yield url


@contextmanager
def emulated(profile, folder):
    """An engine of that profile: its address and its process."""
    save_profile(profile, folder / "profile.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "scepsy.emulator", "--profile", str(folder / "profile.yaml"), "--port", str(port)]
    with subprocess.Popen(argv) as process:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            process.kill()


def wait_until_healthy(url, process):
    for _ in range(200):
        assert process.poll() is None
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):  # noqa: S310 - started here
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the emulator did not start")


@pytest.fixture(scope="module")
def measured(endpoint, tmp_path_factory):
    journal = tmp_path_factory.mktemp("journal") / "points.jsonl"
    told = []
    profile = measure(
        endpoint,
        "generator",
        device_type="H100",
        flags=FLAGS,
        journal=journal,
        on_progress=told.append,
        date="2026-01-01",
    )
    return profile, journal, told


def test_finds_the_step_times_of_the_engine(measured, truth):
    found, expected = StepClock(measured[0], 1, 1.0), StepClock(truth, 1, 1.0)
    steps = [(batch, context, 0) for batch in (1, 2, 4, 8) for context in (88, 1048)]
    for step in (*steps, (0, 0.0, 256), (0, 0.0, 1024)):
        # What is measured is never shorter, and longer by the client's own time on a machine that does other things.
        assert 0.95 * expected.step_s(*step) < found.step_s(*step) < 1.4 * expected.step_s(*step) + 0.003, step


def test_says_where_it_comes_from(measured, truth):
    profile, _, told = measured
    assert profile.provenance.source == "measured"
    assert profile.provenance.engine.startswith("vllm scepsy-emulator")
    assert profile.provenance.note == "5 prefill and 8 decode points"
    assert profile.model == truth.model
    assert profile.max_model_len == 1200
    assert profile.at(1).weights_gib == pytest.approx(truth.at(1).weights_gib, abs=0.01)
    assert [one.done for one in told] == list(range(1, 14))
    assert {one.points for one in told} == {13}
    assert all(one.left_s > 0 for one in told[:-1])
    assert told[-1].left_s == 0
    assert profile.provenance.flags == "--max-num-seqs 8 --max-num-batched-tokens 8192 --max-model-len 1200"


def test_points_in_the_journal_are_not_measured_again(measured, endpoint):
    profile, journal, _ = measured
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + 13
    # As a crash leaves it: the last two points missing, the first of them cut off in its line.
    kept = [*lines[:-2], lines[-2][:20]]
    kept[1] = json.dumps({"key": "prefill 16", "point": {"step_s": 0.0001, "request_s": 0.0}})
    journal.write_text("\n".join(kept))
    again = measure(endpoint, "generator", device_type="H100", flags=FLAGS, journal=journal, date="2026-01-01")
    assert again.at(1).prefill_s[0] == 0.0001
    assert again.at(1).prefill_s[-2:] == profile.at(1).prefill_s[-2:]
    assert len(journal.read_text().splitlines()) == 1 + 13


def test_an_engine_that_dies_costs_what_it_was_at(truth, tmp_path):
    journal, told = tmp_path / "points.jsonl", []
    with emulated(replace(truth, max_num_seqs=2, max_model_len=150), tmp_path) as (url, process):

        def kill_at_the_third(progress):
            told.append(progress)
            if progress.done == 3:
                process.kill()

        flags = EngineFlags(max_num_seqs=2)
        options = {"device_type": "H100", "flags": flags, "journal": journal}
        with pytest.raises(ScepsyError, match=r"broke off|cannot be reached"):
            measure(url, "generator", **options, on_progress=kill_at_the_third)
    assert len(told) == 3
    assert len(journal.read_text().splitlines()) == 1 + 3
    with emulated(replace(truth, max_num_seqs=2, max_model_len=150), tmp_path) as (url, _):
        again = []
        measure(url, "generator", **options, on_progress=again.append)
    assert [one.text for one in again[:3]] == [one.text for one in told]
    assert again[-1].done == again[-1].points == 7


def test_loads_correct_a_profile_that_is_wrong(truth, endpoint, tmp_path):
    lengths = (Lengths(input_tokens=60, output_tokens=8), Lengths(input_tokens=200, output_tokens=4))
    slow = corrected(truth, Correction(decode_scale=1.5), 0)
    journal = tmp_path / "points.jsonl"
    found = correct(slow, endpoint, lengths=lengths, requests_per_load=5, journal=journal)
    wrong, right, true = (StepClock(profile, 1, 1.0).step_s(1, 100, 0) for profile in (slow, found, truth))
    assert abs(right - true) < abs(wrong - true) / 2
    assert "calibrated by 10 measured points" in found.provenance.note
    assert len(journal.read_text().splitlines()) == 1 + 10


def test_a_server_that_does_not_tell_its_longest_context(truth, endpoint, tmp_path, monkeypatch):
    """As what stands in front of several engines may not: prompts keep their lengths, or it is said."""
    lengths = (Lengths(input_tokens=60, output_tokens=8),)
    told, untold = tmp_path / "told.jsonl", tmp_path / "untold.jsonl"
    correct(truth, endpoint, lengths=lengths, requests_per_load=2, journal=told)
    facts = Endpoint.facts

    async def without(self):
        return replace(await facts(self), max_model_len=0)

    monkeypatch.setattr(Endpoint, "facts", without)
    correct(truth, endpoint, lengths=lengths, requests_per_load=2, journal=untold)
    prompts = [
        [json.loads(line)["point"]["input_tokens"] for line in path.read_text().splitlines()[1:]]
        for path in (told, untold)
    ]
    assert prompts[0] == prompts[1]
    with pytest.raises(ScepsyError, match="does not say how long a context may be"):
        measure(endpoint, "generator", device_type="H100")


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "points.jsonl"
    Journal(path, {"llm": "a"}).put("prefill 16", {"step_s": 1.0})
    assert len(Journal(path, {"llm": "a"})) == 1
    with pytest.raises(ScepsyError, match="holds measurements of llm a, not of llm b"):
        Journal(path, {"llm": "b"})
    path.write_text('{"llm": "a"}\n{broken\n{"key": "k", "point": {}}\n')
    with pytest.raises(ScepsyError, match="line 2: not valid JSON"):
        Journal(path, {"llm": "a"})


def test_an_endpoint_that_is_not_there_or_serves_another_model(endpoint):
    with pytest.raises(ScepsyError, match="does not serve 'other'; it serves generator"):
        measure(endpoint, "other", device_type="H100")
    with pytest.raises(ScepsyError, match="cannot be reached"):
        measure("http://127.0.0.1:9", "generator", device_type="H100")
    with pytest.raises(ScepsyError, match="'H10' is not known"):
        measure(endpoint, "generator", device_type="H10")


def test_a_step_that_was_not_measured_is_filled_by_what_contexts_add():
    decode = [
        DecodePoint(batch=batch, context_tokens=context, step_s=0.005 + 0.0001 * batch + 1e-7 * batch * (context - 100))
        for batch, context in ((1, 100), (8, 100), (64, 100), (1, 1100), (8, 1100))
    ]
    prefill = [PrefillPoint(tokens=tokens, step_s=1e-5 * tokens, request_s=0.001) for tokens in (1000, 10)]
    steps = fit_steps(
        prefill, decode, tensor_parallel_size=1, weights_gib=1.0, overhead_gib=1.0, kv_bytes_per_token=1000.0
    )
    assert steps.batch_sizes == (1, 8, 64)
    assert steps.decode_s[2][1] == pytest.approx(0.005 + 0.0064 + 1e-7 * 64 * 1000, rel=1e-3)
    assert steps.prefill_tokens == (10, 1000)


def test_the_grid_keeps_within_the_models_length_and_the_cache():
    grid = probe_grid(max_model_len=2048, max_num_seqs=32, kv_tokens=6000)
    assert grid.prefill_tokens == (16, 64, 256, 1024, 2015)
    assert (32, 64) in grid.decode
    assert (4, 1024) in grid.decode
    assert (8, 1024) not in grid.decode
    assert all(batch * (context + 64) <= 6000 for batch, context in grid.decode)
    assert all(
        context <= 1024 for _, context in probe_grid(max_model_len=1100, max_num_seqs=256, kv_tokens=None).decode
    )
    assert (32, 1024) not in probe_grid(max_model_len=1100, max_num_seqs=256, kv_tokens=None).decode
    # Contexts of two lengths, however short the longest is.
    assert {context for _, context in probe_grid(max_model_len=700, max_num_seqs=2, kv_tokens=None).decode} == {64, 333}
    assert grid.points == len(grid.prefill_tokens) + len(grid.decode)


def test_sums_samples_of_one_model():
    text = """# HELP a_total x
a_total{engine="0",model_name="m"} 2.0
a_total{engine="1",model_name="m"} 3.0
a_total{engine="0",model_name="other"} 7.0
a_total_created{engine="0",model_name="m"} 1.7e9
"""
    assert sum_samples(text, "a_total", "m") == 5.0
