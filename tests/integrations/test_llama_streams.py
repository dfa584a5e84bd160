import asyncio
import gc

import pytest
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import ChatMessage, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.mock import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.llms.openai_like import OpenAILike

import scepsy
from scepsy import semconv
from scepsy.capture import guard_task, recorder, tasks

MESSAGES = [ChatMessage(role="user", content="a question")]


def llm(server, model="pieces"):
    clients = server.http_clients()
    http = {"http_client": clients["http_client"], "async_http_client": clients["http_async_client"]}
    return OpenAILike(model=model, api_base=server.url, api_key="key", is_chat_model=True, max_retries=0, **http)


async def read(stream):
    async for _ in stream:
        pass


def assert_each_request_is_a_call(recorded, server, count=1):
    calls = [call for call in recorded.calls if call.attributes[semconv.OPERATION] == "chat"]
    assert len(calls) == len(server.good) == count
    sent = {int(seen.headers["traceparent"].split("-")[2], 16) for seen in server.good}
    assert sent == {call.context.span_id for call in calls}
    for call in calls:
        assert semconv.OUTCOME not in call.attributes
        assert (call.end_time - call.start_time) / 1e9 > 0.03


async def gathered(model):
    (stream,) = await asyncio.gather(model.astream_chat(MESSAGES))
    return stream


async def in_a_task(model):
    return await asyncio.create_task(model.astream_chat(MESSAGES))


async def in_time(model):
    return await asyncio.wait_for(model.astream_chat(MESSAGES), 10)


async def from_an_agent(model):
    @scepsy.agent
    async def ask():
        return await model.astream_chat(MESSAGES)

    return await ask()


WAYS = [gathered, in_a_task, in_time, from_an_agent]


@pytest.mark.parametrize("make", WAYS)
async def test_a_stream_outlives_the_task_that_made_it(recorded, server, make):
    stream = await make(llm(server))
    await asyncio.sleep(0.02)
    await read(stream)
    assert_each_request_is_a_call(recorded, server)


async def test_streams_made_together_are_read_one_after_the_other(recorded, server):
    for stream in await asyncio.gather(*[llm(server).astream_chat(MESSAGES) for _ in range(3)]):
        await read(stream)
    assert_each_request_is_a_call(recorded, server, 3)


@pytest.fixture
def index(recorded):
    made = VectorStoreIndex.from_documents([Document(text="a b")], embed_model=MockEmbedding(embed_dim=3))
    recorded.clear()
    return made


MODES = ["compact", "refine", "tree_summarize", "simple_summarize"]


@pytest.mark.parametrize("mode", MODES)
async def test_awaited_queries_with_streams(recorded, server, index, mode):
    engine = index.as_query_engine(llm=llm(server), streaming=True, use_async=True, response_mode=mode)
    answer = await engine.aquery("a question")
    await read(answer.async_response_gen())
    assert_each_request_is_a_call(recorded, server)
    (root,) = [span for span in recorded.spans if span.parent is None]
    assert all(recorded.path(call)[0] == root.name for call in recorded.calls)


@pytest.mark.parametrize("mode", MODES)
async def test_queries_with_streams_inside_a_task(recorded, server, index, mode):
    engine = index.as_query_engine(llm=llm(server), streaming=True, response_mode=mode)
    assert str(engine.query("a question")) == "44444"
    assert_each_request_is_a_call(recorded, server)


async def test_chat_engines_inside_a_task(recorded, server):
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000)  # the default never closes its database
    engine = SimpleChatEngine.from_defaults(llm=llm(server), memory=memory)
    await read((await engine.astream_chat("a question")).async_response_gen())
    list(engine.stream_chat("another").response_gen)
    assert_each_request_is_a_call(recorded, server, 2)


async def test_streams_read_below_what_started_after_they_were_made(recorded, server):
    @scepsy.agent
    async def reader(stream):
        await read(stream)

    @scepsy.workflow
    async def main():
        streams = await asyncio.gather(*[llm(server).astream_chat(MESSAGES) for _ in range(2)])
        await asyncio.gather(*[reader(stream) for stream in streams])

    await main()
    assert_each_request_is_a_call(recorded, server, 2)
    assert [recorded.path(call)[:-1] for call in recorded.calls] == [["invoke_workflow main"]] * 2


async def test_an_awaited_stream_of_a_model_without_one_is_one_call(recorded):
    await read(await MockLLM(max_tokens=3).astream_chat(MESSAGES))
    assert recorded.call.attributes[semconv.OPERATION] == "text_completion"


class Router(CustomLLM):
    """A model that passes its prompts on."""

    model: OpenAILike

    @property
    def metadata(self):
        return LLMMetadata(model_name="router")

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        return list(self.model.stream_complete(prompt))[-1]

    @llm_completion_callback()
    def stream_complete(self, prompt, formatted=False, **kwargs):
        return self.model.stream_complete(prompt)


async def test_a_model_that_passes_on_streams_is_no_call(recorded, server):
    router = Router(model=llm(server))
    router.complete("a question")
    list(router.stream_complete("a question"))
    await read(await in_a_task(router))
    assert_each_request_is_a_call(recorded, server, 3)
    assert len(recorded.calls) == 3


@pytest.fixture
def nothing_kept():
    from scepsy_integrations.llama_index import handlers

    memories = handlers._calls, handlers._streams
    before = [len(memory) for memory in memories]
    yield
    gc.collect()
    assert before == [len(memory) for memory in memories]


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("make", WAYS)
async def test_a_passed_on_stream_that_is_never_read(recorded, server, make):
    stream = await make(llm(server))
    await asyncio.sleep(0.02)
    assert recorded.calls == []
    del stream
    gc.collect()
    assert recorded.call.attributes[semconv.OUTCOME] == "abandoned"
    assert server.seen == []


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("make", WAYS)
async def test_a_passed_on_stream_that_is_closed_half_way(recorded, server, make):
    stream = await make(llm(server, "endless"))
    await asyncio.sleep(0.02)
    await anext(stream)
    await stream.aclose()
    assert recorded.call.attributes[semconv.OUTCOME] == "abandoned"
    assert len(server.seen) == 1


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("model", ["stuck", "endless"])
async def test_a_passed_on_stream_whose_reader_is_cancelled(recorded, server, make, model):
    stream = await make(llm(server, model))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(stream), 0.15)
    assert recorded.call.attributes[semconv.OUTCOME] == "cancelled"
    assert len(server.seen) == 1


def test_a_passed_on_stream_of_a_loop_that_was_closed(recorded):
    async def main():
        stream = await in_a_task(MockLLM(max_tokens=3))
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(main())
    loop.close()
    del stream
    gc.collect()
    assert recorded.call.attributes[semconv.OUTCOME] == "abandoned"


def start_call():
    call = recorder.start(semconv.KIND_LLM, "m", operation=semconv.CHAT)
    guard_task(call)
    return call


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tasks_of_closed_loops_are_let_go(recorded):
    async def waiting():
        start_call()
        await asyncio.Event().wait()

    async def leave():
        task = asyncio.create_task(waiting())
        task._log_destroy_pending = False
        await asyncio.sleep(0)

    async def once():
        start_call().end()

    for _ in range(5):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave())
        loop.close()
    assert len(tasks._guarded) == 1
    asyncio.run(once())
    assert tasks._guarded == {}
    outcomes = [call.attributes.get(semconv.OUTCOME) for call in recorded.calls]
    assert sorted(outcomes, key=str) == [None, *["cancelled"] * 5]


async def test_a_call_that_has_ended_is_not_cancelled(recorded):
    async def main():
        call = start_call()
        call.live = False  # as in the midst of its end, which another thread tells
        return call

    call = await asyncio.create_task(main())
    await asyncio.sleep(0)
    call.end()
    assert semconv.OUTCOME not in recorded.call.attributes
