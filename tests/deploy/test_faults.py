"""What breaks while requests come: which of them are lost, that it heals, and that nothing is left behind.

Real processes and signals. How long healing takes is not looked at, only that it comes.
"""

import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import urllib.parse
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from scepsy.cli import main
from scepsy.deployment import deploy, find, list_deployments, processes
from scepsy.deployment.state import Upkeep
from scepsy.files import save_plan
from scepsy_optimizer.errors import ScepsyError

PLAIN = {"hold_s": 0.05}
STREAM = {"pieces": 20, "every_s": 0.02}
IMPATIENT = Upkeep(health_every_s=0.1, health_timeout_s=1.0, health_misses=3, back_off_s=(0.1, 0.2), failed_starts=3)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("scepsy.deployment.lifecycle._UPKEEP", IMPATIENT)
    monkeypatch.setattr("scepsy.deployment.lifecycle._GRACE_S", 0.5)


@pytest.fixture
def two(make_plan, make_part):
    """One LLM with a replica on each of two cores."""
    return make_plan(make_part("a", 0, 1))


class Load:
    """Clients that ask for `a` again and again, plain and streamed, each noting what became of every request."""

    def __init__(self, deployment, clients=6):
        address = urllib.parse.urlsplit(deployment.url)
        self.address = (address.hostname, address.port)
        self.whole, self.lost = [], []
        self.streaming = {}
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._go, args=(number,)) for number in range(clients)]

    def _go(self, number):
        kind = STREAM if number % 2 else PLAIN
        while not self._end.is_set():
            replica, begun = "", False
            connection = http.client.HTTPConnection(*self.address, timeout=60)
            try:
                body = json.dumps({"model": "a", **kind})
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                replica = answer.headers["x-scepsy-replica"]
                begun = answer.status == 200
                self.streaming[number] = replica if kind is STREAM else ""
                text = answer.read()
                is_whole = answer.status == 200 and (kind is PLAIN or text.count(b"data:") == STREAM["pieces"])
            except (OSError, http.client.HTTPException):
                is_whole = False
            finally:
                connection.close()
                self.streaming[number] = ""
            (self.whole if is_whole else self.lost).append((kind is STREAM, replica, begun))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join()


def replicas(deployment):
    return {one.id: one for one in deployment.status().replicas}


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def child_of(pid, table):
    (child,) = [one for one, _ in table if one != pid and parent_of(one) == pid]
    return child


def test_what_dies_under_load_takes_only_the_answers_that_it_had_begun(stub, two, wait, process_table):
    stub.behave("core")
    with stub(plan=two) as deployment, Load(deployment) as load:
        for victim in (
            lambda engine: engine,
            lambda engine: child_of(engine, process_table()),  # vLLM's engine process below its API server
            parent_of,  # the shim
        ):
            engine = replicas(deployment)["a-0"].pid
            served = len(load.whole)
            wait(lambda: len(load.whole) > served + 20 and "a-0" in load.streaming.values(), 30)  # noqa: B023 - called here
            os.kill(victim(engine), signal.SIGKILL)
            wait(lambda: (one := replicas(deployment)["a-0"]).phase == "ready" and one.pid != engine, 30)  # noqa: B023
            assert engine not in [pid for pid, _ in process_table()]
        served = len(load.whole)
        wait(lambda: len(load.whole) > served + 20 and "a-0" in load.streaming.values(), 30)
    # Those alone, and of the three clients that stream each at most one a time.
    assert set(load.lost) <= {(True, "a-0", True)}
    assert len(load.lost) <= 3 * 3


def test_one_that_hangs_is_passed_over_and_started_again(stub, two, wait, process_table):
    with stub(plan=two) as deployment, Load(deployment) as load:
        engine = replicas(deployment)["a-0"].pid
        wait(lambda: len(load.whole) > 20)
        os.kill(engine, signal.SIGSTOP)
        wait(lambda: (one := replicas(deployment)["a-0"]).phase == "ready" and one.pid != engine, 60)
        served = len(load.whole)
        wait(lambda: len(load.whole) > served + 20, 30)
        assert engine not in [one for one, _ in process_table()]
    assert set(load.lost) <= {(True, "a-0", True)}
    assert len(load.lost) <= 3


def test_a_silent_one_that_answers_again_is_not_started_again(stub, two, wait, monkeypatch):
    patient = Upkeep(health_every_s=0.1, health_timeout_s=0.5, health_misses=10_000)
    monkeypatch.setattr("scepsy.deployment.lifecycle._UPKEEP", patient)
    with stub(plan=two) as deployment:
        engine = replicas(deployment)["a-0"].pid
        host, port = Load(deployment).address

        def is_ready():
            connection = http.client.HTTPConnection(host, port, timeout=60)
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            connection.close()
            return 'scepsy_gateway_ready{llm="a",replica="a-0"} 1.0' in text

        wait(is_ready)
        os.kill(engine, signal.SIGSTOP)
        wait(lambda: not is_ready(), 30)
        os.kill(engine, signal.SIGCONT)
        wait(is_ready, 30)
        assert replicas(deployment)["a-0"].pid == engine


def test_a_killed_controller_breaks_every_answer_off_and_the_name_can_be_used_at_once(stub, two, wait, process_table):
    stub.behave("stubborn children")
    deployment = stub(plan=two)
    ports = [urllib.parse.urlsplit(one.url).port for one in replicas(deployment).values()]
    with Load(deployment) as load:
        wait(lambda: len(load.whole) > 20)
        old = [pid for pid, _ in process_table()]
        os.kill(deployment.status().pid, signal.SIGKILL)
        # Nobody waits for an answer that cannot come; and what is left is ended before anything is started again.
        wait(lambda: load.lost and deployment.crashed)
        with stub(plan=two) as again:
            assert not {pid for pid, _ in process_table()} & set(old)
            assert len(process_table()) == 1 + 2 * 4
            assert all(one.phase == "ready" for one in again.status().replicas)
        load.whole.clear()
    assert load.whole == []
    wait(lambda: all(map(processes.port_is_free, [*ports, load.address[1]])))
    deployment.stop()


def test_the_command_in_the_foreground_ends_with_its_deployment(stub, two, stub_command, tmp_path, process_table):
    save_plan(two, tmp_path / "plan.yaml")
    words = ["deploy", str(tmp_path / "plan.yaml"), "--engine", "vllm-cpu", "--command", " ".join(stub_command)]
    argv = [sys.executable, "-m", "scepsy", *words, "--port", "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert any(line.startswith("ready:") for line in command.stdout)
        os.kill(find().status().pid, signal.SIGKILL)
        assert command.wait(30) == 2
        assert "deployment 'default' has ended unasked; see" in command.stderr.read()
    # What was left is ended by then: whoever starts the command again need not wait.
    assert process_table() == []


def test_a_stop_waits_for_what_is_being_answered(stub, two, wait):
    with stub(plan=two) as deployment:
        with Load(deployment, clients=2) as load:
            wait(lambda: load.streaming.get(1))
            load.streaming[1] = ""
            wait(lambda: load.streaming.get(1))  # it has just begun
            deployment.stop()
        # Those that come later are told that it is stopping, or meet nobody; none that had begun is lost.
        assert load.whole
        assert not any(begun for _, _, begun in load.lost)


def test_two_at_once_under_one_name_are_one(stub, two, process_table):
    outcomes = []

    def start():
        try:
            outcomes.append(stub(plan=two))
        except ScepsyError as error:
            outcomes.append(str(error))

    starting = [threading.Thread(target=start) for _ in range(4)]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    (deployment,) = [one for one in outcomes if not isinstance(one, str)]
    assert all("a deployment 'default' is running" in one for one in outcomes if isinstance(one, str))
    assert len(process_table()) == 1 + 2 * 2
    # Each request in flight takes two files.
    soft, hard = resource.prlimit(deployment.status().pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    deployment.stop()


@contextmanager
def full_disk(pid):
    """No file can grow any more for that process, nor for those that it starts: what a full disk is to them."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_stops_nobody_who_runs(stub, wait, monkeypatch, tmp_path, make_plan, make_part):
    endless = Upkeep(back_off_s=(0.1, 0.2), failed_starts=10_000)
    monkeypatch.setattr("scepsy.deployment.lifecycle._UPKEEP", endless)
    with stub(plan=make_plan(make_part("a", 0), make_part("b", 1)), record=tmp_path / "traces") as deployment:
        controller, before = deployment.status().pid, replicas(deployment)
        with full_disk(controller):
            # This engine does not start without its log, others do.
            os.kill(before["b-0"].pid, signal.SIGKILL)
            with Load(deployment) as load:
                wait(lambda: replicas(deployment)["b-0"].restarts > 2 and len(load.whole) > 20, 30)
            assert load.lost == []
            assert "ended before it was ready" in replicas(deployment)["b-0"].last_error
        wait(lambda: replicas(deployment)["b-0"].phase == "ready", 30)
        assert (deployment.status().pid, replicas(deployment)["a-0"].pid) == (controller, before["a-0"].pid)


@pytest.mark.parametrize(
    ("room", "message"),
    [(0, "plan.yaml: cannot be written: File too large"), (1, "deployment 'default' cannot be started from")],
    ids=["for nothing", "for the plan"],
)
def test_a_full_disk_is_told_to_whoever_starts(room, message, home, two, stub_command, tmp_path, process_table):
    save_plan(two, tmp_path / "plan.yaml")
    room *= (tmp_path / "plan.yaml").stat().st_size
    code = (
        f"import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "from scepsy.deployment import deploy\nfrom scepsy.files import load_plan\n"
        "from scepsy_optimizer.errors import ScepsyError\n"
        "try:\n    deploy(load_plan(sys.argv[1]), engine='vllm-cpu', command=sys.argv[2:])\n"
        "except ScepsyError as error:\n    print(error)\n"
    )
    argv = [sys.executable, "-B", "-c", code, tmp_path / "plan.yaml", *stub_command]
    shown = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert message in shown.stdout, shown.stderr
    assert process_table() == []


def test_a_change_on_a_full_disk_goes_back(stub, wait, make_plan, make_part):
    narrow, wide = make_plan(make_part("a", 0)), make_plan(make_part("a", 0, 1))
    with stub(plan=narrow) as deployment:
        errors = []

        def change():
            with suppress(ScepsyError):
                deployment.apply(wide, on_event=errors.append)
                errors.clear()

        changing = threading.Thread(target=change)
        with full_disk(deployment.status().pid):
            changing.start()
            log = deployment.directory / "changes" / "1" / "events.jsonl"
            wait(log.exists)
            wait(lambda: set(replicas(deployment)) == {"a-0", "a-1"}, 30)
            wait(lambda: set(replicas(deployment)) == {"a-0"}, 30)
        changing.join()
        assert errors == ["1 replicas stay, 1 start, 0 stop"]
        # There is room again: the same change is made.
        deployment.apply(wide)
        assert set(replicas(deployment)) == {"a-0", "a-1"}


def test_a_controller_killed_half_way_through_a_change(stub, wait, process_table, make_plan, make_part):
    deployment = stub(plan=make_plan(make_part("a", 0)))
    stub.behave("hangs")
    told = []

    def change():
        try:
            deployment.apply(make_plan(make_part("a", 0, 1)))
        except ScepsyError as error:
            told.append(str(error))

    changing = threading.Thread(target=change)
    changing.start()
    wait(lambda: "a-1" in replicas(deployment))
    os.kill(deployment.status().pid, signal.SIGKILL)
    changing.join()
    assert told[0].startswith("the deployment ended while it was being changed")
    wait(lambda: list_deployments() == ())
    deployment.stop()
    # A shim of which nothing was written down yet ends by itself.
    wait(lambda: process_table() == [])
    stub.behave("")
    with stub(plan=make_plan(make_part("a", 0))) as again:
        assert set(replicas(again)) == {"a-0"}


def test_a_crash_loop_ends_and_shows_its_last_lines(stub, two, wait, capsys):
    with stub(plan=two) as deployment:
        stub.behave("dies")
        os.kill(replicas(deployment)["a-1"].pid, signal.SIGKILL)
        wait(lambda: replicas(deployment)["a-1"].phase == "failed", 30)
        assert replicas(deployment)["a-1"].restarts == IMPATIENT.failed_starts
        assert main(["status"]) == 0
        shown = capsys.readouterr().out
        assert "a-1 failed: a-1 (node0: 1) ended before it was ready (exit code 3)" in shown
        assert "No available memory for the cache blocks" in shown
        assert "noise 29" in shown
        # The other one serves on, and once what was wrong is mended the same plan brings this one back.
        with Load(deployment) as load:
            wait(lambda: len(load.whole) > 20)
            stub.behave("")
            deployment.apply(two)
            wait(lambda: replicas(deployment)["a-1"].phase == "ready", 30)
        assert load.lost == []


def test_a_plan_for_gpus_that_are_not_here(home, make_plan, make_part, tmp_path, monkeypatch, process_table):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n[ \"$1\" = -L ] && echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)' || exit 0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ScepsyError, match="uses GPUs 1 of 2, but this machine has 1; plan for --cluster 1xH100"):
        deploy(make_plan(make_part("a", 1), cluster="2xH100"))
    assert process_table() == []
    assert list_deployments() == ()
