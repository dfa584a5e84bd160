import os
import subprocess
import sys

import pytest

from scepsy.deployment import machine, quota
from scepsy_optimizer.errors import ScepsyError

GPUS = "0, GPU-aaa, NVIDIA H100 80GB HBM3\\n1, GPU-bbb, NVIDIA H100 80GB HBM3\\n"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a program of that name on the path, alone with the shell's own."""

    def make(name, script):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def test_gpus_in_their_order(tool, monkeypatch):
    tool("nvidia-smi", f"printf '{GPUS}'")
    assert [gpu.uuid for gpu in machine.find_gpus()] == ["GPU-aaa", "GPU-bbb"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbb, 0,7")
    assert [gpu.uuid for gpu in machine.find_gpus()] == ["GPU-bbb", "GPU-aaa"]


def test_a_machine_without_gpus(tool, monkeypatch):
    tool("nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    with pytest.raises(ScepsyError, match="nvidia-smi says: NVIDIA-SMI has failed"):
        machine.find_gpus()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ScepsyError, match="this machine has no nvidia-smi"):
        machine.find_gpus()


def test_a_plan_on_more_or_other_gpus(make_plan, make_part):
    gpus = [machine.Gpu(uuid="GPU-aaa", name="NVIDIA A100-SXM4-80GB")]
    assert machine.check_gpus(make_plan(make_part("a", 0), cluster="1xA100"), gpus) == []
    remarks = machine.check_gpus(make_plan(make_part("a", 0), cluster="8xH100"), gpus)
    assert remarks == ["the plan is for H100, this machine has NVIDIA A100-SXM4-80GB"]
    with pytest.raises(ScepsyError, match=r"uses GPUs 1, 2 of 8, but this machine has 1; plan for --cluster 1xA100"):
        machine.check_gpus(make_plan(make_part("a", (1, 2)), cluster="8xA100"), gpus)


def test_mps(tool, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert machine.running_mps() is None
    (tmp_path / "control").touch()
    assert machine.running_mps() == str(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ScepsyError, match="no nvidia-cuda-mps-control"):
        machine.mps_command()
    tool("nvidia-cuda-mps-control", "sleep 1")
    assert machine.mps_command() == [str(tmp_path / "bin" / "nvidia-cuda-mps-control"), "-f"]


def writable():
    parent, _ = quota._parent()
    return os.access(parent, os.W_OK)


def test_a_quota_halves_what_a_process_gets(wait):
    if not writable():
        with pytest.raises(ScepsyError, match="a fraction of a CPU device needs a cgroup"):
            quota.check_quota()
        return
    quota.check_quota()
    name = f"scepsy-test-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            quota.limit(name, busy.pid, 0.5)
            parent, version = quota._parent()
            stat = parent / name / "cpu.stat"
            # The scheduler has stopped it at the end of its part of a period.
            wait(lambda: int(dict(line.split() for line in stat.read_text().splitlines())["nr_throttled"]) > 3)
            limits = {
                1: ("cpu.cfs_quota_us", "10000"),
                2: ("cpu.max", "10000 20000"),
            }
            file, expected = limits[version]
            assert (parent / name / file).read_text().strip() == expected
        finally:
            busy.kill()
    wait(lambda: quota.release(name) or not (parent / name).exists())


def test_unused_quotas_of_a_killed_deployer_are_removed():
    if not writable():
        quota.release_unused()
        return
    parent, _ = quota._parent()
    quota._create("scepsy-test-left", 0.5)
    quota.release_unused()
    assert not (parent / "scepsy-test-left").exists()
