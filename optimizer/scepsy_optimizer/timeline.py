"""The order in which the pieces of an execution wait for each other, and what new durations make of it.

Among the children of one span, a child waits for the siblings that ended before it started; what lies between the
latest of them and its start is tool or think time and stays as it is. A span ends a fixed time after the last of its
children that ended within it. So every traced time is a longest path over fixed gaps and call durations, and other
durations give other times by the same graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from scepsy_optimizer.executions import Call, Execution, Span

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """An execution compiled to a longest-path problem over events (starts and ends of spans).

    Events are in topological order. Event `i` happens `delay_s[i]`, plus the duration of call `call_of[i]` unless that
    is -1, after the latest of its `predecessors[i]`; an event without predecessors happens at 0. The execution is over
    at event `sink`. `span_ids` and `traced_s` go with `calls`.
    """

    execution: str
    workflow: str
    calls: tuple[Call, ...]
    span_ids: tuple[str, ...]
    traced_s: tuple[float, ...]
    predecessors: tuple[tuple[int, ...], ...]
    delay_s: tuple[float, ...]
    call_of: tuple[int, ...]
    sink: int

    def makespan_s(self, durations_s: Sequence[float]) -> float:
        """Wall time of the execution when its calls take `durations_s`, in the order of `calls`."""
        return self._times(durations_s)[self.sink]

    def critical_path(self, durations_s: Sequence[float]) -> CriticalPath:
        """The chain of waits that decides the makespan at these durations."""
        times = self._times(durations_s)
        on_path = []
        fixed_s = 0.0
        event = self.sink
        while True:
            fixed_s += self.delay_s[event]
            if self.call_of[event] >= 0:
                on_path.append(self.call_of[event])
            before = self.predecessors[event]
            if not before:
                break
            event = before[0] if len(before) == 1 else max(before, key=times.__getitem__)
        return CriticalPath(makespan_s=times[self.sink], calls=tuple(reversed(on_path)), fixed_s=fixed_s)

    def _times(self, durations_s: Sequence[float]) -> list[float]:
        times: list[float] = []
        for before, delay, call in zip(self.predecessors, self.delay_s, self.call_of, strict=True):
            if not before:
                time = delay
            elif len(before) == 1:
                time = times[before[0]] + delay
            else:
                time = max([times[event] for event in before]) + delay
            if call >= 0:
                time += durations_s[call]
            times.append(time)
        return times


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalPath:
    """Indices of the calls on the path, in order, and the fixed time (tools, thinking, gaps) along it."""

    makespan_s: float
    calls: tuple[int, ...]
    fixed_s: float


def compile_timeline(execution: Execution) -> Timeline:
    """Compile an execution; at its traced durations the timeline gives its traced makespan."""
    children: dict[str, list[Span]] = {}
    for span in execution.spans:
        if span.parent is not None:
            children.setdefault(span.parent, []).append(span)
    build = _Build()
    root = execution.spans[0]
    # An explicit stack, since recursion in a workflow may nest deeper than Python's own stack allows.
    start = build.event((), 0.0)
    stack = [(root, _Family(root, children.get(root.id, ()), start))]
    while stack:
        span, family = stack[-1]
        child = family.next_child()
        if child is not None:
            start = family.start_of(child, build)
            if child.call is not None:
                family.ended(child, build.call(start, child))
            else:
                stack.append((child, _Family(child, children.get(child.id, ()), start)))
            continue
        end = family.end_of(span, build)
        stack.pop()
        if stack:
            stack[-1][1].ended(span, end)
    return Timeline(
        execution=execution.id,
        workflow=execution.workflow,
        calls=tuple(build.calls),
        span_ids=tuple(build.span_ids),
        traced_s=tuple(build.traced_s),
        predecessors=tuple(build.predecessors),
        delay_s=tuple(build.delay_s),
        call_of=tuple(build.call_of),
        sink=len(build.predecessors) - 1,
    )


def call_graph(execution: Execution) -> nx.DiGraph[str]:
    """Which call waited for which: nodes are span ids with their `call`, edges are transitively reduced waits.

    Waits pass through the steps between calls: a call inside an agent waits for the last calls of the agent before.
    """
    import networkx as nx  # here: it loads slowly, and nothing else that compiles timelines draws graphs

    timeline = compile_timeline(execution)
    ids = timeline.span_ids
    graph: nx.DiGraph[str] = nx.DiGraph()
    for index, call in enumerate(timeline.calls):
        graph.add_node(ids[index], call=call)
    graph.add_edges_from((ids[source], ids[target]) for source, target in waits(timeline) if source >= 0)
    return graph


def waits(timeline: Timeline) -> list[tuple[int, int]]:
    """Which call waits for which, transitively reduced, as pairs of indices; -1 is the start of the execution."""
    found: list[tuple[int, int]] = []
    # For every event, the calls that ended last before it; for every call, all calls before it, as bits.
    latest: list[frozenset[int]] = []
    before_call = [0] * len(timeline.calls)
    for before, call in zip(timeline.predecessors, timeline.call_of, strict=True):
        sources = latest[before[0]] if len(before) == 1 else _NOBODY.union(*(latest[event] for event in before))
        if call >= 0:
            through = 0
            for source in sources:
                through |= before_call[source]
            # Of two that are waited for, one that the other has waited for itself says nothing more.
            direct = [source for source in sources if not through >> source & 1]
            found.extend((source, call) for source in direct or (-1,))
            before_call[call] = through | sum(1 << source for source in direct)
            sources = frozenset({call})
        latest.append(sources)
    return found


_NOBODY: Final[frozenset[int]] = frozenset()


def retime(executions: Sequence[Execution], durations_s: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Makespan of each execution, by its id, with calls moved to new durations.

    `durations_s` is keyed by (execution id, span id); calls that it lacks keep their traced duration.
    """
    makespans = {}
    for execution in executions:
        timeline = compile_timeline(execution)
        moved = [
            durations_s.get((execution.id, span_id), traced)
            for span_id, traced in zip(timeline.span_ids, timeline.traced_s, strict=True)
        ]
        makespans[execution.id] = timeline.makespan_s(moved)
    return makespans


class _Build:
    """The event lists while they grow."""

    def __init__(self) -> None:
        self.predecessors: list[tuple[int, ...]] = []
        self.delay_s: list[float] = []
        self.call_of: list[int] = []
        self.calls: list[Call] = []
        self.span_ids: list[str] = []
        self.traced_s: list[float] = []

    def event(self, predecessors: tuple[int, ...], delay_s: float, call: int = -1) -> int:
        self.predecessors.append(predecessors)
        self.delay_s.append(delay_s)
        self.call_of.append(call)
        return len(self.predecessors) - 1

    def call(self, start: int, span: Span) -> int:
        assert span.call is not None  # noqa: S101 - tells mypy what the caller has checked
        self.calls.append(span.call)
        self.span_ids.append(span.id)
        self.traced_s.append(span.duration_s)
        return self.event((start,), 0.0, len(self.calls) - 1)


class _Family:
    """The children of one span while they are compiled in the order of their starts."""

    def __init__(self, parent: Span, children: Sequence[Span], start: int) -> None:
        self._parent = parent
        self._children = sorted(children, key=lambda child: (child.start_s, child.end_s, child.id))
        self._next = 0
        self._start = start
        self._done: list[tuple[Span, int]] = []
        # Those of `_done` that no start has come after yet, as a heap by their ends.
        self._running: list[tuple[float, int, Span]] = []
        self._last: list[tuple[Span, int]] = []
        self._waits: tuple[tuple[int, ...], float] = (start,), parent.start_s

    def next_child(self) -> Span | None:
        if self._next == len(self._children):
            return None
        self._next += 1
        return self._children[self._next - 1]

    def start_of(self, child: Span, build: _Build) -> int:
        ended: list[tuple[Span, int]] = []
        while self._running and self._running[0][0] <= child.start_s:
            _, event, sibling = heappop(self._running)
            ended.append((sibling, event))
        if ended:
            # Starts only get later, so whoever is waited for through another one now always will be: the last ones
            # stand for all that ended before. Walking all of them at each start would be quadratic.
            self._last = _last(sorted(self._last + ended, key=itemgetter(1)))
            self._waits = _ends(self._last)
        waits, since_s = self._waits
        return build.event(waits, child.start_s - since_s)

    def ended(self, child: Span, event: int) -> None:
        self._done.append((child, event))
        heappush(self._running, (child.end_s, event, child))

    def end_of(self, span: Span, build: _Build) -> int:
        # A span may end before the last of its children starts, so this is asked of all of them.
        ended = [(child, event) for child, event in self._done if child.end_s <= span.end_s]
        waits, since_s = _ends(_last(ended)) if ended else ((self._start,), self._parent.start_s)
        return build.event(waits, span.end_s - since_s)


def _last(ended: Sequence[tuple[Span, int]]) -> list[tuple[Span, int]]:
    """Those among children that ended that something after them waits for, transitively reduced, in the same order.

    A child that ended before another of them started is waited for through that one.
    """
    horizon_s = max(child.start_s for child, _ in ended)
    # A child of no duration may start and end at the horizon itself: it stays, and so does whoever started there.
    return [(child, event) for child, event in ended if child.end_s > horizon_s or child.start_s == horizon_s]


def _ends(last: Sequence[tuple[Span, int]]) -> tuple[tuple[int, ...], float]:
    """The events of the children that are waited for, and the latest of their ends."""
    return tuple(event for _, event in last), max(child.end_s for child, _ in last)
