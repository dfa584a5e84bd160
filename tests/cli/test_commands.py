"""The commands as their user meets them: what they print, write and refuse."""

import json
import signal
import subprocess
import sys

import httpx
import pytest

from scepsy.cli import main
from scepsy.files import load_plan, load_profile
from scepsy_optimizer.placement import check_placement


def test_report_shows_what_each_llm_does(scepsy, traces):
    code, out, err = scepsy("report", traces)
    assert (code, err) == (0, "")
    assert "20 executions, 60 LLM calls" in out
    assert "essay" in out
    assert "generator" in out
    assert "writer" in out


def test_report_for_programs_and_for_a_browser(scepsy, traces, tmp_path):
    code, out, _ = scepsy("report", traces, "--json", "--html", tmp_path / "report.html")
    assert code == 0
    summary = json.loads(out)
    assert summary["executions"] == 20
    assert summary["calls"] == 60
    page = (tmp_path / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "generator" in page
    code, _, err = scepsy("report", traces, "--html", tmp_path / "report.html" / "below")
    assert code == 2
    assert "below" in err


def test_collect_records_what_it_passes_on_until_it_is_told_to_end(traces, tmp_path, scepsy):
    """As a process of its own: it ends by a signal."""
    folder = tmp_path / "collected"
    words = [sys.executable, "-m", "scepsy", "collect", "-o", str(folder), "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            address = json.loads(child.stdout.readline())["traces"]
            for line in (traces / "spans.jsonl").read_text().splitlines():
                answer = httpx.post(address, content=line, headers={"Content-Type": "application/json"})
                assert answer.status_code == 200
            child.send_signal(signal.SIGINT)
            assert child.wait(timeout=20) == 0
            assert json.loads(child.stdout.read()) == {"spans": 80, "calls": 0, "output": str(folder)}
        finally:
            child.kill()
    assert "20 executions" in scepsy("report", folder)[1]


def test_a_torn_file_is_read_up_to_the_tear(scepsy, traces):
    path = traces / "spans.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) - 300])
    code, out, _ = scepsy("report", traces)
    assert code == 0
    assert "19 executions" in out
    assert "left out: 1 " in out


def test_optimize_writes_a_plan_that_can_be_read(scepsy, traces, tmp_path):
    target = tmp_path / "plans" / "plan.yaml"
    code, out, err = scepsy("optimize", traces, "--cluster", "4xH100", "--rate", "2", "-o", target)
    assert (code, err) == (0, "")
    plan = load_plan(target)
    assert check_placement(plan) == []
    assert {part.llm for part in plan.llms} == {"generator", "writer"}
    assert plan.rate_rps == 2
    assert plan.prediction is not None
    assert f"predicted latency {plan.prediction.latency_s:.2f} s" in out
    assert "scepsy deploy" in out
    assert plan.provenance["traces"] == str(traces)


def test_rates_can_be_given_by_workflow(scepsy, traces, tmp_path):
    target = tmp_path / "plan.yaml"
    assert scepsy("optimize", traces, "--cluster", "4xH100", "--rate", "essay=3", "-o", target)[0] == 0
    assert load_plan(target).rate_rps == 3


def test_a_latency_limit_asks_for_the_highest_rate_or_the_fewest_devices(scepsy, traces, tmp_path):
    target = tmp_path / "plan.yaml"
    words = ["optimize", traces, "--cluster", "4xH100", "--max-latency", "6", "-o", target]
    assert scepsy(*words)[0] == 0
    highest = load_plan(target)
    assert highest.prediction is not None
    assert highest.prediction.latency_s <= 6
    assert scepsy(*words, "--rate", highest.rate_rps / 4)[0] == 0
    fewest = load_plan(target)
    assert sum(part.device_count for part in fewest.llms) < sum(part.device_count for part in highest.llms)
    code, _, err = scepsy("optimize", traces, "--cluster", "4xH100", "--max-latency", "0.1")
    assert code == 2
    assert "even without load: the least is" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cluster", "4xH100", "--rate", "100000"], "is out of reach on 4 H100: the highest is"),
        (["--cluster", "4xH100"], "give a rate, a latency limit, or both"),
        (["--cluster", "4xH100", "--rate", "0"], "must be a positive number"),
        (["--cluster", "4xH100", "--rate", "fast"], "write a number, WORKFLOW=NUMBER for each, or max"),
        (["--cluster", "4xH100", "--rate", "poem=1"], "give each traced workflow a rate"),
        (["--cluster", "4xH100", "--rate", "1", "--rate", "essay=1"], "give one rate for all, or one for each"),
        (["--cluster", "4xZ100", "--rate", "1"], "unknown device type 'Z100'; known: A100"),
        (["--cluster", "cluster.yaml", "--rate", "1"], "cluster.yaml: no such file; expected a cluster file"),
        (["--cluster", "4xA100", "--rate", "1"], "no profile of generator, writer on A100"),
        (["--cluster", "4xH100", "--rate", "1", "--model", "generator"], "write LLM=MODEL"),
        (["--cluster", "4xH100", "--rate", "1", "--profiles", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_bad_questions_get_one_clear_line(scepsy, traces, tmp_path, words, told):
    code, out, err = scepsy("optimize", traces, *words, "-o", tmp_path / "plan.yaml")
    assert code == 2
    assert out == ""
    assert err.startswith("scepsy optimize: ")
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "plan.yaml").exists()


@pytest.mark.extras
def test_an_unknown_model_is_told_with_those_that_are_known(scepsy, traces, tmp_path):
    words = ["--cluster", "4xH100", "--rate", "1", "--model", "generator=nobody/nothing-1b", "-o", tmp_path / "p.yaml"]
    code, _, err = scepsy("optimize", traces, *words)
    assert code == 2
    assert "nobody/nothing-1b" in err
    assert err.count("\n") == 1


def test_traces_that_are_none(scepsy, tmp_path):
    code, _, err = scepsy("report", tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in err
    (tmp_path / "empty").mkdir()
    code, _, err = scepsy("report", tmp_path / "empty")
    assert code == 2
    assert "empty" in err
    (tmp_path / "noise.jsonl").write_text("not a span\n")
    code, _, err = scepsy("report", tmp_path / "noise.jsonl")
    assert code == 2
    assert "noise.jsonl" in err


def test_a_plan_that_does_not_fit_this_machine_is_refused(scepsy, traces, tmp_path, monkeypatch):
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    target = tmp_path / "plan.yaml"
    assert scepsy("optimize", traces, "--cluster", "4xH100", "--rate", "2", "-o", target)[0] == 0
    code, _, err = scepsy("deploy", target, "--port", "0")
    assert code == 2
    assert err.startswith("scepsy deploy: ")
    assert "GPU" in err
    code, _, err = scepsy("deploy", tmp_path / "other.yaml")
    assert code == 2
    assert "other.yaml: no such file" in err
    code, _, err = scepsy("stop", "nothing")
    assert code == 2
    assert "no deployment 'nothing'" in err
    code, out, _ = scepsy("status")
    assert code == 0
    assert "nothing is deployed" in out


def test_deploy_status_and_stop_work_from_several_processes(scepsy, traces, tmp_path, monkeypatch):
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    target = tmp_path / "plan.yaml"
    assert scepsy("optimize", traces, "--cluster", "2xH100", "--rate", "1", "-o", target)[0] == 0
    words = ["--engine", "emulator", "--port", "0", "--name", "here", "--detach", "--record", tmp_path / "calls"]
    code, out, err = scepsy("deploy", target, *words, "--json")
    try:
        told = json.loads(out)
        url = told["url"]
        assert (code, told["name"]) == (0, "here")
        assert f"ready: OPENAI_BASE_URL={url}" in err
        question = {"model": "writer", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert httpx.post(f"{url}/chat/completions", json=question, timeout=30).status_code == 200
        code, out, _ = scepsy("status", "here")
        assert code == 0
        assert "generator-0" in out
        code, out, _ = scepsy("apply", target, "--name", "here", "--dry-run", "--json")
        assert (code, json.loads(out)["steps"]) == (0, [])
        code, out, err = scepsy("watch", "here", "--once", "--json", "-o", tmp_path / "proposed.yaml")
        assert (code, json.loads(out)["proposed"], json.loads(out)["applied"]) == (0, None, False)
        assert "waiting for 30" in err
    finally:
        code, out, err = scepsy("stop", "here", "--json")
    assert (code, json.loads(out)) == (0, {"stopped": "here"})
    assert "stopped 'here'" in err
    assert scepsy("status", "here")[0] == 2
    code, out, _ = scepsy("report", tmp_path / "calls")
    assert code == 0
    assert "1 executions" in out


def test_demo_refuses_what_makes_no_sense(scepsy):
    assert scepsy("demo", "--rate", "0")[0] == 2
    assert scepsy("demo", "--cluster", "1xH100", "--seconds", "1")[0] == 2


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        name in shown
        for name in ("demo", "collect", "report", "profile", "optimize", "plan", "deploy", "status", "stop")
    )


@pytest.mark.extras
def test_profile_estimates_and_its_file_is_planned_with(scepsy, traces, tmp_path):
    target = tmp_path / "poet.yaml"
    words = ["profile", "Qwen/Qwen3-8B", "--estimate", "--device-type", "h100", "--llm", "writer", "-o", target]
    code, out, err = scepsy(*words, "--tensor-parallel", "1,2", "--json")
    assert (code, json.loads(out)["llm"]) == (0, "writer")
    assert "estimate: writer on H100 at tensor_parallel_size 1, 2" in err
    assert [steps.tensor_parallel_size for steps in load_profile(target).steps] == [1, 2]
    plan = tmp_path / "plan.yaml"
    rest = ["--cluster", "4xH100", "--rate", "1", "--profiles", target, "-o", plan]
    assert scepsy("optimize", traces, *rest)[0] == 0
    assert load_plan(plan).parts("writer")[0].model == "Qwen/Qwen3-8B"


@pytest.mark.extras
def test_profile_is_corrected_by_reports_of_load_generators(scepsy, tmp_path):
    words = ["profile", "Qwen/Qwen3-8B", "--device-type", "H100", "--llm", "writer"]
    assert scepsy(*words, "--estimate", "--tensor-parallel", "1,2", "-o", tmp_path / "estimate.yaml")[0] == 0
    report = {"completed": 200, "request_rate": "inf", "max_concurrency": 8, "total_input_tokens": 204800}
    report |= {"total_output_tokens": 25600, "request_throughput": 5.0, "mean_ttft_ms": 90.0, "mean_tpot_ms": 9.5}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    rest = ["--from", tmp_path / "estimate.yaml", "--points", f"{path}@2", path, "-o", tmp_path / "corrected.yaml"]
    code, out, err = scepsy(*words, *rest)
    assert (code, err) == (0, "")
    assert "calibrated by 2 measured points" in out
    before, after = (load_profile(tmp_path / f"{name}.yaml") for name in ("estimate", "corrected"))
    assert after.at(2).decode_s[0][0] != before.at(2).decode_s[0][0]
    code, _, err = scepsy(*words, "--estimate", "--endpoint", "http://127.0.0.1:9", "-o", tmp_path / "none.yaml")
    assert (code, "give the traces" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device-type", "Z100", "--estimate"], "Z100"),
        (["--device-type", "H100", "--from", "nowhere.yaml"], "nowhere.yaml"),
        (["--device-type", "H100", "--estimate", "--points", "nowhere.json"], "nowhere.json"),
        (["--device-type", "H100", "--estimate", "--requests", "0"], "--requests 0: must be at least 1"),
        (["--device-type", "H100", "--estimate", "--tensor-parallel", "one"], "write whole numbers above 0"),
        (["--device-type", "H100", "--estimate", "--tensor-parallel", "0"], "write whole numbers above 0"),
        (["--device-type", "H100", "--estimate", "--tensor-parallel", "0.5"], "'0.5': write whole numbers above 0"),
        (["--device-type", "H100", "--estimate", "--tensor-parallel", "inf"], "'inf': write whole numbers above 0"),
        (["--device-type", "H100", "--estimate", "--tensor-parallel", "1,1.5"], "'1,1.5': write whole numbers above 0"),
        (["--device-type", "CPU", "--endpoint", "http://127.0.0.1:9/v1"], "127.0.0.1:9"),
        pytest.param(["--device-type", "H100"], "GPU", marks=pytest.mark.extras),
    ],
)
def test_profiles_that_cannot_be_made(scepsy, tmp_path, monkeypatch, words, told):
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    code, _, err = scepsy("profile", "Qwen/Qwen3-8B", *words, "-o", tmp_path / "profile.yaml")
    assert code == 2
    assert told in err
    assert err.startswith("scepsy profile: ")
    assert not (tmp_path / "profile.yaml").exists()


def test_a_reader_that_has_had_enough_is_no_failure():
    """As `scepsy plan show ... --json | head -1` does: the pipe closes while there is more to write."""
    script = (
        "import scepsy.cli, sys\n"
        "from scepsy.cli import report\n"
        "report.run = lambda args, console: print('x' * 1_000_000) or 0\n"
        "sys.exit(scepsy.cli.main(['report', 'nowhere']))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.read(10)
    writer.stdout.close()
    assert writer.wait(30) == 0
    assert writer.stderr is not None
    assert writer.stderr.read() == b""
    writer.stderr.close()
