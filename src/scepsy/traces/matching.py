"""Requests that lie in a trace of their own, brought back to the call that made them.

Some instrumentations lose the way between a framework's span and its client's request, and engines that got no trace
context start a trace for each request. Such a request belongs to the call of the same model that has its response id,
or around whose interval and with whose tokens it lies.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from scepsy.traces.records import LLM, SpanRecord

SLACK_NS = 5_000_000
_LONGEST_SEARCH = 1000


def match(detached: Sequence[SpanRecord], calls: Iterable[SpanRecord]) -> dict[tuple[str, str], SpanRecord]:
    """For (trace, span id) of a detached record: the call that it belongs to, where there is one; one for each.

    `calls` are all LLM records that lie in traces with something around them.
    """
    by_response: dict[str, SpanRecord] = {}
    timed: list[SpanRecord] = []
    for record in detached:
        if record.response_id:
            by_response[engine_id(record.response_id)] = record
        if record.kind == LLM:
            timed.append(record)
    timed.sort(key=lambda record: record.start_ns)
    starts = [record.start_ns for record in timed]
    found: dict[tuple[str, str], SpanRecord] = {}
    for call in sorted(calls, key=lambda record: record.start_ns):
        request = by_response.get(engine_id(call.response_id)) if call.response_id else None
        if request is None or (request.trace, request.id) in found:
            request = _timed(call, timed, starts, found)
        if request is not None:
            found[request.trace, request.id] = call
    return found


def _timed(
    call: SpanRecord, timed: Sequence[SpanRecord], starts: Sequence[int], found: dict[tuple[str, str], SpanRecord]
) -> SpanRecord | None:
    """The first request not yet matched that the call may have made."""
    begin = bisect_left(starts, call.start_ns - SLACK_NS)
    for request in timed[begin : begin + _LONGEST_SEARCH]:
        if request.start_ns > call.end_ns + SLACK_NS:
            return None
        if (request.trace, request.id) in found or request.trace == call.trace:
            continue
        # A call that was recorded as ending too early still begins with its request and has its first token inside.
        inside = request.end_ns <= call.end_ns + SLACK_NS or bool(call.flaw)
        if inside and same_call(call, request):
            return request
    return None


def same_call(call: SpanRecord, request: SpanRecord) -> bool:
    """Whether neither model nor counts speak against them being one."""
    if call.model and request.model and call.model != request.model:
        return False
    pairs = ((call.input_tokens, request.input_tokens), (call.output_tokens, request.output_tokens))
    return all(one is None or other is None or one == other for one, other in pairs)


def engine_id(response_id: str) -> str:
    """A response's id as client and engine both know it: without the index that vLLM appends to completions."""
    head, dash, tail = response_id.rpartition("-")
    return head if dash and tail == "0" else response_id


def attached(record: SpanRecord, call: SpanRecord, trace: str) -> SpanRecord:
    """The detached record as a span below its call, which lies in `trace`."""
    return replace(record, trace=trace, parent=call.id, detached=False, remote_parent=False)
