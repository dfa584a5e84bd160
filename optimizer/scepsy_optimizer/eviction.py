"""Which kept replicas make room for one that fits nowhere, so that as few as possible move.

Only smaller ones make room: then the larger are settled when the smaller are placed again, and it comes to an end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from scepsy_optimizer.free_devices import FreeDevices
from scepsy_optimizer.plan import Slot


def evict_devices(
    size: int, movable: Mapping[int, tuple[int, int, Slot]], free: FreeDevices
) -> tuple[int | None, Sequence[int]]:
    """Free `size` devices of one domain by releasing the fewest replicas; the domain and those released.

    `movable` has, by key, the size, the units and the slot of each replica that may move; size 0 shares a device.
    Returns (None, ()) where no domain can be freed so.
    """
    # What frees how many devices of a domain: one group, or all that share a device.
    whole: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    sharing: dict[tuple[int, Slot], list[int]] = defaultdict(list)
    for key, (taken, _, slot) in movable.items():
        domain = free.domain_of(slot)
        if taken == 0:
            sharing[domain, slot].append(key)
        elif taken < size:
            whole[domain].append((taken, (key,)))
    for (domain, slot), keys in sharing.items():
        if free.left_on(slot) + sum(movable[key][1] for key in keys) == free.units:
            whole[domain].append((1, tuple(keys)))
    best: tuple[int, int, int] | None = None
    chosen: tuple[int, ...] = ()
    for domain, items in whole.items():
        found = _fewest(items, size - free.free_in(domain))
        if found is not None and (best is None or (len(found[1]), found[0], domain) < best):
            best, chosen = (len(found[1]), found[0], domain), found[1]
    if best is None:
        return None, ()
    for key in chosen:
        taken, units, slot = movable[key]
        if taken:
            free.release(slot)
        else:
            free.release_share(slot, units)
    return best[2], chosen


def _fewest(items: Sequence[tuple[int, tuple[int, ...]]], devices: int) -> tuple[int, tuple[int, ...]] | None:
    """The fewest replicas that free at least so many devices, and how many they free; by dynamic programming."""
    best: dict[int, tuple[int, ...]] = {0: ()}
    for freed, keys in items:
        for before, chosen in sorted(best.items(), reverse=True):
            after = before + freed
            if before < devices and (after not in best or len(best[after]) > len(chosen) + len(keys)):
                best[after] = chosen + keys
    enough = [(len(chosen), freed) for freed, chosen in best.items() if freed >= devices]
    if not enough:
        return None
    freed = min(enough)[1]
    return freed, best[freed]


def evict_share(
    units: int, movable: Mapping[int, tuple[int, Slot]], free: FreeDevices
) -> tuple[Slot | None, Sequence[int]]:
    """Free `units` of one shared device by releasing the fewest replicas; its slot and those released.

    `movable` has, by key, the units and the slot of each replica that may move. Returns (None, ()) if none suffices.
    """
    sharing: dict[Slot, list[tuple[int, int]]] = defaultdict(list)
    for key, (taken, slot) in movable.items():
        if taken < units:
            sharing[slot].append((taken, key))
    best: tuple[int, int, Slot, list[int]] | None = None
    for slot, parts in sharing.items():
        left, chosen = free.left_on(slot), []
        for taken, key in sorted(parts, reverse=True):
            if left < units:
                left += taken
                chosen.append(key)
        if left >= units and (best is None or (len(chosen), left) < best[:2]):
            best = (len(chosen), left, slot, chosen)
    if best is None:
        return None, ()
    for key in best[3]:
        free.release_share(best[2], movable[key][0])
    return best[2], best[3]
