"""The machines a plan is made for: nodes, their devices and which of them share a fast link."""

from __future__ import annotations

import re
from dataclasses import dataclass

from scepsy_optimizer.errors import ScepsyError

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

# Devices whose tensor-parallel groups talk over PCIe: each is an NVLink domain of its own.
_WITHOUT_NVLINK = frozenset(
    {"A100_PCIE", "A10G", "A30", "H100_PCIE", "L4", "L40S", "RTX_4090", "RTX_5090", "RTX_PRO_6000"}
)

_SHAPE = re.compile(r"^(?:(?P<nodes>\d+)x)?(?P<devices>\d+)x(?P<type>[A-Za-z0-9_]+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine. Devices are numbered from 0; `nvlink_domains` partitions those numbers.

    A tensor-parallel group stays inside one domain. `device_type` "CPU" means cores that run vLLM for CPU.
    `uuids`, where known, name the devices in the same order; an engine is started on them rather than on numbers.
    """

    name: str
    device_type: str
    devices: int
    memory_gib: float
    nvlink_domains: tuple[tuple[int, ...], ...]
    uuids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        members = sorted(device for domain in self.nvlink_domains for device in domain)
        if members != list(range(self.devices)):
            raise ScepsyError(
                f"node {self.name!r}: nvlink_domains must name each of its {self.devices} devices once, got {members}"
            )
        if self.uuids and len(self.uuids) != self.devices:
            raise ScepsyError(f"node {self.name!r}: {len(self.uuids)} uuids for {self.devices} devices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """All nodes that the plan may use."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if len(set(names)) != len(names):
            raise ScepsyError(f"cluster: node names must differ, got {names}")

    @property
    def devices(self) -> int:
        """Number of devices of all nodes."""
        return sum(node.devices for node in self.nodes)

    @property
    def largest_domain(self) -> int:
        """Devices of the largest fast-link domain: no tensor-parallel group can be larger."""
        return max(len(domain) for node in self.nodes for domain in node.nvlink_domains)

    @property
    def device_type(self) -> str:
        """The type that all devices share.

        Raises ScepsyError when the nodes have several types: this version plans for one.
        """
        types = sorted({node.device_type for node in self.nodes})
        if len(types) != 1:
            raise ScepsyError(f"cluster: one device type is supported, got {', '.join(types) or 'no nodes'}")
        return types[0]


def parse_cluster(text: str) -> Cluster:
    """Read the short form: "8xH100" is one node of eight, "2x8xH100" two such nodes, "2xCPU" two cores.

    Every node is taken as one NVLink domain, except for device types without NVLink. Raises ScepsyError.
    """
    match = _SHAPE.match(text.strip())
    known = ", ".join(sorted(DEVICE_MEMORY_GIB))
    if match is None:
        raise ScepsyError(f"cluster {text!r}: write DEVICESxTYPE or NODESxDEVICESxTYPE, such as 8xH100 or 2x8xH100")
    device_type = match["type"].upper()
    if device_type not in DEVICE_MEMORY_GIB:
        raise ScepsyError(f"cluster {text!r}: unknown device type {match['type']!r}; known: {known}")
    devices, nodes = int(match["devices"]), int(match["nodes"] or 1)
    if devices < 1 or nodes < 1:
        raise ScepsyError(f"cluster {text!r}: needs at least one node and one device")
    numbers = tuple(range(devices))
    domains = tuple((number,) for number in numbers) if device_type in _WITHOUT_NVLINK else (numbers,)
    return Cluster(
        nodes=tuple(
            Node(
                name=f"node{index}",
                device_type=device_type,
                devices=devices,
                memory_gib=DEVICE_MEMORY_GIB[device_type],
                nvlink_domains=domains,
            )
            for index in range(nodes)
        )
    )
