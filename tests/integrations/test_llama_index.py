import asyncio
import gc
import threading
import time

import openai
import pytest
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import ChatMessage, CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from workflows import Context, Workflow, step
from workflows.errors import WorkflowTimeoutError
from workflows.events import Event, StartEvent, StopEvent

import scepsy
from scepsy import semconv

MESSAGES = [ChatMessage(role="user", content="a secret question")]


def llm(server, model="m", **kwargs):
    clients = server.http_clients()
    http = {"http_client": clients["http_client"], "async_http_client": clients["http_async_client"]}
    kwargs = {"is_chat_model": True, "max_retries": 0, **http, **kwargs}
    return OpenAILike(model=model, api_base=server.url, api_key="key", **kwargs)


def one_call(recorded, server):
    call = recorded.call
    (seen,) = server.good
    _, trace_id, span_id, _ = seen.headers["traceparent"].split("-")
    assert (int(trace_id, 16), int(span_id, 16)) == (call.context.trace_id, call.context.span_id)
    assert call.attributes[semconv.SERVER_PORT] == server.port
    assert not any("secret" in span.to_json() for span in recorded.spans)
    return call


def calls_below(recorded):
    """Where each call lies: the names of the spans above it that are not LlamaIndex's inner plumbing."""
    return sorted(" > ".join(recorded.path(call)) for call in recorded.calls)


WHOLE = {
    "chat": lambda model: model.chat(MESSAGES),
    "complete": lambda model: model.complete("a secret question"),
    "stream_chat": lambda model: list(model.stream_chat(MESSAGES)),
    "stream_complete": lambda model: list(model.stream_complete("a secret question")),
}


@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("is_chat_model", [True, False])
def test_one_call_is_one_span(recorded, server, ask, is_chat_model):
    ask(llm(server, "pieces", is_chat_model=is_chat_model))
    call = one_call(recorded, server)
    assert call.attributes[semconv.OPERATION] == ("chat" if is_chat_model else "text_completion")
    assert call.name.startswith(call.attributes[semconv.OPERATION])


def test_whole_answers_tell_their_tokens(recorded, server):
    llm(server, "metrics").chat(MESSAGES)
    attributes = one_call(recorded, server).attributes
    assert (attributes[semconv.INPUT_TOKENS], attributes[semconv.CACHED_TOKENS]) == (9, 4)
    assert attributes[semconv.OUTPUT_TOKENS] == 5
    assert attributes[semconv.EXECUTION_S] == pytest.approx(0.12)


def test_a_stream_lasts_to_its_last_piece(recorded, server):
    list(llm(server, "pieces").stream_chat(MESSAGES))
    call = one_call(recorded, server)
    assert (call.end_time - call.start_time) / 1e9 > 0.04
    assert call.end_time > server.seen[0].last_piece_ns - 2e6
    assert 0 < call.attributes[semconv.TIME_TO_FIRST_CHUNK_S] < (call.end_time - call.start_time) / 1e9 - 0.02


async def test_awaited_calls_and_streams(recorded, server):
    await llm(server).achat(MESSAGES)
    one_call(recorded, server)
    recorded.clear()
    server.seen.clear()
    async for _ in await llm(server, "pieces").astream_chat(MESSAGES):
        pass
    assert (one_call(recorded, server).end_time - recorded.call.start_time) / 1e9 > 0.04


def test_streams_read_later_keep_their_own_requests(recorded, server):
    client = openai.OpenAI(base_url=server.url, api_key="key")
    first, second = (llm(server, name).stream_chat(MESSAGES) for name in ("one", "two"))
    client.chat.completions.create(model="between", messages=[])
    reader = threading.Thread(target=lambda: list(second))
    reader.start()
    reader.join()
    list(first)
    for call in recorded.calls:
        (seen,) = [seen for seen in server.seen if seen.model == call.attributes[semconv.REQUEST_MODEL]]
        assert int(seen.headers["traceparent"].split("-")[2], 16) == call.context.span_id
    assert len(recorded.calls) == len(server.seen) == 3
    client.close()


def test_a_stream_that_is_left(recorded, server):
    for _ in llm(server, "endless").stream_chat(MESSAGES):
        break
    gc.collect()
    assert one_call(recorded, server).attributes[semconv.OUTCOME] == "abandoned"


def test_a_stream_that_is_never_begun(recorded, server):
    stream = llm(server, "pieces").stream_chat(MESSAGES)
    del stream
    gc.collect()
    assert server.seen == []
    assert recorded.call.attributes[semconv.OUTCOME] == "abandoned"


def test_errors(recorded, server):
    with pytest.raises(openai.InternalServerError):
        llm(server, "broken").chat(MESSAGES)
    assert recorded.call.attributes[semconv.ERROR_TYPE] == "InternalServerError"
    assert recorded.call.attributes[semconv.REQUEST_MODEL] == "broken"


def test_retries_of_the_framework_are_one_call(recorded, server):
    llm(server, "flaky", max_retries=2, reuse_client=True).chat(MESSAGES)
    call = one_call(recorded, server)
    assert call.attributes[semconv.ATTEMPTS] == 2
    assert call.attributes[semconv.RETRY_WAIT_S] > 0


async def test_cancelled(recorded, server):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(llm(server, "slow").achat(MESSAGES), 0.12)
    assert recorded.call.attributes[semconv.OUTCOME] == "cancelled"


class Custom(CustomLLM):
    """A model that no hook can see into."""

    name: str = "custom"

    @property
    def metadata(self):
        return LLMMetadata(model_name=self.name)

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        return CompletionResponse(text="4", additional_kwargs={"prompt_tokens": 3, "completion_tokens": 1})

    @llm_completion_callback()
    def stream_complete(self, prompt, formatted=False, **kwargs):
        def pieces():
            for _ in range(3):
                time.sleep(0.01)
                yield CompletionResponse(text="4", delta="4")

        return pieces()


def test_custom_models(recorded):
    Custom().complete("x")
    list(Custom().stream_complete("x"))
    whole, streamed = recorded.calls
    assert whole.attributes[semconv.INPUT_TOKENS] == 3
    assert whole.attributes[semconv.OUTPUT_TOKENS] == 1
    assert (streamed.end_time - streamed.start_time) / 1e9 >= 0.03
    assert 0.01 <= streamed.attributes[semconv.TIME_TO_FIRST_CHUNK_S] < (streamed.end_time - streamed.start_time) / 1e9


def test_a_model_that_wraps_models_is_no_call(recorded, server):
    class Wrapper(Custom):
        @llm_completion_callback()
        def complete(self, prompt, formatted=False, **kwargs):
            llm(server, "one").complete(prompt)
            return llm(server, "two").complete(prompt)

    Wrapper().complete("x")
    assert [call.attributes[semconv.REQUEST_MODEL] for call in recorded.calls] == ["one", "two"]
    assert len({call.context.trace_id for call in recorded.calls}) == 1


@pytest.fixture
def index(recorded):
    documents = [Document(text=f"a secret {index}") for index in range(3)]
    made = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=3))
    recorded.clear()
    return made


def test_a_query(recorded, server, index):
    index.as_query_engine(llm=llm(server)).query("a secret question")
    embedding, answer = recorded.calls
    assert recorded.path(embedding)[0] == recorded.path(answer)[0] == "invoke_workflow RetrieverQueryEngine"
    assert embedding.attributes[semconv.OPERATION] == "embeddings"
    assert embedding.attributes[semconv.ROLE] == "VectorIndexRetriever"
    assert answer.attributes[semconv.ROLE] == "CompactAndRefine"
    assert len({span.context.trace_id for span in recorded.spans}) == 1


def test_a_streamed_query_lasts_until_it_is_read(recorded, server, index):
    answer = index.as_query_engine(llm=llm(server, "pieces"), streaming=True).query("a secret question")
    time.sleep(0.05)
    assert str(answer) == "44444"
    _, call = recorded.calls
    (root,) = [span for span in recorded.spans if span.parent is None]
    assert recorded.path(call)[0] == root.name == "invoke_workflow RetrieverQueryEngine"
    assert root.end_time >= call.end_time
    assert call.attributes[semconv.ROLE] == "CompactAndRefine"


async def test_an_awaited_streamed_query(recorded, server, index):
    engine = index.as_query_engine(llm=llm(server, "pieces"), streaming=True, use_async=True)
    answer = await engine.aquery("a secret question")
    async for _ in answer.async_response_gen():
        pass
    (root,) = [span for span in recorded.spans if span.parent is None]
    assert all(recorded.path(call)[0] == root.name for call in recorded.calls)
    assert len(server.good) == 1


def test_a_streamed_answer_that_nobody_reads(recorded, server, index):
    answer = index.as_query_engine(llm=llm(server, "pieces"), streaming=True).query("a secret question")
    del answer
    gc.collect()
    (root,) = [span for span in recorded.spans if span.parent is None]
    assert root.attributes[semconv.OUTCOME] == "abandoned"


def test_rerankers(recorded, server, index):
    reranker = LLMRerank(llm=llm(server), choice_batch_size=10, top_n=1)
    nodes = [NodeWithScore(node=TextNode(text="x"), score=1.0)]
    reranker.postprocess_nodes(nodes, query_str="q")
    assert recorded.call.attributes[semconv.ROLE] == "LLMRerank"
    recorded.clear()

    class CrossEncoder(BaseNodePostprocessor):
        def _postprocess_nodes(self, nodes, query_bundle=None):
            start = ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=1, model_name="bge")
            get_dispatcher().event(start)
            get_dispatcher().event(ReRankEndEvent(nodes=nodes))
            return nodes

    CrossEncoder().postprocess_nodes(nodes, query_str="q")
    assert recorded.call.name == "rerank bge"
    assert recorded.call.attributes[semconv.ROLE] == "CrossEncoder"


async def test_embeddings_in_batches(recorded, server):
    client = openai.AsyncOpenAI(base_url=server.url, api_key="key")

    class Embedding(BaseEmbedding):
        def _get_text_embedding(self, text):
            raise NotImplementedError

        def _get_query_embedding(self, query):
            raise NotImplementedError

        async def _aget_query_embedding(self, query):
            return (await self._aget_text_embeddings([query]))[0]

        async def _aget_text_embeddings(self, texts):
            answer = await client.embeddings.create(model="e", input=texts)
            return [one.embedding for one in answer.data]

    embedding = Embedding(model_name="e", embed_batch_size=2)
    assert len(await embedding.aget_text_embedding_batch(["a", "b", "c", "d", "e"])) == 5
    assert len(recorded.calls) == len(server.good) == 3
    assert [call.attributes[semconv.INPUT_TOKENS] for call in recorded.calls] == [9, 9, 9]
    await client.close()


class Part(Event):
    index: int


class Done(Event):
    index: int


class Fan(Workflow):
    model: OpenAILike | None = None
    depth: int = 0

    @step
    async def split(self, ctx: Context, ev: StartEvent) -> Part | None:
        for index in range(3):
            ctx.send_event(Part(index=index))

    @step(num_workers=3)
    async def work(self, ctx: Context, ev: Part) -> Done:
        await self.model.achat(MESSAGES)
        if self.depth > 0 and ev.index == 0:
            inner = Fan(timeout=20)
            inner.model, inner.depth = self.model, self.depth - 1
            await inner.run()
        return Done(index=ev.index)

    @step
    async def join(self, ctx: Context, ev: Done) -> StopEvent | None:
        if ctx.collect_events(ev, [Done] * 3) is None:
            return None
        return StopEvent(result="done")


async def test_workflow_steps(recorded, server):
    fan = Fan(timeout=20)
    fan.model = llm(server)
    await fan.run()
    assert calls_below(recorded) == ["invoke_workflow Fan > Fan.work > chat m"] * 3
    assert recorded.roles == ["work"] * 3
    assert len(server.good) == 3


async def test_nested_workflows(recorded, server):
    @scepsy.workflow
    async def main():
        fan = Fan(timeout=20)
        fan.model, fan.depth = llm(server), 1
        await fan.run()

    await main()
    outer = "invoke_workflow main > Fan.run > Fan.work > chat m"
    inner = "invoke_workflow main > Fan.run > Fan.work > Fan.run > Fan.work > chat m"
    assert calls_below(recorded) == [inner] * 3 + [outer] * 3


async def test_a_workflow_that_times_out(recorded, server):
    fan = Fan(timeout=0.2)
    fan.model = llm(server, "endless")
    fan.model = llm(server, "slow+" + "x")
    fan.depth = 5
    with pytest.raises(WorkflowTimeoutError):
        await fan.run()
    await asyncio.sleep(0.1)
    (root,) = [span for span in recorded.spans if span.parent is None]
    assert root.attributes[semconv.ERROR_TYPE] == "WorkflowTimeoutError"
    assert all(recorded.path(call)[0] == root.name for call in recorded.calls)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex itself uses old names of pydantic
async def test_agents_and_tools(recorded, server):
    @scepsy.tool
    async def search(query: str) -> str:
        """Search."""
        await llm(server, "inner").achat(MESSAGES)
        return "found"

    agent = FunctionAgent(name="bob", tools=[FunctionTool.from_defaults(async_fn=search)], llm=llm(server))
    agent.llm.is_function_calling_model = True
    await agent.run("a secret question")
    call = one_call(recorded, server)
    assert call.attributes[semconv.ROLE] == "bob"
    recorded.clear()
    await AgentWorkflow(agents=[agent], root_agent="bob").run("a secret question")
    assert recorded.path(recorded.call)[0] == "invoke_workflow AgentWorkflow"
    assert recorded.call.attributes[semconv.ROLE] == "bob"
    recorded.clear()
    tool = FunctionTool.from_defaults(async_fn=search)
    await tool.acall(query="q")
    assert recorded.path(recorded.call)[:1] == ["execute_tool search"]
    assert recorded.call.attributes[semconv.ROLE] == "search"


def test_nothing_is_kept_of_what_has_ended(recorded, server):
    from scepsy_integrations.llama_index import handlers

    before = len(handlers._calls), len(handlers._passed), len(handlers._streams), len(handlers._cancelled)
    for _ in range(5):
        llm(server).chat(MESSAGES)
        list(llm(server).stream_chat(MESSAGES))
    assert before == (len(handlers._calls), len(handlers._passed), len(handlers._streams), len(handlers._cancelled))


def test_errors_in_the_hook_do_not_reach_the_program(recorded, monkeypatch, caplog):
    from scepsy_integrations.llama_index import handlers

    monkeypatch.setattr(handlers, "_REACTIONS", None)
    monkeypatch.setattr(handlers, "_ancestry", None)
    assert Custom().complete("x").text == "4"
    assert "capture failed" in caplog.text
