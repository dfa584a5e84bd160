"""Which replicas of a running plan make room for one that fits nowhere, so that as few as possible restart.

Only smaller ones make room: then the larger are settled when the smaller are placed again, and it comes to an end. A
group that is to shrink anyway gives up its surplus for nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from scepsy_optimizer.free_devices import FreeDevices, Replica
from scepsy_optimizer.plan import Slot

Kept = Mapping[int, tuple[Replica, Slot]]
"""Replicas that keep their slots so far, by any key."""


def evict_devices(
    size: int, kept: Kept, surplus: Mapping[Replica, int], free: FreeDevices
) -> tuple[int | None, Sequence[int]]:
    """The domain in which `size` devices cost the fewest restarts, and the keys of those that have to go.

    `surplus` says how many of each group go without a restart. Returns (None, ()) where no domain can be freed so.
    """
    by_domain: dict[int, list[int]] = defaultdict(list)
    for key, (replica, slot) in kept.items():
        if replica.size < size:
            by_domain[free.domain_of(slot)].append(key)
    best: tuple[int, int, int, tuple[int, ...]] | None = None
    for domain, keys in by_domain.items():
        items = _items(keys, kept, surplus, free)
        found = _cheapest(items, size - free.free_in(domain))
        if found is not None and (best is None or (*found[:2], domain) < best[:3]):
            best = (*found[:2], domain, found[2])
    return (None, ()) if best is None else (best[2], best[3])


def _items(
    keys: Sequence[int], kept: Kept, surplus: Mapping[Replica, int], free: FreeDevices
) -> list[tuple[int, int, tuple[int, ...]]]:
    """What can go from a domain: devices freed, restarts, and keys; those that share a device go together."""
    credit = Counter(surplus)
    items: list[tuple[int, int, tuple[int, ...]]] = []
    sharing: dict[Slot, list[int]] = defaultdict(list)
    for key in keys:
        replica, slot = kept[key]
        if replica.size:
            items.append((replica.size, _cost(replica, credit), (key,)))
        else:
            sharing[slot].append(key)
    for slot, sharers in sharing.items():
        if free.left_on(slot) + sum(kept[key][0].units for key in sharers) == free.units:
            items.append((1, sum(_cost(kept[key][0], credit) for key in sharers), tuple(sharers)))
    return items


def _cost(replica: Replica, credit: Counter[Replica]) -> int:
    if credit[replica] > 0:
        credit[replica] -= 1
        return 0
    return 1


def _cheapest(
    items: Sequence[tuple[int, int, tuple[int, ...]]], devices: int
) -> tuple[int, int, tuple[int, ...]] | None:
    """The least cost of at least so many devices, how many are freed, and the keys; by dynamic programming."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for freed, cost, keys in items:
        for before, (spent, chosen) in sorted(best.items(), reverse=True):
            after = (spent + cost, chosen + keys)
            if before < devices and (before + freed not in best or best[before + freed][0] > after[0]):
                best[before + freed] = after
    enough = [(cost, freed, keys) for freed, (cost, keys) in best.items() if freed >= devices]
    return min(enough, default=None)


def evict_share(
    units: int, kept: Kept, surplus: Mapping[Replica, int], free: FreeDevices
) -> tuple[Slot | None, Sequence[int]]:
    """The shared device of which `units` cost the fewest restarts, and the keys of those that have to go.

    Returns (None, ()) where no device can be freed so.
    """
    sharing: dict[Slot, list[int]] = defaultdict(list)
    for key, (replica, slot) in kept.items():
        if 0 < replica.units < units:
            sharing[slot].append(key)
    best: tuple[int, int, Slot, list[int]] | None = None
    for slot, keys in sharing.items():
        credit = Counter(surplus)
        costs = {key: _cost(kept[key][0], credit) for key in keys}
        left, cost, chosen = free.left_on(slot), 0, []
        for key in sorted(keys, key=lambda key: (costs[key], -kept[key][0].units)):
            if left < units:
                left, cost = left + kept[key][0].units, cost + costs[key]
                chosen.append(key)
        if left >= units and (best is None or (cost, left) < best[:2]):
            best = (cost, left, slot, chosen)
    return (None, ()) if best is None else best[2:]
