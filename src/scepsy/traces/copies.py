"""Calls that two instrumentations of one process have recorded, each in spans of its own.

Nothing in the spans says so. Two that overlap are one call if different libraries made them in one process and they
have the same response id; or, where that is not known of both, the same model and counts, and one interval lies around
the other. Each library can have seen a call only once, so spans are matched one to one: of calls that truly ran at once
every one stays. Scepsy's own spans stay, else those of the library that saw more; the others are the copies.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TypeVar

from msgspec.structs import replace

from scepsy.traces.matching import SLACK_NS, engine_id, same_call
from scepsy.traces.records import LLM, SpanRecord
from scepsy.traces.spool import Spool

_OWN = "scepsy"
_BUCKET_NS = 1_000_000_000
# A framework's span begins before its client's, by what it does between: on a busy machine that takes long.
_EARLIER_NS = 1_000_000_000
_LONGEST_SEARCH = 500

T = TypeVar("T", str, int)
_Place = tuple[str, str]


def find_copies(traces: Iterable[tuple[str, Sequence[SpanRecord]]]) -> Mapping[str, frozenset[str]]:
    """For each trace with copies of calls in it, their span ids. `traces` are all records, by trace.

    Memory grows with the number of copies, not with that of spans.
    """
    seen: Counter[str] = Counter()
    with Spool() as sightings:
        for _, records in traces:
            for call in _innermost(records):
                seen[call.scope] += 1
                sightings.add(_by_what_copies_share(call))
        ranked = sorted(seen, key=lambda scope: (scope != _OWN, -seen[scope], scope))
        copies: set[_Place] = set()
        originals: dict[_Place, set[str]] = defaultdict(set)
        for _, alike in sightings.traces():
            if len(alike) > 1:
                _match(alike, ranked, copies, originals)
    found: dict[str, set[str]] = defaultdict(set)
    for trace, own in copies:
        found[trace].add(own)
    return {trace: frozenset(ids) for trace, ids in found.items()}


def _innermost(records: Sequence[SpanRecord]) -> Iterator[SpanRecord]:
    """The LLM spans below which there is no other, with the counts and response ids of those around them."""
    calls = {record.id: record for record in records if record.kind == LLM}
    outer = {record.parent for record in calls.values()}
    for call in calls.values():
        if call.id in outer:
            continue
        around: dict[str, SpanRecord] = {}
        above = calls.get(call.parent)
        while above is not None and above.id not in around:
            around[above.id] = above
            above = calls.get(above.parent)
        yield replace(
            call,
            model=_first(call.model, *(outer.model for outer in around.values())) or "",
            response_id=_first(call.response_id, *(outer.response_id for outer in around.values())) or "",
            input_tokens=_first(call.input_tokens, *(outer.input_tokens for outer in around.values())),
            output_tokens=_first(call.output_tokens, *(outer.output_tokens for outer in around.values())),
        )


def _first(*told: T | None) -> T | None:
    return next((one for one in told if one not in (None, "")), None)


def _by_what_copies_share(call: SpanRecord) -> list[SpanRecord]:
    """The call under each key that a copy of it may have too, in place of its trace, which becomes its parent."""
    keys = {f"{call.model} {(call.start_ns + ahead) // _BUCKET_NS}" for ahead in (0, _EARLIER_NS)}
    if call.response_id:
        keys.add(engine_id(call.response_id))
    return [replace(call, trace=key, parent=call.trace) for key in sorted(keys)]


def _match(
    alike: Sequence[SpanRecord], ranked: Sequence[str], copies: set[_Place], originals: dict[_Place, set[str]]
) -> None:
    """Add to `copies` the spans that copy others among these, and to `originals` which scopes copied a span."""
    by_scope: dict[str, list[SpanRecord]] = defaultdict(list)
    for call in sorted(alike, key=_start):
        by_scope[call.scope].append(call)
    kept: list[SpanRecord] = []
    for scope in sorted(by_scope, key=ranked.index):
        for call in by_scope[scope]:
            if _place(call) in copies:
                continue
            middle = bisect_left(kept, call.start_ns, key=_start)
            near = kept[max(0, middle - _LONGEST_SEARCH) : middle + _LONGEST_SEARCH]
            for other in near:
                if scope not in originals.get(_place(other), ()) and _is_copy(call, other):
                    copies.add(_place(call))
                    originals[_place(other)].add(scope)
                    break
        kept += [call for call in by_scope[scope] if _place(call) not in copies]
        kept.sort(key=_start)


_start = attrgetter("start_ns")
_place = attrgetter("parent", "id")


def _is_copy(one: SpanRecord, other: SpanRecord) -> bool:
    if one.process and other.process and one.process != other.process:
        return False
    if one.start_ns > other.end_ns + SLACK_NS or other.start_ns > one.end_ns + SLACK_NS:
        return False
    if one.response_id and other.response_id:
        return engine_id(one.response_id) == engine_id(other.response_id)
    if not same_call(one, other) or one.status != other.status:
        return False
    begins, ends = one.start_ns - other.start_ns, one.end_ns - other.end_ns
    if abs(begins) <= SLACK_NS and abs(ends) <= SLACK_NS:
        return True
    counted = None not in (one.input_tokens, other.input_tokens, one.output_tokens, other.output_tokens)
    around = (begins <= SLACK_NS and ends >= -SLACK_NS) or (begins >= -SLACK_NS and ends <= SLACK_NS)
    return counted and around and abs(begins) <= _EARLIER_NS
