"""Leanings in the choice of nodes: LLMs that call each other together, or the replicas of an LLM apart.

Keeping the most calls on their node is a quadratic assignment, which is hard. Replicas are placed one after another,
each on the node whose replicas its LLM calls, or is called by, most; then pairs of replicas of one shape change places
while that helps, up to a number of tries: whatever else sits where, and what stays free, does not change by that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.cluster import Node
from scepsy_optimizer.free_devices import Floats, Replica
from scepsy_optimizer.plan import Slot
from scepsy_optimizer.timeline import waits
from scepsy_optimizer.workload import Workload

# What a call below the same switch is worth beside one on the same node.
_SAME_SWITCH = 0.25
_MAX_TRIES = 200
_NOTHING = 1e-12
_MAX_EXECUTIONS = 200


class Leaning(Protocol):
    """What makes one node better than another for a replica, where devices do not decide."""

    def rank(self, replica: Replica, done: int) -> float:
        """Among replicas of one shape the lowest chooses first; `done` of its group have chosen before."""
        ...

    def cost(self, replica: Replica) -> Floats:
        """By node; the least is best."""
        ...

    def count(self, replica: Replica, node: int, sign: int) -> None:
        """A replica has come to a node (1) or has gone (-1)."""
        ...


class Spread:
    """Fewest replicas of the same LLM on a node; LLMs with the most replicas choose first: they need the most nodes."""

    def __init__(self, nodes: int, wanted: Counter[Replica]) -> None:
        self._replicas: Counter[str] = Counter()
        for replica, count in wanted.items():
            self._replicas[replica.llm] += count
        self._held = {llm: np.zeros(nodes) for llm in self._replicas}

    def rank(self, replica: Replica, done: int) -> float:  # noqa: ARG002 - the same for all of a group
        """See `Leaning`."""
        return -float(self._replicas[replica.llm])

    def cost(self, replica: Replica) -> Floats:
        """See `Leaning`."""
        return self._held[replica.llm]

    def count(self, replica: Replica, node: int, sign: int) -> None:
        """See `Leaning`."""
        self._held[replica.llm][node] += sign


class Gather:
    """Most calls to and from what is on the node already; the groups choose by turns, so that they mix.

    `calls` says how often a call of the first LLM is followed by one of the second. The calls of an LLM spread over its
    replicas by the devices that they take.
    """

    def __init__(
        self, nodes: Sequence[Node], wanted: Counter[Replica], units: int, calls: Mapping[tuple[str, str], float]
    ) -> None:
        self._wanted = wanted
        self._llms = {llm: index for index, llm in enumerate(sorted({replica.llm for replica in wanted}))}
        self._follow = np.zeros((len(self._llms), len(self._llms)))
        for (one, other), rate in calls.items():
            if one in self._llms and other in self._llms:
                self._follow[self._llms[one], self._llms[other]] += rate / 2
                self._follow[self._llms[other], self._llms[one]] += rate / 2
        total: Counter[str] = Counter()
        for replica, count in wanted.items():
            total[replica.llm] += count * (replica.size * units + replica.units)
        self._part = {one: (one.size * units + one.units) / total[one.llm] for one in wanted}
        names = np.array([node.switch for node in nodes])
        self._near: Floats = _SAME_SWITCH * ((names[:, None] == names[None, :]) & (names != "")[:, None])
        self._switched = bool(self._near.any())
        np.fill_diagonal(self._near, 1.0)
        self._costs = np.zeros((len(self._llms), len(nodes)))

    def rank(self, replica: Replica, done: int) -> float:
        """See `Leaning`."""
        return (done + 0.5) / self._wanted[replica]

    def cost(self, replica: Replica) -> Floats:
        """See `Leaning`."""
        costs: Floats = self._costs[self._llms[replica.llm]]
        return costs

    def count(self, replica: Replica, node: int, sign: int) -> None:
        """See `Leaning`."""
        llm, part = self._llms[replica.llm], sign * self._part[replica]
        pull = self._follow[llm] * part
        if self._switched:
            self._costs -= np.outer(pull, self._near[node])
        else:
            self._costs[:, node] -= pull

    def swapped(
        self,
        nodes: Mapping[str, int],
        placed: Mapping[Replica, Sequence[Slot]],
        fixed: Mapping[Replica, Sequence[Slot]],
    ) -> dict[Replica, list[Slot]]:
        """The same slots after replicas of one shape have changed places; those of `fixed` keep theirs.

        What has been counted must be what is placed.
        """
        shapes = sorted({(replica.size, replica.units) for replica in placed})
        groups = {shape: [one for one in placed if (one.size, one.units) == shape] for shape in shapes}
        result = {replica: list(fixed.get(replica, ())) for replica in placed}
        for members in groups.values():
            seats: list[list[Slot]] = [[] for _ in nodes]
            given = np.zeros((len(nodes), len(members)), dtype=int)
            for index, replica in enumerate(members):
                movable = Counter(placed[replica])
                movable.subtract(result[replica])
                for slot in movable.elements():
                    seats[nodes[slot.node]].append(slot)
                    given[nodes[slot.node], index] += 1
            self._swap(given, members)
            for node, left in enumerate(seats):
                for index, replica in enumerate(members):
                    for _ in range(given[node, index]):
                        result[replica].append(left.pop(0))
        return result

    def _swap(self, given: NDArray[np.int_], members: Sequence[Replica]) -> None:
        """Let two replicas of one shape on two nodes change places, as long as more calls stay near by that.

        `given` has how many of each group sit on each node, and is brought up to date.
        """
        llms = [self._llms[replica.llm] for replica in members]
        parts = np.array([self._part[replica] for replica in members])
        follow = self._follow[np.ix_(llms, llms)]
        squares = parts**2 * np.diag(follow)
        change = squares[:, None] + squares[None, :] - 2 * np.outer(parts, parts) * follow
        # Neighbours first: what was split between them is what may come together.
        pairs = [(one, one + gap) for gap in range(1, len(given)) for one in range(len(given) - gap)][:_MAX_TRIES]
        tries = 0
        improved = len(members) > 1
        while improved:
            improved = False
            for one, other in pairs:
                go, come = given[one].nonzero()[0], given[other].nonzero()[0]
                if not (len(go) and len(come)):
                    continue
                tries += 1
                if tries > _MAX_TRIES:
                    return
                pull = parts * (self._costs[llms, one] - self._costs[llms, other])
                gain = pull[go, None] - pull[None, come] + (1 - self._near[one, other]) * change[np.ix_(go, come)]
                best = int(gain.argmax())
                if gain.flat[best] <= _NOTHING:
                    continue
                improved = True
                goes, comes = go[best // len(come)], come[best % len(come)]
                for node, sign in ((one, -1), (other, 1)):
                    given[node, goes] += sign
                    given[node, comes] -= sign
                    self.count(members[goes], node, sign)
                    self.count(members[comes], node, -sign)


def calls_between(workload: Workload) -> dict[tuple[str, str], float]:
    """How often, in a mean execution, a call of the first LLM is waited for by one of the second.

    Taken from at most a few hundred executions, evenly chosen: it only decides who sits where in what is taken anyway.
    """
    step = -(-len(workload.timelines) // _MAX_EXECUTIONS)
    rates: dict[tuple[str, str], float] = defaultdict(float)
    chosen = list(zip(workload.timelines, workload.weights, strict=True))[::step]
    total = sum(weight for _, weight in chosen)
    for timeline, weight in chosen:
        for before, after in waits(timeline):
            if before >= 0:
                rates[timeline.calls[before].llm, timeline.calls[after].llm] += weight / total
    return dict(rates)
