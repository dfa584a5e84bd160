"""`scepsy optimize` beyond a plan for a rate: what it prints, writes and refuses."""

import json
from dataclasses import replace

import pytest

from scepsy.files import load_plan, save_plan
from scepsy_optimizer.requirements import kept


@pytest.fixture
def optimize(scepsy, two_workflows, tmp_path):
    """Ask about two workflows on four devices; the plan file and what was told."""

    def ask(*words):
        target = tmp_path / "plan.yaml"
        target.unlink(missing_ok=True)
        return target, scepsy("optimize", two_workflows, "--cluster", "4xH100", "-o", target, *words)

    return ask


def test_workflows_that_share_are_told_who_pays(optimize):
    target, (code, out, err) = optimize("--rate", "essay=2", "--rate", "poem=1")
    assert (code, err) == (0, "")
    assert "who pays for whom" in out
    assert load_plan(target).rate_rps == pytest.approx(3)
    rows = [line.split() for line in out.splitlines() if line.startswith(("essay", "poem"))]
    assert [row[:2] for row in rows] == [["essay", "2"], ["poem", "1"]]


def test_one_device_more_and_one_less(optimize):
    _, (code, out, _) = optimize("--rate", "3", "--what-if")
    assert code == 0
    assert "as it is" in out
    assert "+1 H100" in out
    assert "-1 H100" in out
    assert "the next device, if one LLM got it" in out


def test_the_frontier_writes_no_plan(optimize):
    target, (code, out, err) = optimize("--frontier")
    assert (code, err) == (0, "")
    assert not target.exists()
    assert "least mean latency in s by devices and executions/s, of 4 H100" in out
    _, (code, out, _) = optimize("--frontier", "--json")
    points = json.loads(out)
    assert code == 0
    assert {"devices", "rate_rps", "latency_s", "lower_bound_s", "allocation"} <= points[0].keys()
    assert {point["devices"] for point in points} <= {1, 2, 3, 4}


def test_an_answer_for_programs(optimize):
    target, (code, out, err) = optimize("--rate", "3", "--what-if", "--robust", "0.9", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["plan"]["rate_rps"] == load_plan(target).rate_rps == 3
    assert [change["change"] for change in answer["changes"]] == [0, 1, -1]
    assert {share["workflow"] for share in answer["shares"]} == {"essay", "poem"}
    assert {one["llm"] for one in answer["next_devices"]} == {"generator", "writer"}
    assert answer["robustness"]["quantile"] == 0.9


def test_a_robust_plan_tells_its_price(optimize):
    _, (code, out, _) = optimize("--rate", "3", "--robust", "0.9")
    assert code == 0
    assert "robust: loads at the 0.9 quantile (" in out
    assert "Its price: " in out


def test_the_highest_rate_within_a_percentile(optimize):
    target, (code, _, _) = optimize("--max-latency", "8", "--percentile", "95", "--rate", "max")
    assert code == 0
    prediction = load_plan(target).prediction
    assert prediction is not None
    assert prediction.replayed is not None
    assert prediction.replayed.p95_s <= 8


def test_llms_are_kept_as_they_are_in_a_plan(optimize, tmp_path):
    target, (code, _, _) = optimize("--rate", "1")
    assert code == 0
    old = tmp_path / "old.yaml"
    target.rename(old)
    target, (code, _, err) = optimize("--rate", "6", "--plan", old, "--keep", "writer")
    assert (code, err) == (0, "")
    assert kept(load_plan(target), "writer") == kept(load_plan(old), "writer")


def test_what_is_kept_stays_on_its_device_type_and_gets_no_next_device(optimize, tmp_path):
    target, (code, _, _) = optimize("--rate", "1")
    assert code == 0
    old = tmp_path / "old.yaml"
    target.rename(old)
    words = ("--rate", "1", "--plan", old, "--keep", "writer")
    target, (code, _, err) = optimize(*words, "--cluster", "4xL40S+4xH100")
    assert (code, err) == (0, "")
    named = [replace(one, device_type="H100") for one in kept(load_plan(old), "writer").fixed]
    assert list(kept(load_plan(target), "writer").fixed) == named
    _, (code, out, _) = optimize(*words, "--what-if", "--json")
    assert code == 0
    assert [one["llm"] for one in json.loads(out)["next_devices"]] == ["generator"]


def test_what_was_left_out_and_mended_is_told_in_one_line(scepsy, two_workflows, tmp_path):
    path = two_workflows / "spans.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("gen_ai.usage.", "other.")
    lines[2] = lines[2].replace('"parentSpanId": ""', '"parentSpanId": "00000000000000ff"')
    path.write_text("\n".join(lines) + "\n")
    words = ("optimize", two_workflows, "--cluster", "4xH100", "--rate", "1", "-o", tmp_path / "plan.yaml")
    code, out, err = scepsy(*words, "--json")
    assert code == 0
    assert json.loads(out)["plan"]["rate_rps"] == 1
    assert err.startswith("traces: ")
    assert "calls that lack token counts, taken as the mean of their LLM's other calls" in err
    assert err.count("\n") == 1
    assert scepsy(*words)[2] == err


def test_what_runs_stays_in_place(optimize, tmp_path):
    target, (code, _, _) = optimize("--rate", "1")
    assert code == 0
    first = load_plan(target)
    old = tmp_path / "old.yaml"
    moved = {(0,): (2,), (1,): (3,), (2,): (0,), (3,): (1,), (0, 1): (2, 3), (2, 3): (0, 1)}
    elsewhere = tuple(
        replace(part, slots=tuple(replace(slot, devices=moved.get(slot.devices, slot.devices)) for slot in part.slots))
        for part in first.llms
    )
    save_plan(replace(first, llms=elsewhere), old)
    target, (code, out, _) = optimize("--rate", "1", "--plan", old)
    assert code == 0
    assert load_plan(target).llms == elsewhere
    replicas = sum(part.replicas for part in elsewhere)
    assert f"from {old}: of the replicas {replicas} stay, 0 start" in out


def test_weights_and_limits_of_workflows(optimize):
    """A limit on one workflow's mean latency, and weights that prefer it, both cost the other one."""

    def latencies(*words):
        target, (code, _, err) = optimize("--rate", "essay=8", "--rate", "poem=4", *words)
        assert (code, err) == (0, "")
        prediction = load_plan(target).prediction
        assert prediction is not None
        return prediction.workflow_latency_s

    plain, poems = latencies(), latencies("--weight", "poem=100")
    assert poems["poem"] <= plain["poem"]
    assert poems["essay"] >= plain["essay"]
    limit_s = plain["poem"] * 1.0001
    assert latencies("--weight", "essay=100", "--limit", f"poem={limit_s}")["poem"] <= limit_s
    _, (code, _, err) = optimize("--rate", "essay=8", "--rate", "poem=4", "--limit", "poem=0.5")
    assert code == 2
    assert (
        "a mean latency of 0.5 s of workflow 'poem' is out of reach at 12 executions/s on 4 H100: the least is" in err
    )


def test_requirements_come_from_a_file(optimize, tmp_path):
    path = tmp_path / "requirements.yaml"
    path.write_text("format: scepsy-requirements/1\nllms: {generator: {min_replicas: 2}}\n")
    target, (code, _, err) = optimize("--rate", "1", "--requirements", path)
    assert (code, err) == (0, "")
    assert sum(part.replicas for part in load_plan(target).parts("generator")) >= 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--frontier", "--rate", "1"], "leave out --rate"),
        (["--rate", "1", "--html", f"{__file__}/page.html"], "test_optimize.py is no directory"),
        (["--rate", "1", "--html", "/"], "/: cannot be written: it is a directory; name a file"),
        (["--frontier", "--limit", "essay=0.1"], "0.1 s of workflow 'essay' is out of reach on 4 H100, even without"),
        (["--rate", "1", "--keep", "writer"], "name the plan that it is in with --plan"),
        (["--rate", "1", "--plan", "old.yaml"], "old.yaml: no such file; expected a plan file"),
        (["--rate", "1", "--plan", "old.yaml", "--keep", "writer"], "old.yaml: no such file"),
        (["--rate", "1", "--weight", "essay"], "--weight 'essay': write WORKFLOW=NUMBER"),
        (["--rate", "1", "--weight", "essay=0"], "weight of 0 must be a positive number"),
        (["--rate", "1", "--limit", "novel=3"], "no workflow novel; there is essay, poem"),
        (["--rate", "1", "--requirements", "none.yaml"], "none.yaml: no such file; expected a requirements file"),
        (["--rate", "1", "--percentile", "95"], "belongs to a latency limit"),
        (["--rate", "1", "--robust", "2"], "at least 0.5 and below 1"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(optimize, words, told):
    target, (code, out, err) = optimize(*words)
    assert (code, out) == (2, "")
    assert err.startswith("scepsy optimize: ")
    assert told in err
    assert err.count("\n") == 1
    assert not target.exists()
