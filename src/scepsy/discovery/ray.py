"""The nodes of a Ray cluster as a cluster to plan for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Final

from scepsy.discovery.products import device_type_of
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB, Cluster, Node, usual_domains
from scepsy_optimizer.errors import ScepsyError

_ACCELERATOR: Final = "accelerator_type:"
_SWITCHES: Final = ("ray.io/rack", "rack", "network.topology.nvidia.com/leaf")


def discover_ray() -> Cluster:
    """The live nodes with GPUs of the Ray cluster that this process belongs to, or that RAY_ADDRESS names.

    Raises ScepsyError without Ray, without a cluster, or without a GPU in it.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise ScepsyError("finding a Ray cluster's nodes needs Ray; install it (pip install 'scepsy[ray]')") from error
    connected = ray.is_initialized()
    try:
        if not connected:
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        nodes = ray.nodes()
    # Ray raises ConnectionError without a cluster, RuntimeError or ValueError for addresses and versions.
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise ScepsyError(f"no Ray cluster answers: {said}; start one, or set RAY_ADDRESS") from error
    finally:
        if not connected:
            ray.shutdown()
    return cluster_of_ray(nodes)


def cluster_of_ray(nodes: Sequence[Mapping[str, Any]]) -> Cluster:
    """The cluster that `ray.nodes()` describes.

    Nodes are called by host name, or by Ray's node id where several have the same one. Ray knows the number and the
    type of a node's GPUs, not their links or memory: those of the type are assumed. Raises ScepsyError where no live
    node has a GPU, or where a type is not known.
    """
    live = [node for node in nodes if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    if not live:
        raise ScepsyError(f"none of the Ray cluster's {len(nodes)} nodes is alive and has a GPU")
    hosts = [str(node["NodeManagerHostname"]) for node in live]
    unique = len(set(hosts)) == len(hosts)
    found = [_node(node, host if unique else str(node["NodeID"])) for node, host in zip(live, hosts, strict=True)]
    return Cluster(nodes=tuple(sorted(found, key=lambda node: node.name)))


def _node(node: Mapping[str, Any], name: str) -> Node:
    labels, resources = node.get("Labels") or {}, node["Resources"]
    marks = [key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR)]
    product = labels.get("ray.io/accelerator-type") or (marks[0] if marks else "")
    if not product:
        raise ScepsyError(
            f"Ray node {name!r} has GPUs but does not name their type; start it with --labels "
            "ray.io/accelerator-type=H100, or describe the cluster in a file"
        )
    # Ray writes the size into the names of products that come in two: A100-40G.
    match = re.search(r"-(\d+)GB?$", product)
    size_gib = None if match is None else float(match[1])
    device_type = device_type_of(product, size_gib)
    memory_gib = DEVICE_MEMORY_GIB.get(device_type, size_gib)
    if memory_gib is None:
        raise ScepsyError(
            f"Ray node {name!r} has GPUs of type {product!r}, whose memory Ray does not tell; describe the cluster in "
            "a file"
        )
    devices = int(resources["GPU"])
    return Node(
        name=name,
        device_type=device_type,
        devices=devices,
        memory_gib=memory_gib,
        nvlink_domains=usual_domains(device_type, devices),
        switch=next((str(labels[key]) for key in _SWITCHES if key in labels), ""),
    )
