import asyncio
import contextlib
import json

import aiohttp
import openai
import pytest
from aiohttp import web

from scepsy.collect import collecting
from scepsy.collect.calls import Recorder
from scepsy.collect.joining import Joiner
from scepsy.collect.store import TraceStore
from scepsy.traces import read_executions
from scepsy_optimizer.errors import ScepsyError

HELLO = [{"role": "user", "content": "a secret question"}]
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Server:
    """An OpenAI-compatible server that answers at its own pace and remembers what it was sent."""

    def __init__(self):
        self.seen = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.late_s = 0.0
        """What passes between the last piece of a stream and its end."""

    async def handle(self, request):
        body = await request.read()
        self.seen.append((request.raw_path, dict(request.headers), body))
        asked = json.loads(body) if body else {}
        usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
        head = {"id": f"r{len(self.seen)}", "model": asked.get("model"), "created": 1}
        if asked.get("model") == "broken":
            return web.json_response({"error": {"message": "no", "type": "x", "code": 500}}, status=500)
        if request.path.endswith("/embeddings"):
            data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
            return web.json_response({**head, "object": "list", "data": data, "usage": {"prompt_tokens": 5}})
        if not asked.get("stream"):
            await self.hold.wait()
            message = {"role": "assistant", "content": "an answer"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for text in ("", "an", " answer", "."):
            await asyncio.sleep(0.02)
            delta = {"content": text} if text else {"role": "assistant", "content": ""}
            await self.send(response, {**head, "choices": [{"index": 0, "delta": delta}]})
            await self.hold.wait()
        if (asked.get("stream_options") or {}).get("include_usage"):
            await self.send(response, {**head, "choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        await asyncio.sleep(self.late_s)
        return response

    async def send(self, response, content):
        await response.write(f"data: {json.dumps({**content, 'object': 'chat.completion.chunk'})}\n\n".encode())


@contextlib.asynccontextmanager
async def proxied(directory, **options):
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        async with collecting(directory, port=0, upstream=upstream, **options) as counts:
            yield server, counts
    finally:
        await runner.cleanup()


def client(counts, **options):
    return openai.AsyncOpenAI(base_url=f"{counts.url}/v1", api_key="sk-secret", max_retries=0, **options)


def raw_spans(directory):
    found = []
    for path in directory.iterdir():
        for line in path.read_text().splitlines():
            for group in json.loads(line)["resourceSpans"]:
                found += [span for scope in group["scopeSpans"] for span in scope["spans"]]
    return found


def spans(directory):
    return [
        span | {"attributes": {pair["key"]: next(iter(pair["value"].values())) for pair in span["attributes"]}}
        for span in raw_spans(directory)
    ]


async def test_calls_of_one_client_become_an_execution(tmp_path):
    async with proxied(tmp_path) as (server, counts), client(counts) as user:
        answer = await user.chat.completions.create(model="gen", messages=HELLO)
        assert answer.choices[0].message.content == "an answer"
        await asyncio.gather(*(user.chat.completions.create(model="ver", messages=HELLO) for _ in range(2)))
        await user.embeddings.create(model="emb", input="x")
        await user.models.list()
    assert counts.calls == 4
    assert [path for path, _, _ in server.seen].count("/v1/chat/completions") == 3
    reading = read_executions([tmp_path])
    (execution,) = reading.executions
    assert execution.workflow == "unnamed"
    assert sorted((span.call.llm, span.call.input_tokens, span.call.output_tokens) for span in execution.calls) == [
        ("emb", 5, 0),
        ("gen", 11, 3),
        ("ver", 11, 3),
        ("ver", 11, 3),
    ]
    assert {span["attributes"]["scepsy.joined_by"] for span in spans(tmp_path)} == {"inferred"}
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret" not in text
    assert "answer" not in text


async def test_a_stream_is_timed_by_its_pieces(tmp_path):
    async with proxied(tmp_path) as (_, counts), client(counts) as user:
        for options in ({"include_usage": True}, None):
            stream = await user.chat.completions.create(
                model="gen", messages=HELLO, stream=True, stream_options=options or openai.omit
            )
            assert (
                "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
                == "an answer."
            )
    with_usage, without = (span for span in spans(tmp_path) if span["name"] == "chat gen")
    for span in (with_usage, without):
        first_s = span["attributes"]["gen_ai.response.time_to_first_chunk"]
        duration_s = (int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])) / 1e9
        assert 0.015 < first_s < duration_s - 0.04
        assert span["attributes"]["scepsy.output_chunks"] == "3"
    assert with_usage["attributes"]["gen_ai.usage.output_tokens"] == "3"
    assert "gen_ai.usage.output_tokens" not in without["attributes"]
    assert with_usage["attributes"]["gen_ai.response.id"] == "r1"


async def test_a_client_that_leaves_at_the_last_piece_has_its_answer(tmp_path):
    """As openai's does since its second version: it closes at [DONE], which engines send before the stream's end."""
    async with proxied(tmp_path) as (server, counts), aiohttp.ClientSession() as session:
        server.late_s = 0.3
        for _ in range(3):
            body = {"model": "gen", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
            async with session.post(f"{counts.url}/v1/chat/completions", json=body) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: [DONE]"):
                        break
                answer.close()
    found = spans(tmp_path)
    assert [span["attributes"].get("scepsy.outcome") for span in found if span["name"] == "chat gen"] == [None] * 3
    assert all(span.get("status", {}).get("code", 0) != 2 for span in found)
    calls = [span.call for execution in read_executions([tmp_path]).executions for span in execution.calls]
    assert [(call.llm, call.input_tokens, call.output_tokens) for call in calls] == [("gen", 11, 3)] * 3


async def test_headers_that_are_no_utf8_cost_nothing(tmp_path):
    async with proxied(tmp_path) as (_, counts), client(counts) as user:
        port = counts.url.rpartition(":")[2]
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        body = json.dumps({"model": "gen", "messages": HELLO}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n".encode()
        head += b"Host: h\xe9te\r\nX-Scepsy-Workflow: caf\xe9\r\nX-Session-Id: s\xe9\r\nConnection: close\r\n\r\n"
        writer.write(head + body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        await user.chat.completions.create(model="gen", messages=HELLO)
    reading = read_executions([tmp_path])
    assert sorted(execution.workflow for execution in reading.executions) == ["caf?", "unnamed"]
    assert sum(len(execution.calls) for execution in reading.executions) == 2


async def test_a_span_that_cannot_be_written_takes_no_other_with_it(tmp_path, caplog):
    recorder = Recorder(TraceStore(tmp_path))
    async with recorder.recording():
        for name in ("one", "lone \udce9", "two"):
            place = recorder._joiner.join({"x-session-id": "s"}, "", 1)
            recorder.add(place, {"traceId": place.trace, "spanId": place.parent, "name": name}, 2)
    assert [span["name"] for span in raw_spans(tmp_path) if span["name"] in ("one", "two")] == ["one", "two"]
    assert "1 spans could not be written" in caplog.text


async def test_conversations_are_executions(tmp_path):
    async with proxied(tmp_path) as (server, counts), client(counts) as user:
        for session in ("a", "b", "a"):
            headers = {"x-session-id": session, "x-scepsy-workflow": "support"}
            await user.chat.completions.create(model="gen", messages=HELLO, extra_headers=headers)
    assert all(headers["x-session-id"] in ("a", "b") for _, headers, _ in server.seen)
    executions = read_executions([tmp_path]).executions
    assert sorted(len(execution.calls) for execution in executions) == [1, 2]
    assert {execution.workflow for execution in executions} == {"support"}


async def test_traceparent_joins_and_is_passed_on_with_the_calls_own_span(tmp_path):
    async with proxied(tmp_path) as (server, counts), client(counts) as user:
        for parent in ("b7ad6b7169203331", "b7ad6b7169203332"):
            headers = {"traceparent": f"00-{TRACE}-{parent}-01"}
            await user.chat.completions.create(model="gen", messages=HELLO, extra_headers=headers)
    recorded = {span["spanId"]: span for span in spans(tmp_path)}
    assert {span["parentSpanId"] for span in recorded.values()} == {"b7ad6b7169203331", "b7ad6b7169203332"}
    for _, headers, _ in server.seen:
        version, trace, parent, flags = headers["traceparent"].split("-")
        assert (version, trace, flags) == ("00", TRACE, "01")
        assert parent in recorded
    (execution,) = read_executions([tmp_path]).executions
    assert (execution.id, len(execution.calls)) == (TRACE, 2)


async def test_calls_that_the_client_records_too_count_once(tmp_path):
    """The client's own span of a call and the proxy's of the same request are one call, timed by the client."""
    import scepsy

    async with proxied(tmp_path / "proxy") as (_, counts), client(counts) as user:
        scepsy.instrument(user, directory=tmp_path / "agent")
        try:

            @scepsy.workflow(name="mine")
            async def run():
                await user.chat.completions.create(model="gen", messages=HELLO)
                await user.chat.completions.create(model="gen", messages=HELLO)

            await run()
        finally:
            scepsy.uninstrument()
    assert counts.calls == 2
    (execution,) = read_executions([tmp_path / "proxy", tmp_path / "agent"]).executions
    assert execution.workflow == "mine"
    assert [span.call.llm for span in execution.calls] == ["gen", "gen"]
    # The proxy's files alone hold the same calls.
    (alone,) = read_executions([tmp_path / "proxy"]).executions
    assert (alone.id, len(alone.calls)) == (execution.id, 2)


async def test_failed_and_cancelled_calls_are_marked(tmp_path):
    async with proxied(tmp_path) as (server, counts), client(counts) as user:
        with pytest.raises(openai.InternalServerError):
            await user.chat.completions.create(model="broken", messages=HELLO)
        server.hold.clear()
        task = asyncio.create_task(user.chat.completions.create(model="gen", messages=HELLO))
        while len(server.seen) < 2:  # noqa: ASYNC110 - the server remembers, it does not tell
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        server.hold.set()
        await user.chat.completions.create(model="gen", messages=HELLO)
    marks = [
        (span["attributes"].get("error.type"), span["attributes"].get("scepsy.outcome"), "status" in span)
        for span in spans(tmp_path)
        if span["name"].startswith("chat")
    ]
    assert sorted(marks, key=str) == [("500", None, True), (None, "cancelled", True), (None, None, False)]
    (execution,) = read_executions([tmp_path]).executions
    assert len(execution.calls) == 1


async def test_a_server_that_cannot_be_reached(tmp_path):
    async with collecting(tmp_path, port=0, upstream="http://127.0.0.1:9") as counts, client(counts) as user:
        with pytest.raises(openai.APIStatusError, match=r"http://127.0.0.1:9 cannot be reached") as caught:
            await user.chat.completions.create(model="gen", messages=HELLO)
    assert caught.value.status_code == 502
    for wrong in ("localhost:8000", "ftp://x", "http://", "http://[x"):
        with pytest.raises(ScepsyError, match="upstream"):
            async with collecting(tmp_path, port=0, upstream=wrong):
                pass


async def test_executions_that_paused_are_written_while_it_runs(tmp_path):
    joiner = Joiner(inferred_gap_s=0.1)
    async with proxied(tmp_path, joiner=joiner) as (_, counts), client(counts) as user:
        await user.chat.completions.create(model="gen", messages=HELLO)
        async with asyncio.timeout(5):
            while not (list(tmp_path.iterdir()) and len(spans(tmp_path)) == 2):  # noqa: ASYNC110 - only files tell
                await asyncio.sleep(0.05)
        assert len(read_executions([tmp_path]).executions) == 1
        await user.chat.completions.create(model="gen", messages=HELLO)
    assert len(read_executions([tmp_path]).executions) == 2


async def test_the_receiver_and_the_proxy_share_a_port(tmp_path):
    async with proxied(tmp_path) as (server, counts), aiohttp.ClientSession() as session:
        body = b'{"resourceSpans": []}'
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{counts.url}/v1/traces", data=body, headers=headers) as answer:
            assert answer.status == 200
        assert server.seen == []
        async with session.post(f"{counts.url}/v1/tokenize?a=%2F", json={"prompt": "x"}) as answer:
            assert answer.status == 200
        ((path, headers, body),) = server.seen
        assert (path.partition("?")[0], json.loads(body)) == ("/v1/tokenize", {"prompt": "x"})
        assert headers["Host"] != counts.url.removeprefix("http://")  # as the server is called, not the proxy
    assert counts.calls == 0


async def test_every_call_that_the_server_saw_is_recorded_once(tmp_path):
    """Fifty clients at once, some of whose calls fail, are streamed, or are left in the middle."""
    async with proxied(tmp_path, file_bytes=50_000) as (server, counts), client(counts) as user:

        async def one(number):
            model = "broken" if number % 10 == 3 else f"m{number}"
            call = user.chat.completions.create(
                model=model, messages=HELLO, stream=number % 3 == 0, extra_headers={"x-session-id": str(number % 50)}
            )
            try:
                async with asyncio.timeout(0.01 if number % 7 == 0 else 30):
                    answer = await call
                    if number % 3 == 0:
                        async for _ in answer:
                            pass
            except (TimeoutError, openai.InternalServerError):
                return

        for begin in range(0, 400, 50):
            await asyncio.gather(*(one(number) for number in range(begin, begin + 50)))
        await asyncio.sleep(0.1)
        seen = [json.loads(body)["model"] for _, _, body in server.seen]
    recorded = [span for span in spans(tmp_path) if "scepsy.transport" in span["attributes"]]
    assert len(recorded) == counts.calls == len({span["spanId"] for span in recorded})
    # A client may leave before its call has reached the server; nothing else may be missing or doubled.
    unseen = [span for span in recorded if span["attributes"]["gen_ai.request.model"] not in seen]
    assert all(span["attributes"].get("scepsy.outcome") == "cancelled" for span in unseen)
    names = [span["attributes"]["gen_ai.request.model"] for span in recorded]
    assert sorted(name for name in names if name in seen) == sorted(seen)
    assert counts.files > 1
    reading = read_executions([tmp_path])
    assert len(reading.executions) == 50
