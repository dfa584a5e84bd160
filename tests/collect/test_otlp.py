import gzip
import json

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from scepsy.collect.otlp import JSON, PROTOBUF, EncodingError, inflate, to_line

values = st.recursive(
    st.one_of(
        st.text(max_size=20).map(lambda text: AnyValue(string_value=text)),
        st.integers(-(2**63), 2**63 - 1).map(lambda number: AnyValue(int_value=number)),
        st.floats(allow_nan=False, allow_infinity=False).map(lambda number: AnyValue(double_value=number)),
        st.booleans().map(lambda flag: AnyValue(bool_value=flag)),
        st.just(AnyValue()),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: AnyValue(array_value=ArrayValue(values=items))),
        st.lists(inner, max_size=3).map(
            lambda items: AnyValue(kvlist_value=KeyValueList(values=[KeyValue(key="k", value=item) for item in items]))
        ),
    ),
    max_leaves=5,
)
attributes = st.lists(st.builds(lambda key, value: KeyValue(key=f"a.{key}", value=value), st.text(max_size=8), values))
nanos = st.integers(0, 2**63)
spans = st.builds(
    lambda trace, own, parent, name, times, pairs, flags, code, state: Span(
        trace_id=trace,
        span_id=own,
        parent_span_id=parent,
        name=name,
        kind=Span.SPAN_KIND_CLIENT,
        start_time_unix_nano=times[0],
        end_time_unix_nano=times[1],
        attributes=pairs,
        flags=flags,
        trace_state=state,
        status={"code": code},
        events=[Span.Event(name="e", time_unix_nano=times[0], attributes=pairs)],
        links=[Span.Link(trace_id=trace, span_id=own, attributes=pairs)],
    ),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=8, max_size=8),
    st.one_of(st.just(b""), st.binary(min_size=8, max_size=8)),
    st.text(max_size=10),
    st.tuples(nanos, nanos),
    attributes,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2),
    st.sampled_from(["", "a=b"]),
)


def request(*members):
    scope = ScopeSpans(spans=members)
    scope.scope.name, scope.scope.version = "lib", "1"
    group = ResourceSpans(scope_spans=[scope])
    group.resource.attributes.append(KeyValue(key="service.name", value=AnyValue(string_value="s")))
    return ExportTraceServiceRequest(resource_spans=[group])


def hexed(value, bare):
    """Google's JSON mapping with OTLP's exception, ids in hex, and without what stands for a default."""
    if isinstance(value, dict):
        return {
            key: bare[key] if key in ("traceId", "spanId", "parentSpanId") else hexed(inner, bare)
            for key, inner in value.items()
        }
    return [hexed(inner, bare) for inner in value] if isinstance(value, list) else value


def defaults_gone(value):
    if isinstance(value, dict):
        kept = {key: defaults_gone(inner) for key, inner in value.items()}
        lists = ("values", "attributes", "events", "links")
        return {key: inner for key, inner in kept.items() if not (key in lists and not inner)}
    return [defaults_gone(inner) for inner in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(spans)
def test_protobuf_becomes_otlps_json(span):
    line, count = to_line(request(span).SerializeToString(), PROTOBUF, keep_content=True)
    assert count == 1
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    ids = {"traceId": span.trace_id.hex(), "spanId": span.span_id.hex(), "parentSpanId": span.parent_span_id.hex()}
    ours = json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    reference = hexed(MessageToDict(span, use_integers_for_enums=True), ids)
    ours = {key: value for key, value in ours.items() if value not in ("", "0")}
    reference = {key: value for key, value in reference.items() if value not in ("", "0", {})}
    for event in (*ours.get("events", ()), *reference.get("events", ())):
        if event.get("timeUnixNano") == "0":
            del event["timeUnixNano"]
    assert defaults_gone(ours) == defaults_gone(reference)


@settings(deadline=None)
@given(spans)
def test_what_was_made_json_is_taken_as_json(span):
    line, _ = to_line(request(span).SerializeToString(), PROTOBUF, keep_content=True)
    assert to_line(line, JSON, keep_content=True) == (line, 1)


def test_prompts_and_answers_are_left_out():
    def pair(key, text="secret"):
        return KeyValue(key=key, value=AnyValue(string_value=text))

    kept = ["gen_ai.request.model", "gen_ai.prompt_tokens", "llm.model_name", "llm.token_count.prompt", "tool.name"]
    dropped = [
        *("gen_ai.prompt.0.content", "gen_ai.completion.0.content", "gen_ai.input.messages", "gen_ai.output.messages"),
        *("gen_ai.system_instructions", "gen_ai.prompt", "gen_ai.tool.call.arguments"),
        *("llm.input_messages.0.message.content", "llm.prompts.0", "input.value", "output.value"),
        *("traceloop.entity.input", "retrieval.documents.0.document.content", "exception.stacktrace"),
    ]
    span = Span(trace_id=b"t" * 16, span_id=b"s" * 8, attributes=[pair(key) for key in (*kept, *dropped)])
    span.attributes.append(pair("long", "x" * 10_000))
    span.events.append(Span.Event(name="gen_ai.user.message", attributes=[pair("gen_ai.prompt"), pair("id")]))
    line, _ = to_line(request(span).SerializeToString(), PROTOBUF, keep_content=False)
    left = json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert [one["key"] for one in left["attributes"]] == kept
    assert [one["key"] for one in left["events"][0]["attributes"]] == ["id"]
    whole, _ = to_line(request(span).SerializeToString(), PROTOBUF, keep_content=True)
    assert whole.count(b"secret") == len(kept) + len(dropped) + 2


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"\xff\xff\xff", PROTOBUF),
        (b"{", JSON),
        (b"[]", JSON),
        (b'{"resourceSpans": 3}', JSON),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "xyz", "spanId": "00"}]}]}]}', JSON),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": "00"}]}]}]}', JSON),
        (
            b'{"resourceSpans": [{"scopeSpans": [{"spans": '
            b'[{"traceId": "00", "spanId": "00", "attributes": [{"key": "a", "value": 3}]}]}]}]}',
            JSON,
        ),
    ],
)
def test_what_is_no_otlp_is_refused(body, content_type):
    with pytest.raises(EncodingError, match="the body is not an OTLP"):
        to_line(body, content_type, keep_content=False)


def test_content_encodings():
    packed = gzip.compress(b"x" * 1000)
    assert inflate(b"x", "") == b"x"
    assert inflate(packed, "gzip") == b"x" * 1000
    for body, encoding, message in (
        (b"x", "br", "'br' is not understood"),
        (b"x" * 20, "gzip", "not gzip"),
        (packed[:-9], "gzip", "cut off"),
    ):
        with pytest.raises(EncodingError, match=message):
            inflate(body, encoding)


def test_a_packed_body_that_unpacks_without_end_is_refused():
    with pytest.raises(EncodingError, match="too large"):
        inflate(gzip.compress(b"\0" * (65 << 20), compresslevel=1), "gzip")
