"""Spans in OTLP's JSON form: ids in hex, nanoseconds and integers as strings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from scepsy import semconv
from scepsy.capture.handle import Attribute, Handle
from scepsy.capture.recorder import SCOPE
from scepsy.capture.safety import tell

_INTERNAL, _CLIENT = 1, 3
_REMOTE_PARENT: Final = 0x300
_ELSEWHERE: Final = f'"flags":{_REMOTE_PARENT},'
"""Its parent is not in these files: the span of another process, or of another provider."""
_FAILED: Final = ',"status":{"code":2}'


def encode_request(
    items: Sequence[ReadableSpan | Handle], process: Mapping[str, Attribute], own: Resource | None = None
) -> bytes:
    """One `ExportTraceServiceRequest` as a line; `process` is added to the attributes of each resource.

    Handles become spans of the resource `own`. Of spans that Scepsy did not make only the skeleton is written (name,
    ids, times): they may hold prompts. One that cannot be written is left out, with one line in the log.
    """
    spans: dict[tuple[int, str], tuple[Resource, str, list[str]]] = {}
    handles = []
    for item in items:
        if isinstance(item, Handle):
            try:
                handles.append(_handle(item))
            except Exception as error:  # noqa: BLE001 - one that cannot be written must not take the others with it
                tell("encoding a span", error)
            continue
        scope = item.instrumentation_scope
        name = "" if scope is None else scope.name
        group = spans.setdefault(
            (id(item.resource), name), (item.resource, "" if scope is None else scope.version or "", [])
        )
        try:
            group[2].append(json.dumps(_span(item, whole=name == SCOPE), separators=(",", ":")))
        except Exception as error:  # noqa: BLE001 - likewise
            tell("encoding a span", error)
    parts = [
        _resource(resource, process, name, version, group) for (_, name), (resource, version, group) in spans.items()
    ]
    if handles:
        parts.append(_resource(own or Resource.get_empty(), process, SCOPE, "", handles))
    return f'{{"resourceSpans":[{",".join(parts)}]}}\n'.encode()


def _resource(
    resource: Resource, process: Mapping[str, Attribute], scope: str, version: str, spans: Sequence[str]
) -> str:
    about = json.dumps({"attributes": _attributes({**resource.attributes, **process})}, separators=(",", ":"))
    named = json.dumps({"name": scope, "version": version}, separators=(",", ":"))
    return f'{{"resource":{about},"scopeSpans":[{{"scope":{named},"spans":[{",".join(spans)}]}}]}}'


def _handle(handle: Handle) -> str:
    # By hand, because this runs for every call beside the program, which wants the interpreter for itself.
    parent = f'"parentSpanId":"{handle.parent_id:016x}",' if handle.parent_id else ""
    if parent and handle.parent is None:
        parent += _ELSEWHERE
    kind = _CLIENT if handle.kind == semconv.KIND_LLM else _INTERNAL
    attributes = ",".join(
        [
            f'{{"key":"{key}","value":{{"stringValue":{encode_basestring_ascii(value)}}}}}'
            if type(value) is str
            else f'{{"key":"{key}","value":{{"intValue":"{value}"}}}}'
            if type(value) is int
            else f'{{"key":"{key}","value":{json.dumps(_value(value))}}}'
            # A copy: a call that was given up may still be told something.
            for key, value in dict(handle.attributes).items()
        ]
    )
    return (
        f'{{"traceId":"{handle.trace_id:032x}","spanId":"{handle.span_id:016x}",{parent}'
        f'"name":{encode_basestring_ascii(handle.name)},"kind":{kind},'
        f'"startTimeUnixNano":"{handle.start_ns}","endTimeUnixNano":"{handle.end_ns}",'
        f'"attributes":[{attributes}]{_FAILED if handle.failed else ""}}}'
    )


def _span(span: ReadableSpan, *, whole: bool) -> dict[str, Any]:
    context = span.get_span_context()
    if context is None:
        raise ValueError("a span without an identity")
    encoded: dict[str, Any] = {
        "traceId": f"{context.trace_id:032x}",
        "spanId": f"{context.span_id:016x}",
        "name": span.name,
        "kind": span.kind.value + 1,
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
    }
    if span.parent is not None:
        encoded["parentSpanId"] = f"{span.parent.span_id:016x}"
        if span.parent.is_remote:
            encoded["flags"] = _REMOTE_PARENT
    if whole and span.attributes:
        encoded["attributes"] = _attributes(span.attributes)
    if span.status.status_code.value:
        encoded["status"] = {"code": span.status.status_code.value}
    return encoded


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, Iterable):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    return {"stringValue": str(value)}
