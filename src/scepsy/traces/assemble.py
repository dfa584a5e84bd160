"""The records of one trace become one execution.

Who counts as a call: the innermost LLM span. An LLM span around another one is a wrapper (a framework's span around its
client's), and the request or engine span below one is detail; both lend what the call itself does not tell, and go.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace as replace_fields
from typing import Final

import msgspec
from msgspec.structs import replace

from scepsy.traces.records import (
    CALL,
    CALL_LIKE,
    FAILED,
    FROM_CACHE,
    INTERRUPTED,
    LLM,
    OK,
    SERVER,
    STEP,
    TRANSPORT,
    WORKFLOW,
    Counts,
    SpanRecord,
    Tally,
)
from scepsy.traces.tree import Node, let_go, link, make_nodes, preorder, reunite_streams
from scepsy_optimizer.executions import Call, Execution, Span

NO_ROOT: Final = "executions without their root span (still running, cut off, or sampled out)"
UNENDED_ROOT: Final = "executions whose root span has no end"
FAILED_ROOT: Final = "executions that failed or were cancelled"
STOPPED_ROOT: Final = "executions that were interrupted or whose results nobody read to the end"
FAILED_CALL: Final = "calls that failed or were cancelled (their time stays, as a step)"
STOPPED_CALL: Final = "calls that were abandoned before anything was counted (their time stays, as a step)"
CACHED_CALL: Final = "calls answered from the framework's cache (their time stays, as a step)"
UNENDED_CALL: Final = "calls without an end (their time stays, as a step)"
NAMELESS_CALL: Final = "calls without a model name (their time stays, as a step)"
COPIED_CALL: Final = "calls that another instrumentation recorded too (they count there)"
COPIED_EXECUTION: Final = "executions all of whose calls another instrumentation recorded too"
CIRCLE: Final = "spans in a circle of parents"
LOST_CALL: Final = "calls in executions or circles that were left out"

BACKWARDS: Final = "spans that ended before they started, taken as instants"
UNENDED: Final = "steps without an end, ended with their parent"
SKEWED: Final = "spans moved into their parent on another host, whose clock differs"
UNCOUNTED: Final = "calls without token counts"
FILLED_IN: Final = "calls that lack token counts, taken as the mean of their LLM's other calls"
RETRIED: Final = "calls that begin with their last attempt (the failed ones and the waiting stay, as a gap)"

_STATUS_OF_CALL = {FAILED: FAILED_CALL, INTERRUPTED: STOPPED_CALL, FROM_CACHE: CACHED_CALL}


_LLM_OR_CALL = frozenset({LLM, CALL})
_REQUESTS = frozenset({TRANSPORT, SERVER})


# What becomes a Call and a Span: msgspec makes those from these in half the time that their own constructors take.
class _CallRow(msgspec.Struct, gc=False):
    llm: str
    role: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    time_to_first_token_s: float | None
    queue_s: float | None


class _SpanRow(msgspec.Struct, gc=False):
    id: str
    parent: str | None
    name: str
    kind: str
    start_s: float
    end_s: float
    call: _CallRow | None = None


_SPANS = tuple[Span, ...]

# Below this, what is set aside stays in memory.
_ASIDE_BYTES = 1 << 24
_SIZE_BYTES = 8
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[Execution, dict[str, tuple[bool, bool]]])


def assemble(
    trace: str,
    records: Sequence[SpanRecord],
    *,
    name_llm: Callable[[str, str], str],
    tally: Tally,
    copies: Collection[str] = (),
) -> Execution | None:
    """The execution that the records of `trace` tell of, or None if it is left out; `tally` gets the reason.

    `name_llm` names the LLM that serves a model at an endpoint. `copies` are the ids of spans whose calls another
    instrumentation has recorded too, and which count there.
    """
    nodes = make_nodes(records, tally)
    try:
        return _assembled(trace, nodes, name_llm, tally, copies)
    finally:
        let_go(nodes.values())


def fill_in(executions: Iterable[Execution], tally: Tally) -> Iterator[Execution]:
    """The executions that `tally` counts as they are assembled, with the mean where a call lacks a token count.

    The mean is of the same LLM's calls that tell it, of those in the same role where there are any; what no call of the
    LLM tells stays 0. Executions that lack a count wait for the others, in a file where they are many, and come last.
    """
    with tempfile.SpooledTemporaryFile(_ASIDE_BYTES, prefix="scepsy-uncounted-") as aside:
        for execution in executions:
            if tally.missing:
                content = _encoder.encode((execution, tally.missing))
                aside.write(len(content).to_bytes(_SIZE_BYTES))
                aside.write(content)
            else:
                yield execution
        by_llm: dict[str, Counts] = {}
        for (llm, _), counts in tally.counts.items():
            by_llm.setdefault(llm, Counts()).add(counts)
        aside.seek(0)
        while size := aside.read(_SIZE_BYTES):
            execution, missing = _decoder.decode(aside.read(int.from_bytes(size)))
            spans = tuple(
                replace_fields(span, call=_filled_in(span.call, missing[span.id], by_llm[span.call.llm], tally))
                if span.call is not None and span.id in missing
                else span
                for span in execution.spans
            )
            yield replace_fields(execution, spans=spans)


def _filled_in(call: Call, missing: tuple[bool, bool], of_llm: Counts, tally: Tally) -> Call:
    of_role = tally.counts[call.llm, call.role]
    before = call
    lacks_input, lacks_output = missing
    if lacks_input and of_llm.inputs:
        told = of_role if of_role.inputs else of_llm
        call = replace_fields(
            call,
            input_tokens=round(told.input_tokens / told.inputs),
            cached_tokens=round(told.cached_tokens / told.inputs),
        )
        tally.repaired[UNCOUNTED] -= 1
        if not tally.repaired[UNCOUNTED]:
            del tally.repaired[UNCOUNTED]
    if lacks_output and of_llm.outputs:
        told = of_role if of_role.outputs else of_llm
        call = replace_fields(call, output_tokens=round(told.output_tokens / told.outputs))
    if call is not before:
        tally.repaired[FILLED_IN] += 1
    return call


def _assembled(
    trace: str, nodes: dict[str, Node], name_llm: Callable[[str, str], str], tally: Tally, copies: Collection[str]
) -> Execution | None:
    roots, strays = link(nodes, tally)
    reason = _why_not(roots)
    roots += strays
    if reason:
        roots = [node for node in nodes.values() if node.parent is None]
    else:
        reunite_streams(nodes)
    order = preorder(roots)
    nested = _find_calls(order)
    if len(order) < len(nodes):
        reached = {node.record.id for node in order}
        circling = [node for node in nodes.values() if node.record.id not in reached]
        tally.drop(CIRCLE, len(circling))
        tally.drop(LOST_CALL, sum(node.record.kind in CALL_LIKE for node in circling))
    if nested:
        for node in order:
            if node.call:
                _lend_wrappers(node)
    if copies and _leave_out(copies, order, tally):
        tally.drop(COPIED_EXECUTION)
        return None
    if reason:
        tally.drop(reason)
        tally.drop(LOST_CALL, sum(node.call for node in order))
        return None
    _mend_times(order, tally)
    return _execution(trace, roots, order, name_llm, tally)


def _why_not(roots: Sequence[Node]) -> str:
    """Why an execution with these roots is left out; empty if it is not."""
    if not roots:
        return NO_ROOT
    if any(root.end_ns <= 0 for root in roots):
        return UNENDED_ROOT
    ended = [root.record.status for root in roots if root.record.kind not in CALL_LIKE and root.record.status != OK]
    if ended:
        return FAILED_ROOT if ended[0] == FAILED else STOPPED_ROOT
    return ""


def _mend_times(order: Sequence[Node], tally: Tally) -> None:
    """Give every span an interval that makes sense beside its parent's."""
    moved_ns: dict[str, int] = {}
    for node in order:
        record, parent = node.record, node.parent
        if 0 < node.end_ns >= node.start_ns and not moved_ns and not record.remote_parent:
            continue
        shift_ns = moved_ns.get(parent.record.id, 0) if parent is not None else 0
        if parent is not None and node.end_ns <= 0:
            node.end_ns = max(parent.end_ns - shift_ns, node.start_ns)
            if record.kind not in CALL_LIKE:
                tally.repaired[UNENDED] += 1
        elif node.end_ns < node.start_ns:
            tally.repaired[BACKWARDS] += 1
            node.end_ns = node.start_ns
        node.start_ns += shift_ns
        node.end_ns += shift_ns
        if parent is not None and record.remote_parent and record.kind != SERVER:
            inside = parent.start_ns <= node.start_ns and node.end_ns <= parent.end_ns
            slack_ns = (parent.end_ns - parent.start_ns) - (node.end_ns - node.start_ns)
            if not inside and slack_ns >= 0:
                # Its clock is off by an unknown amount: request and answer are taken to travel equally long.
                tally.repaired[SKEWED] += 1
                extra_ns = parent.start_ns + slack_ns // 2 - node.start_ns
                node.start_ns += extra_ns
                node.end_ns += extra_ns
                shift_ns += extra_ns
        if shift_ns:
            moved_ns[record.id] = shift_ns


def _find_calls(order: Sequence[Node]) -> bool:
    """Mark the calls, the wrappers that go, and the details that calls absorb; whether there are any of these two."""
    if not any(node.children and node.record.kind in CALL_LIKE for node in order):
        for node in order:
            node.above = node.parent
            node.call = node.record.kind in CALL_LIKE
        return False
    for node in reversed(order):
        if node.parent is not None and (node.calls_below or node.record.kind in _LLM_OR_CALL):
            node.parent.calls_below += node.calls_below or 1
    for node in order:
        kind, parent = node.record.kind, node.parent
        if parent is not None:
            node.above = parent.above if parent.gone else parent
            if parent.absorbed is not None:
                node.absorbed = parent.absorbed
                node.gone = True
                if kind in CALL_LIKE:
                    node.absorbed.lent += (node.record,)
                continue
        if kind not in CALL_LIKE:
            continue
        if node.calls_below:
            node.gone = node.calls_below == 1 and _wraps_directly(node)
        elif kind in _REQUESTS and parent is not None and parent.gone:
            node.gone = True
        else:
            node.call = True
            node.absorbed = node
    return True


def _leave_out(copies: Collection[str], order: Sequence[Node], tally: Tally) -> bool:
    """Take copies of calls out of an execution; whether no call of its own is left."""
    left = 0
    for node in order:
        if node.call and any(record.id in copies for record in (node.record, *node.lent)):
            tally.drop(COPIED_CALL)
            node.call = False
            node.gone = True
        left += node.call
    return not left


def _wraps_directly(node: Node) -> bool:
    """Whether nothing but LLM spans lies between this one and the only call below it."""
    while node.calls_below:
        found = [child for child in node.children if child.calls_below or child.record.kind in _LLM_OR_CALL]
        if found[0].record.kind not in CALL_LIKE:
            return False
        node = found[0]
    return True


def _execution(
    trace: str, roots: Sequence[Node], order: Sequence[Node], name_llm: Callable[[str, str], str], tally: Tally
) -> Execution:
    workflow = _workflow_name(order)
    tops = [node for node in order if node.above is None and not node.gone]
    start_ns = min(root.start_ns for root in roots)
    rows: list[_SpanRow] = []
    above = None
    if tally.missing:
        tally.missing = {}
    if len(tops) != 1 or tops[0].call:
        end_ns = max(root.end_ns for root in roots)
        above = "root" if all(node.record.id != "root" for node in order) else f"root of {trace}"
        rows.append(_SpanRow(above, None, workflow, WORKFLOW, 0.0, (end_ns - start_ns) / 1e9))
    for node in order:
        if node.gone:
            continue
        parent, record = node.above, node.record
        call = _call(node, name_llm, tally) if node.call else None
        kind = record.kind
        rows.append(
            _SpanRow(
                record.id,
                above if parent is None else parent.record.id,
                record.name,
                LLM if call is not None else STEP if kind in CALL_LIKE else kind,
                (node.start_ns - start_ns) / 1e9,
                (node.end_ns - start_ns) / 1e9,
                call,
            )
        )
    spans: tuple[Span, ...] = msgspec.convert(rows, _SPANS, from_attributes=True)
    return Execution(id=trace, workflow=workflow, spans=spans, started_ns=start_ns)


def _workflow_name(order: Sequence[Node]) -> str:
    """The name that a span gives the workflow, else the outermost workflow span's, else the root's."""
    best: tuple[int, int] | None = None
    name = ""
    for node in order:
        if (best is None or node.depth < best[0]) and (node.record.workflow or node.record.kind == WORKFLOW):
            given = node.record.workflow or node.record.label
            if given:
                best, name = (node.depth, node.start_ns), given
                if not node.depth:
                    break
    return name or order[0].record.label or order[0].record.name


def _lend_wrappers(call: Node) -> None:
    """Add what the spans around a call tell of it, and the requests beside it, to what it may complete itself from."""
    above = call.parent
    while above is not None and above.record.kind in CALL_LIKE:
        if above.gone:
            beside = (child.record for child in above.children if child.gone and child.record.kind in _REQUESTS)
            call.lent += (above.record, *beside)
        else:
            # It stands around several calls: its counts and times are theirs together.
            told = replace(
                above.record, input_tokens=None, output_tokens=None, cached_tokens=None, time_to_first_token_s=None
            )
            call.lent += (told,)
        above = above.parent


def _call(node: Node, name_llm: Callable[[str, str], str], tally: Tally) -> _CallRow | None:
    record = node.record
    if record.status != OK:
        tally.dropped[_STATUS_OF_CALL[record.status]] += 1
        return None
    if record.end_ns <= 0:
        tally.dropped[UNENDED_CALL] += 1
        return None
    for other in node.lent:
        record = _completed(record, other)
    if not record.model:
        tally.dropped[NAMELESS_CALL] += 1
        return None
    if node.record.flaw:
        tally.repaired[node.record.flaw] += 1
    if record.lost_s:
        tally.repaired[RETRIED] += 1
        node.start_ns = min(node.start_ns + int(record.lost_s * 1e9), node.end_ns)
    llm, role = name_llm(record.model, record.endpoint), record.role or _role(node)
    input_tokens, cached_tokens, output_tokens = _counted(node.record.id, llm, role, record, tally)
    return _CallRow(llm, role, input_tokens, output_tokens, cached_tokens, record.time_to_first_token_s, record.queue_s)


def _counted(span: str, llm: str, role: str, record: SpanRecord, tally: Tally) -> tuple[int, int, int]:
    """The tokens of a call's input, those of it that were cached, and of its output: 0 where they are not told."""
    input_tokens, output_tokens = record.input_tokens or 0, record.output_tokens
    cached_tokens = min(record.cached_tokens or 0, input_tokens)
    counts = tally.counts.get((llm, role))
    if counts is None:
        counts = tally.counts[llm, role] = Counts()
    # No engine is asked for nothing: an input of 0 tokens is how some say that they do not know.
    if input_tokens:
        counts.inputs += 1
        counts.input_tokens += input_tokens
        counts.cached_tokens += cached_tokens
    else:
        tally.repaired[UNCOUNTED] += 1
    if output_tokens is not None and (input_tokens or output_tokens):
        counts.outputs += 1
        counts.output_tokens += output_tokens
    else:
        output_tokens = None
    if not input_tokens or output_tokens is None:
        tally.missing[span] = (not input_tokens, output_tokens is None)
    return input_tokens, cached_tokens, output_tokens or 0


def _completed(record: SpanRecord, other: SpanRecord) -> SpanRecord:
    """The record with what it does not tell taken from another one."""
    # Output of 0 beside a count elsewhere is a stream whose usage only the other one saw.
    return replace(
        record,
        model=record.model or other.model,
        endpoint=record.endpoint or other.endpoint,
        role=record.role or other.role,
        input_tokens=record.input_tokens or other.input_tokens or record.input_tokens,
        output_tokens=record.output_tokens or other.output_tokens or record.output_tokens,
        cached_tokens=record.cached_tokens or other.cached_tokens or record.cached_tokens,
        time_to_first_token_s=_first(record.time_to_first_token_s, other.time_to_first_token_s),
        queue_s=_first(record.queue_s, other.queue_s),
        lost_s=record.lost_s or other.lost_s,
    )


def _first(one: float | None, other: float | None) -> float | None:
    return other if one is None else one


def _role(node: Node) -> str:
    """The name of the nearest agent, tool or step above."""
    above = node.parent
    while above is not None:
        if above.record.label:
            return above.record.label
        above = above.parent
    return ""
