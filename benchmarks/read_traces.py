"""How fast traces are read, and in how much memory: each dialect beside plain parsing of the same file.

`python -m benchmarks.read_traces [SPANS]` writes a file of a million spans (or SPANS) in each dialect and reads it in a
process of its own, pinned to one core. Bound: at most 1.5 times the time of `json.loads` on every line, under 1 GiB.
Times are the process's own, without imports, so that what else the machine does counts little. For protobuf the plain
parsing beside it is that of the same spans in JSON. Last, the totals of one dialect's executions are taken, of a tenth
of the file and of all of it: the memory must not grow.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.outcome import Bound, finish

SPANS = 1_000_000
PER_EXECUTION = 20
PER_LINE = 100
BOUND_TIME = 1.5
BOUND_GIB = 1.0
BOUND_GROWTH = 1.5

Attributes = dict[str, Any]


def scepsy(index: int, *, call: bool) -> Attributes:
    """As Scepsy's own capture writes them."""
    if not call:
        return {"scepsy.kind": "agent", "gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "solver"}
    return {
        "scepsy.kind": "llm",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "meta-llama/Llama-3.1-8B-Instruct",
        "scepsy.role": "solver",
        "gen_ai.provider.name": "openai",
        "server.address": "127.0.0.1",
        "server.port": 8000,
        "gen_ai.response.model": "meta-llama/Llama-3.1-8B-Instruct",
        "gen_ai.response.id": f"chatcmpl-{index:032x}",
        "gen_ai.usage.input_tokens": 1000 + index % 512,
        "gen_ai.usage.output_tokens": 100 + index % 64,
        "scepsy.attempts": 1,
    }


def opentelemetry(index: int, *, call: bool) -> Attributes:
    """As OpenTelemetry's instrumentations write them, without content."""
    if not call:
        return {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": "solver",
            "gen_ai.provider.name": "openai",
        }
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "meta-llama/Llama-3.1-8B-Instruct",
        "gen_ai.request.max_tokens": 512,
        "gen_ai.request.temperature": 0.7,
        "server.address": "127.0.0.1",
        "server.port": 8000,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.id": f"chatcmpl-{index:032x}",
        "gen_ai.response.model": "meta-llama/Llama-3.1-8B-Instruct",
        "gen_ai.usage.input_tokens": 1000 + index % 512,
        "gen_ai.usage.output_tokens": 100 + index % 64,
    }


def openinference(index: int, *, call: bool) -> Attributes:
    """As OpenInference's instrumentations write them, with short messages."""
    if not call:
        return {
            "openinference.span.kind": "CHAIN",
            "input.value": '{"question": "What limits tidal power?"}',
            "input.mime_type": "application/json",
            "output.value": "A short answer.",
            "metadata": '{"langgraph_node": "solver", "langgraph_step": 1}',
        }
    return {
        "openinference.span.kind": "LLM",
        "input.value": '{"messages": [[{"content": "What limits tidal power?"}]]}',
        "input.mime_type": "application/json",
        "output.value": '{"generations": [[{"text": "A short answer."}]]}',
        "output.mime_type": "application/json",
        "llm.input_messages.0.message.role": "user",
        "llm.input_messages.0.message.content": "What limits tidal power?",
        "llm.output_messages.0.message.role": "assistant",
        "llm.output_messages.0.message.content": "A short answer.",
        "llm.invocation_parameters": '{"model": "meta-llama/Llama-3.1-8B-Instruct", "max_tokens": 512}',
        "llm.model_name": "meta-llama/Llama-3.1-8B-Instruct",
        "llm.provider": "openai",
        "llm.system": "openai",
        "llm.token_count.prompt": 1000 + index % 512,
        "llm.token_count.completion": 100 + index % 64,
        "llm.token_count.total": 1100 + index % 512 + index % 64,
    }


def traceloop(index: int, *, call: bool) -> Attributes:
    """As OpenLLMetry's instrumentations write them, with content off."""
    if not call:
        return {
            "traceloop.span.kind": "task",
            "traceloop.workflow.name": "research",
            "traceloop.entity.name": "solver",
            "traceloop.entity.path": "solver",
        }
    return {
        "llm.request.type": "chat",
        "traceloop.workflow.name": "research",
        "traceloop.entity.path": "solver",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "meta-llama/Llama-3.1-8B-Instruct",
        "gen_ai.request.temperature": 0.7,
        "gen_ai.openai.api_base": "http://127.0.0.1:8000/v1/",
        "gen_ai.response.id": f"chatcmpl-{index:032x}",
        "gen_ai.response.model": "meta-llama/Llama-3.1-8B-Instruct",
        "gen_ai.usage.input_tokens": 1000 + index % 512,
        "gen_ai.usage.output_tokens": 100 + index % 64,
        "llm.usage.total_tokens": 1100 + index % 512 + index % 64,
        "llm.is_streaming": False,
    }


def langfuse(index: int, *, call: bool) -> Attributes:
    """As Langfuse's SDK writes them, with short messages."""
    if not call:
        return {
            "langfuse.observation.type": "chain",
            "langfuse.observation.input": '{"question": "What limits tidal power?"}',
            "langfuse.observation.output": '"A short answer."',
            "langfuse.trace.name": "research",
        }
    return {
        "langfuse.observation.type": "generation",
        "langfuse.observation.model.name": "meta-llama/Llama-3.1-8B-Instruct",
        "langfuse.observation.model.parameters": '{"max_tokens": 512, "temperature": 0.7}',
        "langfuse.observation.input": '[{"role": "user", "content": "What limits tidal power?"}]',
        "langfuse.observation.output": '{"role": "assistant", "content": "A short answer."}',
        "langfuse.observation.usage_details": json.dumps({"input": 1000 + index % 512, "output": 100 + index % 64}),
        "langfuse.observation.metadata.ls_provider": "openai",
        "langfuse.trace.name": "research",
    }


DIALECTS: dict[str, Callable[..., Attributes]] = {
    "scepsy": scepsy,
    "opentelemetry": opentelemetry,
    "openinference": openinference,
    "traceloop": traceloop,
    "langfuse": langfuse,
}


def requests(dialect: Callable[..., Attributes], spans: int) -> Iterator[dict[str, Any]]:
    """Export requests of PER_LINE spans: executions of a root, three agents and their calls, in the order of ends."""
    base = 1_790_000_000_000_000_000
    line = []
    for index in range(spans):
        execution, place = divmod(index, PER_EXECUTION)
        # Spans are written when they end: calls, then the agents above them, the root last.
        number = PER_EXECUTION - 1 - place
        parent = "" if number == 0 else f"{execution:08x}{0 if number < 4 else 1 + number % 3:08x}"
        start = base + execution * 1_000_000 + number * 30_000_000 * (number >= 4)
        length = 25_000_000 if number >= 4 else 700_000_000
        line.append(
            {
                "traceId": f"{execution:032x}",
                "spanId": f"{execution:08x}{number:08x}",
                **({"parentSpanId": parent} if parent else {}),
                "flags": 256,
                "name": "chat meta-llama/Llama-3.1-8B-Instruct" if number >= 4 else "invoke_agent solver",
                "kind": 3 if number >= 4 else 1,
                "startTimeUnixNano": str(start),
                "endTimeUnixNano": str(start + length),
                "attributes": [
                    {"key": key, "value": _any(value)} for key, value in dialect(index, call=number >= 4).items()
                ],
                "status": {},
            }
        )
        if len(line) == PER_LINE or index == spans - 1:
            yield {
                "resourceSpans": [
                    {
                        "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "agent"}}]},
                        "scopeSpans": [{"scope": {"name": "bench", "version": "1"}, "spans": line}],
                    }
                ]
            }
            line = []


def _any(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_any(item) for item in value]}}
    return {"stringValue": value}


def write(path: Path, dialect: Callable[..., Attributes], spans: int) -> None:
    """A file of OTLP/JSON lines."""
    with path.open("wb") as out:
        for request in requests(dialect, spans):
            out.write(msgspec.json.encode(request) + b"\n")


def write_protobuf(source: Path, target: Path) -> None:
    """The same requests as the Collector writes them in protobuf."""
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, TracesData

    def value_of(written: dict[str, Any]) -> AnyValue:
        ((kind, value),) = written.items()
        match kind:
            case "stringValue":
                return AnyValue(string_value=value)
            case "intValue":
                return AnyValue(int_value=int(value))
            case "boolValue":
                return AnyValue(bool_value=value)
            case "doubleValue":
                return AnyValue(double_value=value)
            case _:
                return AnyValue(array_value=ArrayValue(values=map(value_of, value["values"])))

    def attributes_of(written: list[dict[str, Any]]) -> list[KeyValue]:
        return [KeyValue(key=pair["key"], value=value_of(pair["value"])) for pair in written]

    with source.open("rb") as lines, target.open("wb") as out:
        for line in lines:
            (groups,) = json.loads(line).values()
            (group,) = groups
            (inner,) = group["scopeSpans"]
            spans = [
                Span(
                    trace_id=bytes.fromhex(span["traceId"]),
                    span_id=bytes.fromhex(span["spanId"]),
                    parent_span_id=bytes.fromhex(span.get("parentSpanId", "")),
                    flags=span["flags"],
                    name=span["name"],
                    kind=span["kind"],
                    start_time_unix_nano=int(span["startTimeUnixNano"]),
                    end_time_unix_nano=int(span["endTimeUnixNano"]),
                    attributes=attributes_of(span["attributes"]),
                )
                for span in inner["spans"]
            ]
            resource = Resource(attributes=attributes_of(group["resource"]["attributes"]))
            scope = ScopeSpans(scope=InstrumentationScope(**inner["scope"]), spans=spans)
            message = TracesData(resource_spans=[ResourceSpans(resource=resource, scope_spans=[scope])])
            encoded = message.SerializeToString()
            out.write(len(encoded).to_bytes(4) + encoded)


def child(what: str, path: Path) -> None:
    """Parse, read or add up one file in this process, and print seconds, peak memory and what came out."""
    from scepsy.traces import Tally, iter_executions
    from scepsy_optimizer.totals import total

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    tally = Tally()
    begin = time.process_time()
    if what == "plain":
        count = 0
        with path.open("rb") as lines:
            for line in lines:
                json.loads(line)
                count += 1
    elif what == "read":
        count = sum(len(execution.calls) for execution in iter_executions([path], tally))
    else:
        count = total(iter_executions([path], tally)).calls
    seconds = time.process_time() - begin
    assert not tally.dropped, tally.dropped
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, count]))


def measure(what: str, path: Path) -> tuple[float, float, int]:
    """Seconds, GiB and count of `child` in a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.read_traces", "--child", what, str(path)]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True)
    seconds, gib, count = json.loads(shown.stdout)
    return seconds, gib, count


def main(argv: list[str]) -> int:
    """Print the table; 1 if a bound is missed."""
    if argv[:1] == ["--child"]:
        child(argv[1], Path(argv[2]))
        return 0
    spans = int(argv[0]) if argv else SPANS
    bounds: list[Bound] = []
    speeds: dict[str, float] = {}
    print(f"{spans:,} spans, one core; bound {BOUND_TIME} x plain json, {BOUND_GIB} GiB")
    print(f"{'dialect':>15} {'MB':>6} {'json.loads s':>13} {'read s':>8} {'ratio':>6} {'spans/s':>9} {'peak GiB':>9}")
    with tempfile.TemporaryDirectory() as directory:
        for name, dialect in DIALECTS.items():
            path = Path(directory) / f"{name}.jsonl"
            write(path, dialect, spans)
            plain_s, _, _ = measure("plain", path)
            rows = [(name, path)]
            if dialect is opentelemetry:
                rows.append(("protobuf", Path(directory) / f"{name}.pb"))
                write_protobuf(path, rows[1][1])
            for label, file in rows:
                read_s, gib, calls = measure("read", file)
                ratio = read_s / plain_s
                assert calls == sum(PER_EXECUTION - 1 - index % PER_EXECUTION >= 4 for index in range(spans))
                speeds[label] = spans / read_s
                bounds.append(Bound(name=f"{label}: times json.loads", value=ratio, at_most=BOUND_TIME))
                bounds.append(Bound(name=f"{label}: peak GiB", value=gib, at_most=BOUND_GIB))
                print(
                    f"{label:>15} {file.stat().st_size / 1e6:6.0f} {plain_s:13.1f} {read_s:8.1f} {ratio:6.2f} "
                    f"{spans / read_s:9,.0f} {gib:9.2f}"
                )
                file.unlink()
        print("totals of the executions: spans, seconds, peak GiB")
        peaks = {}
        for number in (spans // 10, spans):
            path = Path(directory) / "totals.jsonl"
            write(path, scepsy, number)
            seconds, peaks[number], _ = measure("totals", path)
            print(f"{number:>15,} {seconds:8.1f} {peaks[number]:9.2f}")
        bounds.append(Bound(name="totals: peak GiB", value=peaks[spans], at_most=BOUND_GIB))
        growth = peaks[spans] / peaks[spans // 10]
        bounds.append(Bound(name="totals: peak at ten times the spans", value=growth, at_most=BOUND_GROWTH))
    return finish("read_traces", bounds, {"spans": spans, "spans_per_s": speeds})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
