"""OTLP/JSON lines of the form that they should have, decoded to just what is looked at.

The same spans as `otlp_json` reads, several times as fast: most of a line is never made into objects. A line that
deviates in any type is left to `otlp_json`, which finds what is usable in it span by span.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from scepsy.traces.dialects import WANTED
from scepsy.traces.formats.otlp_json import BROKEN, NOT_REMOTE, remote_parent
from scepsy.traces.records import Event, RawSpan, Tally, process_of

# Fields have the names of OTLP's JSON encoding, which are not ours to choose.
# ruff: noqa: N815


class _Value(msgspec.Struct, gc=False):
    """AnyValue; lists and maps are none of what any dialect looks at."""

    stringValue: str | None = None
    intValue: int | None = None
    doubleValue: float | None = None
    boolValue: bool | None = None


class _Attribute(msgspec.Struct, gc=False):
    key: str
    value: _Value


class _Status(msgspec.Struct, gc=False):
    code: int | str = 0


class _Event(msgspec.Struct, gc=False):
    name: str
    timeUnixNano: int


_Time = Annotated[int, msgspec.Meta(ge=0)]


class _Span(msgspec.Struct, gc=False):
    traceId: str
    spanId: str
    startTimeUnixNano: _Time
    endTimeUnixNano: _Time = 0
    parentSpanId: str = ""
    name: str = ""
    flags: int = 0
    attributes: list[_Attribute] = []
    events: list[_Event] = []
    status: _Status | None = None


class _Scope(msgspec.Struct, gc=False):
    name: str = ""


class _ScopeSpans(msgspec.Struct, gc=False):
    scope: _Scope | None = None
    spans: list[_Span] = []


class _Resource(msgspec.Struct, gc=False):
    attributes: list[_Attribute] = []


class _ResourceSpans(msgspec.Struct, gc=False):
    scopeSpans: list[_ScopeSpans]
    resource: _Resource | None = None


class _Request(msgspec.Struct, gc=False):
    resourceSpans: list[_ResourceSpans]


# 64-bit integers are text in protobuf's JSON; a lax decoder takes them either way.
_decoder = msgspec.json.Decoder(_Request, strict=False)
_STATUS_ERROR = (2, "STATUS_CODE_ERROR")


def spans(line: bytes, tally: Tally) -> list[RawSpan] | None:
    """The spans of the request in a line, or None if it is not exactly one."""
    try:
        request = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    wanted = WANTED
    found: list[RawSpan] = []
    for group in request.resourceSpans:
        resource = {} if group.resource is None else _plain(group.resource.attributes)
        process = process_of(resource)
        for inner in group.scopeSpans:
            scope = "" if inner.scope is None else inner.scope.name
            tally.spans += len(inner.spans)
            for span in inner.spans:
                if not span.traceId or not span.spanId:
                    tally.dropped[BROKEN] += 1
                    continue
                status = span.status
                attributes: dict[str, Any] = {}
                for pair in span.attributes:
                    key = pair.key
                    if key in wanted:
                        value = pair.value
                        told: Any = value.stringValue
                        if told is None:
                            told = value.intValue
                            if told is None:
                                told = value.boolValue if value.doubleValue is None else value.doubleValue
                        attributes[key] = told
                found.append(
                    RawSpan(
                        span.traceId,
                        span.spanId,
                        span.parentSpanId,
                        span.name,
                        span.startTimeUnixNano,
                        span.endTimeUnixNano,
                        scope,
                        attributes,
                        resource,
                        status is not None and bool(status.code) and status.code in _STATUS_ERROR,
                        span.flags > NOT_REMOTE and remote_parent(span.flags),
                        [Event(event.name, event.timeUnixNano) for event in span.events] if span.events else (),
                        process,
                    )
                )
    return found


def _plain(pairs: list[_Attribute]) -> dict[str, Any]:
    return {
        pair.key: pair.value.intValue if pair.value.stringValue is None else pair.value.stringValue for pair in pairs
    }
