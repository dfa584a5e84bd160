"""Placement: which replica sits on which devices of which node.

Largest first: tensor-parallel groups into fast-link domains, each into the fullest domain that still holds it, then
fractions by best fit onto devices already shared. So groups stay aligned, whole devices and whole nodes stay free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from scepsy_optimizer.allocation import Choice, Groups
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.plan import Plan, Slot


@dataclass(slots=True)
class _Domain:
    node: str
    device_type: str
    free: list[int]
    shared: dict[int, Fraction] = field(default_factory=dict)


def place(allocation: Mapping[str, Groups], cluster: Cluster) -> dict[str, tuple[tuple[Slot, ...], ...]] | None:
    """For every LLM and group a slot for each replica, or None where they cannot all be placed.

    Whatever is placed satisfies `check_placement`.
    """
    domains = [
        _Domain(node.name, node.device_type, sorted(domain)) for node in cluster.nodes for domain in node.nvlink_domains
    ]
    replicas = [
        (choice, llm, number)
        for llm, groups in allocation.items()
        for number, choice in enumerate(groups)
        for _ in range(choice.replicas)
    ]
    replicas.sort(key=lambda item: (-item[0].tensor_parallel_size, -item[0].fraction, item[1:]))
    slots: dict[str, list[list[Slot]]] = {llm: [[] for _ in groups] for llm, groups in allocation.items()}
    for choice, llm, number in replicas:
        fitting = [domain for domain in domains if choice.device_type in ("", domain.device_type)]
        slot = _place_shared(choice, fitting) if choice.fraction < 1 else _place_whole(choice, fitting)
        if slot is None:
            return None
        slots[llm][number].append(slot)
    return {llm: tuple(tuple(group) for group in groups) for llm, groups in slots.items()}


def _take(domains: list[_Domain], size: int) -> tuple[_Domain, tuple[int, ...]] | None:
    """Take whole devices from the domain with the fewest free ones that still has enough."""
    fitting = [domain for domain in domains if len(domain.free) >= size]
    if not fitting:
        return None
    domain = min(fitting, key=lambda candidate: len(candidate.free))
    devices, domain.free = tuple(domain.free[:size]), domain.free[size:]
    return domain, devices


def _place_whole(choice: Choice, domains: list[_Domain]) -> Slot | None:
    taken = _take(domains, choice.tensor_parallel_size)
    return None if taken is None else Slot(node=taken[0].node, devices=taken[1])


def _place_shared(choice: Choice, domains: list[_Domain]) -> Slot | None:
    fitting = [
        (left, index, device)
        for index, domain in enumerate(domains)
        for device, left in domain.shared.items()
        if left >= choice.fraction
    ]
    if fitting:
        left, index, device = min(fitting)
        domain = domains[index]
    else:
        taken = _take(domains, 1)
        if taken is None:
            return None
        domain, (device,) = taken
        left = Fraction(1)
    domain.shared[device] = left - choice.fraction
    return Slot(node=domain.node, devices=(device,))


def check_placement(plan: Plan) -> list[str]:
    """What is wrong with a plan's slots on its own cluster, in words; empty if nothing is.

    Knows only the plan: every slot on devices that exist, a group inside one fast-link domain, no device given out more
    than once in whole or beyond its whole in fractions.
    """
    nodes = {node.name: node for node in plan.cluster.nodes}
    used: dict[tuple[str, int], Fraction] = {}
    wrong = []
    for part in plan.llms:
        for number, slot in enumerate(part.slots):
            where = f"{part.llm!r} replica {number}"
            node = nodes.get(slot.node)
            if node is None:
                wrong.append(f"{where}: the cluster has no node {slot.node!r}")
                continue
            outside = [device for device in slot.devices if not 0 <= device < node.devices]
            if outside:
                wrong.append(f"{where}: node {node.name!r} has {node.devices} devices, no number {outside[0]}")
                continue
            if len(set(slot.devices)) != len(slot.devices):
                wrong.append(f"{where}: names a device twice")
            if part.device_type not in ("", node.device_type):
                wrong.append(f"{where}: planned for {part.device_type}, node {node.name!r} has {node.device_type}")
            if not any(set(slot.devices) <= set(domain) for domain in node.nvlink_domains):
                wrong.append(f"{where}: devices {list(slot.devices)} of {node.name!r} do not share a fast-link domain")
            for device in slot.devices:
                key = (node.name, device)
                used[key] = used.get(key, Fraction(0)) + Fraction(part.fraction).limit_denominator(1000)
    wrong += [
        f"device {device} of {node!r} is given out {float(total):g} times"
        for (node, device), total in used.items()
        if total > 1
    ]
    return wrong
