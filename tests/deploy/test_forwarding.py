"""What goes through the endpoint unchanged, and what does not, through the gateway alone and behind HAProxy."""

import asyncio
import base64
import gzip
import io

import aiohttp
import openai
import pytest

from scepsy.deployment.naming import form_model

pytestmark = pytest.mark.parametrize("stage", [{}, {"front": True}], ids=["gateway", "haproxy"], indirect=True)

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


PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses?x=%2F&y=a+b",
    "/v1/messages",
    "/v1/embeddings",
    "/rerank",
    "/v1/rerank",
    "/score",
    "/pooling",
    "/tokenize",
    "/inference/v1/generate",
    "/a%20b//c/../d",
]


async def test_bodies_pass_byte_for_byte(stage, session):
    for path in PATHS[:4]:
        for name, sent in BODIES.items():
            data = io.BytesIO(sent) if name == "large" else sent
            async with await stage.post(session, data, path) as answer:
                seen = await answer.json()
                assert answer.status == 200, name
                assert answer.headers["x-scepsy-replica"].startswith("small-")
            assert base64.b64decode(seen["body"]) == sent, name
            assert (seen["method"], seen["path"]) == ("POST", path)


async def test_every_path_is_forwarded(stage):
    # By a socket: clients tidy paths before they send them.
    for path in PATHS:
        raw = await stage.raw(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 17\r\n\r\n" + '{"model":"small"}')
        assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
    assert [seen[1] for seen in sorted(stage.seen, key=lambda seen: PATHS.index(seen[1]))] == PATHS


async def test_request_headers_pass_all_but_those_of_the_connection(stage):
    sent = (
        "POST /v1/x HTTP/1.1\r\nHost: gateway:1\r\nContent-Length: 17\r\nAuthorization: Bearer t\r\n"
        "traceparent: 00-1-2-01\r\nbaggage: " + "k=v," * 5000 + "a=b\r\nX-Session-Id: s\r\nX-Twice: 1\r\nX-Twice: 2\r\n"
        "Accept-Encoding: gzip\r\nCookie: c=1\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nTE: trailers\r\n"
        'Keep-Alive: 5\r\nProxy-Authorization: p\r\n\r\n{"model":"small"}'
    )
    await stage.raw(sent)
    ((_, _, headers, _),) = stage.seen
    got = [(name.decode().lower(), value.decode()) for name, value in headers]
    assert sorted(got) == sorted(
        [
            ("host", "gateway:1"),
            ("content-length", "17"),
            ("authorization", "Bearer t"),
            ("traceparent", "00-1-2-01"),
            ("baggage", "k=v," * 5000 + "a=b"),
            ("x-session-id", "s"),
            ("x-twice", "1"),
            ("x-twice", "2"),
            ("accept-encoding", "gzip"),
            ("cookie", "c=1"),
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
    raw = await stage.raw(f"POST /v1/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}")
    assert raw.startswith(b"HTTP/1.1 200")
    (seen,) = stage.seen
    assert seen[3] == b'{"model":"small"}'
    raw = await stage.raw("HEAD /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", head=True)
    assert raw.endswith(b"\r\n\r\n")
    stage.gateway._pools.pop("big/one")
    raw = await stage.raw("HEAD /version HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", head=True)
    assert raw.startswith(b"HTTP/1.1 200")
    assert raw.endswith(b"\r\n\r\n")


async def test_old_clients_get_the_end_by_the_close(stage):
    stage.release()
    body = '{"model":"small","do":"stream"}'
    raw = await stage.raw(f"POST /v1/x HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}")
    assert raw.endswith(b"\r\n\r\ndata: one\n\ndata: two\n\n")


async def test_a_stream_passes_at_once(stage, session):
    async with await stage.post(session, {"model": "small", "do": "stream"}) as answer:
        # The worker holds the second event until it is told: the first one is here alone.
        assert await asyncio.wait_for(answer.content.readany(), 2) == b"data: one\n\n"
        assert answer.headers["Content-Type"] == "text/event-stream"
        stage.workers[answer.headers["x-scepsy-replica"]].release.set()
        assert await answer.content.readany() == b"data: two\n\n"


async def test_a_worker_lost_in_the_middle_breaks_the_answer(stage, session):
    stage.release()
    async with await stage.post(session, {"model": "small", "do": "stream and die"}) as answer:
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    assert len(stage.seen) == 1
    assert all(backend.outstanding == 0 for backend in stage.backends.values())


@pytest.mark.parametrize("do", ["hang", "stream and hang"])
async def test_a_client_that_leaves_is_passed_on(stage, session, do):
    asked = asyncio.create_task(stage.post(session, {"model": "big/one", "do": do}))
    worker = stage.workers["big-0"]
    async with asyncio.timeout(5):
        while not worker.posted:  # noqa: ASYNC110 - the worker counts, it does not tell
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
    assert not stage.seen


async def test_forms_name_their_model(stage, session):
    form = aiohttp.FormData({"model": "big/one"})
    form.add_field("file", b"\x00\xffsound", filename="a.wav")
    async with session.post(f"{stage.url}/v1/audio/transcriptions", data=form) as answer:
        seen = await answer.json()
        assert answer.headers["x-scepsy-replica"] == "big-0"
    assert b"\x00\xffsound" in base64.b64decode(seen["body"])
    assert form_model(b"--x\r\n", "multipart/form-data") is None


async def test_draining_finishes_some_and_breaks_off_the_rest(stage, session):
    quick = await stage.post(session, {"model": "small", "do": "stream"})
    slow = await stage.post(session, {"model": "big/one", "do": "stream and hang"})
    drain = asyncio.create_task(stage.endpoint.drain(0.3))
    await asyncio.sleep(0.05)
    async with await stage.post(session, {"model": "small"}) as answer:
        assert answer.status == 503
    stage.release()
    assert await quick.read() == b"data: one\n\ndata: two\n\n"
    await drain
    with pytest.raises(aiohttp.ClientPayloadError):
        await slow.read()
    quick.close()
    slow.close()
