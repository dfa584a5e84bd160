"""The demonstration from end to end, short: real frameworks, real processes, emulated devices."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from scepsy.demo.schedule import make_schedule
from scepsy.files import load_plan


def started_with(home):
    """Living processes, this one apart, whose environment has this SCEPSY_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("SCEPSY_HOME") == str(home):
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


@pytest.mark.extras
def test_the_whole_loop(scepsy, tmp_path, monkeypatch):
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    figures = tmp_path / "figures.json"
    words = [
        "--cluster",
        "8xH100",
        "--seconds",
        "3",
        "--rate",
        "3",
        "--seed",
        "4",
        "--directory",
        tmp_path / "run",
        "--json",
        figures,
    ]
    code, out, err = scepsy("demo", *words)
    assert code == 0, out + err
    assert "mean latency in seconds" in out
    assert "Next: scepsy optimize" in out
    found = json.loads(figures.read_text())
    assert found["failed"] == 0
    expected = make_schedule(("beam_search", "retrieval", "research"), rate_rps=3, seconds=3, seed=4)
    assert found["executions"] == sum(len(arrivals.at_s) for arrivals in expected.values())
    plan = load_plan(tmp_path / "run" / "plan.yaml")
    assert plan.prediction is not None
    assert plan.prediction.lower_bound_s <= plan.prediction.latency_s
    assert started_with(tmp_path / "home") == []
    assert scepsy("demo", *words)[0] == 2  # the folder is taken
    # The command that it ends with works on what it has left.
    command = next(line for line in out.splitlines() if line.startswith("Next: "))
    code, out, err = scepsy(*command.split()[2:], "-o", tmp_path / "next.yaml")
    assert code == 0, err


def test_an_agent_under_load_ends_with_its_parent(tmp_path):
    example = tmp_path / "waiting.py"
    example.write_text("import asyncio\n\nasync def run(question):\n    await asyncio.sleep(600)\n")
    words = [sys.executable, "-m", "scepsy.demo.load", str(example)]
    environment = os.environ | {"SCEPSY_TRACES": str(tmp_path / "traces")}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write('{"questions": ["why?"], "at_s": [0]}\n')
            child.stdin.flush()
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("go\n")
            child.stdin.close()
            assert child.wait(timeout=20) == 1
        finally:
            child.kill()


def test_schedules_are_the_same_for_the_same_seed():
    first = make_schedule(["a", "b"], rate_rps=5, seconds=20, seed=1)
    assert first == make_schedule(["a", "b"], rate_rps=5, seconds=20, seed=1)
    assert first != make_schedule(["a", "b"], rate_rps=5, seconds=20, seed=2)
    questions = [question for arrivals in first.values() for question in arrivals.questions]
    assert len(questions) == len(set(questions)) > 50
    for arrivals in first.values():
        assert list(arrivals.at_s) == sorted(arrivals.at_s)
        assert all(0 < at_s < 20 for at_s in arrivals.at_s)
