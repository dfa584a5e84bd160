"""This machine's GPUs, as NVIDIA's management library (NVML) tells them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations
from typing import Any

import networkx as nx

from scepsy.discovery.products import device_type_of
from scepsy.discovery.visible import VARIABLE, left_visible
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.errors import ScepsyError

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Device:
    """A GPU, or one MIG instance of the GPU `gpu`; `index` is what CUDA_VISIBLE_DEVICES may call the GPU."""

    device_type: str
    memory_gib: float
    uuid: str
    gpu: Any
    index: int
    instance: bool


def discover_local(nvml: Any = None) -> Cluster:
    """This machine as a cluster: one node for each device type, with UUIDs, NVLink and PCIe domains.

    The devices are those that CUDA_VISIBLE_DEVICES leaves, by index or UUID, all where it is not set. A GPU in MIG mode
    stands for its instances, each a device of its own. `nvml` is the module to ask, pynvml by default. Raises
    ScepsyError without the module, the driver, the permission or a GPU.
    """
    nvml = nvml if nvml is not None else _module()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _told(nvml, error) from error
    try:
        devices = _visible([device for index in range(nvml.nvmlDeviceGetCount()) for device in _devices(nvml, index)])
        return _cluster(nvml, devices)
    except nvml.NVMLError as error:
        raise _told(nvml, error) from error
    finally:
        nvml.nvmlShutdown()


def _module() -> Any:
    try:
        return import_module("pynvml")
    except ImportError as error:
        raise ScepsyError(
            "finding GPUs needs nvidia-ml-py; install it (pip install 'scepsy[deploy]'), or describe the cluster, "
            "such as 8xH100"
        ) from error


def _told(nvml: Any, error: Exception) -> ScepsyError:
    code = getattr(error, "value", None)
    if code == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return ScepsyError(
            "no NVIDIA driver on this machine (libnvidia-ml.so.1 is not there); describe the cluster, such as 8xH100, "
            "or 2xCPU for cores"
        )
    if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return ScepsyError("the NVIDIA driver is installed but not loaded; load it, or describe the cluster")
    if code == nvml.NVML_ERROR_NO_PERMISSION:
        return ScepsyError(
            "this user may not ask NVIDIA's driver; ask for access to /dev/nvidia*, or describe the cluster"
        )
    return ScepsyError(f"NVIDIA's driver does not answer: {error}")


def _devices(nvml: Any, index: int) -> list[_Device]:
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    if _unless_unsupported(nvml, lambda: nvml.nvmlDeviceGetMigMode(gpu)[0], 0) != nvml.NVML_DEVICE_MIG_ENABLE:
        return [_device(nvml, gpu, gpu, index)]
    found = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number)
        except nvml.NVMLError_NotFound:
            continue
        found.append(_device(nvml, instance, gpu, index))
    return found


def _device(nvml: Any, handle: Any, gpu: Any, index: int) -> _Device:
    memory_gib = nvml.nvmlDeviceGetMemoryInfo(handle).total / _GIB
    return _Device(
        device_type=device_type_of(nvml.nvmlDeviceGetName(handle), memory_gib),
        memory_gib=round(memory_gib, 1),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        gpu=gpu,
        index=index,
        instance=handle is not gpu,
    )


def _visible(devices: list[_Device]) -> list[_Device]:
    """The devices that CUDA_VISIBLE_DEVICES leaves, in its order."""
    if not devices:
        raise ScepsyError("NVIDIA's driver is here but shows no GPU; describe the cluster, such as 8xH100")
    left = left_visible([(str(one.index), one.uuid) for one in devices])
    if not left:
        raise ScepsyError(
            f"{VARIABLE}={os.environ.get(VARIABLE)!r} leaves none of {len(devices)} GPUs; unset or correct it"
        )
    return [devices[number] for number in left]


def _cluster(nvml: Any, devices: list[_Device]) -> Cluster:
    host = socket.gethostname()
    types = list(dict.fromkeys(device.device_type for device in devices))
    nodes = []
    for device_type in types:
        here = [device for device in devices if device.device_type == device_type]
        nodes.append(
            Node(
                name=host if len(types) == 1 else f"{host}-{device_type}",
                device_type=device_type,
                devices=len(here),
                memory_gib=here[0].memory_gib,
                nvlink_domains=_joined(here, lambda one, other: _over_nvlink(nvml, one, other)),
                pcie_domains=_joined(here, lambda one, other: _same_socket(nvml, one, other)),
                uuids=tuple(device.uuid for device in here),
            )
        )
    return Cluster(nodes=tuple(nodes))


def _joined(devices: Sequence[_Device], join: Callable[[_Device, _Device], bool]) -> tuple[tuple[int, ...], ...]:
    """The devices by number, those in one domain that are joined directly or through others."""
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(devices)))
    graph.add_edges_from(pair for pair in combinations(graph, 2) if join(devices[pair[0]], devices[pair[1]]))
    return tuple(sorted(tuple(sorted(domain)) for domain in nx.connected_components(graph)))


def _over_nvlink(nvml: Any, one: _Device, other: _Device) -> bool:
    """Whether the two reach each other over NVLink, directly or through a switch; MIG instances never do."""
    if one.instance or other.instance:
        return False
    status = _unless_unsupported(
        nvml,
        lambda: nvml.nvmlDeviceGetP2PStatus(one.gpu, other.gpu, nvml.NVML_P2P_CAPS_INDEX_NVLINK),
        nvml.NVML_P2P_STATUS_NOT_SUPPORTED,
    )
    return bool(status == nvml.NVML_P2P_STATUS_OK)


def _same_socket(nvml: Any, one: _Device, other: _Device) -> bool:
    if one.gpu is other.gpu:
        return True
    level = _unless_unsupported(
        nvml, lambda: nvml.nvmlDeviceGetTopologyCommonAncestor(one.gpu, other.gpu), nvml.NVML_TOPOLOGY_SYSTEM
    )
    return bool(level < nvml.NVML_TOPOLOGY_SYSTEM)


def _unless_unsupported(nvml: Any, ask: Callable[[], int], otherwise: int) -> int:
    """The answer, or `otherwise` where the device does not know the question."""
    try:
        return ask()
    except nvml.NVMLError_NotSupported:
        return otherwise
