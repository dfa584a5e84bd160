"""OTLP in its JSON encoding: export requests, as the Collector's file exporter writes them line by line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from scepsy.traces.dialects import WANTED
from scepsy.traces.records import Event, RawSpan, Tally, process_of

BROKEN: Final = "spans that are not in OTLP's form"

_HAS_IS_REMOTE = 0x100
_IS_REMOTE = 0x200
NOT_REMOTE: Final = 0x1FF
"""Flags up to here have no bit that says that the parent is remote."""
_LATEST_NS = 1 << 64
_STATUS_ERROR = (2, "STATUS_CODE_ERROR")


def recognises(value: object) -> bool:
    """Whether a parsed JSON value is an export request with spans."""
    return isinstance(value, dict) and "resourceSpans" in value


def spans(request: Mapping[str, Any], tally: Tally) -> Iterator[RawSpan]:
    """The spans of one request; what has the wrong shape is counted and passed over."""
    for group in _items(request.get("resourceSpans"), tally):
        resource = _attributes_of(group.get("resource"))
        process = process_of(resource)
        for inner in _items(group.get("scopeSpans") or group.get("instrumentationLibrarySpans"), tally):
            scope = inner.get("scope") or inner.get("instrumentationLibrary")
            library = scope.get("name") if isinstance(scope, dict) else ""
            library = library if isinstance(library, str) else ""
            for span in _items(inner.get("spans"), tally):
                tally.spans += 1
                try:
                    raw = _span(span, library, resource, process)
                except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
                    tally.dropped[BROKEN] += 1
                else:
                    yield raw


def remote_parent(flags: int) -> bool:
    """Whether a span's flags say that its parent belongs to another process."""
    return bool(flags & _HAS_IS_REMOTE and flags & _IS_REMOTE)


def _span(span: Mapping[str, Any], scope: str, resource: Mapping[str, Any], process: str) -> RawSpan:
    trace, own, name, parent = span["traceId"], span["spanId"], span.get("name", ""), span.get("parentSpanId", "")
    if not (type(trace) is type(own) is type(name) is type(parent) is str and trace and own):
        raise TypeError
    start_ns, end_ns = int(span["startTimeUnixNano"]), int(span.get("endTimeUnixNano", 0))
    if not (0 <= start_ns < _LATEST_NS and 0 <= end_ns < _LATEST_NS):
        raise ValueError
    status = span.get("status")
    events = span.get("events")
    return RawSpan(
        trace,
        own,
        parent,
        name,
        start_ns,
        end_ns,
        scope,
        {pair["key"]: _value(pair["value"]) for pair in span.get("attributes", ()) if pair["key"] in WANTED},
        resource,
        status is not None and status.get("code") in _STATUS_ERROR,
        remote_parent(int(span.get("flags", 0))),
        [Event(str(event["name"]), int(event["timeUnixNano"])) for event in events] if events else (),
        process,
    )


def _value(value: Mapping[str, Any]) -> Any:
    """A plain value out of OTLP's AnyValue; None for one that is empty."""
    for kind, content in value.items():
        if kind == "intValue":
            return int(content)
        if kind == "arrayValue":
            return [_value(item) for item in content.get("values", ())]
        if kind == "kvlistValue":
            return {pair["key"]: _value(pair["value"]) for pair in content.get("values", ())}
        return content
    return None


def _attributes_of(resource: object) -> Mapping[str, Any]:
    """The attributes of a resource; none of them if they are broken, for no span should be lost to that."""
    if not isinstance(resource, dict):
        return {}
    try:
        return {pair["key"]: _value(pair["value"]) for pair in resource.get("attributes", ())}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _items(values: object, tally: Tally) -> Iterator[dict[str, Any]]:
    if values is None:
        return
    if not isinstance(values, list):
        tally.dropped[BROKEN] += 1
        return
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            tally.dropped[BROKEN] += 1
