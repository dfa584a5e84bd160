import asyncio
import gc
import time
from contextlib import suppress

import openai
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

import scepsy
from scepsy import semconv
from scepsy_integrations.langchain import ScepsyCallbackHandler

MODEL = FakeListChatModel(responses=["answer"] * 1000)
CHAIN = ChatPromptTemplate.from_template("a secret {question}") | MODEL | StrOutputParser()
CALL = ("chat FakeListChatModel", [])
LINE = ("RunnableSequence", [CALL])


def chat(server, model="m", **kwargs):
    return ChatOpenAI(model=model, base_url=server.url, api_key="key", **server.http_clients(), **kwargs)


def one_call(recorded, server):
    call = recorded.call
    (seen,) = server.good
    _, trace_id, span_id, _ = seen.headers["traceparent"].split("-")
    assert (int(trace_id, 16), int(span_id, 16)) == (call.context.trace_id, call.context.span_id)
    assert call.attributes[semconv.ATTEMPTS] == len(server.seen)
    return call


def test_a_chain_is_a_workflow_with_its_call_and_no_plumbing(recorded):
    assert CHAIN.invoke({"question": 1}) == "answer"
    assert recorded.tree == [("invoke_workflow RunnableSequence", [CALL])]
    assert not any("secret" in span.to_json() for span in recorded.spans)


def test_below_a_workflow_of_the_program_it_is_a_step(recorded):
    @scepsy.workflow
    def main():
        return CHAIN.invoke({"question": 1})

    main()
    assert recorded.tree == [("invoke_workflow main", [LINE])]
    assert recorded.roles == ["main"]


def test_parallel_branches_in_threads(recorded):
    @scepsy.workflow
    def main():
        return RunnableParallel(a=CHAIN, b=CHAIN, c=RunnableLambda(lambda _: MODEL.invoke("x"))).invoke({"question": 1})

    main()
    ((_, ((parallel, branches),)),) = recorded.tree
    assert parallel == "RunnableParallel<a,b,c>"
    assert sorted(branches) == [("RunnableLambda", [CALL]), LINE, LINE]


def test_batches(recorded):
    @scepsy.workflow
    def main():
        return CHAIN.batch([{"question": index} for index in range(4)])

    main()
    assert recorded.tree == [("invoke_workflow main", [LINE] * 4)]


async def test_gathered_runs(recorded):
    @scepsy.workflow
    async def main():
        await asyncio.gather(
            *(CHAIN.ainvoke({"question": index}) for index in range(4)), CHAIN.abatch([{"question": 1}])
        )

    await main()
    assert recorded.tree == [("invoke_workflow main", [LINE] * 5)]


def test_several_prompts_in_one_request_are_siblings(recorded):
    MODEL.generate([[HumanMessage("a")], [HumanMessage("b")]])
    assert recorded.tree == [CALL, CALL]


async def test_recursion_keeps_its_depth(recorded):
    async def split(size):
        await MODEL.ainvoke("x")
        return 1 if size == 0 else await chain.ainvoke(size - 1)

    chain = RunnableLambda(split)
    await chain.ainvoke(2)
    deepest = ("RunnableLambda" if recorded.tree[0][0].endswith("RunnableLambda") else "split", [CALL])
    name = deepest[0]
    assert recorded.tree == [(f"invoke_workflow {name}", [CALL, (name, [CALL, deepest])])]


def test_tools_and_agents_give_their_calls_a_role(recorded):
    @tool
    def search(query: str) -> str:
        """Search."""
        return MODEL.invoke(query).content

    @scepsy.agent
    def writer():
        MODEL.invoke("x")
        return search.invoke({"query": "q"})

    assert writer() == "answer"
    assert recorded.tree == [("invoke_agent writer", [CALL, ("execute_tool search", [CALL])])]
    assert recorded.roles == ["search", "writer"]


def test_a_runs_own_name_is_its_role(recorded):
    MODEL.with_config(run_name="x").invoke("a")
    (CHAIN.with_config(run_name="planner")).invoke({"question": 1})
    assert recorded.roles == ["", "planner"]


async def test_decorated_functions_between_runs(recorded):
    @scepsy.agent
    async def inner(_):
        await MODEL.ainvoke("x")

    await RunnableLambda(inner).ainvoke(1)
    ((_, ((name, calls),)),) = recorded.tree
    assert (name, calls) == ("invoke_agent inner", [CALL])


def test_tokens_from_the_framework(recorded):
    usage = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10, "input_token_details": {"cache_read": 2}}

    class Model(BaseChatModel):
        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            message = AIMessage("x", usage_metadata=usage, response_metadata={"model_name": "served", "id": "i"})
            return ChatResult(generations=[ChatGeneration(message=message)])

        @property
        def _llm_type(self):
            return "mine"

    Model().invoke("x")
    attributes = recorded.call.attributes
    assert attributes[semconv.INPUT_TOKENS] == 7
    assert attributes[semconv.OUTPUT_TOKENS] == 3
    assert attributes[semconv.CACHED_TOKENS] == 2
    assert attributes[semconv.RESPONSE_MODEL] == "served"
    assert attributes[semconv.RESPONSE_ID] == "i"


def test_completion_models(recorded):
    FakeListLLM(responses=["a"]).invoke("x")
    assert recorded.call.attributes[semconv.OPERATION] == "text_completion"


def test_a_model_over_http_is_one_call(recorded, server):
    chat(server, "metrics").invoke("hi")
    call = one_call(recorded, server)
    assert call.attributes[semconv.INPUT_TOKENS] == 9
    assert call.attributes[semconv.CACHED_TOKENS] == 4
    assert call.attributes[semconv.EXECUTION_S] == pytest.approx(0.12)
    assert call.attributes[semconv.SERVER_PORT] == server.port


async def test_a_model_over_http_awaited_is_one_call(recorded, server):
    await chat(server).ainvoke("hi")
    one_call(recorded, server)


def test_a_streamed_model_over_http_lasts_to_its_last_piece(recorded, server):
    assert len(list(chat(server, "pieces", stream_usage=True).stream("hi"))) > 5
    call = one_call(recorded, server)
    assert call.attributes[semconv.OUTPUT_TOKENS] == 5
    assert call.attributes[semconv.OUTPUT_CHUNKS] == 5
    assert (call.end_time - call.start_time) / 1e9 > 0.04
    assert 0 < call.attributes[semconv.TIME_TO_FIRST_CHUNK_S] < (call.end_time - call.start_time) / 1e9 - 0.02


async def test_a_streamed_model_awaited(recorded, server):
    assert len([piece async for piece in chat(server, "pieces").astream("hi")]) > 5
    one_call(recorded, server)


def test_a_streamed_model_without_http_has_its_time_to_first_token(recorded):
    assert list(FakeListChatModel(responses=["abc"], sleep=0.01).stream("x"))
    attributes = recorded.call.attributes
    assert attributes[semconv.TIME_TO_FIRST_CHUNK_S] >= 0.01
    assert attributes[semconv.REQUEST_STREAM] is True


@pytest.mark.skipif(not hasattr(BaseChatModel, "stream_events"), reason="this LangChain streams no events")
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_stream_of_events_has_its_time_to_first_token(recorded, by_hand):
    given = {}
    if by_hand:
        scepsy.uninstrument()
        scepsy.capture.recorder.use(recorded.provider)
        given = {"callbacks": [ScepsyCallbackHandler()]}
    model = FakeListChatModel(responses=["answer"], sleep=0.01)
    for _ in model.stream_events("q", version="v3", config=given):
        pass
    call = recorded.call
    assert 0 < call.attributes[semconv.TIME_TO_FIRST_CHUNK_S] < (call.end_time - call.start_time) / 1e9
    assert call.attributes[semconv.REQUEST_STREAM] is True


def test_completions_and_embeddings_over_http(recorded, server):
    OpenAI(model="c", base_url=server.url, api_key="key", **server.http_clients()).invoke("hi")

    @scepsy.agent
    def embed():
        OpenAIEmbeddings(
            model="e", base_url=server.url, api_key="key", check_embedding_ctx_length=False, **server.http_clients()
        ).embed_documents(["a"])

    embed()
    completion, embedding = recorded.calls
    assert completion.name == "text_completion c"
    assert recorded.path(embedding) == ["invoke_agent embed", "embeddings e"]
    assert len(server.good) == 2


def test_a_retrievers_embedding_belongs_to_the_retriever(recorded, server):
    class Retriever(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            with openai.OpenAI(base_url=server.url, api_key="key") as client:
                client.embeddings.create(model="e", input=query)
            return [Document("d")]

    (Retriever() | RunnableLambda(lambda docs: MODEL.invoke("x"))).invoke("q")
    assert recorded.tree == [
        (
            "invoke_workflow RunnableSequence",
            [("Retriever", [("embeddings e", [])]), ("RunnableLambda", [CALL])],
        )
    ]


def test_a_raw_client_in_a_chain_is_a_child_of_its_step(recorded, server):
    client = openai.OpenAI(base_url=server.url, api_key="key")

    def ask(_):
        return client.chat.completions.create(model="raw", messages=[]).id

    RunnableParallel(a=RunnableLambda(ask), b=chat(server)).invoke("x")
    ((_, branches),) = recorded.tree
    assert sorted(branches) == [("ask", [("chat raw", [])]), ("chat m", [])] or sorted(branches) == [
        ("RunnableLambda", [("chat raw", [])]),
        ("chat m", []),
    ]
    client.close()


def test_code_that_reads_a_stream_is_not_part_of_it(recorded, server):
    client = openai.OpenAI(base_url=server.url, api_key="key")

    @scepsy.workflow
    def main():
        for _ in chat(server, "pieces").stream("hi"):
            client.chat.completions.create(model="raw", messages=[])
            MODEL.invoke("x")
            break

    main()
    gc.collect()
    assert recorded.tree == [("invoke_workflow main", [("chat pieces", []), ("chat raw", []), CALL])]
    client.close()


def test_code_that_reads_a_chains_stream_is_not_part_of_it(recorded, server):
    client = openai.OpenAI(base_url=server.url, api_key="key")
    for _ in CHAIN.stream({"question": 1}):
        client.chat.completions.create(model="raw", messages=[])
        break
    gc.collect()
    assert ("chat raw", []) in recorded.tree
    client.close()


def test_a_stream_that_is_left(recorded, server):
    for _ in chat(server, "endless").stream("hi"):
        break
    gc.collect()
    call = one_call(recorded, server)
    assert call.attributes[semconv.OUTCOME] == "abandoned"


async def test_an_async_stream_that_is_left_ends_where_it_was_left(recorded, server):
    async for _ in chat(server, "endless").astream("hi"):
        break
    left_ns = time.time_ns()
    await asyncio.sleep(0.1)
    gc.collect()
    await asyncio.sleep(0.01)
    call = one_call(recorded, server)
    assert call.attributes[semconv.OUTCOME] == "abandoned"
    assert call.end_time < left_ns + 2e6


class Slow(BaseChatModel):
    """A model that no hook can see into."""

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        time.sleep(0.2)
        return ChatResult(generations=[ChatGeneration(message=AIMessage("x"))])

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        await asyncio.sleep(10)

    @property
    def _llm_type(self):
        return "slow"


async def test_cancelled_calls_are_ended_and_marked(recorded):
    started = []

    async def ask(_):
        started.append(1)
        await Slow().ainvoke("x")

    chain = RunnableLambda(ask)
    await asyncio.gather(*(asyncio.wait_for(chain.ainvoke("x"), 0.3) for _ in range(50)), return_exceptions=True)
    assert len(recorded.calls) == len(started) > 0
    for call in recorded.calls:
        assert call.attributes[semconv.OUTCOME] == "cancelled"
        assert (call.end_time - call.start_time) / 1e9 < 5


async def test_a_timeout_inside_a_task_that_goes_on(recorded):
    @scepsy.workflow
    async def main():
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await Slow().ainvoke("x")
        await MODEL.ainvoke("x")
        return 1

    await main()
    assert recorded.tree == [("invoke_workflow main", [("chat Slow", []), CALL])]
    assert recorded.calls[0].attributes[semconv.OUTCOME] == "cancelled"


async def test_cancelled_over_http(recorded, server):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(chat(server, "slow").ainvoke("hi"), 0.05)
    call = recorded.call
    assert call.attributes[semconv.OUTCOME] == "cancelled"
    assert (call.end_time - call.start_time) / 1e9 < 5


def test_errors(recorded, server):
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever LangChain makes of it
        chat(server, "broken", max_retries=0).invoke("hi")
    assert not recorded.call.status.is_ok


def test_retries_of_the_client_are_one_call(recorded, server):
    chat(server, "flaky").invoke("hi")
    assert one_call(recorded, server).attributes[semconv.RETRY_WAIT_S] > 0


def test_retries_of_the_framework_are_calls_of_their_own(recorded, server):
    failing = chat(server, "broken", max_retries=0)
    with pytest.raises(Exception):  # noqa: B017, PT011 - as above
        failing.with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke("hi")
    assert len(recorded.calls) == len(server.seen) == 2
    recorded.clear()
    assert failing.with_fallbacks([MODEL]).invoke("hi").content == "answer"
    assert [call.status.is_ok for call in recorded.calls] == [False, True]


def test_answers_from_the_cache_are_marked(recorded, server):
    model = chat(server, cache=InMemoryCache())
    for _ in range(3):
        model.invoke("hi")
    assert [call.attributes.get(semconv.CACHE_HIT) for call in recorded.calls] == [None, True, True]
    assert len(server.seen) == 1


def test_a_model_that_wraps_a_model_is_no_call(recorded, server):
    class Wrapper(BaseChatModel):
        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            answers = [chat(server, name).invoke(messages) for name in ("one", "two")]
            return ChatResult(generations=[ChatGeneration(message=answers[0])])

        @property
        def _llm_type(self):
            return "wrapper"

    Wrapper().invoke("hi")
    assert [call.name for call in recorded.calls] == ["chat one", "chat two"]
    assert {recorded.path(call)[0] for call in recorded.calls} == {"chat Wrapper"}


def test_a_model_that_sends_two_requests_is_two_calls(recorded, server):
    client = openai.OpenAI(base_url=server.url, api_key="key")

    class Twice(BaseChatModel):
        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            for name in ("one", "two"):
                client.chat.completions.create(model=name, messages=[])
            return ChatResult(generations=[ChatGeneration(message=AIMessage("x"))])

        @property
        def _llm_type(self):
            return "twice"

    Twice().invoke("hi")
    assert recorded.tree == [("chat one", []), ("chat two", [])]
    client.close()


def test_the_handler_by_hand(recorded):
    scepsy.uninstrument()
    CHAIN.invoke({"question": 1})
    assert recorded.spans == []
    scepsy.capture.recorder.use(recorded.provider)
    CHAIN.invoke({"question": 1}, config={"callbacks": [ScepsyCallbackHandler()]})
    assert recorded.tree == [("invoke_workflow RunnableSequence", [CALL])]


def test_by_hand_and_for_all_is_not_twice(recorded):
    CHAIN.invoke({"question": 1}, config={"callbacks": [ScepsyCallbackHandler(), ScepsyCallbackHandler()]})
    assert recorded.tree == [("invoke_workflow RunnableSequence", [CALL])]


def test_other_handlers_see_what_they_always_saw(recorded):
    class Mine(BaseCallbackHandler):
        def __init__(self):
            self.seen = []

        def on_chat_model_start(self, *args, **kwargs):
            self.seen.append("start")

        def on_llm_end(self, *args, **kwargs):
            self.seen.append("end")

    mine = Mine()
    CHAIN.invoke({"question": 1}, config={"callbacks": [mine]})
    assert mine.seen == ["start", "end"]


def test_errors_in_the_hook_do_not_reach_the_program(recorded, monkeypatch, caplog):
    from scepsy_integrations.langchain import runs

    for name in ("_wrapping_call", "describe", "settle_task"):
        monkeypatch.setattr(runs, name, None)
    assert CHAIN.invoke({"question": 1}) == "answer"
    assert "capture failed" in caplog.text
    monkeypatch.undo()
    scepsy.capture.recorder.forget()


def test_nothing_is_kept_of_what_has_ended(recorded):
    from scepsy_integrations.langchain import runs

    before = len(runs._passed)
    for _ in range(20):
        CHAIN.invoke({"question": 1})
    assert len(runs._passed) == before
    assert not scepsy.capture.recorder.open
