"""Placement of LLMs that may sit on few nodes only: they get nodes of their own first, the others what is left."""

from __future__ import annotations

from collections.abc import Mapping

from scepsy_optimizer.allocation import Groups
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.placement import place
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

Slots = dict[str, tuple[tuple[Slot, ...], ...]]

_MAX_TRIES = 16


def place_on_few_nodes(
    allocation: Mapping[str, Groups],
    cluster: Cluster,
    max_nodes: Mapping[str, int],
    *,
    calls: Mapping[tuple[str, str], float] | None = None,
    spread: bool = False,
) -> Slots | None:
    """`place`, with the LLMs of `max_nodes` on at most that many nodes each.

    None where no such placement was found: neither `place` alone, nor with the limited LLMs on neighbouring nodes from
    each of the first few nodes on, keeps the limits. That misses nothing where the nodes are alike and one LLM is
    limited.
    """
    slots = place(allocation, cluster, calls=calls, spread=spread)
    if slots is None or _keeps(slots, max_nodes):
        return slots
    limited = sorted(max_nodes.keys() & allocation.keys(), key=lambda llm: -sum(one.units for one in allocation[llm]))
    for offset in range(min(_MAX_TRIES, len(cluster.nodes))):
        first = offset
        parts: list[LLMPlan] = []
        for llm in limited:
            alone = _alone(llm, allocation[llm], cluster, first, max_nodes[llm])
            if alone is None:
                break
            parts += alone
            first += max_nodes[llm]
        else:
            wanted = Plan(cluster=cluster, rate_rps=0.0, llms=tuple(parts))
            slots = place(allocation, cluster, spread=spread, prefer=wanted)
            if slots is not None and _keeps(slots, max_nodes):
                return slots
    return None


def _keeps(slots: Slots, max_nodes: Mapping[str, int]) -> bool:
    return all(
        len({slot.node for group in slots.get(llm, ()) for slot in group}) <= most for llm, most in max_nodes.items()
    )


def _alone(llm: str, groups: Groups, cluster: Cluster, first: int, most: int) -> list[LLMPlan] | None:
    """The LLM alone on `most` neighbouring nodes that its groups may use, the `first` of them on, round the end."""
    types = {group.device_type or cluster.device_type for group in groups}
    nodes = [node for node in cluster.nodes if node.device_type in types]
    window = {(first + step) % len(nodes) for step in range(min(most, len(nodes)))}
    part = Cluster(nodes=tuple(nodes[index] for index in sorted(window)))
    slots = place({llm: groups}, part)
    if slots is None:
        return None
    # Only where they sit matters here: the engines' settings stay open.
    return [
        LLMPlan(
            llm=llm,
            model="",
            tensor_parallel_size=group.tensor_parallel_size,
            fraction=float(group.fraction),
            replicas=group.replicas,
            slots=placed,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            max_model_len=1,
            gpu_memory_utilization=1.0,
            device_type=group.device_type,
        )
        for group, placed in zip(groups, slots[llm], strict=True)
    ]
