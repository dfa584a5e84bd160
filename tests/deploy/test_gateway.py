"""Who gets which request, and who gets none; by the gateway alone, and where it says `both` behind HAProxy as well."""

import asyncio
import gzip
import json
import re

import openai
import pytest

from scepsy.collect import Recorder, TraceStore
from scepsy.deployment.affinity import Affinity


def both(**options):
    return pytest.mark.parametrize(
        "stage", [options, {**options, "front": True}], ids=["gateway", "haproxy"], indirect=True
    )


async def until(check):
    async with asyncio.timeout(5):
        while not check():  # noqa: ASYNC110 - what is counted does not tell
            await asyncio.sleep(0.01)


@both()
async def test_a_dead_replica_costs_nothing_while_another_lives(stage, session):
    await stage.change("small-0", url="http://127.0.0.1:9")
    for _ in range(4):
        async with await stage.post(session, {"model": "small"}) as answer:
            assert (answer.status, answer.headers["x-scepsy-replica"]) == (200, "small-1")


@both()
async def test_an_answer_lost_before_its_first_byte_is_asked_for_once_more(stage, session):
    async with await stage.post(session, {"model": "small", "do": "die"}) as answer:
        assert answer.status == 502
        assert "ended while answering" in (await answer.json())["error"]["message"]
    # Each replica has seen it once; a third would not have.
    assert [len(stage.workers[name].posted) for name in ("small-0", "small-1")] == [1, 1]
    async with await stage.post(session, {"model": "big/one", "do": "die"}) as answer:
        assert answer.status == 502
    assert len(stage.workers["big-0"].posted) == 2


async def test_a_stream_that_was_only_promised_is_asked_for_once_more(stage, session):
    """As vLLM promises one to whoever waits in its queue."""
    async with await stage.post(session, {"model": "small", "do": "promise and die"}) as answer:
        assert answer.status == 502
        assert "ended while answering" in (await answer.json())["error"]["message"]
    assert [len(stage.workers[name].posted) for name in ("small-0", "small-1")] == [1, 1]


@both()
async def test_a_model_without_a_ready_replica(stage, session):
    for name in ("small-0", "small-1"):
        await stage.change(name, ready=False)
    async with await stage.post(session, {"model": "small"}) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
        assert (await answer.json())["error"]["message"] == "no replica of `small` is ready"
    async with session.get(f"{stage.url}/health") as answer:
        assert (answer.status, (await answer.json())["without_replica"]) == (503, ["small"])
    async with session.get(f"{stage.url}/v1/models") as answer:
        assert [model["id"] for model in (await answer.json())["data"]] == ["small", "big/one"]
    async with await stage.post(session, {"model": "big/one"}) as answer:
        assert answer.status == 200


async def test_while_no_llm_has_a_pool_nothing_breaks(stage, session):
    """As it is between an LLM and the one that takes its place."""
    stage.pools.clear()
    async with await stage.post(session, {"prompt": "of no model in particular"}) as answer:
        assert answer.status == 503
        assert "No LLM" in (await answer.json())["error"]["message"]
    async with session.get(f"{stage.url}/health") as answer:
        assert answer.status == 503


@both()
async def test_requests_wait_a_while_for_a_replica(stage, session):
    stage.pools["small"].wait_s = 5
    for name in ("small-0", "small-1"):
        await stage.change(name, ready=False)
    asked = asyncio.create_task(stage.post(session, {"model": "small"}))
    await until(lambda: stage.pools["small"].waiting)
    await stage.change("small-1", ready=True)
    async with await asked as answer:
        assert (answer.status, answer.headers["x-scepsy-replica"]) == (200, "small-1")


async def test_of_those_that_wait_there_are_only_so_many(stage, session):
    stage.pools["small"].wait_s, stage.pools["small"].max_waiting = 5, 1
    for name in ("small-0", "small-1"):
        await stage.change(name, ready=False)
    first = asyncio.create_task(stage.post(session, {"model": "small"}))
    await until(lambda: stage.pools["small"].waiting)
    async with await stage.post(session, {"model": "small"}) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
    async with session.get(f"{stage.url}/metrics") as answer:
        assert 'scepsy_gateway_waiting{llm="small"} 1.0' in await answer.text()
    await stage.change("small-0", ready=True)
    (await first).close()


@both()
async def test_load_is_spread_by_what_is_outstanding_and_weight(stage, session):
    await stage.change("small-0", weight=0.25)
    await stage.change("small-1", weight=0.75)
    asked = []
    for number in range(16):
        asked.append(asyncio.create_task(stage.post(session, {"model": "small", "do": "hang"})))
        await until(lambda number=number: sum(len(worker.posted) for worker in stage.workers.values()) > number)
    await stage.known()
    assert (stage.load("small-0"), stage.load("small-1")) == (4, 12)
    assert stage.endpoint.in_flight == 16
    stage.release()
    for one in asked:
        (await one).close()


async def test_what_a_client_leaves_once_it_has_begun_is_served(stage, session):
    """Clients close at the last piece of a stream, before its end."""
    backend = stage.backends["big-0"]
    (await stage.post(session, {"model": "big/one", "do": "stream and hang"})).close()
    await until(lambda: not backend.outstanding)
    assert backend.served == 1
    asked = asyncio.create_task(stage.post(session, {"model": "big/one", "do": "hang"}))
    await until(lambda: backend.outstanding)
    asked.cancel()
    await until(lambda: not backend.outstanding)
    assert backend.served == 1


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
    assert 'scepsy_gateway_waiting{llm="small"} 0.0' in text


@both(affinity=Affinity.parsed("session:x-session-id"))
async def test_a_session_meets_the_same_replica(stage, session):
    for name in ("one", "two", "three"):
        headers = {"X-Session-ID": name}
        met = set()
        for _ in range(4):
            async with await stage.post(session, {"model": "small"}, headers=headers) as answer:
                await answer.read()  # until then it counts as load, which may send the next one elsewhere
            met.add(answer.headers["x-scepsy-replica"])
        assert len(met) == 1


@both(api_key="s3cret, (it's) 'quoted'")
async def test_a_key_is_asked_for_and_goes_no_further(stage, session):
    key = "Bearer s3cret, (it's) 'quoted'"
    for given in ({}, {"Authorization": key[:-1]}, {"Authorization": key[7:]}, {"Authorization": "Bearer \xff"}):
        answer = await stage.post(session, {"model": "small"}, headers=given)
        assert answer.status == 401
        assert (await session.get(f"{stage.url}/v1/models", headers=given)).status == 401
    assert not any(worker.posted for worker in stage.workers.values())
    answer = await stage.post(session, {"model": "small"}, headers={"Authorization": key, "X-Other": "1"})
    assert answer.status == 200
    sent = {name.lower(): value for name, value in (await answer.json())["headers"]}
    assert "authorization" not in sent
    assert sent["x-other"] == "1"
    # What watches the endpoint has no key.
    for path in ("/health", "/metrics", "/scepsy/status"):
        assert (await session.get(stage.url + path)).status == 200


@both()
async def test_what_cannot_be_forwarded_is_told_why(stage, session):
    packed = gzip.compress(b'{"model":"small"}')
    async with await stage.post(session, packed, headers={"Content-Encoding": "gzip"}) as answer:
        assert (answer.status, (await answer.json())["error"]["type"]) == (415, "UnsupportedMediaTypeError")
    # With its model in the query, or where there is one model only, it need not be read.
    async with await stage.post(session, packed, "/v1/x?model=big/one", headers={"Content-Encoding": "gzip"}) as answer:
        assert (answer.status, answer.headers["x-scepsy-replica"]) == (200, "big-0")
    upgrade = "GET /v1/realtime?model=small HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    raw = await stage.raw(f"{upgrade}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'x' * 22}==\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 400 ")
    assert b"websockets are not forwarded" in raw


async def test_a_body_beyond_all_measure_is_refused_at_once(stage):
    raw = await stage.raw(f"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: {1 << 31}\r\n\r\n" + "x" * 10)
    assert raw.startswith(b"HTTP/1.1 413 ")


async def test_only_a_recorded_call_gets_a_span_of_its_own(stage, session, tmp_path):
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    (await stage.post(session, {"model": "big/one"}, headers={"traceparent": parent})).close()
    recorder = Recorder(TraceStore(tmp_path / "traces"))
    async with recorder.recording():
        stage.gateway._recorder = recorder
        (await stage.post(session, {"model": "big/one"}, headers={"traceparent": parent})).close()
    plain, recorded = (dict(seen[2])[b"traceparent"].decode() for seen in stage.seen)
    assert plain == parent
    (file,) = (tmp_path / "traces").glob("*.jsonl")
    (span,) = json.loads(file.read_text())["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert recorded == f"00-{span['traceId']}-{span['spanId']}-01"
    assert (span["traceId"], span["parentSpanId"]) == ("a" * 32, "b" * 16)
    told = {one["key"]: one["value"] for one in span["attributes"]}
    assert told["scepsy.replica"] == {"stringValue": "big-0"}
