"""The endpoint alone, as a process, in front of emulators that it does not keep."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from scepsy.deployment import deploy
from scepsy.deployment.processes import free_ports


@pytest.fixture
def engines(home, make_plan, make_part, make_profile):
    plan = make_plan(make_part("gen", 0, 1), cluster="2xH100")
    with deploy(plan, engine="emulator", profiles={"gen": make_profile("gen")}) as deployment:
        yield [one.url for one in deployment.status().replicas]


def post(url, body, headers=None):
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", data, kind | (headers or {}))  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - our own
        return answer.headers["x-scepsy-replica"]


def test_it_finds_by_itself_who_is_there(engines, tmp_path, wait, monkeypatch):
    monkeypatch.setenv("SCEPSY_API_KEY", "k")
    backends = [{"id": f"gen-{number}", "llm": "gen", "model": "m", "url": url} for number, url in enumerate(engines)]
    backends += [
        {"id": "gone", "llm": "gen", "model": "m", "url": "http://127.0.0.1:9"},
        # Somebody else's server on that address: it does not serve this LLM.
        {"id": "other", "llm": "other", "model": "m", "url": engines[0]},
    ]
    (port,) = free_ports(1)
    config = tmp_path / "endpoint.json"
    config.write_text(json.dumps({"backends": backends}))
    argv = [sys.executable, "-m", "scepsy.deployment.endpoint", str(config), "--port", str(port)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
        try:
            url = f"http://127.0.0.1:{port}"

            def ready():
                try:
                    with urllib.request.urlopen(f"{url}/scepsy/status") as answer:  # noqa: S310 - our own
                        return {one["id"] for one in json.loads(answer.read())["backends"] if one["ready"]}
                except OSError:
                    return set()

            wait(lambda: ready() == {"gen-0", "gen-1"}, 30)
            key = {"Authorization": "Bearer k"}
            assert {post(url, {"model": "gen", "prompt": "p", "max_tokens": 2}, key) for _ in range(4)} == {
                "gen-0",
                "gen-1",
            }
            with pytest.raises(urllib.error.HTTPError, match="503"):
                post(url, {"model": "other", "prompt": "p"}, key)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                post(url, {"model": "gen", "prompt": "p"})
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def test_a_configuration_that_is_none_is_one_line(tmp_path):
    argv = [sys.executable, "-m", "scepsy.deployment.endpoint", str(tmp_path / "none.json")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "none.json: No such file or directory" in done.stderr
