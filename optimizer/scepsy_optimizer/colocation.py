"""Which of the replicas of one shape sits on which node, so that LLMs that call each other share nodes.

Replicas of the same shape change places freely: whatever else sits where, and what stays free, does not change by that.
Maximising the calls that stay on a node is a quadratic assignment, which is hard. Nodes are filled one after another,
each with what calls most, or is called most by, what is on it already; then pairs of replicas change places while that
helps, up to a number of tries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.timeline import waits
from scepsy_optimizer.workload import Workload

Floats = NDArray[np.float64]
Shape = tuple[int, int]

# What a call below the same switch is worth beside one on the same node.
_SAME_SWITCH = 0.25
_MAX_TRIES = 300
_NOTHING = 1e-12
_MAX_EXECUTIONS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A replica where it sits now; `weight` is its part in the LLM's calls, in any unit. A fixed one stays."""

    llm: str
    shape: Shape
    weight: float
    node: str
    fixed: bool


def gather(
    seats: Sequence[Seat], nodes: Sequence[str], switches: Sequence[str], calls: Mapping[tuple[str, str], float]
) -> list[int]:
    """For each replica the index of the seat that it should have; fixed ones keep theirs.

    `calls` says how often a call of the first LLM is followed by one of the second, and `switches` names what each node
    hangs on ("" for nothing known). The calls of an LLM spread over its replicas by their weight.
    """
    llms = sorted({seat.llm for seat in seats})
    llm_of = [llms.index(seat.llm) for seat in seats]
    node_index = {node: index for index, node in enumerate(nodes)}
    follow = _follow(llms, calls)
    total = np.zeros(len(llms))
    for seat, llm in zip(seats, llm_of, strict=True):
        total[llm] += seat.weight
    # How many seats of each shape each node has to give, and how many replicas of each LLM want one.
    shapes = sorted({seat.shape for seat in seats})
    shape_of = [shapes.index(seat.shape) for seat in seats]
    room = np.zeros((len(shapes), len(nodes)), dtype=int)
    waiting = np.zeros((len(shapes), len(llms)), dtype=int)
    here = np.zeros((len(nodes), len(llms)))
    weights = np.zeros(len(shapes))
    for seat, llm, shape in zip(seats, llm_of, shape_of, strict=True):
        weights[shape] = seat.weight
        if seat.fixed:
            here[node_index[seat.node], llm] += seat.weight / total[llm]
        else:
            room[shape, node_index[seat.node]] += 1
            waiting[shape, llm] += 1
    names = np.array(switches)
    near = _SAME_SWITCH * ((names[:, None] == names[None, :]) & (names != "")[:, None])
    np.fill_diagonal(near, 1.0)
    parts = weights[:, None] / total[None, :]
    given = _fill(room, waiting, here, parts, follow, near)
    _swap(given, here, parts, follow, near)
    return _seat(seats, shape_of, llm_of, node_index, given)


def _follow(llms: Sequence[str], calls: Mapping[tuple[str, str], float]) -> Floats:
    number = {llm: index for index, llm in enumerate(llms)}
    follow = np.zeros((len(llms), len(llms)))
    for (one, other), rate in calls.items():
        if one in number and other in number:
            follow[number[one], number[other]] += rate / 2
            follow[number[other], number[one]] += rate / 2
    return follow


def _fill(
    room: NDArray[np.int_], waiting: NDArray[np.int_], here: Floats, parts: Floats, follow: Floats, near: Floats
) -> NDArray[np.int_]:
    """Replicas by shape, node and LLM; `here`, the part of each LLM on each node, is brought up to date."""
    given = np.zeros((*room.shape, waiting.shape[1]), dtype=int)
    waiting, room = waiting.copy(), room.copy()
    whole = parts * follow.sum(axis=1)
    for node in range(room.shape[1]):
        pull = follow @ (near[node] @ here)
        for _ in range(room[:, node].sum()):
            gain = parts * pull if pull.any() else whole
            best = int(np.where((waiting > 0) & (room[:, node, None] > 0), gain, -1.0).argmax())
            shape, llm = divmod(best, waiting.shape[1])
            given[shape, node, llm] += 1
            waiting[shape, llm] -= 1
            room[shape, node] -= 1
            here[node, llm] += parts[shape, llm]
            pull += follow[:, llm] * parts[shape, llm]
    return given


def _swap(given: NDArray[np.int_], here: Floats, parts: Floats, follow: Floats, near: Floats) -> None:
    """Let two replicas of one shape on two nodes change places, as long as more calls stay near by that."""
    shapes, nodes, _ = given.shape
    tries = 0
    improved = True
    own = np.diag(follow)
    squares = [part**2 * own for part in parts]
    changes = [
        square[:, None] + square[None, :] - 2 * np.outer(part, part) * follow
        for square, part in zip(squares, parts, strict=True)
    ]
    # Neighbours in the order of filling first: what was split there is what may come together.
    pairs = [(one, one + gap) for gap in range(1, nodes) for one in range(nodes - gap)]
    pairs = pairs[:_MAX_TRIES]
    while improved:
        improved = False
        for shape, (one, other) in product(range(shapes), pairs):
            go, come = given[shape, one].nonzero()[0], given[shape, other].nonzero()[0]
            if not (len(go) and len(come)):
                continue
            tries += 1
            if tries > _MAX_TRIES:
                return
            pull = parts[shape] * (follow @ ((near[other] - near[one]) @ here))
            gain = pull[go, None] - pull[None, come] + (1 - near[one, other]) * changes[shape][np.ix_(go, come)]
            best = int(gain.argmax())
            if gain.flat[best] <= _NOTHING:
                continue
            improved = True
            goes, comes = go[best // len(come)], come[best % len(come)]
            for node, sign in ((one, -1), (other, 1)):
                given[shape, node, goes] += sign
                given[shape, node, comes] -= sign
                here[node, goes] += sign * parts[shape, goes]
                here[node, comes] -= sign * parts[shape, comes]


def _seat(
    seats: Sequence[Seat],
    shape_of: Sequence[int],
    llm_of: Sequence[int],
    node_index: Mapping[str, int],
    given: NDArray[np.int_],
) -> list[int]:
    """Seats by replica; one that may keep its own does."""
    empty: dict[tuple[int, int], list[int]] = defaultdict(list)
    result = [-1] * len(seats)
    for index, (seat, shape, llm) in enumerate(zip(seats, shape_of, llm_of, strict=True)):
        node = node_index[seat.node]
        if seat.fixed:
            result[index] = index
        elif given[shape, node, llm]:
            given[shape, node, llm] -= 1
            result[index] = index
        else:
            empty[shape, node].append(index)
    for index, (shape, llm) in enumerate(zip(shape_of, llm_of, strict=True)):
        if result[index] < 0:
            node = int(given[shape, :, llm].argmax())
            given[shape, node, llm] -= 1
            result[index] = empty[shape, node].pop(0)
    return result


def calls_between(workload: Workload) -> dict[tuple[str, str], float]:
    """How often, in a mean execution, a call of the first LLM is waited for by one of the second.

    Taken from at most a few hundred executions, evenly chosen: it decides nothing but which equal places are swapped.
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
