"""The machines a plan is made for: nodes, their devices, which of them share a fast link, and what lies between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    import networkx as nx

# Usable memory per device in GiB, as NVML reports the total.
DEVICE_MEMORY_GIB = {
    "A100": 79.2,
    "A100_PCIE": 80.0,
    "A10G": 22.5,
    "A30": 24.0,
    "B200": 178.4,
    "B300": 267.7,
    "CPU": 4.0,
    "GB200": 184.9,
    "H100": 79.6,
    "H100_PCIE": 79.6,
    "H200": 140.4,
    "L4": 22.5,
    "L40S": 44.7,
    "RTX_4090": 24.0,
    "RTX_5090": 31.8,
    "RTX_PRO_6000": 95.6,
}

# Memory bandwidth per device in GB/s, by the data sheet.
DEVICE_MEMORY_GB_S = {
    "A100": 2039.0,
    "A100_PCIE": 1935.0,
    "A10G": 600.0,
    "A30": 933.0,
    "B200": 8000.0,
    "B300": 7750.0,
    "GB200": 8000.0,
    "H100": 3350.0,
    "H100_PCIE": 2039.0,
    "H200": 4800.0,
    "L4": 300.0,
    "L40S": 864.0,
    "RTX_4090": 1008.0,
    "RTX_5090": 1792.0,
    "RTX_PRO_6000": 1792.0,
}

# Devices that NVLink joins to all others of their node (for cores, their memory does). Tensor-parallel groups of others
# would talk over PCIe: each is a domain of its own, unless a cluster file or NVML says otherwise.
_WITH_NVLINK = frozenset({"A100", "A100_40GB", "B200", "B300", "CPU", "GB200", "H100", "H200"})

_SHAPE = re.compile(r"^(?:(?P<nodes>\d+)x)?(?P<devices>\d+)x(?P<type>[A-Za-z0-9_]+)$")

_SAME_MEMORY = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine. Devices are numbered from 0; `nvlink_domains` partitions those numbers.

    A tensor-parallel group stays inside one domain. `device_type` "CPU" means cores that run vLLM for CPU. A machine
    with devices of several types is several nodes. `pcie_domains`, where known, partitions the devices by the processor
    socket that they hang on, and `switch` names the rack or leaf switch of the node. `uuids`, where known, name the
    devices in the same order; an engine is started on them rather than on numbers.
    """

    name: str
    device_type: str
    devices: int
    memory_gib: float
    nvlink_domains: tuple[tuple[int, ...], ...]
    uuids: tuple[str, ...] = ()
    pcie_domains: tuple[tuple[int, ...], ...] = ()
    switch: str = ""

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ScepsyError(f"node {self.name!r}: has {self.devices} devices; give at least 1, or leave the node out")
        for name, domains in (("nvlink_domains", self.nvlink_domains), ("pcie_domains", self.pcie_domains)):
            members = sorted(device for domain in domains for device in domain)
            if members != list(range(self.devices)) and (domains or name == "nvlink_domains"):
                raise ScepsyError(
                    f"node {self.name!r}: {name} must name each of its {self.devices} devices once, got {members}"
                )
        if self.uuids and len(self.uuids) != self.devices:
            raise ScepsyError(f"node {self.name!r}: {len(self.uuids)} uuids for {self.devices} devices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """All nodes that the plan may use."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if not names:
            raise ScepsyError("cluster: has no nodes; name at least one, with its devices")
        if len(set(names)) != len(names):
            raise ScepsyError(f"cluster: node names must differ, got {names}")
        memory_gib: dict[str, float] = {}
        for node in self.nodes:
            usual = memory_gib.setdefault(node.device_type, node.memory_gib)
            if abs(node.memory_gib - usual) > _SAME_MEMORY * usual:
                raise ScepsyError(
                    f"cluster: {node.device_type} has {usual:g} GiB on one node and {node.memory_gib:g} GiB on "
                    f"{node.name!r}; call them by two device types, such as A100 and A100_40GB"
                )

    @property
    def devices(self) -> int:
        """Number of devices of all nodes."""
        return sum(node.devices for node in self.nodes)

    @property
    def largest_domain(self) -> int:
        """Devices of the largest fast-link domain: no tensor-parallel group can be larger."""
        return max(len(domain) for node in self.nodes for domain in node.nvlink_domains)

    @property
    def device_types(self) -> tuple[str, ...]:
        """The types that there are, each once, in the order of the nodes."""
        return tuple(dict.fromkeys(node.device_type for node in self.nodes))

    @property
    def device_type(self) -> str:
        """The types in one word: "H100", or "H100+L40S" where there are several."""
        return "+".join(self.device_types)

    def devices_of(self, device_type: str) -> int:
        """Number of devices of that type."""
        return sum(node.devices for node in self.nodes if node.device_type == device_type)

    def largest_domain_of(self, device_type: str) -> int:
        """Devices of the largest fast-link domain of that type."""
        return max(self.domain_sizes_of(device_type), default=0)

    def groups_of(self, device_type: str, size: int) -> int:
        """How many groups of `size` devices of that type its fast-link domains hold together."""
        return sum(devices // size for devices in self.domain_sizes_of(device_type))

    def domain_sizes_of(self, device_type: str) -> list[int]:
        """Devices of each fast-link domain of that type."""
        return [len(domain) for node in self.nodes if node.device_type == device_type for domain in node.nvlink_domains]


_MAX_PARTS = 64


def parts_of(cluster: Cluster, nodes: int) -> tuple[Cluster, ...]:
    """Every part of a cluster of that many nodes, but one of those that differ only in which of equal nodes they have.

    Raises ScepsyError where the nodes differ so much that there are very many.
    """
    if nodes >= len(cluster.nodes):
        return (cluster,)
    alike: dict[tuple[str, tuple[int, ...], str], list[Node]] = {}
    for node in cluster.nodes:
        shape = tuple(sorted(len(domain) for domain in node.nvlink_domains))
        alike.setdefault((node.device_type, shape, node.switch), []).append(node)
    numbers = list(islice(_numbers([len(group) for group in alike.values()], nodes), _MAX_PARTS + 1))
    if len(numbers) > _MAX_PARTS:
        raise ScepsyError(
            f"there are more than {_MAX_PARTS} ways to choose {nodes} of {len(cluster.nodes)} nodes that differ: name "
            "the nodes to use in a cluster file of their own"
        )
    return tuple(
        Cluster(
            nodes=tuple(node for group, count in zip(alike.values(), counts, strict=True) for node in group[:count])
        )
        for counts in numbers
    )


def _numbers(limits: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Every way to take `total` from heaps of limited size, from the first heap the most first."""
    if len(limits) == 1:
        if total <= limits[0]:
            yield (total,)
        return
    for count in range(min(limits[0], total), -1, -1):
        yield from ((count, *rest) for rest in _numbers(limits[1:], total - count))


def parse_cluster(text: str) -> Cluster:
    """Read the short form: "8xH100" is one node of eight, "2x8xH100" two such nodes, "2xCPU" two cores.

    Several shapes are joined by "+": "2x8xH100+8xL40S". Every node is taken as one NVLink domain, except for device
    types that come without. Raises ScepsyError.
    """
    nodes: list[Node] = []
    for shape in text.split("+"):
        nodes += _parse_shape(shape.strip(), text, len(nodes))
    return Cluster(nodes=tuple(nodes))


def _parse_shape(shape: str, text: str, first: int) -> list[Node]:
    match = _SHAPE.match(shape)
    if match is None:
        raise ScepsyError(
            f"cluster {text!r}: write DEVICESxTYPE or NODESxDEVICESxTYPE, such as 8xH100 or 2x8xH100, "
            "several joined by +"
        )
    device_type = match["type"].upper()
    if device_type not in DEVICE_MEMORY_GIB:
        known = ", ".join(sorted(DEVICE_MEMORY_GIB))
        raise ScepsyError(f"cluster {text!r}: unknown device type {match['type']!r}; known: {known}")
    devices, nodes = int(match["devices"]), int(match["nodes"] or 1)
    if devices < 1 or nodes < 1:
        raise ScepsyError(f"cluster {text!r}: needs at least one node and one device")
    return [
        Node(
            name=f"node{first + index}",
            device_type=device_type,
            devices=devices,
            memory_gib=DEVICE_MEMORY_GIB[device_type],
            nvlink_domains=usual_domains(device_type, devices),
        )
        for index in range(nodes)
    ]


def usual_domains(device_type: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The NVLink domains of a node of which only the type and number of devices is known: all, or each alone."""
    numbers = tuple(range(devices))
    return (numbers,) if device_type in _WITH_NVLINK else tuple((number,) for number in numbers)


NVLINK_DISTANCE = 1
PCIE_DISTANCE = 2
SOCKET_DISTANCE = 4
SWITCH_DISTANCE = 16
NETWORK_DISTANCE = 32

Place = tuple[str, ...] | tuple[str, str, int]
"""A vertex of the topology: ("network",), ("switch", NAME), ("node", NAME), or a socket, an NVLink domain or a device
of a node, such as ("device", NODE, 3)."""


def topology(cluster: Cluster) -> nx.Graph[Place]:
    """The cluster as a graph: devices, the NVLink domains and sockets that join them, nodes, switches, the network.

    The `distance` of an edge is half of that between two devices which it and its like join, so that a shortest path
    between devices is 1 over NVLink, 2 over PCIe below one socket, 4 across sockets, 16 between nodes below one switch
    and 32 between others. The figures order the links by how long a byte takes; they are not times. Nodes that name no
    switch hang on the network directly.
    """
    import networkx as nx  # here: clusters and plans are read by processes that draw no graphs, and it loads slowly

    graph: nx.Graph[Place] = nx.Graph()
    graph.add_node(("network",))
    for node in cluster.nodes:
        here: Place = ("node", node.name)
        if node.switch:
            graph.add_edge(("network",), ("switch", node.switch), distance=(NETWORK_DISTANCE - SWITCH_DISTANCE) / 2)
            graph.add_edge(("switch", node.switch), here, distance=(SWITCH_DISTANCE - SOCKET_DISTANCE) / 2)
        else:
            graph.add_edge(("network",), here, distance=(NETWORK_DISTANCE - SOCKET_DISTANCE) / 2)
        for number, devices in enumerate(node.pcie_domains or (tuple(range(node.devices)),)):
            socket: Place = ("socket", node.name, number)
            graph.add_edge(here, socket, distance=(SOCKET_DISTANCE - PCIE_DISTANCE) / 2)
            graph.add_edges_from(
                ((socket, ("device", node.name, device)) for device in devices), distance=PCIE_DISTANCE / 2
            )
        for number, devices in enumerate(node.nvlink_domains):
            if len(devices) > 1:
                hub: Place = ("nvlink", node.name, number)
                graph.add_edges_from(
                    ((hub, ("device", node.name, device)) for device in devices), distance=NVLINK_DISTANCE / 2
                )
    return graph


def same_devices(old: Cluster, new: Cluster) -> dict[tuple[str, int], tuple[str, int]]:
    """The devices of `old` that `new` has as well: what each is called there, by node name and number in `old`.

    Devices are told apart by their UUIDs where both clusters know them, else by node name and number.
    """
    by_uuid = {uuid: (node.name, number) for node in new.nodes for number, uuid in enumerate(node.uuids)}
    nodes = {node.name: node for node in new.nodes}
    same = {}
    for node in old.nodes:
        here = nodes.get(node.name)
        for number in range(node.devices):
            if node.uuids and by_uuid:
                if node.uuids[number] in by_uuid:
                    same[node.name, number] = by_uuid[node.uuids[number]]
            elif here is not None and number < here.devices and here.device_type == node.device_type:
                same[node.name, number] = (node.name, number)
    return same
