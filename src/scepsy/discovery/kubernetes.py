"""The nodes of a Kubernetes cluster as a cluster to plan for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, Final

from scepsy.discovery.products import device_type_of
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB, Cluster, Node, usual_domains
from scepsy_optimizer.errors import ScepsyError

_MIB_PER_GIB: Final = 1024
_TIMEOUT_S: Final = 30
_GPU: Final = "nvidia.com/gpu"
_MIG: Final = re.compile(r"nvidia\.com/mig-\d+g\.\d+gb")
# Where a node hangs: NVIDIA's Topograph, the clouds' own labels, and what people write by hand.
_SWITCHES: Final = (
    "network.topology.nvidia.com/leaf",
    "topology.k8s.aws/network-node-layer-3",
    "cloud.google.com/gce-topology-subblock",
    "topology.kubernetes.io/rack",
    "rack",
)


def discover_kubernetes() -> Cluster:
    """The ready nodes with GPUs of the cluster that kubectl is set up for, by the labels of GPU feature discovery.

    Raises ScepsyError without kubectl, without an answer or the permission to list nodes, or without a GPU.
    """
    tool = shutil.which("kubectl")
    if tool is None:
        raise ScepsyError("finding a Kubernetes cluster's nodes needs kubectl, which is not installed")
    words = [tool, "get", "nodes", "--output", "json", f"--request-timeout={_TIMEOUT_S}s"]
    try:
        # kubectl retries a server that is not there, each time with the time-out.
        shown = subprocess.run(words, capture_output=True, text=True, check=False, timeout=3 * _TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ScepsyError("the Kubernetes cluster that kubectl is set up for does not answer") from error
    if shown.returncode != 0:
        said = [line.strip() for line in shown.stderr.splitlines() if line.strip()]
        raise ScepsyError(f"kubectl get nodes: {said[-1] if said else f'exit code {shown.returncode}'}")
    return cluster_of_kubernetes(json.loads(shown.stdout)["items"])


def cluster_of_kubernetes(items: list[Mapping[str, Any]]) -> Cluster:
    """The cluster that a list of Kubernetes nodes describes.

    A node counts where it is ready, takes new pods and has `nvidia.com/gpu` or MIG resources to allocate; each kind of
    MIG instance is a node of its own, "NODE-TYPE". Where a device plugin offers each GPU several times, the GPUs are
    counted, not the offers. Raises ScepsyError where none counts, or where one lacks the labels of GPU feature
    discovery.
    """
    nodes = [node for item in items if _usable(item) for node in _nodes(item)]
    if not nodes:
        raise ScepsyError(f"none of the {len(items)} Kubernetes nodes is ready, takes new pods and has NVIDIA GPUs")
    return Cluster(nodes=tuple(sorted(nodes, key=lambda node: node.name)))


def _usable(item: Mapping[str, Any]) -> bool:
    conditions = {one["type"]: one["status"] for one in item["status"].get("conditions", ())}
    return conditions.get("Ready") == "True" and not item["spec"].get("unschedulable", False)


def _nodes(item: Mapping[str, Any]) -> Iterator[Node]:
    labels: Mapping[str, str] = item["metadata"].get("labels", {})
    counts = {
        key: int(count)
        for key, count in item["status"].get("allocatable", {}).items()
        if (key == _GPU or _MIG.match(key)) and int(count)
    }
    if _GPU in counts:
        counts[_GPU] //= max(1, int(labels.get(f"{_GPU}.replicas", 1)))
    for resource, count in counts.items():
        yield _node(str(item["metadata"]["name"]), labels, resource, count, alone=len(counts) == 1)


def _node(name: str, labels: Mapping[str, str], resource: str, devices: int, *, alone: bool) -> Node:
    product, memory_mib = labels.get(f"{resource}.product", ""), labels.get(f"{resource}.memory", "")
    if not product:
        raise ScepsyError(
            f"Kubernetes node {name!r} has {resource} but no label {resource}.product; install NVIDIA's GPU feature "
            "discovery, or describe the cluster in a file"
        )
    memory_gib = int(memory_mib) / _MIB_PER_GIB if memory_mib.isdigit() else None
    device_type = device_type_of(product, memory_gib)
    memory_gib = memory_gib or DEVICE_MEMORY_GIB.get(device_type)
    if memory_gib is None:
        raise ScepsyError(
            f"Kubernetes node {name!r}: no label {resource}.memory tells the memory of {product}; describe the cluster "
            "in a file"
        )
    return Node(
        name=name if alone else f"{name}-{device_type}",
        device_type=device_type,
        devices=devices,
        memory_gib=round(memory_gib, 1),
        nvlink_domains=usual_domains(device_type, devices),
        switch=next((labels[key] for key in _SWITCHES if key in labels), ""),
    )
