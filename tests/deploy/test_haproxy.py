"""What only HAProxy before the gateway does: what it is told, that it is kept up, and what it leaves to the gateway."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import urllib.request

import pytest

from scepsy.cli import main
from scepsy.deployment import haproxy
from scepsy.deployment.backends import Backend, Pool
from scepsy.files import save_plan
from scepsy_optimizer.errors import ScepsyError

fronted = pytest.mark.parametrize("stage", [{"front": True}], indirect=True)


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize("session_header", [None, "x-session-id"])
def test_it_takes_its_configuration(tmp_path, has_key, session_header):
    names = haproxy.backend_names(["small", "big/one", "big one"])
    assert list(names.values()) == ["llm-small", "llm-big-one", "llm-big-one-2"]
    text = haproxy.configuration(names.values(), 1, threads=64, has_key=has_key, session_header=session_header)
    assert "nbthread 4\n" in text
    assert ("del-header authorization" in text) == has_key
    (tmp_path / "haproxy.cfg").write_text(text)
    (tmp_path / haproxy.MAP).write_text("")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        environment = {**os.environ, haproxy.CONTROL: str(fd), haproxy.LISTENER: str(fd)}
        argv = [haproxy.find_binary(), "-c", "-dW", "-f", str(tmp_path / "haproxy.cfg")]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, pass_fds=[fd], check=False)
    assert done.returncode == 0, done.stderr


@fronted
async def test_it_routes_what_it_can_read_and_leaves_the_rest_to_the_gateway(stage, session):
    deep, long = b"[" * 40 + b"]" * 40, b'"' + b"x" * 200_000 + b'"'
    fast = [b'{"model":"small"}', b'{"model":"sm\\u0061ll"}', b'{"x":{"model":"big/one"},"model":"small"}']
    fast += [b'{"model":"small","x":' + part + b"}" for part in (deep, long, b"NaN")]
    slow = [b'{"\\u006dodel":"small"}', *(b'{"x":' + part + b',"model":"small"}' for part in (deep, long, b"NaN"))]
    for bodies, count in ((fast, 0), (slow, len(slow))):
        for body in bodies:
            async with await stage.post(session, body) as answer:
                assert answer.headers["x-scepsy-replica"].startswith("small-")
        counted = stage.gateway._metrics.text().decode()
        by_gateway = [float(line.split()[-1]) for line in counted.splitlines() if "requests_total{" in line]
        assert sum(by_gateway) == count


@fronted
async def test_a_replica_that_leaves_ends_what_it_answers_first(stage, session):
    asked = await stage.post(session, {"model": "small", "do": "stream"})
    leaving = stage.backends[asked.headers["x-scepsy-replica"]]
    leaving.ready = False
    emptied = asyncio.create_task(stage.front.empty(leaving, 10))
    await stage.known()
    for _ in range(3):
        (await stage.post(session, {"model": "small"})).close()
    assert len(stage.workers[leaving.id].posted) == 1
    assert not emptied.done()
    stage.release()
    assert await asked.read() == b"data: one\n\ndata: two\n\n"
    assert await emptied
    assert (leaving.served, stage.endpoint.in_flight) == (1, 0)
    assert stage.events == []


@fronted
async def test_time_to_end_runs_out(stage, session):
    asked = await stage.post(session, {"model": "big/one", "do": "stream and hang"})
    stage.backends["big-0"].ready = False
    assert not await stage.front.empty(stage.backends["big-0"], 0.1)
    asked.close()


@fronted
async def test_llms_come_and_go(stage, session):
    url = stage.backends["big-0"].url
    for number in range(haproxy.SPARE_BACKENDS + 2):
        backend = Backend(id=f"new-{number}", llm=f"new one {number}", url=url, ready=True)
        stage.pools[backend.llm] = Pool([backend])
        stage.front.watch(backend)
        await stage.known()
        async with await stage.post(session, {"model": backend.llm}) as answer:
            assert (answer.status, answer.headers["x-scepsy-replica"]) == (200, backend.id)
        # One more than there are spare backends stays: the gateway alone routes to what has none.
        if number:
            backend.ready = False
            del stage.pools[backend.llm]
            stage.front.forget(backend)
            await stage.known()
            async with await stage.post(session, {"model": backend.llm}) as answer:
                assert answer.status == 404
    await stage.known()
    assert len(stage.front._told._spare) == haproxy.SPARE_BACKENDS - 1
    assert stage.events == []


@fronted
async def test_killed_it_comes_back_and_nobody_is_refused(stage, session):
    os.kill(stage.front.kept.engine.pid, signal.SIGKILL)
    asked = [asyncio.create_task(stage.post(session, {"model": "small"})) for _ in range(8)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    # What came after its end waited for the new one; a connection may have been taken just before.
    assert {answer.status for answer in answers if not isinstance(answer, OSError)} <= {200}
    async with asyncio.timeout(10):
        while not stage.events:  # noqa: ASYNC110 - it does not tell
            await asyncio.sleep(0.01)
    (event,) = stage.events
    assert event.startswith("HAProxy ended unasked (killed by SIGKILL")
    async with await stage.post(session, {"model": "small"}) as answer:
        assert answer.status == 200


async def test_what_does_not_answer_is_one_error(tmp_path):
    with pytest.raises(haproxy.ControlError, match="does not answer to 'show stat'"):
        await haproxy.tell(str(tmp_path / "none"), "show stat")


def ask(url, model):
    data = json.dumps({"model": model, "prompt": "p"}).encode()
    request = urllib.request.Request(f"{url}/completions", data, {"Content-Type": "application/json"})  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - our own
        return answer.headers["x-scepsy-replica"]


def test_a_deployment_behind_it(stub, make_plan, make_part, process_table, wait):
    events = []
    plan = make_plan(make_part("a", 0, 1))
    with stub(plan=plan, endpoint="haproxy", on_event=events.append) as deployment:
        assert {ask(deployment.url, "a") for _ in range(4)} == {"a-0", "a-1"}
        wait(lambda: sum(one.served for one in deployment.status().replicas) == 4)
        first = deployment.status().replicas[0]
        os.kill(first.pid, signal.SIGKILL)
        assert {ask(deployment.url, "a") for _ in range(6)} == {"a-1"}
        wait(lambda: ask(deployment.url, "a") == "a-0", 30)
        (front,) = [pid for pid, words in process_table() if words.split()[0].endswith("haproxy")]
        os.kill(front, signal.SIGKILL)
        wait(lambda: any("HAProxy ended unasked" in event for event in events))
        ask(deployment.url, "a")
        # Another plan: one LLM goes, another comes, by what runs.
        deployment.apply(make_plan(make_part("a", 0), make_part("c", 1)))
        assert (ask(deployment.url, "a"), ask(deployment.url, "c")) == ("a-0", "c-0")
        assert {one.id for one in deployment.status().replicas} == {"a-0", "c-0"}

        def metrics():
            with urllib.request.urlopen(f"{deployment.url.removesuffix('/v1')}/metrics") as answer:  # noqa: S310 - our own
                return answer.read().decode()

        assert 'haproxy_server_status{proxy="llm-a",server="a-0",state="UP"} 1' in metrics()
        wait(lambda: 'server="a-1"' not in metrics())
    assert not any("does not answer" in event for event in events)


def test_a_controller_that_is_killed_takes_it_along(stub, process_table, wait):
    with stub(endpoint="haproxy") as deployment:
        os.kill(deployment.status().pid, signal.SIGKILL)
        wait(lambda: not process_table(), 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": "x"}, "records no calls"),
        ({"affinity": "prefix"}, "no affinity by prefix"),
        ({"endpoint": "nginx"}, "use gateway or haproxy"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_starts(stub, options, message):
    with pytest.raises(ScepsyError, match=message):
        stub(**{"endpoint": "haproxy", **options})


def test_elsewhere_there_is_the_gateway_only(make_plan, make_part, tmp_path, capsys):
    save_plan(make_plan(make_part("a", 0)), tmp_path / "plan.yaml")
    assert main(["deploy", str(tmp_path / "plan.yaml"), "--to", "ray", "--endpoint", "haproxy"]) == 2
    assert "--endpoint haproxy is for --to local" in capsys.readouterr().err


def test_a_machine_without_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(haproxy, "find_spec", lambda _name: None)
    with pytest.raises(ScepsyError, match=r"pip install 'scepsy\[haproxy\]'"):
        haproxy.find_binary()
    monkeypatch.undo()
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/bin/echo")
    with pytest.raises(ScepsyError, match="/bin/echo is not HAProxy"):
        haproxy.find_binary()
