"""OTLP in its protobuf encoding.

Google's decoder is fast; to make Python objects of each attribute is not. So it gets a description of OTLP in which the
attributes of spans are plain bytes. Most are the same bytes in very many spans, and are taken apart once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final

from scepsy.traces.dialects import WANTED
from scepsy.traces.formats.otlp_json import NOT_REMOTE, remote_parent
from scepsy.traces.records import Event, RawSpan, Tally, process_of
from scepsy_optimizer.errors import ScepsyError

NOT_REQUESTS: Final = "messages that are not OTLP trace requests"
BROKEN_ATTRIBUTE: Final = "attributes that are not in OTLP's form"

_STATUS_ERROR = 2
_MOST_KNOWN = 20_000
_LONGEST_KNOWN = 256

_Told = tuple[str, Any] | None


def spans(message: bytes, tally: Tally) -> Iterator[RawSpan]:
    """The spans of one encoded request. Raises ScepsyError where the decoder is not installed."""
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # ships no types

        decode, attribute = _decoders()
    except ImportError as error:
        raise ScepsyError(
            "reading OTLP protobuf needs a decoder; install it with: pip install 'scepsy[traces]'"
        ) from error
    try:
        data = decode(message)
    except DecodeError:
        tally.dropped[NOT_REQUESTS] += 1
        return
    known = _known
    for group in data.resource_spans:
        resource = {pair.key: _value(pair.value) for pair in group.resource.attributes}
        process = process_of(resource)
        for inner in group.scope_spans:
            scope = inner.scope.name
            tally.spans += len(inner.spans)
            for span in inner.spans:
                attributes = {}
                for encoded in span.attributes:
                    try:
                        told = known[encoded]
                    except KeyError:
                        try:
                            told = _take_apart(encoded, attribute)
                        except DecodeError:
                            tally.dropped[BROKEN_ATTRIBUTE] += 1
                            continue
                    if told is not None:
                        attributes[told[0]] = told[1]
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
                    (flags := span.flags) > NOT_REMOTE and remote_parent(flags),
                    [Event(event.name, event.time_unix_nano) for event in events] if events else (),
                    process,
                )


@cache
def _decoders() -> tuple[Callable[[bytes], Any], Callable[[bytes], Any]]:
    """Decoders of a request, whose spans have their attributes in bytes, and of such an attribute."""
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto  # type: ignore[import-untyped]
    from google.protobuf.descriptor_pool import DescriptorPool  # type: ignore[import-untyped]
    from google.protobuf.message_factory import GetMessageClass  # type: ignore[import-untyped]
    from opentelemetry.proto.common.v1 import common_pb2
    from opentelemetry.proto.resource.v1 import resource_pb2
    from opentelemetry.proto.trace.v1 import trace_pb2

    pool = DescriptorPool()
    for module in (common_pb2, resource_pb2, trace_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        for kind in file.message_type:
            if kind.name == "Span":
                (attributes,) = (field for field in kind.field if field.name == "attributes")
                attributes.type = FieldDescriptorProto.TYPE_BYTES
                attributes.ClearField("type_name")
        pool.Add(file)
    # ExportTraceServiceRequest and TracesData have the same encoding: field 1 holds the resource spans.
    request = GetMessageClass(pool.FindMessageTypeByName("opentelemetry.proto.trace.v1.TracesData"))
    return request.FromString, common_pb2.KeyValue.FromString


_known: dict[bytes, _Told] = {}
_names = {key: key for key in WANTED}


def _take_apart(encoded: bytes, decode: Callable[[bytes], Any]) -> _Told:
    """An attribute's key and value, None for one that nobody wants."""
    pair = decode(encoded)
    name = _names.get(pair.key)
    # Most are text: to ask which kind a value has takes longer than to look.
    told = None if name is None else (name, pair.value.string_value or _value(pair.value))
    if len(encoded) <= _LONGEST_KNOWN:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[encoded] = told
    return told


def _value(value: Any) -> Any:
    """A plain value out of OTLP's AnyValue; None for one that is empty."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return {pair.key: _value(pair.value) for pair in value.kvlist_value.values}
    return None if kind is None else getattr(value, kind)
