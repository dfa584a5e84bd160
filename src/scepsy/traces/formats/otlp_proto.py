"""OTLP in its protobuf encoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from scepsy.traces.dialects import WANTED
from scepsy.traces.formats.otlp_json import remote_parent
from scepsy.traces.records import Event, RawSpan, Tally
from scepsy_optimizer.errors import ScepsyError

NOT_REQUESTS: Final = "messages that are not OTLP trace requests"

_STATUS_ERROR = 2


def spans(message: bytes, tally: Tally) -> Iterator[RawSpan]:
    """The spans of one encoded request. Raises ScepsyError where the decoder is not installed."""
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # ships no types
        from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
    except ImportError as error:
        raise ScepsyError(
            "reading OTLP protobuf needs a decoder; install it with: pip install 'scepsy[traces]'"
        ) from error
    # ExportTraceServiceRequest and TracesData have the same encoding: field 1 holds the resource spans.
    data = TracesData()
    try:
        data.ParseFromString(message)
    except DecodeError:
        tally.dropped[NOT_REQUESTS] += 1
        return
    wanted = WANTED
    for group in data.resource_spans:
        resource = {pair.key: _value(pair.value) for pair in group.resource.attributes}
        for inner in group.scope_spans:
            scope = inner.scope.name
            tally.spans += len(inner.spans)
            for span in inner.spans:
                attributes = {}
                for pair in span.attributes:
                    key = pair.key
                    if key in wanted:
                        # Most are text: to ask which kind a value has takes longer than to look.
                        attributes[key] = pair.value.string_value or _value(pair.value)
                events = span.events
                yield RawSpan(
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.name,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    scope,
                    attributes,
                    resource,
                    span.HasField("status") and span.status.code == _STATUS_ERROR,
                    remote_parent(span.flags),
                    [Event(event.name, event.time_unix_nano) for event in events] if events else (),
                )


def _value(value: Any) -> Any:
    """A plain value out of OTLP's AnyValue; None for one that is empty."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return {pair.key: _value(pair.value) for pair in value.kvlist_value.values}
    return None if kind is None else getattr(value, kind)
