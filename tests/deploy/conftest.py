import json
import os
import sys
import time
import uuid
from pathlib import Path

import pytest

from scepsy.deployment import deploy
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.plan import LLMPlan, Plan, Slot
from scepsy_optimizer.profile import LLMProfile, Provenance, StepTimes

STUB = Path(__file__).with_name("stub_engine.py")


@pytest.fixture(scope="session")
def make_profile():
    def make(llm="m", **changes):
        steps = StepTimes(
            tensor_parallel_size=1,
            batch_sizes=(1, 64),
            context_tokens=(256, 4096),
            decode_s=((0.004, 0.005), (0.008, 0.012)),
            prefill_tokens=(16, 4096),
            prefill_s=(0.004, 0.08),
            weights_gib=2.0,
            overhead_gib=1.0,
            kv_bytes_per_token=100_000.0,
        )
        return LLMProfile(
            llm=llm,
            model=f"models/{llm}",
            device_type="H100",
            steps=(steps,),
            provenance=Provenance(source="estimate", tool="made up", engine="vLLM", date="2026-01-01"),
            **{"device_memory_gib": 79.6, "max_model_len": 4096, **changes},
        )

    return make


@pytest.fixture(scope="session")
def make_part():
    def make(llm, *devices, fraction=1.0, node="node0", **changes):
        """A replica on each given device; a tuple of devices is a tensor-parallel group."""
        groups = [device if isinstance(device, tuple) else (device,) for device in devices]
        return LLMPlan(
            **{
                "llm": llm,
                "model": f"models/{llm}",
                "tensor_parallel_size": len(groups[0]),
                "fraction": fraction,
                "replicas": len(groups),
                "slots": tuple(Slot(node=node, devices=group) for group in groups),
                "max_num_seqs": 128,
                "max_num_batched_tokens": 4096,
                "max_model_len": 4096,
                "gpu_memory_utilization": 0.9,
                **changes,
            }
        )

    return make


@pytest.fixture(scope="session")
def make_plan():
    def make(*parts, cluster="2xCPU"):
        return Plan(cluster=parse_cluster(cluster), rate_rps=1.0, llms=parts)

    return make


@pytest.fixture(scope="session")
def stub_command():
    return [sys.executable, str(STUB)]


def marked_processes(mark):
    """Processes, the zombies among them left out, that were started with the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
            except OSError:
                continue
    return found


def wait_for(check, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="session")
def wait():
    return wait_for


@pytest.fixture
def process_table():
    """Everything started under this fixture carries a mark; at the end nothing marked may be left."""
    mark = f"scepsy-test-{uuid.uuid4().hex}"
    os.environ["SCEPSY_TEST_MARK"] = mark
    yield lambda: marked_processes(mark)
    del os.environ["SCEPSY_TEST_MARK"]
    assert marked_processes(mark) == []


@pytest.fixture
def home(tmp_path, monkeypatch, process_table):
    """Deployments are noted in a folder of the test's own, scratch folders made there too, and nothing is left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(scratch))
    yield tmp_path / "home"
    assert list(scratch.iterdir()) == []


@pytest.fixture
def stub(home, make_plan, make_part, stub_command, monkeypatch, tmp_path):
    """Deploy stub engines on two cores; `behave` says how they behave at their next start."""
    behaviour = tmp_path / "behaviour"
    behaviour.write_text("")
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("STUB_BEHAVIOUR", str(behaviour))
    monkeypatch.setenv("STUB_SEEN", str(seen))
    plan = make_plan(make_part("a", 0), make_part("b", 1))

    def start(**options):
        return deploy(**{"plan": plan, "engine": "vllm-cpu", "command": stub_command, **options})

    start.behave = behaviour.write_text
    start.seen = lambda: [json.loads(path.read_text()) for path in sorted(seen.iterdir())]
    return start
