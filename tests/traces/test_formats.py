"""The same spans in every format that they may come in."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from pyarrow import parquet

from scepsy.traces import Tally, iter_executions, read_executions
from scepsy.traces.formats.call_table import NO_DURATION
from scepsy.traces.sources import TORN_MESSAGE
from scepsy_optimizer.errors import ScepsyError

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "golden" / "scepsy.jsonl"


@pytest.fixture(scope="module")
def lines():
    return [json.loads(line) for line in GOLDEN.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected():
    return read_executions([GOLDEN])


def to_protobuf(request):
    data = TracesData()
    for group in request["resourceSpans"]:
        resource = data.resource_spans.add()
        for scope in group["scopeSpans"]:
            inner = resource.scope_spans.add()
            inner.scope.name = scope["scope"]["name"]
            for span in scope["spans"]:
                made = inner.spans.add(
                    trace_id=bytes.fromhex(span["traceId"]),
                    span_id=bytes.fromhex(span["spanId"]),
                    parent_span_id=bytes.fromhex(span.get("parentSpanId", "")),
                    name=span["name"],
                    start_time_unix_nano=int(span["startTimeUnixNano"]),
                    end_time_unix_nano=int(span["endTimeUnixNano"]),
                    flags=span.get("flags", 0),
                )
                made.status.code = span.get("status", {}).get("code", 0)
                for pair in span["attributes"]:
                    ((kind, value),) = pair["value"].items()
                    attribute = made.attributes.add(key=pair["key"])
                    name = {"stringValue": "string_value", "intValue": "int_value", "boolValue": "bool_value"}
                    setattr(
                        attribute.value, name.get(kind, "double_value"), int(value) if kind == "intValue" else value
                    )
    return data.SerializeToString()


def framed(messages):
    return b"".join(len(message).to_bytes(4) + message for message in messages)


def content(form, lines):
    text = GOLDEN.read_bytes()
    messages = [to_protobuf(line) for line in lines]
    compress = zstandard.ZstdCompressor().compress
    return {
        "lines": text,
        "gzip": gzip.compress(text),
        "zstd": compress(text),
        "one value over many lines": json.dumps(lines, indent=2).encode(),
        "protobuf": b"".join(messages),
        "framed protobuf": framed(messages),
        "framed protobuf, each under zstd": framed(map(compress, messages)),
        "framed JSON": framed(json.dumps(line).encode() for line in lines),
        "framed protobuf under gzip": gzip.compress(framed(messages)),
    }[form]


FORMS = [
    "lines", "gzip", "zstd", "one value over many lines", "protobuf", "framed protobuf",
    "framed protobuf, each under zstd", "framed JSON", "framed protobuf under gzip",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_otlp_in_all_its_forms(form, lines, expected, tmp_path):
    path = tmp_path / "spans.otlp"
    path.write_bytes(content(form, lines))
    reading = read_executions([path])
    assert reading.executions == expected.executions
    assert reading.dropped == expected.dropped


def test_standard_input(expected):
    code = (
        "from scepsy.traces import read_executions; reading = read_executions(['-']); "
        "print(len(reading.executions), sum(len(execution.calls) for execution in reading.executions))"
    )
    with GOLDEN.open("rb") as stream:
        shown = subprocess.run([sys.executable, "-c", code], stdin=stream, capture_output=True, text=True, check=True)
    calls = sum(len(execution.calls) for execution in expected.executions)
    assert shown.stdout.split() == [str(len(expected.executions)), str(calls)]


def test_a_cut_message_is_counted(lines, tmp_path):
    path = tmp_path / "spans.pb"
    path.write_bytes(framed([to_protobuf(line) for line in lines]) + b"\x00\x00\x10\x00half")
    assert read_executions([path]).dropped[TORN_MESSAGE] == 1


def test_a_stream_gives_what_the_reading_gives(expected):
    tally = Tally()
    streamed = sorted(iter_executions([GOLDEN], tally), key=lambda execution: execution.id)
    assert streamed == sorted(expected.executions, key=lambda execution: execution.id)
    assert dict(tally.dropped) == expected.dropped


def jaeger(lines):
    traces = {}
    for line in lines:
        for span in line["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            tags = [{"key": pair["key"], "value": next(iter(pair["value"].values()))} for pair in span["attributes"]]
            for tag, pair in zip(tags, span["attributes"], strict=True):
                if "intValue" in pair["value"]:
                    tag["value"] = int(tag["value"])
            if span.get("status", {}).get("code") == 2:
                tags.append({"key": "error", "value": True})
            start = int(span["startTimeUnixNano"]) // 1000
            parent = span.get("parentSpanId")
            reference = {"refType": "CHILD_OF", "traceID": span["traceId"], "spanID": parent}
            traces.setdefault(span["traceId"], []).append(
                {
                    "traceID": span["traceId"],
                    "spanID": span["spanId"],
                    "operationName": span["name"],
                    "references": [reference] if parent else [],
                    "startTime": start,
                    "duration": int(span["endTimeUnixNano"]) // 1000 - start,
                    "tags": tags,
                    "logs": [{"timestamp": start, "fields": [{"key": "event", "value": "an event"}]}],
                    "processID": "p1",
                }
            )
    processes = {"p1": {"serviceName": "agent", "tags": [{"key": "host", "value": "here"}]}}
    return {"data": [{"traceID": key, "spans": spans, "processes": processes} for key, spans in traces.items()]}


def close_to(found, expected):
    """The same executions, to the microsecond that other formats round to."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.id, one.workflow) == (other.id, other.workflow)
        assert [(span.id, span.parent, span.kind) for span in one.spans] == [
            (span.id, span.parent, span.kind) for span in other.spans
        ]
        for span, like in zip(one.spans, other.spans, strict=True):
            assert (span.start_s, span.end_s) == pytest.approx((like.start_s, like.end_s), abs=3e-6)
            assert (span.call is None) == (like.call is None)
            if span.call is not None:
                same = replace(span.call, time_to_first_token_s=like.call.time_to_first_token_s)
                assert same == like.call
                assert span.call.time_to_first_token_s == pytest.approx(like.call.time_to_first_token_s, abs=3e-6)
    return True


def test_jaeger(lines, expected, tmp_path):
    path = tmp_path / "jaeger.json"
    path.write_text(json.dumps(jaeger(lines), indent=1))
    assert close_to(read_executions([path]).executions, expected.executions)


def phoenix_rows(lines):
    """As Phoenix's client gives spans in a data frame."""
    for line in lines:
        for span in line["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            attributes = {pair["key"]: next(iter(pair["value"].values())) for pair in span.get("attributes", ())}
            for pair in span.get("attributes", ()):
                if "intValue" in pair["value"]:
                    attributes[pair["key"]] = int(pair["value"]["intValue"])
            start, end = (pa.scalar(int(span[key]) // 1000, pa.timestamp("us", "UTC")) for key in _TIMES)
            yield {
                "name": span["name"],
                "span_kind": attributes.pop("openinference.span.kind", "UNKNOWN"),
                "parent_id": span.get("parentSpanId"),
                "start_time": start.as_py(),
                "end_time": end.as_py(),
                "status_code": "ERROR" if span.get("status", {}).get("code") == 2 else "OK",
                "events": [
                    {"name": event["name"], "timestamp": _iso(event["timeUnixNano"])}
                    for event in span.get("events", ())
                ],
                "context.span_id": span["spanId"],
                "context.trace_id": span["traceId"],
                **{f"attributes.{key}": value for key, value in attributes.items()},
            }


_TIMES = ("startTimeUnixNano", "endTimeUnixNano")


def _iso(time_ns):
    return pa.scalar(int(time_ns) // 1000, pa.timestamp("us", "UTC")).as_py().isoformat()


@pytest.mark.parametrize("form", ["parquet", "lines", "api"])
def test_phoenix(form, tmp_path):
    golden = DATA / "golden" / "openinference.jsonl"
    expected = read_executions([golden])
    rows = list(phoenix_rows(json.loads(line) for line in golden.read_text().splitlines()))
    path = tmp_path / f"phoenix.{form}"
    if form == "parquet":
        wanted = {key for row in rows for key in row if "messages" not in key}
        table = {key: [row.get(key) for row in rows] for key in sorted(wanted)}
        table["events"] = [row["events"] or None for row in rows]
        parquet.write_table(pa.table(table), path)
    else:
        for row in rows:
            row["start_time"], row["end_time"] = row["start_time"].isoformat(), row["end_time"].isoformat()
        if form == "api":
            rows = [
                {
                    **{key: value for key, value in row.items() if "." not in key},
                    "context": {"trace_id": row["context.trace_id"], "span_id": row["context.span_id"]},
                    "attributes": {
                        key.removeprefix("attributes."): value
                        for key, value in row.items()
                        if key.startswith("attributes.")
                    },
                }
                for row in rows
            ]
            path.write_text(json.dumps({"data": rows, "next_cursor": None}))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read_executions([path])
    assert close_to(reading.executions, expected.executions)
    assert reading.dropped == expected.dropped


def test_langfuse_exports():
    reading = read_executions([DATA / "langfuse"])
    assert (reading.files, reading.dropped, reading.repaired) == (4, {}, {})
    found = {
        execution.workflow: [
            (span.call.llm, span.call.role, span.call.input_tokens, span.call.output_tokens) for span in execution.calls
        ]
        for execution in reading.executions
    }
    assert found == {
        "LangGraph": [("gpt-4o-2024-08-06", "agent", 60, 15), ("gpt-4o-2024-08-06", "agent", 108, 51)],
        "llama-index-trace": [("gpt-4o", "llama-index-trace", 13, 81)],
        "autogen-chat-trace": [("gpt-4o", "autogen-chat-trace", 41, 3)],
        "invocation [hello_app]": [
            ("gemini-2.0-flash", "agent_run [hello_agent]", 28, 3),
            ("gemini-2.0-flash", "agent_run [hello_agent]", 39, 6),
        ],
    }


def test_langfuse_counts_disjoint_tokens(tmp_path):
    """Cached and reasoning tokens are beside the plain ones, not within them."""
    observation = {
        "id": "a", "traceId": "t", "type": "GENERATION", "name": "call", "model": "m",
        "startTime": "2026-01-01T00:00:00.000Z", "endTime": "2026-01-01T00:00:02.000Z",
        "completionStartTime": "2026-01-01T00:00:00.500Z",
        "usageDetails": {"input": 5, "input_cache_read": 4, "output": 3, "output_reasoning": 2, "total": 14},
    }  # fmt: skip
    path = tmp_path / "observations.json"
    path.write_text(json.dumps([observation]))
    ((span,),) = (execution.calls for execution in read_executions([path]).executions)
    call = span.call
    assert (call.input_tokens, call.cached_tokens, call.output_tokens) == (9, 4, 5)
    assert call.time_to_first_token_s == 0.5


def test_a_real_table_of_calls():
    reading = read_executions([DATA / "claude-code"])
    assert len(reading.executions) == 3
    assert sum(len(execution.calls) for execution in reading.executions) == reading.spans
    assert reading.dropped == {}
    assert all(execution.workflow == "calls" for execution in reading.executions)
    roles = {span.call.role for execution in reading.executions for span in execution.calls}
    assert {"main", "agent_001"} <= roles


TABLE = [
    {"execution": "e1", "call": "s", "parent": "", "model": "", "start_s": 0, "duration_s": 9, "role": "solver"},
    {"execution": "e1", "call": "a", "parent": "s", "model": "big", "start_s": 1, "duration_s": 2, "in_tok": 7},
    {"execution": "e1", "call": "b", "parent": "a", "model": "small", "start_s": 3.5, "duration_s": 1, "in_tok": 8},
    {"execution": "e2", "call": "c", "parent": None, "model": "big", "start_s": 0, "duration_s": None, "in_tok": 9},
]


def write_table(path, rows):
    columns = {key: [row.get(key) for row in rows] for key in ("execution", "call", "parent", "model", "role")}
    for key in ("start_s", "duration_s", "in_tok"):
        columns[key] = [row.get(key) for row in rows]
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
    else:
        delimiter = ";" if path.stem == "semicolons" else ","
        names = list(columns)
        body = [delimiter.join("" if row.get(key) is None else str(row[key]) for key in names) for row in rows]
        path.write_text("\n".join([delimiter.join(names), *body]) + "\n")
    return path


@pytest.mark.parametrize("name", ["table.csv", "semicolons.csv", "table.parquet"])
def test_a_table_of_calls(name, tmp_path):
    """A row without a model is a step; a call named as parent passes its children on to its own parent."""
    reading = read_executions([write_table(tmp_path / name, TABLE)])
    assert reading.repaired == {NO_DURATION: 1}
    first, second = sorted(reading.executions, key=lambda execution: execution.id)
    assert first.workflow == name.split(".")[0]
    assert [(span.id, span.parent, span.start_s, span.end_s) for span in first.spans] == [
        ("s", None, 0, 9),
        ("a", "s", 1, 3),
        ("b", "s", 3.5, 4.5),
    ]
    assert [(span.call.llm, span.call.role, span.call.input_tokens) for span in first.calls] == [
        ("big", "solver", 7),
        ("small", "solver", 8),
    ]
    assert second.makespan_s == 0


def test_a_table_without_the_columns_says_which(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("execution,model,when\ne,m,3\n")
    with pytest.raises(
        ScepsyError, match=r"lacks columns \(start: start_s or .*; duration: .*it has execution, model, when"
    ):
        read_executions([path])


def test_damaged_parquet_is_one_clear_error(tmp_path):
    path = tmp_path / "table.parquet"
    path.write_bytes(b"PAR1" + os.urandom(64))
    with pytest.raises(ScepsyError, match="not a readable Parquet file"):
        read_executions([path])


def test_damaged_zstd_is_one_clear_error(tmp_path):
    path = tmp_path / "spans.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(GOLDEN.read_bytes())[:200])
    with pytest.raises(ScepsyError, match=str(path)):
        read_executions([path])


def test_the_typed_and_the_tolerant_decoder_agree(lines, tmp_path):
    """A value of an unexpected type anywhere in a line sends it to the tolerant decoder: the spans are the same."""
    odd = tmp_path / "odd.jsonl"
    with odd.open("w") as out:
        for line in lines:
            line["resourceSpans"][0]["schemaUrl"] = 5
            line["resourceSpans"][0]["scopeSpans"][0]["scope"]["name"] = None
            out.write(json.dumps(line) + "\n")
    assert read_executions([odd]).executions == read_executions([GOLDEN]).executions
