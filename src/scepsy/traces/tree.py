"""The tree of a trace: records joined to their parents, as far as these are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Final

import msgspec
from msgspec.structs import replace

from scepsy.traces.matching import SLACK_NS, same_call
from scepsy.traces.records import CALL, CALL_LIKE, LLM, SERVER, SpanRecord, Tally

DUPLICATE: Final = "spans that came twice"
ORPHAN: Final = "spans whose parent is missing, put under the root"


class Node(msgspec.Struct, eq=False, gc=False):
    """A record in the tree of its trace, and what becomes of it.

    Parents know their children and these their parents, of which the garbage collector is not told: `let_go` must be.
    """

    record: SpanRecord
    start_ns: int
    end_ns: int
    parent: Node | None = None
    children: Sequence[Node] = ()
    depth: int = 0
    calls_below: int = 0
    call: bool = False
    gone: bool = False
    above: Node | None = None
    """The nearest span above that does not go."""
    absorbed: Node | None = None
    """The call that this span is a detail of."""
    lent: tuple[SpanRecord, ...] = ()
    """What a call may complete itself from: its details first, then the wrappers around it, inside out."""


def make_nodes(records: Sequence[SpanRecord], tally: Tally) -> dict[str, Node]:
    """The records by span id, each once."""
    nodes = {record.id: Node(record, record.start_ns, record.end_ns) for record in records}
    if len(nodes) < len(records):
        tally.dropped[DUPLICATE] += len(records) - len(nodes)
        # The first of them counts.
        nodes = {record.id: Node(record, record.start_ns, record.end_ns) for record in reversed(records)}
        nodes = {record.id: nodes[record.id] for record in records}
    return nodes


def link(nodes: dict[str, Node], tally: Tally) -> tuple[list[Node], list[Node]]:
    """Join children to parents.

    Returns the roots, none of them if the trace is cut off above, and spans of a missing parent that must stand beside.
    """
    roots, orphans = [], []
    for node in nodes.values():
        parent = nodes.get(node.record.parent)
        if parent is not None and parent.record.kind == CALL:
            parent = _above_calls(node, parent, nodes)
        if parent is not None and parent is not node:
            node.parent = parent
            _adopt(parent, node)
        elif node.record.parent:
            orphans.append(node)
        else:
            roots.append(node)
    if not roots:
        # The parent of a whole execution may be somebody else's: of a web server's client that exports elsewhere. A
        # missing parent of this process, though, is one that never ended.
        roots = [node for node in orphans if node.record.remote_parent or node.record.kind == SERVER]
        orphans = [node for node in orphans if not (node.record.remote_parent or node.record.kind == SERVER)]
    if roots and orphans:
        tally.repaired[ORPHAN] += len(orphans)
        steps = [node for node in roots if node.record.kind not in CALL_LIKE]
        if steps:
            root = min(steps, key=_start)
            for orphan in orphans:
                orphan.parent = root
                _adopt(root, orphan)
        else:
            # Nothing may be put under a call: it would seem to be a wrapper of what is below it.
            return roots, orphans
    return roots, []


def _adopt(parent: Node, child: Node) -> None:
    # Most spans have no children, and need no list.
    if isinstance(parent.children, list):
        parent.children.append(child)
    else:
        parent.children = [child]


def reunite_streams(nodes: dict[str, Node]) -> None:
    """Put a client's span under the framework's span of the same call, where that ended too early to be its parent."""
    flawed = [node for node in nodes.values() if node.record.flaw and node.record.kind == LLM and not node.children]
    for node in flawed:
        record = node.record
        above = {id(node)}
        outer = node.parent
        while outer is not None and id(outer) not in above:
            above.add(id(outer))
            outer = outer.parent
        later = [
            other
            for other in nodes.values()
            if other.record.kind == LLM
            and not other.record.flaw
            and id(other) not in above
            and record.start_ns - SLACK_NS <= other.start_ns <= record.end_ns + SLACK_NS
            and same_call(record, other.record)
            and not (other.parent is not None and other.parent.record.kind == LLM)
        ]
        if later:
            request = min(later, key=_start)
            if request.parent is not None:
                request.parent.children = [child for child in request.parent.children if child is not request]
                request.parent = node
                _adopt(node, request)


def _above_calls(node: Node, parent: Node | None, nodes: dict[str, Node]) -> Node | None:
    """The nearest span at or above `parent` that can have children."""
    passed: set[str] = set()
    while parent is not None and parent.record.kind == CALL and parent.record.id not in passed:
        passed.add(parent.record.id)
        above = nodes.get(parent.record.parent)
        if above is None:
            # The topmost call has no parent to share: both are roots.
            node.record = replace(node.record, parent="")
        parent = above
    # Calls in a circle have nothing above them.
    return None if parent is not None and parent.record.kind == CALL else parent


def preorder(roots: Sequence[Node]) -> list[Node]:
    """Every parent before its children, and siblings in the order of their start."""
    order: list[Node] = []
    stack = sorted(roots, key=_start, reverse=True)
    while stack:
        node = stack.pop()
        order.append(node)
        children = node.children
        if children:
            depth = node.depth + 1
            for child in children:
                child.depth = depth
            stack += sorted(children, key=_start, reverse=True) if len(children) > 1 else children
    return order


_start = attrgetter("start_ns")


def let_go(nodes: Iterable[Node]) -> None:
    """Undo what makes circles of references, so that nodes go away."""
    for node in nodes:
        node.parent = None
        if node.children:
            node.children = ()
        if node.absorbed:
            node.absorbed = None
