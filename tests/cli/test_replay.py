"""`scepsy replay`: what it prints, and what it refuses."""

import json
import re
from functools import partial

import pytest


@pytest.fixture
def plan(scepsy, traces, tmp_path):
    path = tmp_path / "plan.yaml"
    assert scepsy("optimize", traces, "--cluster", "4xH100", "--rate", "1", "-o", path)[0] == 0
    return path


def test_latencies_with_intervals_beside_the_prediction(scepsy, traces, plan):
    code, out, err = scepsy("replay", plan, traces, "--executions", "60", "--runs", "3")
    assert (code, err) == (0, "")
    assert "3 replays of 60 executions at 1/s" in out
    for word in ("mean", "99th percentile", "predicted", "generator", "writer", "waiting"):
        assert word in out


def test_for_programs_and_repeatable(scepsy, traces, plan):
    words = ("replay", plan, traces, "--json", "--executions", "50", "--runs", "2", "--rate", "2")
    first, again, other = (json.loads(scepsy(*words, "--seed", seed)[1]) for seed in ("1", "1", "5"))
    assert first == again
    assert first["replayed"]["mean_s"] != other["replayed"]["mean_s"]
    replayed = first["replayed"]
    assert replayed["rate_rps"] == 2
    assert replayed["runs"] == 2
    assert replayed["p50_s"]["value"] <= replayed["p95_s"]["value"] <= replayed["p99_s"]["value"]
    assert replayed["mean_s"]["half_width"] > 0
    assert first["predicted_s"] == pytest.approx(replayed["mean_s"]["value"], rel=0.1)
    assert {use["llm"] for use in replayed["uses"]} == {"generator", "writer"}
    assert all(0 < use["busy"] <= 1 for use in replayed["uses"])


@pytest.mark.extras
def test_the_model_is_the_plans_own(scepsy, traces, tmp_path):
    """An LLM that is called as a shipped profile is, but is another model."""
    words = ("--cluster", "4xH100", "--rate", "1", "--model", "writer=Qwen/Qwen3-8B", "--json")
    made = json.loads(scepsy("optimize", traces, *words, "-o", tmp_path / "plan.yaml")[1])
    code, out, err = scepsy("replay", tmp_path / "plan.yaml", traces, "--json", "--executions", "50", "--runs", "1")
    assert code == 0, err
    assert json.loads(out)["predicted_s"] == pytest.approx(made["plan"]["prediction"]["latency_s"], rel=0.02)


def _moved(found, seconds):
    return f'TimeUnixNano": "{int(found[1]) + seconds * 10**9}"'


def test_recorded_starts_instead_of_random_ones(scepsy, traces, plan, tmp_path):
    lines = (traces / "spans.jsonl").read_text().splitlines()
    # Every execution starts at the same moment in these traces: let each start a second after the one before.
    later = [
        re.sub(r'TimeUnixNano": "(\d+)"', partial(_moved, seconds=number), line) for number, line in enumerate(lines)
    ]
    (tmp_path / "later.jsonl").write_text("\n".join(later))
    found = json.loads(scepsy("replay", plan, tmp_path / "later.jsonl", "--recorded", "--json")[1])
    assert found["replayed"]["rate_rps"] == pytest.approx(1)
    assert (found["replayed"]["runs"], found["replayed"]["executions"]) == (1, 20)
    assert (
        found["predicted_s"]
        == found["predicted"]["mean_s"]
        == pytest.approx(found["replayed"]["mean_s"]["value"], rel=0.1)
    )
    assert found["predicted"]["p50_s"] <= found["predicted"]["p95_s"] <= found["predicted"]["p99_s"]
    out = scepsy("replay", plan, tmp_path / "later.jsonl", "--recorded", "--rate", "2")[1]
    assert "1 replays of 20 executions at 2/s" in out


def test_more_than_the_plan_carries_is_replayed_without_a_prediction(scepsy, traces, plan):
    found = json.loads(
        scepsy("replay", plan, traces, "--json", "--executions", "100", "--runs", "1", "--rate", "500")[1]
    )
    assert found["predicted_s"] is None
    assert found["replayed"]["mean_s"]["value"] > 0
    assert (
        "beyond saturation" in scepsy("replay", plan, traces, "--executions", "100", "--runs", "1", "--rate", "500")[1]
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rate", "-1"), "--rate"),
        (("--executions", "3"), "at least 10"),
        (("--runs", "0"), "0 runs"),
        (("--runs", "11"), "between 1 and 10"),
        (("--seed", "-1"), "--seed -1"),
        (("--recorded",), "all 20 executions started at the same moment"),
        (("--recorded", "--runs", "2"), "leave out --runs"),
    ],
)
def test_what_cannot_be_replayed_is_told_in_one_line(scepsy, traces, plan, words, told):
    code, out, err = scepsy("replay", plan, traces, *words)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_llms_that_the_plan_does_not_serve(scepsy, two_workflows, traces, tmp_path):
    path = tmp_path / "poems.yaml"
    text = (two_workflows / "spans.jsonl").read_text().splitlines()
    poems = tmp_path / "poems"
    poems.mkdir()
    (poems / "spans.jsonl").write_text("\n".join(line for line in text if "poem" in line) + "\n")
    assert scepsy("optimize", poems, "--cluster", "4xH100", "--rate", "1", "-o", path)[0] == 0
    code, _, err = scepsy("replay", path, traces)
    assert code == 2
    assert "no LLM 'generator'" in err


def test_engine_options_of_the_plan_count(scepsy, traces, plan, tmp_path):
    words = (traces, "--json", "--executions", "60", "--runs", "1", "--rate", "4")
    before = json.loads(scepsy("replay", plan, *words)[1])
    one = tmp_path / "one.yaml"
    one.write_text(re.sub(r"max_num_seqs: \d+", "max_num_seqs: 1", plan.read_text()))
    after = json.loads(scepsy("replay", one, *words)[1])
    assert after["replayed"]["mean_s"]["value"] > 2 * before["replayed"]["mean_s"]["value"]
    assert after["predicted_s"] is None or after["predicted_s"] > 2 * before["predicted_s"]
