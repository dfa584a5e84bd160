"""Exports of Jaeger: the JSON of its interface and of its API, `{"data": [trace, ...]}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from scepsy.traces.records import Event, RawSpan, Tally

BROKEN: Final = "spans that are not in Jaeger's form"

_LATEST_NS = 1 << 64


def recognises(value: object) -> bool:
    """Whether a parsed JSON value is a trace of Jaeger."""
    return isinstance(value, dict) and "traceID" in value and isinstance(value.get("spans"), list)


def spans(trace: Mapping[str, Any], tally: Tally) -> Iterator[RawSpan]:
    """The spans of one trace; times in Jaeger are microseconds."""
    processes = trace.get("processes")
    processes = processes if isinstance(processes, dict) else {}
    for span in trace["spans"]:
        tally.spans += 1
        try:
            raw = _span(span, processes)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            tally.dropped[BROKEN] += 1
        else:
            yield raw


def _span(span: Mapping[str, Any], processes: Mapping[str, Any]) -> RawSpan:
    trace, own, name = span["traceID"], span["spanID"], span["operationName"]
    if not (isinstance(trace, str) and isinstance(own, str) and isinstance(name, str) and trace and own):
        raise TypeError
    attributes = {tag["key"]: tag["value"] for tag in span.get("tags") or ()}
    parents = [
        reference["spanID"]
        for reference in span.get("references") or ()
        if reference["refType"] == "CHILD_OF" and reference["traceID"] == trace
    ]
    parent = parents[0] if parents else ""
    process = span.get("process") or processes.get(str(span.get("processID"))) or {}
    resource = {tag["key"]: tag["value"] for tag in process.get("tags") or ()}
    start_ns = int(span["startTime"]) * 1000
    end_ns = start_ns + int(span["duration"]) * 1000
    if not (0 <= start_ns < _LATEST_NS and 0 <= end_ns < _LATEST_NS):
        raise ValueError
    return RawSpan(
        trace,
        own,
        parent if isinstance(parent, str) else "",
        name,
        start_ns,
        end_ns,
        str(attributes.get("otel.scope.name") or attributes.get("otel.library.name") or ""),
        attributes,
        resource | {"service.name": process.get("serviceName")},
        failed=attributes.get("otel.status_code") == "ERROR" or attributes.get("error") in (True, "true"),
        events=[event for log in span.get("logs") or () for event in _events(log)],
    )


def _events(log: Mapping[str, Any]) -> Iterator[Event]:
    for field in log["fields"]:
        if field["key"] == "event":
            yield Event(str(field["value"]), int(log["timestamp"]) * 1000)
