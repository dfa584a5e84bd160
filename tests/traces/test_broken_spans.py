"""Whatever is in a file: never a traceback, always executions of the promised shape."""

import contextlib
import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy.traces import Tally, iter_executions, read_executions
from scepsy.traces.assemble import (
    CACHED_CALL,
    FAILED_CALL,
    LOST_CALL,
    NAMELESS_CALL,
    STOPPED_CALL,
    UNENDED_CALL,
)
from scepsy.traces.dialects import DIALECTS
from scepsy.traces.formats.otlp_json import BROKEN as BROKEN_SPAN
from scepsy.traces.sources import NOT_JSON
from scepsy.traces.tree import DUPLICATE
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.timeline import compile_timeline

KEYS = [
    "gen_ai.operation.name", "gen_ai.request.model", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens",
    "gen_ai.agent.name", "gen_ai.workflow.name", "scepsy.kind", "scepsy.transport", "scepsy.role", "scepsy.outcome",
    "scepsy.cache_hit", "scepsy.wasted_s", "scepsy.queue_s", "error.type", "server.address", "server.port",
    "openinference.span.kind", "llm.model_name", "llm.token_count.prompt", "llm.invocation_parameters",
    "traceloop.span.kind", "traceloop.workflow.name", "llm.request.type", "langfuse.observation.type",
    "langfuse.observation.usage_details", "langfuse.observation.metadata", "langfuse.observation.completion_start_time",
    "gen_ai.latency.e2e", "gen_ai.latency.time_in_queue", "gen_ai.request.id", "gen_ai.response.id",
]  # fmt: skip
MARKS = {mark for dialect in DIALECTS for mark in dialect.marks}
WORDS = [
    "chat", "embeddings", "invoke_agent", "invoke_workflow", "execute_tool", "LLM", "CHAIN", "AGENT", "RERANKER",
    "workflow", "agent", "llm", "call", "task", "generation", "span", "completion", "m", "x" * 5000, "",
    '{"model": "m"}', '{"input": 3, "input_cached": 1}', "[]", "[[[[", "2026-01-01T00:00:00Z", "abandoned", "-1", "nan",
]  # fmt: skip
IDS = st.sampled_from(["a", "b", "c", "d", "e", "root"])
# Protobuf's JSON has 64-bit integers as text, but not everybody's.
TIMES = st.one_of(
    st.integers(min_value=0, max_value=2**64 - 1).map(str),
    st.integers(min_value=10**18, max_value=10**18 + 10**10).map(str),
    st.integers(min_value=-5, max_value=5),
)
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.none(), max_size=2)
)
VALUES = st.one_of(
    st.sampled_from(WORDS).map(lambda text: {"stringValue": text}),
    st.integers(-3, 10**6).map(lambda number: {"intValue": str(number)}),
    st.booleans().map(lambda value: {"boolValue": value}),
    st.floats().map(lambda value: {"doubleValue": value}),
    st.just({"arrayValue": {"values": [{"stringValue": "a"}]}}),
    st.just({"kvlistValue": {"values": [{"key": "k", "value": {}}]}}),
    st.just({}),
)
ATTRIBUTES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6).map(
    lambda found: [{"key": key, "value": value} for key, value in found.items()]
)
SPANS = st.fixed_dictionaries(
    {"traceId": st.sampled_from(["t1", "t2"]), "spanId": IDS, "startTimeUnixNano": TIMES},
    optional={
        "parentSpanId": st.one_of(IDS, st.just("")),
        "name": st.sampled_from(["a name", "ChatOpenAI", ""]),
        "endTimeUnixNano": TIMES,
        "attributes": ATTRIBUTES,
        "flags": st.sampled_from([0, 0x100, 0x300]),
        "status": st.sampled_from([{}, {"code": 1}, {"code": 2}, {"code": "STATUS_CODE_ERROR"}]),
        "events": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["First Token Stream Event", "other"]), "timeUnixNano": TIMES}
            ),
            max_size=2,
        ),
    },
)
BROKEN = st.one_of(
    JUNK,
    st.builds(lambda span, key, junk: {**span, key: junk}, SPANS, st.sampled_from(["spanId", "traceId", "name"]), JUNK),
    st.builds(lambda span, junk: {**span, "attributes": junk}, SPANS, JUNK),
    st.builds(lambda span, junk: {**span, "startTimeUnixNano": junk}, SPANS, JUNK),
    st.builds(lambda span, junk: {**span, "events": [junk], "status": junk}, SPANS, JUNK),
)


def read_or_refuse(path):
    refused = None
    try:
        return read_executions([path])
    except ScepsyError as error:
        refused = str(error)
    assert str(path) in refused
    return None


def check(spans, directory):
    path = directory / "spans.jsonl"
    lines = [{"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]} for span in spans]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    reading = read_or_refuse(path)
    if reading is None:
        return
    shown = 0
    for execution in reading.executions:
        seen = {}
        for index, span in enumerate(execution.spans):
            assert (span.parent is None) == (index == 0)
            assert span.parent is None or seen[span.parent].call is None
            assert span.id not in seen
            assert span.end_s >= span.start_s
            assert (span.kind == "llm") == (span.call is not None)
            seen[span.id] = span
        for span in execution.calls:
            assert span.call.llm
            assert 0 <= span.call.cached_tokens <= span.call.input_tokens
            assert span.call.output_tokens >= 0
        timeline = compile_timeline(execution)
        assert len(timeline.calls) == len(execution.calls)
        shown += len(execution.calls)
    assert shown <= len(spans)
    assert reading.spans <= len(spans)


@settings(max_examples=80, deadline=None)
@given(spans=st.lists(SPANS, min_size=1, max_size=8))
def test_any_mixture_of_spans(spans, tmp_path_factory):
    check(spans, tmp_path_factory.getbasetemp())


@settings(max_examples=60, deadline=None)
@given(spans=st.lists(st.one_of(SPANS, BROKEN), min_size=1, max_size=6))
def test_spans_with_values_of_the_wrong_type(spans, tmp_path_factory):
    check(spans, tmp_path_factory.getbasetemp())


@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_file(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(content)
    read_or_refuse(path)


REASONS_OF_CALLS = {FAILED_CALL, STOPPED_CALL, CACHED_CALL, UNENDED_CALL, NAMELESS_CALL, LOST_CALL}


def account(spans, path):
    """Calls that were kept, calls that were left out, and the tally; None where nothing is whole."""
    tally = Tally()
    lines = [{"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]} for span in spans]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with contextlib.suppress(ScepsyError):
        kept = sum(len(execution.calls) for execution in iter_executions([path], tally))
        return kept, sum(count for reason, count in tally.dropped.items() if reason in REASONS_OF_CALLS), tally
    return None


@settings(max_examples=80, deadline=None)
@given(spans=st.lists(SPANS, min_size=1, max_size=9))
def test_every_call_is_kept_or_counted(spans, tmp_path_factory):
    """A span that says it is a call of its own is one, wherever it stands."""
    whole = {"traceId": "whole", "spanId": "w", "startTimeUnixNano": "5", "endTimeUnixNano": "6"}
    for number, span in enumerate(spans):
        if number % 2:
            span["attributes"] = [
                *(pair for pair in span.get("attributes", ()) if pair["key"] not in MARKS),
                {"key": "scepsy.kind", "value": {"stringValue": "call"}},
            ]
        else:
            span.pop("attributes", None)
    kept, left_out, tally = account([whole, *spans], tmp_path_factory.getbasetemp() / "calls.jsonl")
    first = {}
    for number, span in enumerate(spans):
        if usable(span):
            first.setdefault((span["traceId"], span["spanId"]), number)
    assert kept + left_out == sum(number % 2 for number in first.values())
    assert tally.dropped[DUPLICATE] == sum(map(usable, spans)) - len(first)
    unusable = len(spans) - sum(map(usable, spans))
    assert tally.dropped[BROKEN_SPAN] + tally.dropped[NOT_JSON] == unusable


def usable(span):
    """Whether its times are times, and its line is JSON, which has no infinite numbers."""
    times = (span["startTimeUnixNano"], span.get("endTimeUnixNano", 0))
    return all(0 <= int(time) < 2**64 for time in times) and not re.search("NaN|Infinity", json.dumps(span))


@settings(max_examples=80, deadline=None)
@given(spans=st.lists(SPANS, min_size=1, max_size=9))
def test_no_trace_with_a_call_disappears(spans, tmp_path_factory):
    """Whatever wraps, lends or fails: a trace with a span of an LLM in it has calls that are kept or counted."""
    whole = {"traceId": "whole", "spanId": "w", "startTimeUnixNano": "5", "endTimeUnixNano": "6"}
    for span in spans:
        attributes = {pair["key"]: pair["value"].get("stringValue") for pair in span.get("attributes", ())}
        if attributes.keys() & {*MARKS, "scepsy.kind", "scepsy.transport"}:
            span.pop("attributes")
    seen = {}
    for span in spans:
        if usable(span):
            seen.setdefault((span["traceId"], span["spanId"]), span)
    asking = {
        trace
        for (trace, _), span in seen.items()
        if {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}} in span.get("attributes", ())
    }
    kept, left_out, _ = account([whole, *spans], tmp_path_factory.getbasetemp() / "asking.jsonl")
    assert kept + left_out >= len(asking)


JSON = st.recursive(
    JUNK,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["resourceSpans", "scopeSpans", "spans", "data", "traceID", "observations", "traceId", "startTime",
                 "id", "context", "trace_id", "span_id", "start_time", "processes", "tags", "attributes", "references"]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(value=JSON)
def test_any_json(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "anything.json"
    path.write_text(json.dumps(value, allow_nan=True), encoding="utf-8")
    read_or_refuse(path)
