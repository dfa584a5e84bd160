import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from scepsy.cli import main
from scepsy.deployment import deploy, find, list_deployments, stop
from scepsy.files import save_plan
from scepsy.traces import read_executions
from scepsy_optimizer.errors import ScepsyError

HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def plan_of_one(make_plan, make_part):
    return make_plan(make_part("a", 0), cluster="1xCPU")


def ask(deployment, model):
    with openai.OpenAI(base_url=deployment.url, api_key="x", max_retries=0) as client:
        return client.chat.completions.with_raw_response.create(model=model, messages=HELLO)


def replicas(deployment):
    return {replica.id: replica for replica in deployment.status().replicas}


def test_emulators_behind_one_endpoint(home, make_profile, make_plan, make_part, process_table, tmp_path, wait):
    events = []
    plan = make_plan(make_part("gen", 0, 1), make_part("ver/2", 1, fraction=0.5, node="node1"), cluster="2x2xH100")
    profiles = {name: make_profile(name) for name in ("gen", "ver/2")}
    options = {"engine": "emulator", "profiles": profiles, "record": tmp_path / "traces"}
    with deploy(plan, **options, on_event=events.append) as deployment:
        assert deployment.url.startswith("http://127.0.0.1:")
        with openai.OpenAI(base_url=deployment.url, api_key="x", max_retries=0) as client:
            texts = {
                (
                    (
                        answer := client.chat.completions.with_raw_response.create(
                            model="gen", messages=HELLO, max_tokens=8
                        )
                    ).headers["x-scepsy-replica"],
                    answer.parse().choices[0].message.content,
                )
                for _ in range(4)
            }
            chunks = client.chat.completions.create(model="ver/2", messages=HELLO, max_tokens=8, stream=True)
            assert "".join(chunk.choices[0].delta.content for chunk in chunks).strip()
        # Both replicas have answered, and the same.
        assert {replica for replica, _ in texts} == {"gen-0", "gen-1"}
        assert len({text for _, text in texts}) == 1
        # A stream counts when its end is passed on, a moment after its last piece.
        wait(lambda: sum(one.served for one in deployment.status().replicas) == 5)
        status = deployment.status()
        assert (status.name, status.engine, status.ready, status.in_flight) == ("default", "emulator", True, 0)
        assert {(one.id, one.phase, one.served) for one in status.replicas} == {
            ("gen-0", "ready", 2),
            ("gen-1", "ready", 2),
            ("ver-2-0", "ready", 1),
        }
        assert [one.name for one in list_deployments()] == ["default"]
        assert find().url == deployment.url
        planned = (home / "deployments/default/profiles/0.yaml").read_text()
        assert "max_num_seqs: 128" in planned  # as the plan says, not the profile
    assert events[0] == "starting 3 replicas of 2 LLMs (emulator)"
    assert sorted(event.split()[0] for event in events[1:]) == ["gen-0", "gen-1", "ver-2-0"]
    assert process_table() == []
    # What the endpoint carried is one execution of an unknown program.
    (execution,) = read_executions([tmp_path / "traces"]).executions
    assert [span.call.llm for span in execution.calls] == ["gen"] * 4 + ["ver/2"]
    assert len({span.call.output_tokens for span in execution.calls[:4]} - {0}) == 1
    assert list_deployments() == ()
    with pytest.raises(ScepsyError, match="has ended"):
        deployment.status()
    deployment.stop()


def test_engines_get_what_the_plan_says(stub, home):
    with stub(engine_args=["--dtype", "half"]) as deployment:
        assert json.loads(ask(deployment, "b").content)["pid"] == replicas(deployment)["b-0"].pid
    seen = stub.seen()
    assert sorted(one["argv"][one["argv"].index("--served-model-name") + 1] for one in seen) == ["a", "b"]
    cores = sorted(os.sched_getaffinity(0))
    assert sorted(one["cores"] for one in seen) == [[core] for core in cores[:2]]
    assert all(one["argv"][-2:] == ["--dtype", "half"] for one in seen)
    folders = {one["env"]["TMPDIR"] for one in seen}
    assert len(folders) == 2
    assert not any(Path(folder).exists() for folder in folders)


def test_a_worker_that_dies_at_start(stub, home, process_table):
    stub.behave("dies children")
    with pytest.raises(ScepsyError, match=r"ended before it was ready \(exit code 3\)") as caught:
        stub()
    message = str(caught.value)
    assert "Cause: ValueError: No available memory for the cache blocks." in message
    assert message.endswith("noise 29")
    assert "noise 5\n" not in message
    assert process_table() == []
    assert list_deployments() == ()


@pytest.mark.parametrize("behaviour", ["hangs", "misnamed"])
def test_a_worker_that_never_gets_ready(stub, behaviour):
    stub.behave(behaviour)
    with pytest.raises(ScepsyError, match=r"was not ready after 0\.8 s. Its last lines(.|\n)*loading the model"):
        stub(start_timeout_s=0.8)


def test_a_command_that_cannot_run(stub):
    with pytest.raises(ScepsyError, match="cannot find '/nowhere/vllm' to start engines with"):
        stub(command=["/nowhere/vllm", "serve"])


def test_a_taken_port_is_named(stub, process_table):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ScepsyError, match=f"port {port} on 127.0.0.1 is in use by process {os.getpid()}; end that"):
            stub(port=port)
        assert stub.seen() == []
        assert process_table() == []
    with stub(port=port) as deployment:
        assert deployment.url == f"http://127.0.0.1:{port}/v1"


def test_an_engines_port_that_was_taken_meanwhile(stub, monkeypatch):
    """The readiness of another server on the port is not the engine's: the replica moves."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("scepsy.deployment.processes.free_ports", lambda count: [port, port + 1, port + 2][:count])
        with stub() as deployment:
            assert replicas(deployment)["a-0"].url != f"http://127.0.0.1:{port}"


def test_an_end_unasked_is_repaired(stub, wait):
    events = []
    with stub(on_event=events.append) as deployment:
        before = replicas(deployment)["b-0"]
        os.kill(before.pid, signal.SIGKILL)
        after = wait(lambda: (one := replicas(deployment)["b-0"]).phase == "ready" and one.restarts == 1 and one)
        assert after.pid != before.pid
        assert after.last_error == "ended unasked (killed by SIGKILL, as the kernel does when memory runs out)"
        assert json.loads(ask(deployment, "b").content)["pid"] == after.pid
    assert f"b-0 {after.last_error}; starting it again" in events


def test_a_death_in_the_middle_of_load_loses_nothing_that_another_can_answer(stub, make_plan, make_part):
    with stub(plan=make_plan(make_part("a", 0, 1))) as deployment:
        victim = replicas(deployment)["a-0"].pid
        for number in range(20):
            if number == 5:
                os.kill(victim, signal.SIGKILL)
            assert ask(deployment, "a").status_code == 200


def test_all_replicas_dead(stub, wait):
    with stub() as deployment:
        stub.behave("hangs")
        os.kill(replicas(deployment)["b-0"].pid, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(deployment, "b")
        assert caught.value.status_code == 503
        assert caught.value.response.headers["Retry-After"] == "2"
        assert ask(deployment, "a").status_code == 200


def test_a_stubborn_engine_is_killed_after_the_grace(stub, monkeypatch, process_table):
    monkeypatch.setattr("scepsy.deployment.lifecycle._GRACE_S", 0.3)
    stub.behave("stubborn children")
    deployment = stub()
    assert len(process_table()) == 1 + 2 * 4  # the controller; each a shim, an engine, its two children
    deployment.stop()
    assert process_table() == []


def test_a_killed_controller_leaves_nothing(stub, process_table, wait):
    stub.behave("children")
    deployment = stub()
    os.kill(deployment.status().pid, signal.SIGKILL)
    wait(lambda: process_table() == [])
    with pytest.raises(ScepsyError, match="'default' had ended unasked; what it left is ended now"):
        find()
    deployment.stop()
    # The name is free again, the logs of the old one are gone.
    with stub():
        pass


def test_killed_shims_and_controller_leave_nothing_after_the_next_look(stub, process_table, wait, capsys):
    stub.behave("stubborn")
    deployment = stub()
    pid = deployment.status().pid
    os.kill(pid, signal.SIGSTOP)  # it shall not see its shims die
    for shim, command in process_table():
        if "shim.py" in command:
            os.kill(shim, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: deployment.crashed)
    assert main(["status"]) == 0
    told = capsys.readouterr().out
    assert "deployment 'default' had ended unasked; what it left is ended now. Its logs:" in told
    assert "nothing is deployed" in told
    assert list_deployments() == ()
    assert process_table() == []
    deployment.stop()


def test_a_dead_parent_leaves_nothing(home, stub_command, plan_of_one, process_table, wait, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from scepsy.deployment import deploy\n"
        "from scepsy.files import load_plan\n"
        "deployment = deploy(load_plan(sys.argv[1]), engine='vllm-cpu', command=sys.argv[2:])\n"
        "print(deployment.url, flush=True)\n"
        "time.sleep(600)\n"
    )
    save_plan(plan_of_one, tmp_path / "plan.yaml")
    with subprocess.Popen(
        [sys.executable, script, tmp_path / "plan.yaml", *stub_command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as parent:
        assert parent.stdout.readline().startswith(b"http://127.0.0.1:")
        assert len(process_table()) == 4  # parent, controller, shim, engine
        parent.kill()
    wait(lambda: process_table() == [])
    wait(lambda: list_deployments() == ())


def test_a_parent_that_dies_during_the_start_leaves_nothing(
    home, stub_command, plan_of_one, process_table, wait, tmp_path, monkeypatch
):
    (tmp_path / "behaviour").write_text("hangs")
    monkeypatch.setenv("STUB_BEHAVIOUR", str(tmp_path / "behaviour"))
    save_plan(plan_of_one, tmp_path / "plan.yaml")
    code = (
        "import sys\nfrom scepsy.deployment import deploy\nfrom scepsy.files import load_plan\n"
        "deploy(load_plan(sys.argv[1]), engine='vllm-cpu', command=sys.argv[2:], detach=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "plan.yaml", *stub_command]) as parent:
        wait(lambda: len(process_table()) == 4)
        parent.kill()
    wait(lambda: process_table() == [])


def test_detached_it_outlives_its_parent_and_is_stopped_by_name(
    home, stub_command, plan_of_one, process_table, tmp_path
):
    save_plan(plan_of_one, tmp_path / "plan.yaml")
    code = (
        "import sys\nfrom scepsy.deployment import deploy\nfrom scepsy.files import load_plan\n"
        "print(deploy(load_plan(sys.argv[1]), engine='vllm-cpu', command=sys.argv[2:], detach=True, name='d').url)\n"
    )
    parent = [sys.executable, "-W", "error", "-c", code, tmp_path / "plan.yaml", *stub_command]
    shown = subprocess.run(parent, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    deployment = find("d")
    assert deployment.url == shown.stdout.strip()
    assert json.loads(ask(deployment, "a").content)["pid"] == replicas(deployment)["a-0"].pid
    with pytest.raises(ScepsyError, match=r"a deployment 'd' is running; end it with `scepsy stop d`"):
        deploy(plan_of_one, engine="vllm-cpu", command=stub_command, name="d")
    assert find("d").status().ready
    stop("d")
    assert process_table() == []
    with pytest.raises(ScepsyError, match=r"no deployment 'd' is running \(none is; start a plan with: "):
        stop("d")


def test_what_cannot_be_deployed_is_refused_before_anything_starts(
    home, make_plan, make_part, make_profile, process_table, monkeypatch, tmp_path, capsys
):
    gpus = make_plan(make_part("a", 0), cluster="1xH100")
    for options, message in (
        ({"engine": "vllm"}, "engine 'vllm' needs NVIDIA GPUs"),
        ({"engine": "other"}, "engine 'other': use one of vllm, vllm-cpu, emulator"),
        ({"engine": "emulator"}, "needs a profile of each LLM, and there is none of 'a'"),
        ({"engine": "emulator", "name": "../x"}, r"deployment name '\.\./x'"),
        ({"engine": "vllm", "plan": make_plan(make_part("a", 0), cluster="2x8xH100")}, "the plan has 2 nodes"),
        (
            {"engine": "emulator", "plan": make_plan(make_part("a", 0), make_part("b", 0), cluster="1xH100")},
            "plan: device 0 of 'node0' is given out 2 times, to 'a', 'b'; correct its slots, or plan anew",
        ),
        (
            {"engine": "emulator", "plan": make_plan(make_part("a", (0, 0)), cluster="1xH100")},
            "'a' replica 0: names a device twice",
        ),
        (
            {"engine": "emulator", "plan": make_plan(make_part("a", 8), cluster="1xH100")},
            "'a' replica 0: node 'node0' has 1 devices from 0 on, no number 8",
        ),
        (
            {"engine": "emulator", "plan": make_plan(make_part("a", 0, node="other"), cluster="1xH100")},
            "'a' replica 0: the cluster has no node 'other', it has node0",
        ),
        ({"engine": "emulator", "profiles": {"a": make_profile("a", device_memory_gib=1.0)}}, "'a' does not fit into"),
        ({"engine": "emulator", "profiles": {"a": make_profile("a")}, "host": "192.0.2.1"}, "cannot listen on 192.0.2"),
    ):
        with pytest.raises(ScepsyError, match=message):
            deploy(**{"plan": gpus, **options})
    save_plan(gpus, tmp_path / "plan.yaml")
    words = ["deploy", str(tmp_path / "plan.yaml"), "--to", "ray", "--record", "x", "--kv-cache-bytes"]
    assert main(words) == 2
    assert "--record, --kv-cache-bytes: only for engines on this machine, not with --to ray" in capsys.readouterr().err
    assert main(["deploy", str(tmp_path / "plan.yaml"), "--remove", "--image", "x"]) == 2
    assert "--image, --remove: only with --to kubernetes" in capsys.readouterr().err
    assert main(["deploy", str(tmp_path / "plan.yaml"), "--address", "ray://x"]) == 2
    assert "--address: only with --to ray" in capsys.readouterr().err
    here = ["--drain", "5", "--host", "0.0.0.0", "--detach"]  # noqa: S104 - it is refused
    for target in ("ray", "kubernetes"):
        assert main(["deploy", str(tmp_path / "plan.yaml"), "--to", target, *here]) == 2
        assert f"--drain, --host, --detach: only for engines on this machine, not with --to {target}" in (
            capsys.readouterr().err
        )
    monkeypatch.setenv("SCEPSY_HOME", "/proc/none")
    with pytest.raises(ScepsyError, match="/proc/none/deployments/default: cannot be written"):
        deploy(gpus, engine="emulator")
    assert process_table() == []


def test_a_running_deployment_is_not_changed_to_what_cannot_be_placed(
    home, plan_of_one, make_plan, make_part, make_profile
):
    profiles = {llm: make_profile(llm) for llm in "ab"}
    with deploy(plan_of_one, engine="emulator", profiles=profiles) as deployment:
        before = replicas(deployment)
        with pytest.raises(ScepsyError, match="device 0 of 'node0' is given out 2 times, to 'a', 'b'"):
            deployment.apply(make_plan(make_part("a", 0), make_part("b", 0), cluster="1xCPU"), profiles=profiles)
        assert {one.pid for one in replicas(deployment).values()} == {one.pid for one in before.values()}


def test_gpu_engines_under_mps(home, make_plan, make_part, tmp_path, monkeypatch, wait, process_table):
    """The path for GPUs with its tools replaced: UUIDs, MPS daemon before and after the engines, shares, memory."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "no-daemon"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("STUB_SEEN", str(seen))
    tools = tmp_path / "bin"
    tools.mkdir()
    stub_file = Path(__file__).with_name("stub_engine.py")
    for name, script in {
        "nvidia-smi": '[ "$1" = -L ] && for n in 0 1; do echo "GPU $n: NVIDIA H100 (UUID: GPU-$n)"; done || true',
        "nvidia-cuda-mps-control": '[ "$1" = -f ] && touch "$CUDA_MPS_PIPE_DIRECTORY/control" && exec sleep 600',
        "vllm": f'[ "$1" = serve ] && exec {sys.executable} {stub_file} "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    plan = make_plan(make_part("a", 0, fraction=0.5), make_part("b", 0, fraction=0.5), cluster="2xH100")
    with deploy(plan) as deployment:
        (daemon,) = [pid for pid, command in process_table() if command.startswith("sleep 600")]
        os.kill(daemon, signal.SIGKILL)
        wait(lambda: {daemon} != {pid for pid, words in process_table() if words.startswith("sleep 600")} != set())
        assert ask(deployment, "a").status_code == 200
    engines = [json.loads(path.read_text()) for path in seen.iterdir()]
    assert [one["argv"][:2] for one in sorted(engines, key=lambda one: one["argv"][1])] == [
        ["serve", "models/a"],
        ["serve", "models/b"],
    ]
    assert {one["env"]["CUDA_VISIBLE_DEVICES"] for one in engines} == {"GPU-0"}
    assert {one["env"]["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for one in engines} == {"50"}
    (pipes,) = {one["env"]["CUDA_MPS_PIPE_DIRECTORY"] for one in engines}
    assert not Path(pipes).exists()
