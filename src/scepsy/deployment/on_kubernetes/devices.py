"""How a replica's pod gets its devices: whole GPUs, or a fraction by one of four mechanisms, each with its limits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

from scepsy.deployment.on_kubernetes.options import KubernetesOptions, Manifest, object_name
from scepsy_optimizer.cluster import Node
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

GPU: Final = "nvidia.com/gpu"
_SHARED: Final = "nvidia.com/gpu.shared"
_FINEST: Final = 100
# Compute slices of seven, memory slices of eight, as NVIDIA cuts A100 and H100 of 80 GB.
_MIG_80: Final = (("1g.10gb", 1, 1), ("2g.20gb", 2, 2), ("3g.40gb", 3, 4), ("4g.40gb", 4, 4), ("7g.80gb", 7, 8))
_MIG_40: Final = (("1g.5gb", 1, 1), ("2g.10gb", 2, 2), ("3g.20gb", 3, 4), ("4g.20gb", 4, 4), ("7g.40gb", 7, 8))
_MIG: Final[Mapping[str, tuple[tuple[str, int, int], ...]]] = {
    "H100": _MIG_80,
    "A100": _MIG_80,
    "A100_40GB": _MIG_40,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What goes into a pod so that it has its devices: the container's resources, the pod's claims and annotations."""

    limits: Mapping[str, str]
    env: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    claims: tuple[str, ...] = ()


def whole(part: LLMPlan) -> Devices:
    """As many GPUs as the tensor parallelism says; which of the node's, its device plugin decides."""
    return Devices(limits={GPU: str(part.tensor_parallel_size)})


def fraction_of(part: LLMPlan, slot: Slot, node: Node, plan: Plan, options: KubernetesOptions) -> Devices:
    """A fraction of one GPU by the mechanism that was asked for. Raises ScepsyError where that cannot do it."""
    if options.sharing is None:
        raise ScepsyError(
            f"{part.llm!r} takes {part.fraction:g} of a GPU: say by what that is held (--sharing dra, hami, mig or "
            "slices), or let a pod per node do it (--mode agent)"
        )
    if options.sharing == "hami":
        return _hami(part, slot, node)
    if options.sharing == "mig":
        return _mig(part, node)
    if options.sharing == "slices":
        return _slice(part, slot, plan)
    return _dra(part, slot, node, options)


def _hami(part: LLMPlan, slot: Slot, node: Node) -> Devices:
    cores, memory = _percent(part.fraction), _percent(part.fraction)
    annotations = {"nvidia.com/use-gpuuuid": node.uuids[slot.devices[0]]} if node.uuids else {}
    limits = {GPU: "1", "nvidia.com/gpucores": str(cores), "nvidia.com/gpumem-percentage": str(memory)}
    return Devices(limits=limits, annotations=annotations)


def _mig(part: LLMPlan, node: Node) -> Devices:
    kinds = _MIG.get(node.device_type)
    if kinds is None:
        raise ScepsyError(f"{node.device_type} is not known to have MIG: hold fractions by dra or hami, or use agents")
    for name, compute, memory in kinds:
        if compute / 7 >= part.fraction - 1 / 14 and memory / 8 >= part.fraction - 1 / 14:
            return Devices(limits={f"nvidia.com/mig-{name}": "1"})
    raise ScepsyError(f"{part.llm!r} takes {part.fraction:g} of a GPU, for which there is no MIG instance")


def _slice(part: LLMPlan, slot: Slot, plan: Plan) -> Devices:
    """The device plugin cuts all GPUs of a node into the same number of equal slices."""
    here = {
        other.fraction for other in plan.llms for place in other.slots if place.node == slot.node and other.fraction < 1
    }
    parts = round(1 / part.fraction)
    if len(here) > 1 or abs(parts * part.fraction - 1) > 1 / _FINEST:
        told = ", ".join(f"{fraction:g}" for fraction in sorted(here))
        raise ScepsyError(
            f"node {slot.node!r} has fractions of {told}: the device plugin's slices are all one nth of a GPU with the "
            "same n on a node; hold these by dra or hami, or use agents"
        )
    return Devices(limits={_SHARED: "1"})


def _dra(part: LLMPlan, slot: Slot, node: Node, options: KubernetesOptions) -> Devices:
    share = _percent(part.fraction)
    return Devices(
        limits={},
        env={"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share)},
        claims=(claim_name(options, node, slot.devices[0]),),
    )


def claim_name(options: KubernetesOptions, node: Node, device: int) -> str:
    """The ResourceClaim that all replicas on that device share."""
    return object_name(options, node.name, "gpu", str(device))


def shared_claims(plan: Plan, options: KubernetesOptions) -> list[Manifest]:
    """A claim for each device that fractions share under DRA: that very GPU, with MPS between its users.

    Without the nodes' UUIDs any GPU of the node serves; each claim is then another one.
    """
    if options.sharing != "dra":
        return []
    nodes = {node.name: node for node in plan.cluster.nodes}
    users: dict[tuple[str, int], float] = defaultdict(float)
    for part in plan.llms:
        for slot in part.slots:
            if part.fraction < 1:
                users[slot.node, slot.devices[0]] += part.fraction
    return [_claim(options, nodes[name], device) for name, device in sorted(users)]


def _claim(options: KubernetesOptions, node: Node, device: int) -> Manifest:
    exactly: dict[str, Any] = {"deviceClassName": "gpu.nvidia.com"}
    if node.uuids:
        uuid = node.uuids[device]
        exactly["selectors"] = [
            {"cel": {"expression": f'device.attributes["gpu.nvidia.com"].uuid == "{uuid}"'}},
        ]
    parameters = {
        "apiVersion": "resource.nvidia.com/v1beta1",
        "kind": "GpuConfig",
        "sharing": {"strategy": "MPS", "mpsConfig": {"defaultActiveThreadPercentage": 100}},
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": claim_name(options, node, device)},
        "spec": {
            "devices": {
                "requests": [{"name": "gpu", "exactly": exactly}],
                "config": [{"requests": ["gpu"], "opaque": {"driver": "gpu.nvidia.com", "parameters": parameters}}],
            }
        },
    }


def _percent(fraction: float) -> int:
    return int(Fraction(fraction).limit_denominator(_FINEST) * 100)
