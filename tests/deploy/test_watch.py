"""A deployment whose use changes gets another plan: recorded calls, real processes, emulated engines."""

import concurrent.futures
import json
import time
import urllib.request

import pytest

from scepsy.cli import main
from scepsy.deployment import deploy
from scepsy.files import load_plan, save_profile
from scepsy.watching import recent
from scepsy_optimizer.errors import ScepsyError


def execute(deployment, number, heavy):
    """One execution: a call of each LLM, many of `heavy`."""
    for llm in ("gen", *([heavy] * 4), "ver"):
        body = json.dumps({"model": llm, "prompt": "p " * 40, "max_tokens": 6, "min_tokens": 6}).encode()
        headers = {"Content-Type": "application/json", "x-session-id": f"e{number}"}
        request = urllib.request.Request(f"{deployment.url}/completions", body, headers)  # noqa: S310 - our own endpoint
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
            answer.read()


@pytest.fixture
def profiles(make_profile):
    return {name: make_profile(name) for name in ("gen", "ver")}


def test_a_plan_follows_its_use(home, make_plan, make_part, profiles, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, profile in profiles.items():
        save_profile(profile, tmp_path / "profiles" / f"{name}.yaml")
    # Made for so much more than comes that hardly anything of it is needed: the rate alone has drifted.
    plan = make_plan(make_part("gen", 0, rate_rps=100.0, utilisation=0.6), make_part("ver", 1), cluster="4xH100")
    words = ["watch", "--once", "--least", "8", "--profiles", str(tmp_path / "profiles"), "--window", "120"]
    with deploy(plan, engine="emulator", profiles=profiles, record=tmp_path / "traces") as deployment:
        assert main(words) == 0
        assert "0 executions in the last" in capsys.readouterr().out
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: execute(deployment, number, "ver"), range(16)))
        # Until the recorder has written every call, and the last execution counts as whole.
        deadline = time.monotonic() + 40
        while (seen := recent(tmp_path / "traces", window_s=120, now_s=time.time())) is None or (
            sum(demand.visits for demand in seen.workload.demands) * seen.workload.executions < 16 * 6 - 1e-6
        ):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert seen.workload.executions == 16
        assert seen.workload.demand("ver").visits == 5
        (tmp_path / "required.yaml").write_text("format: scepsy-requirements/1\nllms: {ver: {max_devices: 1}}\n")
        required = ["--requirements", "required.yaml", "-o", "limited.yaml", "--dead-band", "0"]
        assert main([*words, *required]) == 1
        assert sum(part.device_count for part in load_plan(tmp_path / "limited.yaml").parts("ver")) <= 1
        capsys.readouterr()
        code = main([*words, "--apply", "-o", "better.yaml", "--dead-band", "0"])
        told = capsys.readouterr().out
        assert code == 1, told
        assert "planned for 1" in told
        assert "deployment 'default' runs better.yaml" in told
        assert load_plan(home / "deployments/default/plan.yaml") == load_plan(tmp_path / "better.yaml")
        assert sum(part.device_count for part in load_plan(tmp_path / "better.yaml").parts("ver")) > 1
        assert all(one.phase == "ready" for one in deployment.status().replicas)
        # And now that it fits, nothing more is proposed.
        code = main([*words, "--dead-band", "0"])
        assert code == 0, capsys.readouterr().out


def test_what_cannot_be_followed_says_so(home, make_plan, make_part, profiles, capsys, monkeypatch, tmp_path):
    assert main(["watch", "--requirements", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["watch", "--every", "-1"]) == 2
    assert "--every -1: give a number of seconds above 0" in capsys.readouterr().err
    with deploy(make_plan(make_part("gen", 0), cluster="1xH100"), engine="emulator", profiles=profiles) as deployment:
        assert main(["watch", "--once"]) == 2
        assert "records no calls: deploy it with --record FOLDER" in capsys.readouterr().err

        def interrupt():
            raise KeyboardInterrupt

        # At the first look somebody has enough of it; at a later one the deployment ends.
        looks = iter((interrupt, lambda: None, deployment.stop))
        monkeypatch.setattr("scepsy.cli.watch._say", lambda _console, _text: next(looks)())
        (tmp_path / "traces").mkdir()
        words = ["watch", "--traces", str(tmp_path / "traces"), "--every", "0.01"]
        assert main(words) == 0
        assert main(words) == 2
        assert "deployment 'default' has ended; its logs" in capsys.readouterr().err


def test_only_what_ended_within_the_window_counts(tmp_path):
    assert recent(tmp_path, window_s=60, now_s=time.time()) is None
    (tmp_path / "opened.jsonl").touch()
    assert recent(tmp_path, window_s=60, now_s=time.time()) is None
    (tmp_path / "report.html").write_text("<html>not a trace, and no matter</html>")
    assert recent(tmp_path, window_s=60, now_s=time.time()) is None
    (tmp_path / "torn.jsonl").write_text("{broken\n")
    with pytest.raises(ScepsyError, match=r"torn\.jsonl"):
        recent(tmp_path, window_s=60, now_s=time.time())
    # What is wrong is not taken from the words of the message, in which the folder's name is as well.
    (tmp_path / "no whole execution").mkdir()
    (tmp_path / "torn.jsonl").rename(tmp_path / "no whole execution" / "torn.jsonl")
    with pytest.raises(ScepsyError, match=r"torn\.jsonl"):
        recent(tmp_path, window_s=60, now_s=time.time())
