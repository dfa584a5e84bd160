"""OTLP requests in both encodings, as lines of OTLP/JSON without anybody's prompts."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import orjson

from scepsy_optimizer.errors import ScepsyError

PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"
_LARGEST_BYTES: Final = 64 << 20
_LONGEST_TEXT: Final = 8192

# Where the usual instrumentations put prompts and answers. Nothing that is read later lies there.
_CONTENT: Final = re.compile(
    r"""gen_ai\.(?:prompt|completion|input\.messages|output\.messages|system_instructions|tool\.call\.(?:arguments|result)
        |tool\.definitions|request\.messages|content)(?:\.|$)
    |llm\.(?:prompts|input_messages|output_messages|prompt_template|function_call|tools|invocation_parameters)(?:\.|$)
    |(?:input|output)\.value$
    |(?:retrieval|reranker|embedding|document)\..*(?:content|documents|text|embedding)
    |traceloop\.entity\.(?:input|output)$
    |(?:exception\.stacktrace|tool\.parameters|metadata)$""",
    re.VERBOSE,
)


class EncodingError(Exception):
    """A request that is not OTLP."""


def inflate(body: bytes, encoding: str) -> bytes:
    """The body without its content encoding, "" or "gzip". Raises EncodingError."""
    if encoding in ("", "identity"):
        return body
    if encoding != "gzip":
        raise EncodingError(f"content encoding {encoding!r} is not understood; use gzip or none")
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        plain = stream.decompress(body, _LARGEST_BYTES)
    except zlib.error as error:
        raise EncodingError(f"the body is not gzip: {error}") from error
    if stream.unconsumed_tail or not stream.eof:
        raise EncodingError("the body is cut off, or too large once it is unpacked")
    return plain


def to_line(body: bytes, content_type: str, *, keep_content: bool) -> tuple[bytes, int]:
    """An export request as a line of OTLP/JSON, and how many spans it has. Raises EncodingError or ScepsyError.

    Unless `keep_content`, attributes that hold prompts and answers are left out, and so are all very long texts.
    """
    request = _from_json(body) if content_type == JSON else _from_protobuf(body)
    spans = 0
    for group in request["resourceSpans"]:
        for inner in group.get("scopeSpans", ()):
            for span in inner.get("spans", ()):
                spans += 1
                if not keep_content:
                    _strip(span)
    return orjson.dumps(request) + b"\n", spans


def _strip(span: dict[str, Any]) -> None:
    for holder in (span, *span.get("events", ()), *span.get("links", ())):
        attributes = holder.get("attributes")
        if attributes:
            holder["attributes"] = [pair for pair in attributes if not _is_content(pair)]


def _is_content(pair: Mapping[str, Any]) -> bool:
    text = pair["value"].get("stringValue")
    return _CONTENT.match(pair["key"]) is not None or (text is not None and len(text) > _LONGEST_TEXT)


def _from_json(body: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(body)
        groups = request.get("resourceSpans", [])
        for group in groups:
            for inner in group.get("scopeSpans", ()):
                for span in inner.get("spans", ()):
                    _check(span)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EncodingError(f"the body is not an OTLP/JSON trace request: {error!r}") from error
    return {"resourceSpans": groups}


def _check(span: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or AttributeError where what is worked on here has another form."""
    bytes.fromhex(span["traceId"] + span["spanId"])
    for holder in (span, *span.get("events", ()), *span.get("links", ())):
        for pair in holder.get("attributes", ()):
            pair["key"].startswith("")
            pair["value"].keys()


def _from_protobuf(body: bytes) -> dict[str, Any]:
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # ships no types
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    except ImportError as error:
        raise ScepsyError(
            "receiving OTLP protobuf needs a decoder; install it with: pip install 'scepsy[traces]', "
            "or send JSON (OTEL_EXPORTER_OTLP_PROTOCOL=http/json)"
        ) from error
    request = ExportTraceServiceRequest()
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise EncodingError("the body is not an OTLP protobuf trace request") from error
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(group.resource.attributes)},
                "scopeSpans": [
                    {
                        "scope": {"name": inner.scope.name, "version": inner.scope.version},
                        "spans": [_span(span) for span in inner.spans],
                    }
                    for inner in group.scope_spans
                ],
            }
            for group in request.resource_spans
        ]
    }


def _span(span: Any) -> dict[str, Any]:
    """In OTLP's JSON mapping: ids in hex, 64-bit numbers as texts, enumerations as numbers."""
    encoded: dict[str, Any] = {
        "traceId": span.trace_id.hex(),
        "spanId": span.span_id.hex(),
        "name": span.name,
        "kind": span.kind,
        "startTimeUnixNano": str(span.start_time_unix_nano),
        "endTimeUnixNano": str(span.end_time_unix_nano),
        "attributes": _attributes(span.attributes),
    }
    if span.parent_span_id:
        encoded["parentSpanId"] = span.parent_span_id.hex()
    if span.flags:
        encoded["flags"] = span.flags
    if span.trace_state:
        encoded["traceState"] = span.trace_state
    if span.status.code:
        encoded["status"] = {"code": span.status.code}
    if span.events:
        encoded["events"] = [
            {
                "name": event.name,
                "timeUnixNano": str(event.time_unix_nano),
                "attributes": _attributes(event.attributes),
            }
            for event in span.events
        ]
    if span.links:
        encoded["links"] = [
            {
                "traceId": link.trace_id.hex(),
                "spanId": link.span_id.hex(),
                "attributes": _attributes(link.attributes),
            }
            for link in span.links
        ]
    return encoded


def _attributes(pairs: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"key": pair.key, "value": _value(pair.value)} for pair in pairs]


def _value(value: Any) -> dict[str, Any]:
    match value.WhichOneof("value"):
        case "string_value":
            return {"stringValue": value.string_value}
        case "int_value":
            return {"intValue": str(value.int_value)}
        case "double_value":
            return {"doubleValue": value.double_value}
        case "bool_value":
            return {"boolValue": value.bool_value}
        case "array_value":
            return {"arrayValue": {"values": [_value(item) for item in value.array_value.values]}}
        case "kvlist_value":
            return {"kvlistValue": {"values": _attributes(value.kvlist_value.values)}}
        case "bytes_value":
            return {"bytesValue": value.bytes_value.hex()}
        case _:
            return {}
