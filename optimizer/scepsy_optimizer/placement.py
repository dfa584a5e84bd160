"""Placement: which replica sits on which devices of which node.

Largest first: tensor-parallel groups into fast-link domains, then fractions onto devices that are shared already, each
where what stays free stays whole. Where every size divides the next larger one nothing is lost by that, whichever
domain is taken; where it fails for other sizes, an exact packing decides. Then replicas of the same shape change places
so that LLMs that call each other share nodes, which costs nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from scepsy_optimizer.allocation import Groups
from scepsy_optimizer.cluster import Cluster, Node, same_devices
from scepsy_optimizer.colocation import Seat, gather
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.eviction import evict_devices, evict_share
from scepsy_optimizer.free_devices import FreeDevices, Ints
from scepsy_optimizer.packing import pack
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

# Fractions in plans are decimal; this recovers tenths and thirds from them.
_FINEST = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One replica to place: `size` whole devices, or `units` of one device where `size` is 0."""

    llm: str
    group: int
    size: int
    units: int


def place(
    allocation: Mapping[str, Groups],
    cluster: Cluster,
    *,
    calls: Mapping[tuple[str, str], float] | None = None,
    spread: bool = False,
    prefer: Plan | None = None,
) -> dict[str, tuple[tuple[Slot, ...], ...]] | None:
    """For every LLM and group a slot for each replica, or None where they cannot all be placed.

    Whatever is placed satisfies `check_placement`. `calls` says how often a call of the first LLM is followed by one of
    the second: such LLMs share nodes where that leaves no less free in one piece. With `spread` the replicas of an LLM
    sit on different nodes as far as there is room, so that one node's failure takes few of them. With `prefer`, what
    that plan already has stays on its devices unless it is in the way of a larger replica. A fraction is a part of a
    device's compute and of its memory alike. Raises ScepsyError where a group does not say which of several device
    types it is for.
    """
    units = math.lcm(*(choice.fraction.denominator for groups in allocation.values() for choice in groups))
    pools: dict[str, list[Replica]] = defaultdict(list)
    for llm, groups in allocation.items():
        for number, choice in enumerate(groups):
            if not choice.device_type and len(cluster.device_types) > 1:
                raise ScepsyError(f"{llm!r}: say which of {', '.join(cluster.device_types)} its replicas are for")
            whole = choice.fraction == 1
            replica = Replica(
                llm=llm,
                group=number,
                size=choice.tensor_parallel_size if whole else 0,
                units=0 if whole else int(choice.fraction * units),
            )
            pools[choice.device_type or cluster.device_type] += [replica] * choice.replicas
    slots: dict[str, list[list[Slot]]] = {llm: [[] for _ in groups] for llm, groups in allocation.items()}
    for device_type, replicas in pools.items():
        nodes = [node for node in cluster.nodes if node.device_type == device_type]
        # Nodes below one switch are neighbours; the order decides what is left to chance otherwise.
        nodes.sort(key=lambda node: node.switch)
        replicas.sort(key=lambda replica: (-replica.size, -replica.units, replica.llm, replica.group))
        kept = _kept(replicas, units, device_type, cluster, prefer) if prefer is not None else {}
        placed = _place_pool(nodes, replicas, units, kept, spread=spread)
        if placed is None:
            return None
        if calls and not spread:
            placed = _colocated(nodes, replicas, placed, kept, units, calls)
        for replica, slot in zip(replicas, placed, strict=True):
            slots[replica.llm][replica.group].append(slot)
    return {llm: tuple(tuple(group) for group in groups) for llm, groups in slots.items()}


def _place_pool(
    nodes: Sequence[Node], replicas: Sequence[Replica], units: int, kept: Mapping[int, Slot], *, spread: bool
) -> list[Slot] | None:
    """A slot for each replica on nodes of one type; `kept` are the slots that replicas, by index, have already."""
    wanted = sum(replica.size * units + replica.units for replica in replicas)
    if wanted > sum(node.devices for node in nodes) * units:
        return None
    placed = _largest_first(nodes, replicas, units, kept, spread=spread)
    if placed is None and spread:
        placed = _largest_first(nodes, replicas, units, kept, spread=False)
    if placed is None and kept:
        placed = _largest_first(nodes, replicas, units, {}, spread=False)
    return placed if placed is not None else _exactly(nodes, replicas, units)


def _largest_first(
    nodes: Sequence[Node], replicas: Sequence[Replica], units: int, kept: Mapping[int, Slot], *, spread: bool
) -> list[Slot] | None:
    free = FreeDevices(nodes, units)
    placed: dict[int, Slot] = {}
    movable: dict[int, Slot] = {}
    for index, slot in kept.items():
        replica = replicas[index]
        if free.take_slot(slot) if replica.size else free.take_share(slot, replica.units):
            placed[index] = movable[index] = slot
    index_of = {node.name: number for number, node in enumerate(nodes)}
    held: dict[str, Ints] | None = None
    many: Mapping[str, int] = Counter(replica.llm for replica in replicas) if spread else {}
    if spread:
        held = {llm: np.zeros(len(nodes), dtype=int) for llm in many}
        for index, slot in placed.items():
            held[replicas[index].llm][index_of[slot.node]] += 1

    def rank(index: int) -> tuple[int, int, int, int]:
        # To spread, those with the most replicas choose first: they need the most nodes.
        replica = replicas[index]
        return -replica.size, -replica.units, -many.get(replica.llm, 0), index

    pending = [rank(index) for index in range(len(replicas)) if index not in placed]
    heapq.heapify(pending)
    while pending:
        index = heapq.heappop(pending)[-1]
        replica = replicas[index]
        holds = None if held is None else held[replica.llm]
        found, evicted = _find(replica, replicas, free, movable, holds)
        for other in evicted:
            gone = movable.pop(other)
            del placed[other]
            if held is not None:
                held[replicas[other].llm][index_of[gone.node]] -= 1
            heapq.heappush(pending, rank(other))
        if found is None:
            return None
        placed[index] = found
        if holds is not None:
            holds[index_of[found.node]] += 1
    return [placed[index] for index in range(len(replicas))]


def _find(
    replica: Replica, replicas: Sequence[Replica], free: FreeDevices, movable: Mapping[int, Slot], holds: Ints | None
) -> tuple[Slot | None, Sequence[int]]:
    """A slot, taken, and the movable replicas that were released for it."""
    evicted: Sequence[int] = ()
    if replica.size:
        domain = free.find_domain(replica.size, holds)
        if domain is None:
            sizes = {index: (replicas[index].size, replicas[index].units, slot) for index, slot in movable.items()}
            domain, evicted = evict_devices(replica.size, sizes, free)
        return (None if domain is None else free.take(domain, replica.size)), evicted
    slot = free.find_share(replica.units, holds)
    if slot is None:
        parts = {index: (replicas[index].units, at) for index, at in movable.items() if not replicas[index].size}
        slot, evicted = evict_share(replica.units, parts, free)
    if slot is not None:
        free.take_share(slot, replica.units)
    return slot, evicted


def _exactly(nodes: Sequence[Node], replicas: Sequence[Replica], units: int) -> list[Slot] | None:
    """The exact packing: fractions into the fewest devices, then these and the groups into domains."""
    parts = Counter(replica.units for replica in replicas if not replica.size)
    sizes = Counter(replica.size for replica in replicas if replica.size)
    fewest = -(-sum(part * count for part, count in parts.items()) // units)
    most = sum(node.devices for node in nodes) - sum(size * count for size, count in sizes.items())
    shared = next((found for n in range(fewest, most + 1) if (found := pack([units] * n, parts)) is not None), None)
    if shared is None:
        return None
    sizes[1] += len(shared)
    free = FreeDevices(nodes, units)
    packed = pack([free.free_in(domain) for domain in range(free.domains)], sizes)
    if packed is None:
        return None
    taken: dict[int, list[Slot]] = defaultdict(list)
    for domain, filling in enumerate(packed):
        for size in sorted(filling, reverse=True):
            taken[size] += [free.take(domain, size) for _ in range(filling[size])]
    part_slots: dict[int, list[Slot]] = defaultdict(list)
    for filling in shared:
        slot = taken[1].pop()
        for part, count in filling.items():
            part_slots[part] += [slot] * count
    return [taken[replica.size].pop() if replica.size else part_slots[replica.units].pop() for replica in replicas]


def _kept(replicas: Sequence[Replica], units: int, device_type: str, cluster: Cluster, old: Plan) -> dict[int, Slot]:
    """The slots that replicas, by index, have in the old plan; of too many, those on the devices and nodes in use."""
    same = same_devices(old.cluster, cluster)
    types = {node.name: node.device_type for node in cluster.nodes}
    wanted: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for index, replica in enumerate(replicas):
        wanted[replica.llm, replica.size, replica.units].append(index)
    had: dict[tuple[str, int, int], list[Slot]] = defaultdict(list)
    for part in old.llms:
        key = (part.llm, *_shape(part, units))
        for slot in part.slots if key in wanted else ():
            devices = [same.get((slot.node, device)) for device in slot.devices]
            names = {device[0] for device in devices if device is not None}
            if None not in devices and len(names) == 1 and types[(name := names.pop())] == device_type:
                had[key].append(Slot(node=name, devices=tuple(device[1] for device in devices if device is not None)))
    kept: dict[int, Slot] = {}
    used: Counter[str | tuple[str, int]] = Counter()
    for key in sorted(had, key=lambda key: (len(had[key]) > len(wanted[key]), -key[1], -key[2], key[0])):
        slots = sorted(had[key], key=lambda slot: (-used[slot.node, slot.devices[0]], -used[slot.node]))
        for index, slot in zip(wanted[key], slots, strict=False):
            kept[index] = slot
            used[slot.node] += key[1] * units + key[2]
            used[slot.node, slot.devices[0]] += key[2]
    return kept


def _shape(part: LLMPlan, units: int) -> tuple[int, int]:
    """Whole devices and units of a shared one, as in `Replica`; a fraction that is no number of units fits none."""
    if part.fraction == 1:
        return part.tensor_parallel_size, 0
    share = Fraction(part.fraction).limit_denominator(_FINEST) * units
    return 0, int(share) if share.denominator == 1 else -1


def _colocated(
    nodes: Sequence[Node],
    replicas: Sequence[Replica],
    placed: Sequence[Slot],
    kept: Mapping[int, Slot],
    units: int,
    calls: Mapping[tuple[str, str], float],
) -> list[Slot]:
    """The same slots, given to other replicas of the same shape so that LLMs that call each other share nodes."""
    stay = {index for index, slot in kept.items() if placed[index] == slot}
    seats = [
        Seat(
            llm=replica.llm,
            shape=(replica.size, replica.units),
            weight=float(replica.size * units + replica.units),
            node=slot.node,
            fixed=index in stay,
        )
        for index, (replica, slot) in enumerate(zip(replicas, placed, strict=True))
    ]
    order = gather(seats, [node.name for node in nodes], [node.switch for node in nodes], calls)
    return [placed[index] for index in order]


def check_placement(plan: Plan) -> list[str]:
    """What is wrong with a plan's slots on its own cluster, in words; empty if nothing is.

    Knows only the plan: every slot on devices that exist and of the type that is planned for, a group inside one
    fast-link domain, no device given out more than once in whole or beyond its whole in fractions, in compute and in
    memory.
    """
    nodes = {node.name: node for node in plan.cluster.nodes}
    domain_of = {
        (node.name, device): number
        for node in plan.cluster.nodes
        for number, domain in enumerate(node.nvlink_domains)
        for device in domain
    }
    used: dict[tuple[str, int], Fraction] = {}
    memory: dict[tuple[str, int], float] = {}
    wrong = []
    for part in plan.llms:
        fraction = Fraction(part.fraction).limit_denominator(_FINEST)
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
            if (part.device_type or plan.cluster.device_type) != node.device_type:
                planned = part.device_type or "no device type"
                wrong.append(f"{where}: planned for {planned}, node {node.name!r} has {node.device_type}")
            if len({domain_of[node.name, device] for device in slot.devices}) > 1:
                wrong.append(f"{where}: devices {list(slot.devices)} of {node.name!r} do not share a fast-link domain")
            for device in slot.devices:
                key = (node.name, device)
                used[key] = used.get(key, Fraction(0)) + fraction
                memory[key] = memory.get(key, 0.0) + part.fraction * part.gpu_memory_utilization
    wrong += [
        f"device {device} of {node!r} is given out {float(total):g} times"
        for (node, device), total in used.items()
        if total > 1
    ]
    wrong += [
        f"the replicas on device {device} of {node!r} take {total:.3g} of its memory"
        for (node, device), total in memory.items()
        if total > 1 + 1e-9 and used[node, device] <= 1
    ]
    return wrong
