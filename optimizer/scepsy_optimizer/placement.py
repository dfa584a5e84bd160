"""Placement: which replica sits on which devices of which node.

Largest first: tensor-parallel groups into fast-link domains, then fractions onto devices that are shared already, each
where what stays free stays whole. Where every size divides the next larger one nothing is lost by that, whichever
domain is taken; where it fails for other sizes, an exact packing decides. Then the replicas are placed again on what is
taken, so that LLMs that call each other share nodes, which costs nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from scepsy_optimizer.allocation import Groups
from scepsy_optimizer.cluster import Cluster, Node, same_devices
from scepsy_optimizer.colocation import Gather, Leaning, Spread
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.eviction import evict_devices, evict_share
from scepsy_optimizer.free_devices import Floats, FreeDevices, Replica
from scepsy_optimizer.packing import pack
from scepsy_optimizer.plan import LLMPlan, Plan, Slot, exact_fraction, unknown_devices


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
    slots: dict[str, list[tuple[Slot, ...]]] = {llm: [()] * len(groups) for llm, groups in allocation.items()}
    for device_type, replicas in pools.items():
        nodes = [node for node in cluster.nodes if node.device_type == device_type]
        # Nodes below one switch are neighbours; the order decides what is left to chance otherwise.
        nodes.sort(key=lambda node: node.switch)
        wanted = Counter(replicas)
        kept = _had(wanted, units, cluster, device_type, prefer) if prefer is not None else []
        found = _place_pool(nodes, wanted, units, kept, spread=spread)
        if found is None:
            return None
        placed = found.placed
        if calls and not spread and len(nodes) > 1:
            placed = _colocated(nodes, wanted, found, kept, units, calls)
        order = {node.name: number for number, node in enumerate(nodes)}
        for replica, seats in placed.items():
            slots[replica.llm][replica.group] = tuple(sorted(seats, key=lambda slot: (order[slot.node], slot.devices)))
    return {llm: tuple(groups) for llm, groups in slots.items()}


Placed = dict[Replica, list[Slot]]
"""A slot for each replica of a group."""


class Placement(NamedTuple):
    """What is placed, how many replicas of the running plan did not keep their slots, and what is wholly free."""

    placed: Placed
    restarts: int
    free: list[Slot]


def _place_pool(
    nodes: Sequence[Node], wanted: Counter[Replica], units: int, had: Sequence[tuple[Replica, Slot]], *, spread: bool
) -> Placement | None:
    """Slots on nodes of one type; `had` are the slots that such replicas have already, some perhaps too many."""
    if sum(_units(replica, units) * count for replica, count in wanted.items()) > units * sum(
        node.devices for node in nodes
    ):
        return None
    found = _kept_first(nodes, wanted, units, had, spread=spread)
    if found is None and spread:
        found = _kept_first(nodes, wanted, units, had, spread=False)
    if found is None and had:
        found = _largest_first(nodes, wanted, units, ())
    return found if found is not None else _exactly(nodes, wanted, units)


def _kept_first(
    nodes: Sequence[Node], wanted: Counter[Replica], units: int, had: Sequence[tuple[Replica, Slot]], *, spread: bool
) -> Placement | None:
    """Largest first, around what stays; which of too many go is decided first, or else by who is in the way."""
    trimmed = _trimmed(had, wanted, units)
    early = _largest_first(nodes, wanted, units, trimmed, Spread(len(nodes), wanted) if spread else None)
    if len(trimmed) == len(had) or (early is not None and not early.restarts):
        return early
    late = _largest_first(nodes, wanted, units, had, Spread(len(nodes), wanted) if spread else None)
    return min((one for one in (early, late) if one is not None), key=lambda one: one.restarts, default=None)


def _largest_first(
    nodes: Sequence[Node],
    wanted: Counter[Replica],
    units: int,
    had: Sequence[tuple[Replica, Slot]],
    leaning: Leaning | None = None,
    reserved: Sequence[Slot] = (),
) -> Placement | None:
    """Largest first, around what stays; None where that does not place all.

    A `leaning`, which is told of every replica that is placed, comes before wholeness. `reserved` devices stay free.
    """
    free = FreeDevices(nodes, units)
    for slot in reserved:
        free.take_slot(slot)
    kept = {key: (replica, slot) for key, (replica, slot) in enumerate(had) if free.keep(replica, slot)}
    number = {node.name: index for index, node in enumerate(nodes)}
    surplus = Counter(replica for replica, _ in kept.values())
    surplus.subtract(wanted)
    if leaning is not None:
        for replica, slot in kept.values():
            leaning.count(replica, number[slot.node], 1)

    def rank(replica: Replica, done: int) -> tuple[int, int, float, str, int]:
        lean = leaning.rank(replica, done) if leaning is not None else 0.0
        return -replica.size, -replica.units, lean, replica.llm, replica.group

    pending = [
        (rank(replica, wanted[replica] + count + done), replica)
        for replica, count in surplus.items()
        for done in range(-count)
    ]
    heapq.heapify(pending)
    placed: Placed = {replica: [] for replica in wanted}
    restarts = 0
    while pending:
        _, replica = heapq.heappop(pending)
        found, evicted = _find(replica, kept, surplus, free, None if leaning is None else leaning.cost(replica))
        for key in evicted:
            gone, left = kept.pop(key)
            if leaning is not None:
                leaning.count(gone, number[left.node], -1)
            surplus[gone] -= 1
            if surplus[gone] < 0:
                restarts += 1
                heapq.heappush(pending, (rank(gone, 0), gone))
        if found is None:
            return None
        surplus[replica] += 1
        placed[replica].append(found)
        if leaning is not None:
            leaning.count(replica, number[found.node], 1)
    for replica, slot in _trimmed(
        list(kept.values()), wanted - Counter({one: len(placed[one]) for one in placed}), units
    ):
        placed[replica].append(slot)
    return Placement(placed, restarts, free.whole())


def _find(
    replica: Replica,
    kept: Mapping[int, tuple[Replica, Slot]],
    surplus: Mapping[Replica, int],
    free: FreeDevices,
    cost: Floats | None,
) -> tuple[Slot | None, Sequence[int]]:
    """A slot, taken, and the keys of the kept replicas that were evicted for it."""
    evicted: Sequence[int] = ()
    if replica.size:
        domain = free.find_domain(replica.size, cost)
        if domain is None:
            domain, evicted = evict_devices(replica.size, kept, surplus, free)
        for key in evicted:
            free.evict(*kept[key])
        return (None if domain is None else free.take(domain, replica.size)), evicted
    slot = free.find_share(replica.units, cost)
    if slot is None:
        slot, evicted = evict_share(replica.units, kept, surplus, free)
    for key in evicted:
        free.evict(*kept[key])
    if slot is not None:
        free.take_share(slot, replica.units)
    return slot, evicted


def _exactly(nodes: Sequence[Node], wanted: Counter[Replica], units: int) -> Placement | None:
    """The exact packing: fractions into the fewest devices, then these and the groups into domains."""
    parts: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for replica, count in wanted.items():
        (sizes if replica.size else parts)[replica.size or replica.units] += count
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
    placed = {
        replica: [(taken[replica.size] if replica.size else part_slots[replica.units]).pop() for _ in range(count)]
        for replica, count in wanted.items()
    }
    return Placement(placed, 0, free.whole())


def _had(
    wanted: Counter[Replica], units: int, cluster: Cluster, device_type: str, old: Plan
) -> list[tuple[Replica, Slot]]:
    """Slots of the old plan that are still there and hold a replica like one that is wanted."""
    same = same_devices(old.cluster, cluster)
    types = {node.name: node.device_type for node in cluster.nodes}
    groups = {(replica.llm, replica.size, replica.units): replica for replica in wanted}
    had = []
    for part in old.llms:
        replica = groups.get((part.llm, *_shape(part, units)))
        for slot in part.slots if replica is not None else ():
            places = [same.get((slot.node, device)) for device in slot.devices]
            devices = [place for place in places if place is not None and types[place[0]] == device_type]
            if len(devices) == len(places) and len({name for name, _ in devices}) == 1:
                assert replica is not None  # noqa: S101 - tells mypy what the loop has checked
                had.append((replica, Slot(node=devices[0][0], devices=tuple(device for _, device in devices))))
    return had


def _shape(part: LLMPlan, units: int) -> tuple[int, int]:
    """Size and units as in `Replica`; a fraction that is no number of units is like none."""
    if part.fraction == 1:
        return part.tensor_parallel_size, 0
    share = exact_fraction(part.fraction) * units
    return 0, int(share) if share.denominator == 1 else -1


def _trimmed(
    had: Sequence[tuple[Replica, Slot]], wanted: Mapping[Replica, int], units: int
) -> list[tuple[Replica, Slot]]:
    """As many of each group as are wanted: of too many, those on the devices and nodes that are most in use."""
    by_group: dict[Replica, list[Slot]] = defaultdict(list)
    for replica, slot in had:
        by_group[replica].append(slot)
    stay = []
    used: Counter[str | tuple[str, int]] = Counter()
    # What stays whole comes first: it says which devices and nodes are in use anyway.
    for replica in sorted(by_group, key=lambda one: (len(by_group[one]) > wanted.get(one, 0), -_units(one, units))):
        slots = by_group[replica]
        slots.sort(key=lambda slot: (-used[slot.node, slot.devices[0]], -used[slot.node]))
        for slot in slots[: wanted.get(replica, 0)]:
            stay.append((replica, slot))
            used[slot.node] += _units(replica, units)
            used[slot.node, slot.devices[0]] += replica.units
    return stay


def _units(replica: Replica, units: int) -> int:
    return replica.size * units + replica.units


def _colocated(
    nodes: Sequence[Node],
    wanted: Counter[Replica],
    before: Placement,
    had: Sequence[tuple[Replica, Slot]],
    units: int,
    calls: Mapping[tuple[str, str], float],
) -> Placed:
    """The replicas again, on what they take together, so that LLMs that call each other share nodes."""
    kept = Counter(had)
    stay = {
        replica: list((Counter(slots) & _slots_of(replica, kept)).elements())
        for replica, slots in before.placed.items()
    }
    number = {node.name: index for index, node in enumerate(nodes)}
    gather = Gather(nodes, wanted, units, calls)
    fixed = [(replica, slot) for replica, slots in stay.items() for slot in slots]
    found = _largest_first(nodes, wanted, units, fixed, gather, before.free)
    if found is None or found.restarts:
        # Fractions that do not divide each other may not fit in another order.
        found = before
        gather = Gather(nodes, wanted, units, calls)
        for replica, slots in before.placed.items():
            for slot in slots:
                gather.count(replica, number[slot.node], 1)
    return gather.swapped(number, found.placed, stay)


def _slots_of(replica: Replica, slots: Mapping[tuple[Replica, Slot], int]) -> Counter[Slot]:
    return Counter({slot: count for (one, slot), count in slots.items() if one == replica})


def check_placement(plan: Plan) -> list[str]:
    """What is wrong with a plan's slots on its own cluster, in words; empty if nothing is.

    Knows only the plan: every slot on devices that exist and of the type that is planned for, a group inside one
    fast-link domain, no device given out more than once in whole or beyond its whole in fractions, in compute and in
    memory.
    """
    return [*unknown_devices(plan), *_misplaced(plan), *_across_domains(plan), *_given_out_twice(plan)]


def require_placed(plan: Plan) -> None:
    """Raise ScepsyError where a plan's replicas cannot have what it gives them: then nothing it says of them holds.

    A group across fast-link domains is let be, as it runs: that is how its slower steps are measured.
    """
    wrong = [*unknown_devices(plan), *_misplaced(plan), *_given_out_twice(plan)]
    if wrong:
        more = f" (and {len(wrong) - 1} more, see scepsy plan show)" if len(wrong) > 1 else ""
        raise ScepsyError(f"plan: {wrong[0]}{more}; correct its slots, or plan anew with scepsy optimize")


def _misplaced(plan: Plan) -> list[str]:
    types = {node.name: node.device_type for node in plan.cluster.nodes}
    wrong = []
    for where, part, slot in _replicas(plan):
        if len(set(slot.devices)) != len(slot.devices):
            wrong.append(f"{where}: names a device twice")
        if (part.device_type or plan.cluster.device_type) != types[slot.node]:
            planned = part.device_type or "no device type"
            wrong.append(f"{where}: planned for {planned}, node {slot.node!r} has {types[slot.node]}")
    return wrong


def _across_domains(plan: Plan) -> list[str]:
    domain_of = {
        (node.name, device): number
        for node in plan.cluster.nodes
        for number, domain in enumerate(node.nvlink_domains)
        for device in domain
    }
    return [
        f"{where}: devices {list(slot.devices)} of {slot.node!r} do not share a fast-link domain"
        for where, _, slot in _replicas(plan)
        if len({domain_of[slot.node, device] for device in slot.devices}) > 1
    ]


def _given_out_twice(plan: Plan) -> list[str]:
    used: dict[tuple[str, int], Fraction] = defaultdict(Fraction)
    memory: dict[tuple[str, int], float] = defaultdict(float)
    takers: dict[tuple[str, int], dict[str, None]] = defaultdict(dict)
    for _, part, slot in _replicas(plan):
        for device in slot.devices:
            key = (slot.node, device)
            used[key] += exact_fraction(part.fraction)
            memory[key] += part.fraction * part.gpu_memory_utilization
            takers[key][part.llm] = None
    wrong = [
        f"device {device} of {node!r} is given out {float(total):g} times, to "
        + ", ".join(repr(llm) for llm in takers[node, device])
        for (node, device), total in used.items()
        if total > 1
    ]
    wrong += [
        f"the replicas on device {device} of {node!r} take {total:.3g} of its memory"
        for (node, device), total in memory.items()
        if total > 1 + 1e-9 and used[node, device] <= 1
    ]
    told = {key for key, total in memory.items() if total > 1 + 1e-9}
    for where, part, slot in _replicas(plan):
        if part.gpu_memory_utilization > 1 and not told.intersection((slot.node, device) for device in slot.devices):
            wrong.append(
                f"{where}: takes {part.gpu_memory_utilization:.3g} of its part of the memory of node {slot.node!r}"
            )
    return wrong


def _replicas(plan: Plan) -> Iterator[tuple[str, LLMPlan, Slot]]:
    """Those on devices that the cluster has, and what to call each."""
    devices = {node.name: range(node.devices) for node in plan.cluster.nodes}
    for part in plan.llms:
        for number, slot in enumerate(part.slots):
            if all(device in devices.get(slot.node, ()) for device in slot.devices):
                yield f"{part.llm!r} replica {number}", part, slot
