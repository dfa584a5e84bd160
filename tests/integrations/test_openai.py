import asyncio
import gc
import time

import openai
import pydantic
import pytest
import wrapt

import scepsy
from scepsy import semconv

MESSAGES = [{"role": "user", "content": "a secret question"}]


class Answer(pydantic.BaseModel):
    answer: int


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="key") as made:
        yield made


@pytest.fixture
async def aclient(server):
    async with openai.AsyncOpenAI(base_url=server.url, api_key="key") as made:
        yield made


def one_call(recorded, server):
    """The one call that was captured: it is what the server saw, and its parent is not another call."""
    call = recorded.call
    (seen,) = server.good
    _, trace_id, span_id, _ = seen.headers["traceparent"].split("-")
    assert int(trace_id, 16) == call.context.trace_id
    assert int(span_id, 16) == call.context.span_id
    assert call.attributes[semconv.REQUEST_MODEL] == seen.model
    assert call.attributes[semconv.SERVER_ADDRESS] == "127.0.0.1"
    assert call.attributes[semconv.SERVER_PORT] == server.port
    assert call.attributes[semconv.ATTEMPTS] == len(server.seen)
    assert "secret" not in call.to_json()
    return call


def tokens(call):
    names = (semconv.INPUT_TOKENS, semconv.CACHED_TOKENS, semconv.OUTPUT_TOKENS, semconv.REASONING_TOKENS)
    return tuple(call.attributes.get(name) for name in names)


CLOCK_NS = 2e6  # the server's clock is read in another thread
FULL = (9, 4, 5, 2)
WHOLE = {
    "chat": lambda c: c.chat.completions.create(model="m", messages=MESSAGES),
    "chat parse": lambda c: c.chat.completions.parse(model="m", messages=MESSAGES, response_format=Answer),
    "responses": lambda c: c.responses.create(model="m", input="a secret question"),
    "responses parse": lambda c: c.responses.parse(model="m", input="a secret question", text_format=Answer),
    "completions": lambda c: c.completions.create(model="m", prompt="a secret question"),
    "with_options": lambda c: c.with_options(timeout=5).chat.completions.create(model="m", messages=MESSAGES),
}


@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE)
def test_every_way_to_get_a_whole_answer(recorded, server, client, ask):
    ask(client)
    call = one_call(recorded, server)
    assert tokens(call) == FULL
    assert semconv.REQUEST_STREAM not in call.attributes


@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE)
async def test_every_way_to_await_a_whole_answer(recorded, server, aclient, ask):
    await ask(aclient)
    assert tokens(one_call(recorded, server)) == FULL


def test_embeddings_and_rerankers(recorded, server, client):
    client.embeddings.create(model="e", input=["a", "b"])
    client.post("/rerank", body={"model": "r", "query": "q", "documents": []}, cast_to=object)
    embedding, reranking = recorded.calls
    assert embedding.name == "embeddings e"
    assert tokens(embedding) == (9, None, 0, None)
    assert reranking.name == "rerank r"
    assert semconv.OPERATION in reranking.attributes


def test_what_is_no_llm_call_is_left_alone(recorded, server, client):
    client.post("/files/of/mine", body={"model": "m"}, cast_to=object)
    assert recorded.spans == []
    assert "traceparent" not in server.seen[0].headers


def test_azure(recorded, server):
    with openai.AzureOpenAI(azure_endpoint=server.url, api_key="key", api_version="1") as client:
        client.chat.completions.create(model="deployed", messages=MESSAGES)
    call = one_call(recorded, server)
    assert tokens(call) == FULL
    assert call.attributes[semconv.REQUEST_MODEL] == "deployed"


async def test_azure_awaited(recorded, server):
    given = {"azure_endpoint": server.url, "api_key": "key", "api_version": "1", "azure_deployment": "deployed"}
    async with openai.AsyncAzureOpenAI(**given) as client:
        await client.chat.completions.create(model="m", messages=MESSAGES)
    assert tokens(one_call(recorded, server)) == FULL


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


def test_raw_responses(recorded, server, client):
    raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.parse() is raw.parse()
    assert tokens(one_call(recorded, server)) == FULL


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


def test_attempts_and_back_off_are_apart(recorded, server, client):
    client.chat.completions.create(model="flaky+slow", messages=MESSAGES)
    call = one_call(recorded, server)
    assert call.attributes[semconv.ATTEMPTS] == 2
    assert call.attributes[semconv.RETRY_WAIT_S] >= 0.04
    first, second = server.seen
    assert call.attributes[semconv.WASTED_S] > (first.end_ns - first.start_ns - CLOCK_NS) / 1e9
    rest_s = (call.end_time - call.start_time) / 1e9 - call.attributes[semconv.WASTED_S]
    rest_s -= call.attributes[semconv.RETRY_WAIT_S]
    assert rest_s > (second.end_ns - second.start_ns - CLOCK_NS) / 1e9
    assert call.end_time - rest_s * 1e9 > first.end_ns
    assert len({seen.headers["traceparent"] for seen in server.seen}) == 1


async def test_async_attempts(recorded, server, aclient):
    await aclient.chat.completions.create(model="flaky", messages=MESSAGES)
    assert one_call(recorded, server).attributes[semconv.ATTEMPTS] == 2


def test_a_call_that_fails(recorded, server, client):
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=1).chat.completions.create(model="broken", messages=MESSAGES)
    call = recorded.call
    assert call.attributes[semconv.ERROR_TYPE] == "InternalServerError"
    assert call.attributes[semconv.REQUEST_MODEL] == "broken"
    assert call.attributes[semconv.ATTEMPTS] == 2
    assert not call.status.is_ok


@pytest.mark.parametrize(("model", "error"), [("cut", "RemoteProtocolError"), ("malformed", "JSONDecodeError")])
def test_a_stream_that_breaks(recorded, server, client, model, error):
    pieces = []
    with pytest.raises(Exception) as caught:  # noqa: PT011 - httpx's or json's own, as without Scepsy
        pieces.extend(client.chat.completions.create(model=model, messages=MESSAGES, stream=True))
    raised = caught.value
    if isinstance(raised, openai.APIConnectionError):  # what the client makes of it since version 3
        raised = raised.__cause__
    assert type(raised).__name__ == error
    call = one_call(recorded, server)
    assert call.attributes[semconv.ERROR_TYPE] == type(caught.value).__name__
    assert call.attributes[semconv.TIME_TO_FIRST_CHUNK_S] > 0


def test_no_server_at_all(recorded):
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="key", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert recorded.call.attributes[semconv.ERROR_TYPE] == "APIConnectionError"


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


async def test_a_cancelled_call(recorded, server, aclient):
    begin_ns = time.time_ns()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(aclient.chat.completions.create(model="slow", messages=MESSAGES), 0.05)
    call = recorded.call
    assert call.attributes[semconv.OUTCOME] == "cancelled"
    assert begin_ns + 40_000_000 < call.end_time < time.time_ns() + CLOCK_NS


async def test_a_stream_cancelled_while_it_is_read(recorded, server, aclient):
    async def read():
        async for _ in await aclient.chat.completions.create(model="endless", messages=MESSAGES, stream=True):
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.1)
    assert recorded.call.attributes[semconv.OUTCOME] == "cancelled"


def test_vllms_own_timings(recorded, server, client):
    client.chat.completions.create(model="metrics", messages=MESSAGES)
    call = recorded.call
    assert call.attributes[semconv.QUEUE_S] == 0.03
    assert call.attributes[semconv.EXECUTION_S] == pytest.approx(0.12)


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


def test_parents_and_roles(recorded, server, client):
    def ask():
        client.chat.completions.create(model="m", messages=MESSAGES)

    @scepsy.tool
    def search():
        ask()

    @scepsy.agent
    def writer():
        ask()
        search()

    @scepsy.workflow
    def main():
        ask()
        writer()

    main()
    call = ("chat m", [])
    tool = ("execute_tool search", [call])
    assert recorded.tree == [("invoke_workflow main", [call, ("invoke_agent writer", [call, tool])])]
    assert recorded.roles == ["main", "search", "writer"]


async def test_parallel_calls_keep_their_parents(recorded, server, aclient):
    @scepsy.agent
    async def writer(index):
        await aclient.chat.completions.create(model=f"m{index}", messages=MESSAGES)

    @scepsy.workflow
    async def main():
        await asyncio.gather(*(writer(index) for index in range(5)))

    await main()
    agents = {("invoke_agent writer", (f"chat m{index}",)) for index in range(5)}
    ((_, below),) = recorded.tree
    assert {(name, tuple(child for child, _ in children)) for name, children in below} == agents


def test_a_stream_read_elsewhere_belongs_to_who_asked(recorded, server, client):
    @scepsy.agent
    def writer():
        return client.chat.completions.create(model="m", messages=MESSAGES, stream=True)

    list(writer())
    assert recorded.path(one_call(recorded, server)) == ["invoke_agent writer", "chat m"]


def test_a_traceparent_of_the_programs_own_is_kept(recorded, server, client):
    own = f"00-{'ab' * 16}-{'cd' * 8}-01"
    client.chat.completions.create(model="m", messages=MESSAGES, extra_headers={"traceparent": own})
    assert server.seen[0].headers["traceparent"] == own


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
def test_a_traceparent_of_the_clients_own_is_kept(recorded, server, name):
    own = f"00-{'1' * 32}-{'2' * 16}-01"
    with openai.OpenAI(base_url=server.url, api_key="key", default_headers={name: own}) as client:
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert [value for key, value in server.seen[0].headers.items() if key.lower() == "traceparent"] == [own]


def test_options_that_are_sent_twice_carry_each_call(recorded, server, client):
    from openai._models import FinalRequestOptions
    from openai.types.chat import ChatCompletion

    given = {"method": "post", "url": "/chat/completions", "headers": {"X-Mine": "yes"}}
    options = FinalRequestOptions.construct(**given, json_data={"model": "m", "messages": MESSAGES})
    for _ in range(2):
        client.request(ChatCompletion, options)
    assert options.headers == {"X-Mine": "yes"}
    sent = [{name.lower(): value for name, value in seen.headers.items()} for seen in server.seen]
    assert [headers["x-mine"] for headers in sent] == ["yes", "yes"]
    told = [f"{call.context.span_id:016x}" for call in recorded.calls]
    assert [headers["traceparent"].split("-")[2] for headers in sent] == told


def test_the_call_is_the_current_span_while_it_is_sent(recorded, server):
    import httpx
    from opentelemetry import trace

    current = []
    hooks = {"request": [lambda request: current.append(trace.get_current_span().get_span_context().span_id)]}
    with httpx.Client(event_hooks=hooks) as http:
        client = openai.OpenAI(base_url=server.url, api_key="key", http_client=http)
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert current == [recorded.call.context.span_id]


def test_muted_instrumentation_is_mute(recorded, server, client):
    from opentelemetry import context
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY

    token = context.attach(context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
    client.chat.completions.create(model="m", messages=MESSAGES)
    context.detach(token)
    assert recorded.calls == []


def test_one_client_only(server, recorded):
    scepsy.uninstrument()
    with (
        openai.OpenAI(base_url=server.url, api_key="key") as mine,
        openai.OpenAI(base_url=server.url, api_key="key") as other,
    ):
        untouched = dict(vars(mine))
        scepsy.instrument(mine, provider=recorded.provider)
        scepsy.instrument(mine)
        mine.chat.completions.create(model="mine", messages=MESSAGES)
        mine.with_options(max_retries=3).chat.completions.create(model="clone", messages=MESSAGES)
        other.chat.completions.create(model="other", messages=MESSAGES)
        assert [call.name for call in recorded.calls] == ["chat mine", "chat clone"]
        scepsy.uninstrument()
        mine.chat.completions.create(model="mine", messages=MESSAGES)
        assert len(recorded.calls) == 2
        added = {name for name in vars(mine) if name not in untouched}
        assert not {name for name in added if "request" in name or "scepsy" in name or "copy" in name}


def test_one_client_and_everything_are_not_twice(server, recorded, client):
    scepsy.instrument(client)
    client.chat.completions.create(model="m", messages=MESSAGES)
    one_call(recorded, server)


def test_errors_in_the_hook_do_not_reach_the_program(recorded, server, client, monkeypatch, caplog):
    from scepsy_integrations.openai import hook

    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(hook.Exchange, "begin", fail)
    assert client.chat.completions.create(model="m", messages=MESSAGES).choices
    monkeypatch.undo()
    monkeypatch.setattr(hook.Exchange, "attempt", fail)
    monkeypatch.setattr(hook.Exchange, "received", fail)
    assert client.chat.completions.create(model="m", messages=MESSAGES).choices
    assert len(list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))) == 6
    assert "capture failed" in caplog.text
    assert len(recorded.calls) == 2


def handles():
    return {id(known) for known in gc.get_objects() if type(known) is scepsy.capture.Handle}


def test_what_has_been_written_does_not_wait_for_the_garbage_collector(server, client, tmp_path):
    scepsy.instrument(directory=tmp_path)
    gc.collect()
    before = handles()  # of other tests, in contexts that live on
    gc.disable()
    try:
        for _ in range(3):
            client.chat.completions.create(model="m", messages=MESSAGES)
        scepsy.uninstrument()
        # Who has written or sent the last one may hold it for a moment longer.
        for _ in range(500):
            left = handles() - before
            if not left:
                break
            time.sleep(0.01)
    finally:
        gc.enable()
    assert left == set()
