import json
import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

import scepsy
from scepsy.discovery import discover_cluster, discover_kubernetes, discover_local
from scepsy.discovery.kubernetes import cluster_of_kubernetes
from scepsy.discovery.products import device_type_of
from scepsy.discovery.ray import cluster_of_ray, discover_ray
from scepsy.files import load_cluster, save_cluster
from scepsy_optimizer.errors import ScepsyError

DATA = Path(__file__).parent.parent / "data" / "clusters"
MIB = 2**20


class Nvml(SimpleNamespace):
    """The real binding's constants and errors over recorded answers: there is no GPU where these tests run.

    `gpus` are (name, MiB, [MIG instances as (name, MiB)]); `links` and `sockets` are groups of GPU numbers.
    """

    def __init__(self, gpus, links=(), sockets=()):
        super().__init__(**{key: value for key, value in vars(pynvml).items() if not key.startswith("__")})
        self.gpus, self.links, self.sockets, self.open = gpus, links, sockets, 0
        # NVML hands out one handle for each GPU, and pynvml wraps it anew each time.
        for name in dir(type(self)):
            if name.startswith("_nvml"):
                setattr(self, name[1:], getattr(self, name))

    def _nvmlInit(self):  # noqa: N802 - the binding's name
        self.open += 1

    def _nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def _nvmlDeviceGetCount(self):  # noqa: N802
        return len(self.gpus)

    def _nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return [index]

    def _nvmlDeviceGetMigMode(self, handle):  # noqa: N802
        if "L40S" in self.gpus[handle[0]][0]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(bool(self.gpus[handle[0]][2])), 0]

    def _nvmlDeviceGetMaxMigDeviceCount(self, handle):  # noqa: N802
        return 7

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, handle, number):  # noqa: N802
        if number >= len(self.gpus[handle[0]][2]):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return [*handle, number]

    def _told(self, handle):
        gpu = self.gpus[handle[0]]
        return gpu[2][handle[1]] if len(handle) > 1 else gpu

    def _nvmlDeviceGetName(self, handle):  # noqa: N802
        return self._told(handle)[0]

    def _nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return f"{'GPU' if len(handle) == 1 else 'MIG'}-{'-'.join(map(str, handle))}"

    def _nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(total=self._told(handle)[1] * MIB)

    def _nvmlDeviceGetP2PStatus(self, one, other, index):  # noqa: N802
        assert index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        joined = any({one[0], other[0]} <= set(group) for group in self.links)
        return pynvml.NVML_P2P_STATUS_OK if joined else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED

    def _nvmlDeviceGetTopologyCommonAncestor(self, one, other):  # noqa: N802
        joined = any({one[0], other[0]} <= set(group) for group in self.sockets)
        return pynvml.NVML_TOPOLOGY_NODE if joined else pynvml.NVML_TOPOLOGY_SYSTEM


H100 = ("NVIDIA H100 80GB HBM3", 81559, ())
L40S = ("NVIDIA L40S", 46068, ())


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_with_nvlink_and_two_sockets():
    nvml = Nvml([H100] * 8, links=[range(8)], sockets=[range(4), range(4, 8)])
    (node,) = discover_local(nvml).nodes
    assert (node.name, node.device_type, node.devices, node.memory_gib) == (socket.gethostname(), "H100", 8, 79.6)
    assert node.nvlink_domains == (tuple(range(8)),)
    assert node.pcie_domains == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert node.uuids[3] == "GPU-3"
    assert nvml.open == 0


def test_bridges_join_pairs_and_types_are_nodes_of_their_own(tmp_path):
    nvml = Nvml([H100, L40S, H100, L40S, H100, H100], links=[(0, 2), (4, 5)], sockets=[range(6)])
    cluster = discover_local(nvml)
    first, second = cluster.nodes
    assert [node.name.removeprefix(socket.gethostname()) for node in cluster.nodes] == ["-H100", "-L40S"]
    assert first.nvlink_domains == ((0, 1), (2, 3))
    assert first.uuids == ("GPU-0", "GPU-2", "GPU-4", "GPU-5")
    assert second.nvlink_domains == ((0,), (1,))
    assert second.pcie_domains == ((0, 1),)
    save_cluster(cluster, tmp_path / "cluster.yaml")
    assert load_cluster(tmp_path / "cluster.yaml") == cluster


def test_instances_stand_for_a_gpu_in_mig_mode():
    small = ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9984)
    cut = (*H100[:2], [small, small])
    whole, instances = discover_local(Nvml([H100, cut], links=[(0, 1)], sockets=[(0, 1)])).nodes
    assert (whole.device_type, whole.devices) == ("H100", 1)
    assert (instances.device_type, instances.devices, instances.memory_gib) == ("H100_MIG_1G_10GB", 2, 9.8)
    assert instances.nvlink_domains == ((0,), (1,))
    assert instances.pcie_domains == ((0, 1),)
    assert instances.uuids == ("MIG-1-0", "MIG-1-1")


@pytest.mark.parametrize(
    ("visible", "uuids"), [("3,1", ("GPU-3", "GPU-1")), ("GPU-2", ("GPU-2",)), ("0,9,1", ("GPU-0",))]
)
def test_cuda_visible_devices_says_which(visible, uuids, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (node,) = discover_local(Nvml([H100] * 4, links=[range(4)])).nodes
    assert node.uuids == uuids


def test_none_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    nvml = Nvml([H100])
    with pytest.raises(ScepsyError, match="CUDA_VISIBLE_DEVICES='' leaves none of 1 GPUs"):
        discover_local(nvml)
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver on this machine"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "installed but not loaded"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "may not ask NVIDIA's driver"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "does not answer: GPU is lost"),
    ],
)
def test_a_driver_that_does_not_answer_is_told_in_one_line(code, words):
    nvml = Nvml([])

    def fails():
        raise pynvml.NVMLError(code)

    nvml.nvmlInit = fails
    with pytest.raises(ScepsyError, match=words) as caught:
        discover_local(nvml)
    assert "\n" not in str(caught.value)


def test_a_driver_without_gpus():
    with pytest.raises(ScepsyError, match="shows no GPU"):
        discover_local(Nvml([]))


def test_without_the_binding(monkeypatch):
    monkeypatch.setitem(os.sys.modules, "pynvml", None)
    with pytest.raises(ScepsyError, match=r"pip install 'scepsy\[deploy\]'"):
        discover_local()


@pytest.mark.parametrize(
    ("product", "memory_gib", "device_type"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "H100"),
        ("NVIDIA-H100-80GB-HBM3", None, "H100"),
        ("NVIDIA H100 PCIe", 79.6, "H100_PCIE"),
        ("NVIDIA H100 NVL", 93.6, "H100_94GB"),
        ("NVIDIA A100-SXM4-80GB", 80.0, "A100"),
        ("NVIDIA A100-SXM4-40GB", 39.6, "A100_40GB"),
        ("NVIDIA-A100-PCIE-40GB", 39.6, "A100_PCIE_40GB"),
        ("NVIDIA A10G", 22.5, "A10G"),
        ("NVIDIA A10", 22.5, "A10"),
        ("NVIDIA GeForce RTX 4090", 24.0, "RTX_4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.6, "RTX_PRO_6000"),
        ("Tesla-T4-SHARED", 15.0, "T4"),
        ("NVIDIA-H100-80GB-HBM3-MIG-2g.20gb.me", 19.6, "H100_MIG_2G_20GB_ME"),
    ],
)
def test_products_and_their_types(product, memory_gib, device_type):
    assert device_type_of(product, memory_gib) == device_type


def test_ray_nodes_as_recorded():
    nodes = json.loads((DATA / "ray_nodes.json").read_text(encoding="utf-8"))
    cluster = cluster_of_ray(nodes)
    # One machine played all five nodes, so they are called by their ids.
    live = {node["NodeID"] for node in nodes if node["Alive"] and "GPU" in node["Resources"]}
    assert {node.name for node in cluster.nodes} == live
    assert sorted((node.device_type, node.devices) for node in cluster.nodes) == [("H100", 8), ("H100", 8), ("L40S", 4)]
    by_type = {node.device_type: node for node in cluster.nodes}
    assert len(by_type["H100"].nvlink_domains) == 1
    assert len(by_type["L40S"].nvlink_domains) == 4


def ray_node(host, **more):
    return {
        "NodeID": f"id-{host}",
        "Alive": True,
        "NodeManagerHostname": host,
        "Resources": {"GPU": 2.0, **more.pop("resources", {})},
        "Labels": more.pop("labels", {}),
        **more,
    }


def test_ray_names_types_sizes_and_racks():
    cluster = cluster_of_ray(
        [
            ray_node("b", labels={"ray.io/accelerator-type": "A100-40G", "rack": "r7"}),
            ray_node("a", resources={"accelerator_type:H200": 1.0}),
        ]
    )
    first, second = cluster.nodes
    assert (first.name, first.device_type, first.memory_gib) == ("a", "H200", 140.4)
    assert (second.name, second.device_type, second.memory_gib, second.switch) == ("b", "A100_40GB", 40.0, "r7")


def test_what_ray_does_not_tell_is_asked_for():
    with pytest.raises(ScepsyError, match="does not name their type"):
        cluster_of_ray([ray_node("a")])
    with pytest.raises(ScepsyError, match="whose memory Ray does not tell"):
        cluster_of_ray([ray_node("a", labels={"ray.io/accelerator-type": "MI300X"})])
    with pytest.raises(ScepsyError, match="none of the Ray cluster's 1 nodes"):
        cluster_of_ray([ray_node("a", Alive=False)])


def test_without_ray(monkeypatch):
    monkeypatch.setitem(os.sys.modules, "ray", None)
    with pytest.raises(ScepsyError, match=r"pip install 'scepsy\[ray\]'"):
        discover_ray()


def kubernetes_items():
    return json.loads((DATA / "kubernetes_nodes.json").read_text(encoding="utf-8"))["items"]


def test_kubernetes_nodes():
    cluster = cluster_of_kubernetes(kubernetes_items())
    found = {node.name: (node.device_type, node.devices, node.memory_gib, node.switch) for node in cluster.nodes}
    assert found == {
        "dgx-1": ("H100", 8, 79.6, "r1"),
        "dgx-2": ("H100", 8, 79.6, "r1"),
        "mig-1-H100": ("H100", 7, 79.6, ""),
        "mig-1-H100_MIG_1G_10GB": ("H100_MIG_1G_10GB", 7, 9.8, ""),
        "pcie-1": ("L40S", 4, 45.0, ""),
        "small-1": ("A100_40GB", 8, 40.0, ""),
    }


def test_kubernetes_nodes_that_do_not_say_what_they_have():
    bare = kubernetes_items()[1]
    del bare["metadata"]["labels"]["nvidia.com/gpu.product"]
    with pytest.raises(ScepsyError, match="no label nvidia.com/gpu.product; install NVIDIA's GPU feature discovery"):
        cluster_of_kubernetes([bare])
    with pytest.raises(ScepsyError, match="none of the 1 Kubernetes nodes"):
        cluster_of_kubernetes(kubernetes_items()[:1])


def put_kubectl(tmp_path, monkeypatch, script):
    tool = tmp_path / "kubectl"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")


def test_kubectl_is_asked(tmp_path, monkeypatch):
    put_kubectl(tmp_path, monkeypatch, f'[ "$1 $2" = "get nodes" ] && cat {DATA / "kubernetes_nodes.json"}')
    assert discover_kubernetes() == cluster_of_kubernetes(kubernetes_items())


def test_kubectl_without_permission_or_missing(tmp_path, monkeypatch):
    put_kubectl(tmp_path, monkeypatch, 'echo noise >&2; echo "Error from server (Forbidden): nodes" >&2; exit 1')
    with pytest.raises(ScepsyError, match=r"^kubectl get nodes: Error from server \(Forbidden\): nodes$"):
        discover_kubernetes()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ScepsyError, match="needs kubectl"):
        discover_kubernetes()


def test_auto_takes_what_there_is(tmp_path, monkeypatch):
    # The real binding: no driver here. Where there is one, its GPUs are what auto finds.
    put_kubectl(tmp_path, monkeypatch, f"cat {DATA / 'kubernetes_nodes.json'}")
    monkeypatch.setitem(os.sys.modules, "pynvml", None)
    assert discover_cluster() == discover_kubernetes()
    monkeypatch.setitem(os.sys.modules, "pynvml", Nvml([H100] * 2, links=[(0, 1)]))
    assert discover_cluster().device_type == "H100"
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1")
    monkeypatch.setitem(os.sys.modules, "ray", None)
    with pytest.raises(ScepsyError, match="needs Ray"):
        discover_cluster()


def test_nothing_found_says_what_each_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(os.sys.modules, "pynvml", None)
    with pytest.raises(ScepsyError, match=r"no cluster found \(local: .*; kubernetes: .*\); describe it"):
        discover_cluster()
    with pytest.raises(ScepsyError, match="cannot discover 'slurm'"):
        scepsy.discover_cluster("slurm")
