"""Plans on a Ray cluster of fake nodes on this machine: real actors and processes, emulated engines."""

import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from scepsy.deployment.on_ray import deploy_on_ray, find_on_ray
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan, Slot
from scepsy_optimizer.profile import LLMProfile, Provenance, StepTimes

pytestmark = pytest.mark.ray

MARK = "SCEPSY_TEST_RAY"


def profile(llm):
    steps = tuple(
        StepTimes(
            tensor_parallel_size=size,
            batch_sizes=(1, 64),
            context_tokens=(256, 4096),
            decode_s=((0.004, 0.005), (0.008, 0.012)),
            prefill_tokens=(16, 4096),
            prefill_s=(0.004, 0.08),
            weights_gib=2.0,
            overhead_gib=1.0,
            kv_bytes_per_token=100_000.0,
        )
        for size in (1, 2)
    )
    provenance = Provenance(source="estimate", tool="made up", engine="vLLM", date="2026-01-01")
    return LLMProfile(
        llm=llm, model=f"m/{llm}", device_type="H100", device_memory_gib=79.6, steps=steps, provenance=provenance
    )


def part(llm, *slots, size=1, fraction=1.0):
    return LLMPlan(
        llm=llm,
        model=f"m/{llm}",
        tensor_parallel_size=size,
        fraction=fraction,
        replicas=len(slots),
        slots=tuple(Slot(node=node, devices=devices) for node, devices in slots),
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        max_model_len=4096,
        gpu_memory_utilization=0.9,
    )


def plan_of(*parts, nodes=("n0", "n1", "n2")):
    made = tuple(
        Node(name=name, device_type="H100", devices=4, memory_gib=79.6, nvlink_domains=((0, 1, 2, 3),))
        for name in nodes
    )
    return Plan(cluster=Cluster(nodes=made), rate_rps=1.0, llms=parts)


PLAN = plan_of(
    part("big", ("n0", (0, 1)), size=2),
    part("half", ("n1", (0,)), ("n1", (0,)), fraction=0.5),
    part("one", ("n2", (3,))),
)
PROFILES = {llm: profile(llm) for llm in ("big", "half", "one")}


def call(deployment, model):
    body = json.dumps({"model": model, "prompt": "p", "max_tokens": 4}).encode()
    request = urllib.request.Request(  # noqa: S310 - our own endpoint
        f"{deployment.url}/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
        return answer.headers["x-scepsy-replica"]


def emulators():
    """Processes of this cluster's engines that live."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.environ[MARK].encode() not in (entry / "environ").read_bytes():
                    continue
                words = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if b"scepsy.emulator" in words and b"shim.py" not in b" ".join(words) and state != "Z":
                found[int(entry.name)] = words[words.index(b"--llm") + 1].decode()
    return found


def wait(check, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.1)
    return value


def left(name="default"):
    """What Ray still keeps of a deployment."""
    import ray

    actors = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    groups = [one["name"] for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]
    return [one for one in (*actors, *groups) if one.startswith(f"{name}/")]


@pytest.fixture
def deployment(cluster):
    with deploy_on_ray(PLAN, engine="emulator", profiles=PROFILES, address=cluster.address, host="127.0.0.1") as made:
        yield made
    assert left() == []
    assert emulators() == {}


def test_every_replica_runs_where_the_plan_has_it(deployment, cluster):
    import ray

    assert {model: call(deployment, model) for model in ("big", "one")} == {"big": "big-0", "one": "one-0"}
    assert {call(deployment, "half") for _ in range(4)} == {"half-0", "half-1"}
    status = deployment.status()
    assert status.ready
    assert {one.id: one.phase for one in status.replicas} == dict.fromkeys(
        ("big-0", "half-0", "half-1", "one-0"), "ready"
    )
    names = {node["NodeID"]: node["Labels"].get("scepsy-node") for node in ray.nodes()}
    groups = {
        one["name"]: (names[one["bundles_to_node_id"][0]], one["bundles"][0]["GPU"])
        for one in ray.util.placement_group_table().values()
        if one["state"] == "CREATED"
    }
    assert groups == {
        "default/big-0": ("n0", 2.0),
        "default/half-0": ("n1", 0.5),
        "default/half-1": ("n1", 0.5),
        "default/one-0": ("n2", 1.0),
    }
    # Another process finds it by its name.
    assert find_on_ray(address=cluster.address).url == deployment.url
    with pytest.raises(ScepsyError, match="a deployment 'default' is on that Ray cluster"):
        deploy_on_ray(PLAN, engine="emulator", profiles=PROFILES, address=cluster.address)


@pytest.mark.parametrize("victim", ["engine", "keeper", "head"])
def test_whoever_is_killed_comes_again_and_leaves_nothing(deployment, victim):
    (engine,) = [pid for pid, llm in emulators().items() if llm == "one"]
    # Between an engine and its keeper is the shim.
    keeper = psutil.Process(engine).parent().parent()
    assert "Keeper" in keeper.cmdline()[0]
    url = deployment.url
    killed = {"engine": engine, "keeper": keeper.pid, "head": deployment.status().pid}[victim]
    os.kill(killed, signal.SIGKILL)

    def healed():
        try:
            return call(deployment, "one") == "one-0" and deployment.status().ready
        except (OSError, ScepsyError):
            return False

    # First it has to be gone, and a keeper's engine with it: until then the old answer would count.
    wait(lambda: not Path(f"/proc/{killed}").exists() if victim == "head" else engine not in emulators())
    wait(healed)
    running = [pid for pid, llm in emulators().items() if llm == "one"]
    assert len(running) == 1
    assert (running == [engine]) == (victim == "head")
    assert deployment.url == url
    for model in ("big", "half"):
        call(deployment, model)


def test_what_has_no_room_says_what_is_missing(cluster):
    wide = plan_of(part("big", ("n0", (0, 1)), ("n0", (2, 3)), ("n0", (0, 1)), size=2))
    with pytest.raises(
        ScepsyError, match=r"no room for 1 of 3 replicas: big-\d wants on 'n0' 2 GPU \(it has 4, of which 0 free\)"
    ):
        deploy_on_ray(wide, engine="emulator", profiles=PROFILES, address=cluster.address)
    assert left() == []
    elsewhere = plan_of(part("one", ("n7", (0,))), nodes=("n7",))
    with pytest.raises(ScepsyError, match="the plan's node 'n7' is 0 of the Ray cluster's nodes"):
        deploy_on_ray(elsewhere, engine="emulator", profiles=PROFILES, address=cluster.address)
    with pytest.raises(ScepsyError, match="no deployment 'other' is on that Ray cluster"):
        find_on_ray("other", address=cluster.address)


def test_an_engine_that_does_not_start_says_why_and_is_taken_away(cluster):
    one = plan_of(part("one", ("n0", (0,))))
    command = ("python3", "-c", "print('ValueError: no such model'); raise SystemExit(3)")
    with pytest.raises(ScepsyError, match=r"one-0 on Ray did not start: (.|\n)*exit code 3(.|\n)*no such model"):
        deploy_on_ray(one, engine="vllm", command=command, address=cluster.address)
    assert left() == []
