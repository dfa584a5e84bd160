import asyncio
import base64
import contextlib
import gzip
import io
import json
import re

import aiohttp
import openai
import pytest
from aiohttp import web
from yarl import URL

from scepsy.deployment.affinity import Affinity
from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.forward import MAX_BODY_BYTES, client, server_options
from scepsy.deployment.gateway import Gateway, form_model


class Worker:
    """A replica that says what it received, byte for byte, or does what the request's `do` asks for."""

    def __init__(self):
        self.seen = []
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    async def handle(self, request):
        body = await request.read()
        self.seen.append((request.method, request.raw_path, request.raw_headers, body))
        do = _do(body)
        if do == "die":
            request.transport.abort()
            return web.Response()
        if do == "hang":
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if do in ("stream", "stream and die", "stream and hang"):
            return await self.stream(request, do)
        if do == "gzip":
            return web.Response(body=gzip.compress(b"packed"), headers={"Content-Encoding": "gzip"})
        if do == "empty":
            return web.Response(status=204)
        if do == "headers":
            answer = web.Response(status=418, reason="Short And Stout", text="x")
            answer.headers.add("Set-Cookie", "a=1")
            answer.headers.add("Set-Cookie", "b=2")
            answer.headers["Server"] = "vllm/1"
            answer.headers["X-Request-Id"] = "r1"
            answer.headers["Keep-Alive"] = "timeout=5"
            return answer
        headers = [(name.decode(), value.decode("latin-1")) for name, value in request.raw_headers]
        return web.json_response(
            {
                "method": request.method,
                "path": request.raw_path,
                "headers": headers,
                "body": base64.b64encode(body).decode(),
            }
        )

    async def stream(self, request, do):
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: one\n\n")
        try:
            await self.release.wait()
            if do == "stream and hang":
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if do == "stream and die":
            request.transport.abort()
            return answer
        await answer.write(b"data: two\n\n")
        return answer


def _do(body):
    try:
        return json.loads(body).get("do")
    except (ValueError, AttributeError):
        return None


@contextlib.asynccontextmanager
async def listening(handler):
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, **server_options())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Stage:
    """A gateway over workers: `small` has two replicas, `big/one` has one."""

    def __init__(self):
        self.workers = {name: Worker() for name in ("small-0", "small-1", "big-0")}
        self.backends = {}
        self.pools = {}
        self.url = ""

    async def post(self, session, body, path="/v1/chat/completions", **options):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        return await session.post(URL(self.url + path, encoded=True), data=data, **options)


@pytest.fixture
async def stage(request):
    stage = Stage()
    async with contextlib.AsyncExitStack() as stack:
        for name, worker in stage.workers.items():
            url = await stack.enter_async_context(listening(worker.handle))
            llm = "small" if name.startswith("small") else "big/one"
            stage.backends[name] = Backend(id=name, llm=llm, url=url, ready=True)
        session = await stack.enter_async_context(client())
        for llm in ("small", "big/one"):
            backends = [backend for backend in stage.backends.values() if backend.llm == llm]
            stage.pools[llm] = Pool(backends, wait_s=0.1)
        models = {llm: {"id": llm, "object": "model", "created": 1, "owned_by": "scepsy"} for llm in stage.pools}
        options = getattr(request, "param", {})
        stage.gateway = Gateway(stage.pools, session, models=models, status=lambda: {"name": "test"}, **options)
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        stage.gateway.add_routes(app)
        runner = web.AppRunner(app, shutdown_timeout=0.1, **server_options())
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stage.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield stage


@pytest.fixture
async def session():
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


BODIES = {
    "vllm extras": b'{"model":"small","vllm_xargs":{"a":1},"top_k":3,"kv_transfer_params":{},"zzz":[null]}',
    "reasoning history": b'{"model":"small","messages":[{"role":"assistant","reasoning":"r","reasoning_content":"c"}]}',
    "tool message": b'{"model":"small","messages":[{"role":"tool","name":"f","content":null,"tool_call_id":"1"}]}',
    "strict tool": b'{"model":"small","tools":[{"type":"function","function":{"name":"f","strict":true}}]}',
    "image parts": b'{"model":"small","messages":[{"content":[{"type":"image_url","image_url":{},"uuid":"x"}]}]}',
    "structural tag": b'{"model":"small","response_format":{"type":"structural_tag","structures":[]}}',
    "hot and custom role": b'{"model":"small","temperature":3.0,"messages":[{"role":"critic","content":"x"}]}',
    "token ids": b'{"model":"small","prompt":[1,2,3]}',
    "spaces, order and number forms": b'{ "z" : 1.0e0,\n "model":"small" , "a": 1E+2, "a": 2 }',
    "escaped name": b'{"\\u006dodel":"sm\\u0061ll"}',
    "raw unicode": '{"model":"small","x":"žluťoučký 🐎"}'.encode(),
    "not a number": b'{"model":"small","temperature":NaN}',
    "large": b'{"x":"' + b"y" * 1_500_000 + b'","model":"small"}',
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses?x=%2F&y=a+b"])
async def test_bodies_pass_byte_for_byte(stage, session, name, path):
    data = io.BytesIO(BODIES[name]) if name == "large" else BODIES[name]
    async with await stage.post(session, data, path) as answer:
        seen = await answer.json()
        assert answer.status == 200
        assert answer.headers["x-scepsy-replica"].startswith("small-")
    assert base64.b64decode(seen["body"]) == BODIES[name]
    assert (seen["method"], seen["path"]) == ("POST", path)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/embeddings", "/tokenize", "/score", "/pooling", "/v1/messages", "/a%20b//c/../d"]
)
async def test_every_path_is_forwarded(stage, path):
    # By a socket: clients tidy paths before they send them.
    raw = await _raw(stage, f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 17\r\n\r\n" + '{"model":"small"}')
    assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
    assert {seen[1] for worker in stage.workers.values() for seen in worker.seen} == {path}


async def test_request_headers_pass_all_but_those_of_the_connection(stage):
    sent = (
        "POST /v1/x HTTP/1.1\r\nHost: gateway:1\r\nContent-Length: 17\r\nAuthorization: Bearer t\r\n"
        "traceparent: 00-1-2-01\r\nbaggage: " + "k=v," * 5000 + "a=b\r\nX-Session-Id: s\r\nX-Twice: 1\r\nX-Twice: 2\r\n"
        "Accept-Encoding: gzip\r\nCookie: c=1\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nTE: trailers\r\n"
        'Keep-Alive: 5\r\nProxy-Authorization: p\r\n\r\n{"model":"small"}'
    )
    await _raw(stage, sent)
    ((_, _, headers, _),) = (seen for worker in stage.workers.values() for seen in worker.seen)
    got = [(name.decode(), value.decode()) for name, value in headers]
    assert sorted(got) == sorted(
        [
            ("Host", "gateway:1"),
            ("Content-Length", "17"),
            ("Authorization", "Bearer t"),
            ("traceparent", "00-1-2-01"),
            ("baggage", "k=v," * 5000 + "a=b"),
            ("X-Session-Id", "s"),
            ("X-Twice", "1"),
            ("X-Twice", "2"),
            ("Accept-Encoding", "gzip"),
            ("Cookie", "c=1"),
        ]
    )


async def test_answers_pass_unchanged(stage, session):
    async with await stage.post(session, {"model": "small", "do": "headers"}) as answer:
        assert (answer.status, answer.reason, await answer.text()) == (418, "Short And Stout", "x")
        assert answer.headers.getall("Set-Cookie") == ["a=1", "b=2"]
        assert (answer.headers["Server"], answer.headers["X-Request-Id"]) == ("vllm/1", "r1")
        assert "Keep-Alive" not in answer.headers
        assert answer.headers["Content-Length"] == "1"
    async with await stage.post(session, {"model": "small", "do": "gzip"}) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(await answer.read()) == b"packed"
    async with await stage.post(session, {"model": "small", "do": "empty"}) as answer:
        assert (answer.status, await answer.read()) == (204, b"")


async def test_a_client_that_expects_to_be_told_to_continue(stage):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stage.url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 17\r\nExpect: 100-continue\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b'{"model":"small"}')
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()


async def test_a_body_in_chunks_and_an_answer_without_one(stage):
    chunks = '6\r\n{"mode\r\nb\r\nl":"small"}\r\n0\r\n\r\n'
    raw = await _raw(stage, f"POST /v1/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}")
    assert raw.startswith(b"HTTP/1.1 200")
    (seen,) = (seen for worker in stage.workers.values() for seen in worker.seen)
    assert seen[3] == b'{"model":"small"}'
    raw = await _raw(stage, "HEAD /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", head=True)
    assert raw.endswith(b"\r\n\r\n")
    stage.gateway._pools.pop("big/one")
    raw = await _raw(stage, "HEAD /version HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", head=True)
    assert raw.startswith(b"HTTP/1.1 200")
    assert raw.endswith(b"\r\n\r\n")


async def test_old_clients_get_the_end_by_the_close(stage):
    for worker in stage.workers.values():
        worker.release.set()
    body = '{"model":"small","do":"stream"}'
    raw = await _raw(stage, f"POST /v1/x HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}")
    assert raw.endswith(b"\r\n\r\ndata: one\n\ndata: two\n\n")


async def test_a_stream_passes_at_once(stage, session):
    async with await stage.post(session, {"model": "small", "do": "stream"}) as answer:
        # The worker holds the second event until it is told: the first one is here alone.
        assert await asyncio.wait_for(answer.content.readany(), 2) == b"data: one\n\n"
        assert answer.headers["Content-Type"] == "text/event-stream"
        stage.workers[answer.headers["x-scepsy-replica"]].release.set()
        assert await answer.content.readany() == b"data: two\n\n"


async def test_a_worker_lost_in_the_middle_breaks_the_answer(stage, session):
    for worker in stage.workers.values():
        worker.release.set()
    async with await stage.post(session, {"model": "small", "do": "stream and die"}) as answer:
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    assert sum(len(worker.seen) for worker in stage.workers.values()) == 1
    assert all(backend.outstanding == 0 for backend in stage.backends.values())


@pytest.mark.parametrize("do", ["hang", "stream and hang"])
async def test_a_client_that_leaves_is_passed_on(stage, session, do):
    asked = asyncio.create_task(stage.post(session, {"model": "big/one", "do": do}))
    worker = stage.workers["big-0"]
    async with asyncio.timeout(5):
        while not worker.seen:  # noqa: ASYNC110 - the worker counts, it does not tell
            await asyncio.sleep(0.01)
        if do != "hang":
            (await asked).close()
        else:
            asked.cancel()
        await worker.cancelled.wait()
        while stage.backends["big-0"].outstanding:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)
    if do == "hang":
        with pytest.raises(asyncio.CancelledError):
            await asked


async def test_a_dead_replica_costs_nothing_while_another_lives(stage, session):
    stage.backends["small-0"].url = "http://127.0.0.1:9"
    for _ in range(4):
        async with await stage.post(session, {"model": "small"}) as answer:
            assert (answer.status, answer.headers["x-scepsy-replica"]) == (200, "small-1")


async def test_an_answer_lost_before_its_first_byte_is_asked_for_once_more(stage, session):
    async with await stage.post(session, {"model": "small", "do": "die"}) as answer:
        assert answer.status == 502
        assert "ended while answering" in (await answer.json())["error"]["message"]
    # Each replica has seen it once; a third would not have.
    assert [len(stage.workers[name].seen) for name in ("small-0", "small-1")] == [1, 1]


async def test_a_model_without_a_ready_replica(stage, session):
    for name in ("small-0", "small-1"):
        stage.backends[name].ready = False
    async with await stage.post(session, {"model": "small"}) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
        assert (await answer.json())["error"]["message"] == "no replica of `small` is ready"
    async with session.get(f"{stage.url}/health") as answer:
        assert (answer.status, (await answer.json())["without_replica"]) == (503, ["small"])
    async with await stage.post(session, {"model": "big/one"}) as answer:
        assert answer.status == 200


async def test_requests_wait_a_while_for_a_replica(stage, session):
    stage.pools["small"].wait_s = 5
    for name in ("small-0", "small-1"):
        stage.backends[name].ready = False
    asked = asyncio.create_task(stage.post(session, {"model": "small"}))
    await asyncio.sleep(0.05)
    stage.backends["small-1"].ready = True
    stage.pools["small"].changed()
    async with await asked as answer:
        assert (answer.status, answer.headers["x-scepsy-replica"]) == (200, "small-1")


async def test_unknown_and_unnamed_models(stage, session):
    async with await stage.post(session, {"model": "nobody"}) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["type"], error["code"]) == (404, "NotFoundError", 404)
        assert "There are: small, big/one." in error["message"]
    for body in (b"", b"{", b"[]", b'{"model": 3}', b"[" * 100_000):
        async with await stage.post(session, body) as answer:
            assert answer.status == 400
    async with openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="x", max_retries=0) as user:
        with pytest.raises(openai.NotFoundError):
            await user.chat.completions.create(model="nobody", messages=[])
    assert not any(worker.seen for worker in stage.workers.values())


async def test_forms_name_their_model(stage, session):
    form = aiohttp.FormData({"model": "big/one"})
    form.add_field("file", b"\x00\xffsound", filename="a.wav")
    async with session.post(f"{stage.url}/v1/audio/transcriptions", data=form) as answer:
        seen = await answer.json()
        assert answer.headers["x-scepsy-replica"] == "big-0"
    assert b"\x00\xffsound" in base64.b64decode(seen["body"])
    assert form_model(b"--x\r\n", "multipart/form-data") is None


async def test_load_is_spread_by_what_is_outstanding_and_weight(stage, session):
    stage.backends["small-0"].weight, stage.backends["small-1"].weight = 0.25, 0.75
    asked = [asyncio.create_task(stage.post(session, {"model": "small", "do": "hang"})) for _ in range(16)]
    async with asyncio.timeout(5):
        while sum(len(worker.seen) for worker in stage.workers.values()) < 16:  # noqa: ASYNC110 - it counts only
            await asyncio.sleep(0.01)
    assert (stage.backends["small-0"].outstanding, stage.backends["small-1"].outstanding) == (4, 12)
    for worker in stage.workers.values():
        worker.release.set()
    for one in asked:
        (await one).close()


async def test_its_own_pages(stage, session):
    async with openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="x") as user:
        assert [model.id for model in (await user.models.list()).data] == ["small", "big/one"]
        assert (await user.models.retrieve("big/one")).owned_by == "scepsy"
        with pytest.raises(openai.NotFoundError):
            await user.models.retrieve("nobody")
    (await stage.post(session, {"model": "small"})).close()
    (await stage.post(session, {"model": "small"})).close()
    async with session.get(f"{stage.url}/health") as health, session.get(f"{stage.url}/scepsy/status") as status:
        assert (health.status, await status.json()) == (200, {"name": "test"})
    async with session.get(f"{stage.url}/metrics") as answer:
        text = await answer.text()
    counted = re.findall(r'scepsy_gateway_requests_total\{llm="small",replica="(.*)",status="200"\} 1\.0', text)
    assert sorted(counted) == ["small-0", "small-1"]
    assert 'scepsy_gateway_request_seconds_count{llm="small"} 2.0' in text
    assert 'scepsy_gateway_ready{llm="big/one",replica="big-0"} 1.0' in text
    assert 'scepsy_gateway_outstanding{llm="small",replica="small-0"} 0.0' in text


async def test_draining_finishes_some_and_breaks_off_the_rest(stage, session):
    quick = await stage.post(session, {"model": "small", "do": "stream"})
    slow = await stage.post(session, {"model": "big/one", "do": "stream and hang"})
    drain = asyncio.create_task(stage.gateway.drain(0.3))
    await asyncio.sleep(0.05)
    async with await stage.post(session, {"model": "small"}) as answer:
        assert answer.status == 503
    for worker in stage.workers.values():
        worker.release.set()
    assert await quick.read() == b"data: one\n\ndata: two\n\n"
    await drain
    with pytest.raises(aiohttp.ClientPayloadError):
        await slow.read()
    quick.close()
    slow.close()


async def _raw(stage, text, *, head=False):
    """Send bytes, half-close nothing, read all that comes until a complete answer or the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stage.url.rsplit(":", 1)[1]), limit=1 << 22)
    writer.write(text.encode())
    await writer.drain()
    start = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = None if head else re.search(rb"Content-Length: (\d+)", start)
    body = await asyncio.wait_for(reader.readexactly(int(length[1])) if length else reader.read(), 5)
    writer.close()
    await writer.wait_closed()
    return start + body


@pytest.mark.parametrize("stage", [{"affinity": Affinity.parsed("session:x-session-id")}], indirect=True)
async def test_a_session_meets_the_same_replica(stage, session):
    for name in ("one", "two", "three"):
        headers = {"X-Session-ID": name}
        answers = [await stage.post(session, {"model": "small"}, headers=headers) for _ in range(4)]
        assert len({answer.headers["x-scepsy-replica"] for answer in answers}) == 1


@pytest.mark.parametrize("stage", [{"api_key": "s3cret"}], indirect=True)
async def test_a_key_is_asked_for_and_goes_no_further(stage, session):
    for given in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer \xff"}):
        answer = await stage.post(session, {"model": "small"}, headers=given)
        assert answer.status == 401
        assert (await session.get(f"{stage.url}/v1/models", headers=given)).status == 401
    assert not any(worker.seen for worker in stage.workers.values())
    answer = await stage.post(session, {"model": "small"}, headers={"Authorization": "Bearer s3cret", "X-Other": "1"})
    assert answer.status == 200
    sent = dict((await answer.json())["headers"])
    assert "Authorization" not in sent
    assert sent["X-Other"] == "1"
    # What watches the endpoint has no key.
    for path in ("/health", "/metrics", "/scepsy/status"):
        assert (await session.get(stage.url + path)).status == 200
