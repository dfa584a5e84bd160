"""What is free while replicas are placed: whole devices in fast-link domains, and parts of shared devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.cluster import Node
from scepsy_optimizer.plan import Slot

Ints = NDArray[np.int_]
Floats = NDArray[np.float64]

_UNTOUCHED = 1 << 40
_FULLEST = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One replica to place: `size` whole devices, or `units` of one device where `size` is 0.

    Replicas of one group are equal and stand for each other.
    """

    llm: str
    group: int
    size: int
    units: int


@dataclass(slots=True)
class _Domain:
    """One fast-link domain: its devices by socket, and which positions of that order are free, as bits."""

    node: int
    devices: tuple[int, ...]
    positions: dict[int, int]
    free: int


class FreeDevices:
    """The free part of some nodes of one device type; a shared device is divided into `units` parts.

    Every place is chosen so that what stays free stays whole: nodes and domains already in use before untouched ones,
    then the domain with the fewest free devices that suffice, then the shared device with the least room that does.
    """

    def __init__(self, nodes: Sequence[Node], units: int) -> None:
        self._nodes = nodes
        self.units = units
        self._domains: list[_Domain] = []
        for index, node in enumerate(nodes):
            sockets = node.pcie_domains or (tuple(range(node.devices)),)
            by_socket = {device: place for place, device in enumerate(device for group in sockets for device in group)}
            for domain in node.nvlink_domains:
                devices = tuple(sorted(domain, key=by_socket.__getitem__))
                positions = {device: place for place, device in enumerate(devices)}
                self._domains.append(_Domain(index, devices, positions, (1 << len(devices)) - 1))
        self._domain_of = {
            (nodes[domain.node].name, device): number
            for number, domain in enumerate(self._domains)
            for device in domain.devices
        }
        self._node_of: Ints = np.array([domain.node for domain in self._domains])
        self._free: Ints = np.array([len(domain.devices) for domain in self._domains])
        self._size = self._free.copy()
        self._node_free: Ints = np.array([node.devices for node in nodes])
        self._node_size = self._node_free.copy()
        self._domains_of = [np.flatnonzero(self._node_of == index) for index in range(len(nodes))]
        self._rank: Ints = np.zeros(len(self._domains), dtype=int)
        for index in range(len(nodes)):
            self._rank_node(index)
        # Shared devices in the order of their opening; `_left` has their free units.
        self._shared: list[tuple[int, int]] = []
        self._shared_at: dict[tuple[int, int], int] = {}
        self._left: Ints = np.zeros(0, dtype=int)
        self._shared_node: Ints = np.zeros(0, dtype=int)

    @property
    def domains(self) -> int:
        """Number of domains."""
        return len(self._domains)

    def free_in(self, domain: int) -> int:
        """Number of wholly free devices of a domain."""
        return int(self._free[domain])

    def domain_of(self, slot: Slot) -> int:
        """The domain that a slot is in."""
        return self._domain_of[slot.node, slot.devices[0]]

    def left_on(self, slot: Slot) -> int:
        """Free units of the one device of a slot."""
        domain = self.domain_of(slot)
        at = self._shared_at.get((domain, slot.devices[0]))
        if at is not None and self._left[at] < self.units:
            return int(self._left[at])
        return self.units if self._is_free(domain, slot.devices[0]) else 0

    def node_of(self, domain: int) -> int:
        """Index of the node that a domain belongs to."""
        return int(self._node_of[domain])

    def whole(self) -> list[Slot]:
        """The wholly free devices, a slot for each domain that has some."""
        return [
            Slot(
                node=self._nodes[domain.node].name,
                devices=tuple(device for device in domain.devices if domain.free >> domain.positions[device] & 1),
            )
            for domain in self._domains
            if domain.free
        ]

    def find_domain(self, size: int, cost: Floats | None = None) -> int | None:
        """The domain to take `size` devices from; with a `cost` by node, one of a node of least cost."""
        return self._best(self._free >= size, cost)

    def take(self, domain: int, size: int) -> Slot:
        """Take `size` free devices of a domain: an aligned block where there is one, of those the least useful."""
        here = self._domains[domain]
        mask = _block(here.free, len(here.devices), size)
        devices = tuple(device for device in here.devices if mask >> here.positions[device] & 1)
        slot = Slot(node=self._nodes[here.node].name, devices=devices)
        self._occupy(slot, domain, mask)
        return slot

    def keep(self, replica: Replica, slot: Slot) -> bool:
        """Take a given slot for a replica; False, and nothing taken, where it does not exist or is not free."""
        return self.take_slot(slot) if replica.size else self.take_share(slot, replica.units)

    def evict(self, replica: Replica, slot: Slot) -> None:
        """Give back the slot of a replica; a device of which nothing is taken is wholly free again."""
        if replica.size:
            self._release(slot)
            return
        at = self._shared_at[self.domain_of(slot), slot.devices[0]]
        self._left[at] += replica.units
        if self._left[at] == self.units:
            self._release(slot)

    def take_slot(self, slot: Slot) -> bool:
        """Take a given slot of whole devices; False, and nothing taken, where they are not all free in one domain."""
        domains = {self._domain_of.get((slot.node, device)) for device in slot.devices}
        domain = domains.pop()
        if domains or domain is None or not all(self._is_free(domain, device) for device in slot.devices):
            return False
        positions = self._domains[domain].positions
        self._occupy(slot, domain, sum(1 << positions[device] for device in slot.devices))
        return True

    def find_share(self, units: int, cost: Floats | None = None) -> Slot | None:
        """The shared device to take `units` of, or a free one to share; with a `cost` by node, where it is least."""
        at = self._best_share(units, cost)
        domain = self.find_domain(1, cost)
        # A free device is shared where others are only if that costs less.
        cheaper = (
            at is not None
            and domain is not None
            and cost is not None
            and cost[self.node_of(domain)] < cost[self.node_of(self._shared[at][0])]
        )
        if cheaper:
            at = None
        if at is not None:
            domain, device = self._shared[at]
        elif domain is not None:
            here = self._domains[domain]
            mask = _block(here.free, len(here.devices), 1)
            device = here.devices[mask.bit_length() - 1]
        else:
            return None
        return Slot(node=self._nodes[self.node_of(domain)].name, devices=(device,))

    def take_share(self, slot: Slot, units: int) -> bool:
        """Take a part of a given device, shared already or wholly free; False, and nothing taken, without room."""
        device = slot.devices[0]
        domain = self._domain_of.get((slot.node, device))
        if domain is None:
            return False
        at = self._shared_at.get((domain, device))
        if at is None or self._left[at] == self.units:
            if not self.take_slot(slot):
                return False
            if at is None:
                at = self._shared_at[domain, device] = len(self._shared)
                self._shared.append((domain, device))
                self._left = np.append(self._left, self.units)
                self._shared_node = np.append(self._shared_node, self.node_of(domain))
        if self._left[at] < units:
            return False
        self._left[at] -= units
        return True

    def _is_free(self, domain: int, device: int) -> bool:
        here = self._domains[domain]
        return bool(here.free >> here.positions[device] & 1)

    def _release(self, slot: Slot) -> None:
        domain = self.domain_of(slot)
        here = self._domains[domain]
        here.free |= sum(1 << here.positions[device] for device in slot.devices)
        self._free[domain] += len(slot.devices)
        self._node_free[here.node] += len(slot.devices)
        self._rank_node(here.node)

    def _occupy(self, slot: Slot, domain: int, mask: int) -> None:
        here = self._domains[domain]
        here.free &= ~mask
        self._free[domain] -= len(slot.devices)
        self._node_free[here.node] -= len(slot.devices)
        self._rank_node(here.node)

    def _rank_node(self, node: int) -> None:
        """Bring up to date in which order the domains of a node are taken: the lowest rank first."""
        domains = self._domains_of[node]
        left = int(self._node_free[node])
        untouched = 2 * (left == self._node_size[node])
        if len(domains) == 1:
            # Much the commonest node; numpy would take ten times as long over one number.
            (domain,) = domains
            free = int(self._free[domain])
            self._rank[domain] = _UNTOUCHED * (untouched + (free == self._size[domain])) + _FULLEST * free + left
            return
        all_free = self._free[domains]
        self._rank[domains] = _UNTOUCHED * (untouched + (all_free == self._size[domains])) + _FULLEST * all_free + left

    def _best(self, usable: NDArray[np.bool_], cost: Floats | None) -> int | None:
        found = np.flatnonzero(usable)
        if not len(found):
            return None
        if cost is not None:
            costs = cost[self._node_of[found]]
            found = found[costs == costs.min()]
        return int(found[np.argmin(self._rank[found])])

    def _best_share(self, units: int, cost: Floats | None) -> int | None:
        found = np.flatnonzero((self._left >= units) & (self._left < self.units))
        if not len(found):
            return None
        if cost is not None:
            costs = cost[self._shared_node[found]]
            found = found[costs == costs.min()]
        return int(found[np.argmin(self._left[found])])


def _block(free: int, length: int, size: int) -> int:
    """`size` of the free positions as bits.

    A power of two takes a block that starts at a multiple of its size, within the smallest free block that has one, so
    that larger ones stay whole; another size takes neighbours. Where there is no such block, any positions will do.
    """
    power = size & (size - 1) == 0
    block = (1 << size) - 1
    best, best_room = 0, length + 1
    for start in range(0, length - size + 1, size if power else 1):
        if free >> start & block != block:
            continue
        room = size
        while power and room < length:
            wider = (1 << 2 * room) - 1
            base = start // (2 * room) * (2 * room)
            if base + 2 * room > length or free >> base & wider != wider:
                break
            room *= 2
        if room < best_room:
            best, best_room = block << start, room
    if best:
        return best
    taken = 0
    for _ in range(size):
        lowest = free & -free
        taken |= lowest
        free &= ~lowest
    return taken
