"""What if there were one device more, or one less: the best plan then, and how it differs from the one at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scepsy_optimizer.allocation import MAX_UTILISATION
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import keep_in_place, optimize
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.requirements import NO_REQUIREMENTS, Requirements
from scepsy_optimizer.search import highest_rate
from scepsy_optimizer.workload import Workload

_LARGEST_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The same question with one device of a type more (`change` 1) or less (-1), or with the cluster as it is (0).

    `plan` is the best plan at the old plan's rate, with what that one has left in place where it can be; None where
    the rate is out of reach then, for the `reason` given. `highest_rate_rps` is what the changed cluster carries at
    all, 0 where the LLMs do not fit into it.
    """

    device_type: str
    change: int
    highest_rate_rps: float
    plan: Plan | None
    reason: str = ""


def what_if(
    workload: Workload,
    profiles: Profiles,
    plan: Plan,
    *,
    max_utilisation: float = MAX_UTILISATION,
    requirements: Requirements = NO_REQUIREMENTS,
) -> tuple[WhatIf, ...]:
    """The plan itself, and what one device more and one less of each type of its cluster would make of it.

    Raises ScepsyError where an LLM has no profile.
    """
    types = plan.cluster.device_types
    changed = [
        *((device_type, 1, add_device(plan.cluster, device_type)) for device_type in types),
        *((device_type, -1, less) for device_type in types if (less := remove_device(plan.cluster, device_type))),
    ]
    rate, _ = highest_rate(workload, profiles, plan.cluster, max_utilisation=max_utilisation, requirements=requirements)
    found = [WhatIf(device_type=plan.cluster.device_type, change=0, highest_rate_rps=rate, plan=plan)]
    for device_type, change, cluster in changed:
        rate, best, reason = 0.0, None, ""
        try:
            rate, _ = highest_rate(
                workload, profiles, cluster, max_utilisation=max_utilisation, requirements=requirements
            )
            best = optimize(
                workload,
                profiles,
                cluster,
                rate_rps=plan.rate_rps,
                max_utilisation=max_utilisation,
                requirements=requirements,
            )
            best = keep_in_place(best, plan, requirements)
        except ScepsyError as error:
            reason = str(error)
        found.append(WhatIf(device_type=device_type, change=change, highest_rate_rps=rate, plan=best, reason=reason))
    return tuple(found)


def add_device(cluster: Cluster, device_type: str) -> Cluster:
    """The cluster with one device more of a type it has: in the smallest node of that type, in its largest domain.

    Where no devices of that node are linked, neither is the new one. Where the node has eight devices or more, as many
    as servers take, it comes in a node of its own.
    """
    node = min((one for one in cluster.nodes if one.device_type == device_type), key=lambda one: one.devices)
    if node.devices >= _LARGEST_NODE:
        names = {one.name for one in cluster.nodes}
        name = next(name for number in range(len(names) + 1) if (name := f"added{number}") not in names)
        added = replace(node, name=name, devices=1, nvlink_domains=((0,),), pcie_domains=(), uuids=())
        return Cluster(nodes=(*cluster.nodes, added))
    domains = [list(domain) for domain in node.nvlink_domains]
    largest = max(domains, key=len)
    if len(largest) > 1:
        largest.append(node.devices)
    else:
        domains.append([node.devices])
    return _with_domains(cluster, node, node.devices + 1, domains)


def remove_device(cluster: Cluster, device_type: str) -> Cluster | None:
    """The cluster without the last device of the last node of a type; None where it would be the last of all."""
    if cluster.devices == 1:
        return None
    node = [one for one in cluster.nodes if one.device_type == device_type][-1]
    if node.devices == 1:
        return Cluster(nodes=tuple(one for one in cluster.nodes if one is not node))
    last = node.devices - 1
    domains = [[device for device in domain if device != last] for domain in node.nvlink_domains]
    return _with_domains(cluster, node, last, [domain for domain in domains if domain])


def _with_domains(cluster: Cluster, node: Node, devices: int, domains: list[list[int]]) -> Cluster:
    # A new device hangs on the socket of the last one.
    sockets = [[device for device in domain if device < devices] for domain in node.pcie_domains]
    for socket in sockets:
        if node.devices - 1 in socket:
            socket.extend(range(node.devices, devices))
    changed = replace(
        node,
        devices=devices,
        pcie_domains=tuple(tuple(socket) for socket in sockets if socket),
        nvlink_domains=tuple(tuple(domain) for domain in domains),
        uuids=node.uuids[:devices] if len(node.uuids) >= devices else (),
    )
    return Cluster(nodes=tuple(changed if one is node else one for one in cluster.nodes))
