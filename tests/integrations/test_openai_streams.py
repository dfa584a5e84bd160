"""Streams of the openai client: they last from the first piece to the last, whoever reads them, and end when left."""

import asyncio
import gc
import time

import openai
import pytest
import wrapt
from openai_calls import CLOCK_NS, FULL, MESSAGES, one_call, tokens

import scepsy
from scepsy import semconv

STREAMED = {
    "chat": lambda c: c.chat.completions.create(
        model="pieces", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ),
    "completions": lambda c: c.completions.create(
        model="pieces", prompt="p", stream=True, stream_options={"include_usage": True}
    ),
    "responses": lambda c: c.responses.create(model="pieces", input="p", stream=True),
}


def assert_streamed(call, seen):
    assert tokens(call) == FULL
    assert call.attributes[semconv.REQUEST_STREAM] is True
    assert call.attributes[semconv.OUTPUT_CHUNKS] == 5
    first_s = call.attributes[semconv.TIME_TO_FIRST_CHUNK_S]
    assert 0 < first_s < (call.end_time - call.start_time) / 1e9
    # The pieces come 10 ms apart: the call lasts as long as the server sends, not as long as create() takes.
    assert (call.end_time - call.start_time) / 1e9 > 0.04
    assert call.start_time < seen.start_ns + CLOCK_NS
    assert call.end_time > seen.last_piece_ns - CLOCK_NS


@pytest.mark.parametrize("ask", STREAMED.values(), ids=STREAMED)
def test_a_stream_lasts_to_its_last_piece(recorded, server, client, ask):
    stream = ask(client)
    assert isinstance(stream, openai.Stream)
    assert len(list(stream)) >= 5
    assert_streamed(one_call(recorded, server), server.seen[0])


@pytest.mark.parametrize("ask", STREAMED.values(), ids=STREAMED)
async def test_an_async_stream_lasts_to_its_last_piece(recorded, server, aclient, ask):
    stream = await ask(aclient)
    assert isinstance(stream, openai.AsyncStream)
    assert len([piece async for piece in stream]) >= 5
    assert_streamed(one_call(recorded, server), server.seen[0])


async def test_streams_of_azure(recorded, server):
    given = {"azure_endpoint": server.url, "api_key": "key", "api_version": "1"}
    with openai.AzureOpenAI(**given) as client:
        assert len(list(STREAMED["chat"](client))) > 5
    assert_streamed(one_call(recorded, server), server.seen[0])
    recorded.clear()
    server.seen.clear()
    async with openai.AsyncAzureOpenAI(**given) as client:
        async for _ in await STREAMED["chat"](client):
            pass
    assert_streamed(one_call(recorded, server), server.seen[0])


def test_a_stream_in_the_proxy_of_another_instrumentation(recorded, server, client, monkeypatch):
    class Proxy(wrapt.ObjectProxy):
        def __next__(self):
            return self.__wrapped__.__next__()

        async def __anext__(self):
            return await self.__wrapped__.__anext__()

    ask = openai.OpenAI.request.__wrapped__
    scepsy.uninstrument()
    monkeypatch.setattr(openai.OpenAI, "request", lambda *args, **kwargs: Proxy(ask(*args, **kwargs)))
    scepsy.instrument(provider=recorded.provider)
    assert len(list(client.chat.completions.create(model="pieces", messages=MESSAGES, stream=True))) == 6
    assert one_call(recorded, server).attributes[semconv.OUTPUT_CHUNKS] == 5


def test_a_slow_reader_does_not_lengthen_the_call(recorded, server, client):
    stream = STREAMED["chat"](client)
    for piece in stream:
        if not piece.choices:
            break
    read_ns = time.time_ns()
    time.sleep(0.02)
    assert list(stream) == []
    assert recorded.call.end_time < read_ns + CLOCK_NS


def test_streaming_helpers(recorded, server, client):
    with client.chat.completions.stream(model="pieces", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == "44444"
    one_call(recorded, server)
    recorded.clear()
    server.seen.clear()
    with client.responses.stream(model="pieces", input="p") as stream:
        stream.get_final_response()
    assert tokens(one_call(recorded, server)) == FULL


async def test_async_streaming_helpers(recorded, server, aclient):
    async with aclient.chat.completions.stream(model="pieces", messages=MESSAGES) as stream:
        await stream.get_final_completion()
    assert one_call(recorded, server).attributes[semconv.OUTPUT_CHUNKS] == 5


def test_raw_streams(recorded, server, client):
    raw = client.chat.completions.with_raw_response.create(
        model="pieces", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    assert len(list(raw.parse())) == 7
    assert_streamed(one_call(recorded, server), server.seen[0])


READ = {
    "parse": lambda r: r.parse(),
    "read": lambda r: r.read(),
    "json": lambda r: r.json(),
    "text": lambda r: r.text(),
    "iter_lines": lambda r: list(r.iter_lines()),
    "iter_bytes": lambda r: list(r.iter_bytes(3)),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_streaming_responses_read_by_the_program(recorded, server, client, read):
    with client.chat.completions.with_streaming_response.create(model="m", messages=MESSAGES) as response:
        assert read(response)
    assert tokens(one_call(recorded, server)) == FULL


def test_streaming_responses_of_streams(recorded, server, client):
    with client.chat.completions.with_streaming_response.create(
        model="pieces", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as response:
        assert list(response.iter_lines())
    call = one_call(recorded, server)
    assert tokens(call) == FULL
    assert (call.end_time - call.start_time) / 1e9 > 0.04


async def test_async_streaming_responses(recorded, server, aclient):
    async with aclient.chat.completions.with_streaming_response.create(model="m", messages=MESSAGES) as response:
        await response.parse()
    assert tokens(one_call(recorded, server)) == FULL


def test_a_streaming_response_that_nobody_reads(recorded, server, client):
    with client.chat.completions.with_streaming_response.create(model="m", messages=MESSAGES):
        pass
    assert recorded.call.attributes[semconv.OUTCOME] == "abandoned"


LEAVE = {
    "break": lambda stream: next(iter(stream)),
    "close": lambda stream: (next(stream), stream.close()),
    "with": lambda stream: stream.__enter__().__next__() and stream.__exit__(None, None, None),
}


@pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE)
def test_a_stream_that_is_left_ends_where_it_was_left(recorded, server, client, leave):
    stream = client.chat.completions.create(model="endless", messages=MESSAGES, stream=True)
    leave(stream)
    left_ns = time.time_ns()
    time.sleep(0.02)
    del stream
    gc.collect()
    call = one_call(recorded, server)
    assert call.attributes[semconv.OUTCOME] == "abandoned"
    assert call.end_time < left_ns + CLOCK_NS


async def test_an_async_stream_that_is_left(recorded, server, aclient):
    stream = await aclient.chat.completions.create(model="endless", messages=MESSAGES, stream=True)
    async for _ in stream:
        break
    left_ns = time.time_ns()
    await asyncio.sleep(0.02)
    await stream.close()
    call = one_call(recorded, server)
    assert call.attributes[semconv.OUTCOME] == "abandoned"
    assert call.end_time < left_ns + CLOCK_NS


async def test_a_stream_cancelled_while_it_is_read(recorded, server, aclient):
    async def read():
        async for _ in await aclient.chat.completions.create(model="endless", messages=MESSAGES, stream=True):
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.1)
    assert recorded.call.attributes[semconv.OUTCOME] == "cancelled"


def test_vllms_own_timings_in_a_stream(recorded, server, client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    list(client.chat.completions.create(model="metrics", messages=MESSAGES, **options))
    assert recorded.call.attributes[semconv.EXECUTION_S] == pytest.approx(0.12)


def test_a_stream_without_usage_tells_how_many_pieces_it_had(recorded, server, client):
    list(client.chat.completions.create(model="bare", messages=MESSAGES, stream=True))
    call = one_call(recorded, server)
    assert tokens(call) == (None, None, None, None)
    assert call.attributes[semconv.OUTPUT_CHUNKS] == 5


COUNTED = {
    "chat": lambda c, **more: c.chat.completions.create(model="m", messages=MESSAGES, stream=True, **more),
    "completions": lambda c, **more: c.completions.create(model="m", prompt="p", stream=True, **more),
}


@pytest.mark.parametrize("ask", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize(("model", "more"), [("m", {}), ("metrics", {"stream_options": {}})])
def test_the_usage_of_a_stream_can_be_asked_for(recorded, server, client, ask, model, more):
    without = [piece.to_dict() for piece in ask(client, **more)]
    scepsy.instrument(include_usage=True)
    recorded.clear()
    server.seen.clear()
    assert [piece.to_dict() for piece in ask(client, **more)] == without  # the program sees what it did before
    assert tokens(one_call(recorded, server)) == FULL


async def test_the_usage_of_an_async_stream_can_be_asked_for(recorded, server, aclient):
    scepsy.instrument(include_usage=True)
    pieces = [
        piece async for piece in await aclient.chat.completions.create(model="metrics", messages=MESSAGES, stream=True)
    ]
    assert all(piece.choices for piece in pieces)
    call = one_call(recorded, server)
    assert tokens(call) == FULL
    assert call.attributes[semconv.QUEUE_S] == 0.03


@pytest.mark.parametrize("ask", COUNTED.values(), ids=COUNTED)
def test_who_asks_for_usage_gets_it(recorded, server, client, ask):
    scepsy.instrument(include_usage=True)
    *_, last = ask(client, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens == 9
    assert tokens(one_call(recorded, server)) == FULL


def test_who_declines_usage_gets_none(recorded, server, client):
    scepsy.instrument(include_usage=True)
    list(COUNTED["chat"](client, stream_options={"include_usage": False}))
    list(COUNTED["chat"](client, extra_body={"stream_options": {"include_usage": False}}))
    assert [tokens(call) for call in recorded.calls] == [(None,) * 4] * 2


def test_usage_is_not_asked_for_where_the_program_reads_the_response_itself(recorded, server, client):
    scepsy.instrument(include_usage=True)
    with client.chat.completions.with_streaming_response.create(model="m", messages=MESSAGES, stream=True) as answer:
        assert "usage" not in "".join(answer.iter_lines())
    raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES, stream=True)
    assert all(piece.choices for piece in raw.parse())
    assert [tokens(call) for call in recorded.calls] == [(None,) * 4] * 2


def test_usage_can_be_asked_for_by_the_environment(recorded, server, client, monkeypatch):
    monkeypatch.setenv("SCEPSY_INCLUDE_USAGE", "1")
    scepsy.uninstrument()  # what was chosen in code is forgotten, the environment read again
    scepsy.instrument(provider=recorded.provider)
    list(COUNTED["chat"](client))
    monkeypatch.undo()
    assert tokens(one_call(recorded, server)) == FULL
