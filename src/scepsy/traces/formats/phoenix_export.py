"""Exports of Phoenix: spans as its API gives them, or rows of the data frame that its client saves.

A row has the keys of a data frame ("context.trace_id", "attributes.llm.model_name"), a span of the API the same things
nested. Both are brought into the names of OpenInference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from scepsy.traces.records import Event, RawSpan, Tally
from scepsy.traces.times import parse_time_ns

BROKEN: Final = "spans that are not in Phoenix's form"

_ATTRIBUTES = "attributes."


def recognises(value: object) -> bool:
    """Whether a parsed JSON value, or a row of a table, is a span of Phoenix."""
    if not isinstance(value, dict):
        return False
    context = value.get("context")
    return "context.trace_id" in value or (isinstance(context, dict) and "trace_id" in context)


def spans(span: Mapping[str, Any], tally: Tally) -> Iterator[RawSpan]:
    """The span, if it is whole."""
    tally.spans += 1
    context = span.get("context")
    nested = context if isinstance(context, dict) else {}
    trace = span.get("context.trace_id") or nested.get("trace_id")
    own = span.get("context.span_id") or nested.get("span_id")
    start_ns = _time_ns(span.get("start_time"))
    if not (isinstance(trace, str) and isinstance(own, str) and start_ns):
        tally.dropped[BROKEN] += 1
        return
    attributes: dict[str, Any] = {}
    _flatten("", span.get("attributes"), attributes)
    for key, value in span.items():
        if key.startswith(_ATTRIBUTES) and value is not None:
            _flatten(key.removeprefix(_ATTRIBUTES), value, attributes)
    attributes.setdefault("openinference.span.kind", span.get("span_kind") or "UNKNOWN")
    parent, name = span.get("parent_id"), span.get("name")
    events = span.get("events")
    yield RawSpan(
        trace,
        own,
        parent if isinstance(parent, str) else "",
        name if isinstance(name, str) else "",
        start_ns,
        _time_ns(span.get("end_time")),
        "phoenix-export",
        attributes,
        {},
        failed=span.get("status_code") == "ERROR",
        events=[
            Event(str(event.get("name")), _time_ns(event.get("timestamp")))
            for event in (events if isinstance(events, list) else ())
            if isinstance(event, dict)
        ],
    )


def _flatten(prefix: str, value: object, into: dict[str, Any]) -> None:
    """Nested attributes under dotted names. A few levels are all that conventions have."""
    stack = [(prefix, value)]
    while stack:
        name, inner = stack.pop()
        if isinstance(inner, dict):
            stack.extend((f"{name}.{key}" if name else str(key), part) for key, part in inner.items())
        elif name and inner is not None:
            into[name] = inner


def _time_ns(value: object) -> int:
    """A time as text, as a moment, or as milliseconds since the epoch, which is how data frames become JSON."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e13:
        return round(value * 1e6)
    return parse_time_ns(value)
