import os
import subprocess
import sys
from dataclasses import replace

import pytest

from scepsy.deployment import machine, quota
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.errors import ScepsyError

# What nvidia-smi prints, for -L and for the query: two GPUs, the second cut into two instances.
LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbb)
"""
LISTED_MIG = f"""{LISTED}\
  MIG 3g.40gb     Device  0: (UUID: MIG-c6d4)
  MIG 1g.10gb     Device  1: (UUID: MIG-91c7)
"""
BUSES = """\
GPU-aaa, 00000000:17:00.0
GPU-bbb, 00000000:CA:00.0
"""


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


def smi(listed):
    return f"[ \"$1\" = -L ] && printf '{listed}' || printf '{BUSES}'"


def test_gpus_in_their_order(tool, monkeypatch):
    tool("nvidia-smi", smi(LISTED))
    assert [gpu.uuid for gpu in machine.find_gpus()] == ["GPU-aaa", "GPU-bbb"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb, 0,7,1")
    assert [gpu.uuid for gpu in machine.find_gpus()] == ["GPU-bbb", "GPU-aaa"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,0")
    assert machine.find_gpus() == []


def test_a_gpu_in_mig_mode_stands_for_its_instances(tool, monkeypatch, make_plan, make_part):
    tool("nvidia-smi", smi(LISTED_MIG))
    gpus = machine.find_gpus()
    assert [gpu.uuid for gpu in gpus] == ["GPU-aaa", "MIG-c6d4", "MIG-91c7"]
    assert gpus[1].name == "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-91c7")
    assert [gpu.uuid for gpu in machine.find_gpus()] == ["MIG-91c7"]
    # As discovery has such a machine: a node for each kind of device.
    whole = Node(
        name="h-H100", device_type="H100", devices=1, memory_gib=79.6, nvlink_domains=((0,),), uuids=("GPU-aaa",)
    )
    kind = "H100_MIG_3G_40GB"
    cut = replace(whole, name=f"h-{kind}", device_type=kind, memory_gib=39.5, uuids=("MIG-c6d4",))
    plan = make_plan(make_part("a", 0, node=whole.name), make_part("b", 0, node=cut.name))
    plan = replace(plan, cluster=Cluster(nodes=(whole, cut)))
    assert machine.check_gpus(plan, gpus) == []
    with pytest.raises(ScepsyError, match="uses GPUs that this machine does not have: MIG-c6d4"):
        machine.check_gpus(plan, gpus[:1])


def test_the_cores_beside_a_gpu(tool, monkeypatch, tmp_path):
    tool("nvidia-smi", smi(LISTED_MIG))
    for bus, cores in (("0000:17:00.0", "0-3,8"), ("0000:ca:00.0", "0-63")):
        (tmp_path / "pci" / bus).mkdir(parents=True)
        (tmp_path / "pci" / bus / "local_cpulist").write_text(f"{cores}\n")
    monkeypatch.setattr(machine, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(machine, "cores", lambda: [2, 3, 4, 8])
    # Those of the second are all that there are: nothing has to be kept.
    assert [gpu.cores for gpu in machine.find_gpus()] == [(2, 3, 8), (), ()]


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


def test_a_quota_holds_a_process_at_its_part(wait):
    if not writable():
        with pytest.raises(ScepsyError, match="a fraction of a CPU device needs a cgroup"):
            quota.check_quota()
        return
    quota.check_quota()
    name = f"scepsy-test-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            # So little that it meets its limit on the busiest machine.
            quota.limit(name, busy.pid, 0.1)
            parent, version = quota._parent()
            stat = parent / name / "cpu.stat"
            # The scheduler has stopped it at the end of its part of a period.
            wait(lambda: int(dict(line.split() for line in stat.read_text().splitlines())["nr_throttled"]) > 3)
            limits = {
                1: {"cpu.cfs_quota_us": "2000", "cpu.shares": "102"},
                2: {"cpu.max": "2000 20000", "cpu.weight": "10"},
            }
            found = {file: (parent / name / file).read_text().strip() for file in limits[version]}
            assert found == limits[version]
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
