import asyncio
import gzip
import json
import os
import signal
import socket
import subprocess
import sys

import aiohttp
import pytest
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from scepsy.collect import collecting
from scepsy.collect.store import FullError
from scepsy.traces import read_executions
from scepsy_optimizer.errors import ScepsyError


def lines(directory):
    return [json.loads(line) for path in sorted(directory.iterdir()) for line in path.read_text().splitlines()]


def span_request(number, size=0):
    span = {
        "traceId": f"{number + 1:032x}",
        "spanId": f"{number + 1:016x}",
        "name": "chat",
        "startTimeUnixNano": "1000000000",
        "endTimeUnixNano": "2000000000",
        "attributes": [{"key": "note", "value": {"stringValue": "x" * size}}],
    }
    return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode()


def run_agent(endpoint, compression):
    """A workflow with two calls, traced by OpenTelemetry's own SDK and exporter."""
    exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", compression=compression)
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("my.agent")
    with tracer.start_as_current_span("invoke_workflow w", attributes={"gen_ai.operation.name": "invoke_workflow"}):
        for model in ("a", "b"):
            attributes = {
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": 7,
                "gen_ai.usage.output_tokens": 3,
                "gen_ai.input.messages": "secret",
            }
            with tracer.start_as_current_span(f"chat {model}", attributes=attributes):
                pass
    provider.shutdown()


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip])
async def test_what_the_usual_exporter_sends_can_be_read(tmp_path, compression):
    async with collecting(tmp_path, port=0) as counts:
        await asyncio.gather(*(asyncio.to_thread(run_agent, counts.url, compression) for _ in range(3)))
    assert (counts.spans, counts.calls, counts.files) == (9, 0, 1)
    reading = read_executions([tmp_path])
    assert len(reading.executions) == 3
    for execution in reading.executions:
        assert [(span.call.llm, span.call.input_tokens) for span in execution.calls] == [("a", 7), ("b", 7)]
    assert not any("secret" in path.read_text() for path in tmp_path.iterdir())


async def test_json_from_many_senders_is_kept_whole_and_rotated(tmp_path):
    async with collecting(tmp_path, port=0, file_bytes=20_000) as counts, aiohttp.ClientSession() as session:

        async def send(number):
            body, headers = span_request(number, 100), {"Content-Type": "application/json"}
            if number % 2:
                body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
            async with session.post(f"{counts.url}/v1/traces", data=body, headers=headers) as answer:
                assert (answer.status, await answer.json()) == (200, {})

        await asyncio.gather(*(send(number) for number in range(300)))
    assert counts.spans == 300
    assert counts.files > 3
    ids = {line["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["traceId"] for line in lines(tmp_path)}
    assert len(ids) == 300
    assert all(path.stat().st_size <= 20_000 for path in tmp_path.iterdir())


async def test_errors_say_what_is_wrong_in_the_senders_encoding(tmp_path):
    protobuf, plain = "application/x-protobuf", "application/json"
    async with collecting(tmp_path, port=0) as counts, aiohttp.ClientSession() as session:
        url = f"{counts.url}/v1/traces"
        for content_type, body, status, message in (
            (plain, b"{", 400, b"not an OTLP/JSON trace request"),
            (protobuf, b"\xff", 400, b"not an OTLP protobuf trace request"),
            ("text/plain", b"x", 415, b"'text/plain' is not OTLP"),
        ):
            async with session.post(url, data=body, headers={"Content-Type": content_type}) as answer:
                assert answer.status == status
                assert message in await answer.read()
                assert answer.content_type == (content_type if content_type == protobuf else plain)
        headers = {"Content-Type": plain, "Content-Encoding": "br"}
        async with session.post(url, data=b"x", headers=headers) as answer:
            assert answer.status == 400
        for path in ("/v1/metrics", "/v1/logs"):
            async with session.post(counts.url + path, data=b"x", headers={"Content-Type": protobuf}) as answer:
                assert (answer.status, await answer.read()) == (200, b"")
    assert list(tmp_path.iterdir()) == []


async def test_what_cannot_be_written_stays_with_its_sender(tmp_path, monkeypatch, caplog):
    from scepsy.collect.store import TraceStore

    real = TraceStore.write
    errors = [FullError(), OSError(28, "No space left on device")]

    async def write(self, line):
        if errors:
            raise errors.pop(0)
        await real(self, line)

    monkeypatch.setattr(TraceStore, "write", write)
    async with collecting(tmp_path, port=0) as counts, aiohttp.ClientSession() as session:
        statuses = []
        for _ in range(3):
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{counts.url}/v1/traces", data=span_request(0), headers=headers) as answer:
                statuses.append((answer.status, answer.headers.get("Retry-After")))
    assert statuses == [(503, "1"), (503, "1"), (200, None)]
    assert len(lines(tmp_path)) == counts.spans == 1
    assert "No space left on device" in caplog.text


def test_the_command_runs_until_it_is_told(tmp_path):
    code = (
        "import sys\nfrom scepsy.collect import collect\n"
        "counts = collect(sys.argv[1], port=0, on_ready=lambda url: print(url, flush=True))\n"
        "print(counts.spans, counts.files, flush=True)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        run_agent(process.stdout.readline().strip(), Compression.Gzip)
        os.kill(process.pid, signal.SIGTERM)
        shown, errors = process.communicate(timeout=10)
        assert (process.returncode, shown, errors) == (0, "3 1\n", "")
    assert len(read_executions([tmp_path]).executions) == 1


async def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ScepsyError, match=f"cannot listen on 127.0.0.1:{port}: it is in use; give another --port"):
            async with collecting(tmp_path, port=port):
                pass
