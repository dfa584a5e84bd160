"""The cases of `capture_truth`: each a small program on a real framework, and what must be told of it."""

# ruff: noqa: D103 - the name in the table says what each of them is about
from __future__ import annotations

import asyncio
import gc
import operator
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Final, TypedDict

import openai
from langchain_core.caches import InMemoryCache
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, Send, interrupt
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from benchmarks.truth_stage import TOLERANCE_NS, Stage, expect
from scepsy.traces.records import FAILED, FROM_CACHE, OK

PROMPT: Final = "the patient's name"
MESSAGES: Final[list[Any]] = [{"role": "user", "content": PROMPT}]
CHAT: Final = [ChatMessage(PROMPT)]


def chat(at: Stage, model: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, base_url=at.url, api_key="key", **more)  # type: ignore[arg-type] # takes a str too


def like(at: Stage, model: str, **more: Any) -> OpenAILike:
    return OpenAILike(model=model, api_base=at.url, api_key="key", is_chat_model=True, max_retries=0, **more)


def client(at: Stage, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=at.url, api_key="key", **more)


def aclient(at: Stage, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=at.url, api_key="key", **more)


def ask(at: Stage, model: str, **more: Any) -> Any:
    return client(at).chat.completions.create(model=model, messages=MESSAGES, **more)


async def one_call_of_langchain(at: Stage) -> None:
    await chat(at, "m").ainvoke(PROMPT)
    chat(at, "m").invoke(PROMPT)
    spans = at.llm_spans
    expect(len(spans) == 2, f"{len(spans) / 2:g} LLM spans in {len({span.trace for span in spans}) / 2:g} traces")


async def one_call_of_llama_index(at: Stage) -> None:
    await like(at, "m").achat(CHAT)
    like(at, "m").chat(CHAT)
    spans = at.llm_spans
    expect(len(spans) == 2, f"{len(spans) / 2:g} LLM spans in {len({span.trace for span in spans}) / 2:g} traces")


async def client_in_a_chain(at: Stage) -> None:
    def thinking(_: Any) -> Any:
        return ask(at, "raw").id

    RunnableParallel(a=RunnableLambda(thinking), b=RunnableLambda(thinking)).invoke(PROMPT)
    calls = at.expect_calls()
    expect(len({call.trace for call in calls}) == 1, f"{len({call.trace for call in calls})} traces for 1 execution")
    for call in calls:
        above = [each.name for each in at.above(call)]
        expect(any(name.startswith(("thinking", "RunnableLambda")) for name in above), "its step is not above it")


class State(TypedDict):
    """What flows through the graphs below."""

    items: Annotated[list[int], operator.add]


def _fan_out(node: Callable[[State], Any], width: int = 3) -> Any:
    graph = StateGraph(State)
    graph.add_node("split", lambda _: {"items": []})
    graph.add_node("work", node)  # type: ignore[call-overload] # its overloads know no union of both sorts of node
    graph.add_edge(START, "split")
    graph.add_conditional_edges("split", lambda _: [Send("work", {"items": [i]}) for i in range(width)], ["work"])
    return graph.compile()


async def client_in_nodes(at: Stage) -> None:
    async def node(_: State) -> Any:
        await aclient(at).chat.completions.create(model="raw", messages=MESSAGES)
        return {"items": []}

    await _fan_out(node).ainvoke({"items": []})
    calls = at.expect_calls()
    expect(len({call.trace for call in calls}) == 1, f"{len({call.trace for call in calls})} traces for 1 execution")
    nodes = [[above.id for above in at.above(call) if above.name.startswith("work")] for call in calls]
    expect(all(nodes), "the node is not above its call")
    expect(len({above[0] for above in nodes}) == 3, "calls under the node of another")


async def nodes_of_a_graph(at: Stage) -> None:
    def node(_: State) -> Any:
        chat(at, "m").invoke(PROMPT)
        return {"items": []}

    _fan_out(node).invoke({"items": []})
    nodes = [record for record in at.records if record.name.startswith("work")]
    expect(len(nodes) == 3, f"{len(nodes)} spans for 3 runs of a node")
    roots = [record for record in at.records if not record.parent]
    expect(len(roots) == 1, f"{len(roots)} roots for 1 execution")


async def interrupted_graph(at: Stage) -> None:
    def node(_: State) -> Any:
        chat(at, "m").invoke(PROMPT)
        return {"items": [interrupt("may I?")]}

    graph = StateGraph(State)
    graph.add_node("ask", node)
    graph.add_edge(START, "ask")
    app = graph.compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}
    app.invoke({"items": []}, config)
    app.invoke(Command(resume="yes"), config)
    at.told()
    expect(not any(record.status == FAILED for record in at.records), "told as an error")


class Slow(BaseChatModel):
    """A model that no hook can see into."""

    asked: ClassVar[list[int]] = []

    def _generate(self, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError

    async def _agenerate(self, *_args: Any, **_kwargs: Any) -> Any:
        self.asked.append(1)
        await asyncio.sleep(10)

    @property
    def _llm_type(self) -> str:
        return "slow"


async def cancelled_runs(at: Stage) -> None:
    model = Slow(metadata={"ls_model_name": "slow"})

    async def asking(_: Any) -> Any:
        return await model.ainvoke([HumanMessage(PROMPT)])

    run = RunnableLambda(asking)
    await asyncio.gather(*(asyncio.wait_for(run.ainvoke(1), 0.2) for _ in range(20)), return_exceptions=True)
    await at.settle()
    expect(len(at.calls) == len(model.asked) > 0, f"{len(at.calls)} calls for {len(model.asked)}")
    expect(all(call.status != OK for call in at.calls), "told as answered")


async def cancelled_requests(at: Stage) -> None:
    asks = [
        asyncio.ensure_future(chat(at, "stuck").ainvoke(PROMPT)),
        asyncio.ensure_future(like(at, "stuck").achat(CHAT)),
        asyncio.ensure_future(aclient(at).chat.completions.create(model="stuck", messages=MESSAGES)),
    ]
    while len(at.seen) < len(asks):  # noqa: ASYNC110 - the server lives in another thread
        await asyncio.sleep(0.01)
    for one in asks:
        one.cancel()
    await asyncio.gather(*asks, return_exceptions=True)
    await at.settle()
    expect(len(at.calls) == len(at.seen), f"{len(at.calls)} calls for {len(at.seen)}")
    expect(all(call.status != OK for call in at.calls), "told as answered")


async def left_async_stream(at: Stage) -> None:
    async for _ in chat(at, "endless").astream(PROMPT):
        break
    left_ns = time.time_ns()
    await at.settle(0.2)
    _expect_left(at, left_ns)


def _expect_left(at: Stage, left_ns: int) -> None:
    late_ms = max(call.end_ns - left_ns for call in at.told()) / 1e6
    expect(late_ms < TOLERANCE_NS / 1e6, f"ends {late_ms:.0f} ms after it was left")
    expect(all(call.status != OK for call in at.calls), "told as complete")


async def left_client_stream(at: Stage) -> None:
    for piece in ask(at, "endless", stream=True):
        if piece.choices:
            break
    left_ns = time.time_ns()
    await at.settle(0.1)
    _expect_left(at, left_ns)


async def llama_index_stream(at: Stage) -> None:
    list(like(at, "pieces").stream_chat(CHAT))
    await at.settle(0.3)
    for call in at.told():
        at.expect_interval(call, at.seen[0])


async def client_streams(at: Stage) -> None:
    for _ in range(2):  # the first time is not judged: it includes the making of the client's parsers
        await at.clear()
        list(ask(at, "pieces", stream=True))
        async for _ in await aclient(at).responses.create(model="pieces", input=PROMPT, stream=True):
            pass
        with client(at).chat.completions.stream(model="pieces", messages=MESSAGES) as stream:
            stream.until_done()
        await at.settle()
    for call, seen in zip(at.expect_calls(), at.seen, strict=True):
        at.expect_interval(call, seen)


class Part(Event):
    """A piece of work."""


class Done(Event):
    """It is done."""


class Fan(Workflow):
    """Three calls at once."""

    def __init__(self, model: OpenAILike) -> None:
        super().__init__(timeout=20)
        self.model = model

    @step
    async def split(self, ctx: Context, _event: StartEvent) -> Part | None:
        """Send three parts."""
        for _ in range(3):
            ctx.send_event(Part())
        return None

    @step(num_workers=3)
    async def work(self, _event: Part) -> Done:
        """One call."""
        await self.model.achat(CHAT)
        return Done()

    @step
    async def join(self, ctx: Context, event: Done) -> StopEvent | None:
        """Wait for all."""
        return None if ctx.collect_events(event, [Done] * 3) is None else StopEvent(result="done")


async def llama_index_workflow(at: Stage) -> None:
    await Fan(like(at, "m")).run()
    await at.settle(0.3)
    traces = {record.trace for record in at.records}
    expect(len(traces) == 1, f"{len(traces)} traces for 1 execution")
    expect(all(any("work" in r.name for r in at.above(call)) for call in at.expect_calls()), "steps are missing")


async def llama_index_query(at: Stage) -> None:
    index = VectorStoreIndex.from_documents([Document(text="x")], embed_model=MockEmbedding(embed_dim=3))
    await at.clear()
    answer = index.as_query_engine(llm=like(at, "pieces"), streaming=True).query(PROMPT)
    await at.settle()
    str(answer)
    await at.settle(0.3)
    expect(len({record.trace for record in at.records}) == 1, "the stream is in another trace")
    for call in at.told():
        if call.model == "pieces":
            at.expect_interval(call, at.seen[0])


async def llama_index_error(at: Stage) -> None:
    with suppress(openai.InternalServerError):
        like(at, "broken").chat(CHAT)
    await at.settle(0.3)
    _expect_failed(at)


async def client_error(at: Stage) -> None:
    with suppress(openai.InternalServerError):
        client(at, max_retries=0).chat.completions.create(model="broken", messages=MESSAGES)
    _expect_failed(at)


def _expect_failed(at: Stage) -> None:
    expect(all(call.status == FAILED for call in at.told()), "not told as failed")
    expect(all(call.model == "broken" for call in at.calls), "without its model")


async def left_llama_index_stream(at: Stage) -> None:
    for _ in like(at, "endless").stream_chat(CHAT):
        break
    left_ns = time.time_ns()
    await at.settle(0.3)
    _expect_left(at, left_ns)
    ask(at, "next")
    (following,) = [call for call in at.calls if call.model == "next"]
    expect(not following.parent, "the next call is put below it")


TRACED: Final[tuple[Callable[[Stage], Any], ...]] = (
    lambda at: ask(at, "m"),
    lambda at: list(ask(at, "m", stream=True)),
    lambda at: client(at).responses.create(model="m", input=PROMPT),
    lambda at: chat(at, "m").invoke(PROMPT),
    lambda at: list(chat(at, "m").stream(PROMPT)),
    lambda at: like(at, "m").chat(CHAT),
    lambda at: list(like(at, "m").stream_chat(CHAT)),
)


async def traceparent(at: Stage) -> None:
    missing = 0
    for program in TRACED:
        await at.clear()
        program(at)
        await at.settle(0.1)
        _, trace, span, _ = at.seen[0].headers.get("traceparent", "---").split("-")
        missing += not any((call.trace, call.id) == (trace, span) for call in at.llm_spans)
    expect(not missing, f"missing in {missing} of {len(TRACED)} ways to ask")


async def retries(at: Stage) -> None:
    ask(at, "flaky+slow")
    good = at.server.good[0]
    calls = [call for call in at.calls if call.status == OK]
    expect(len(calls) == 1, f"{len(calls)} calls answered of 1")
    told_s = (calls[0].end_ns - calls[0].start_ns) / 1e9 - (calls[0].lost_s or 0.0)
    real_s = (good.end_ns - good.start_ns) / 1e9
    expect(abs(told_s - real_s) < TOLERANCE_NS / 1e9, f"{told_s * 1e3:.0f} ms for {real_s * 1e3:.0f} ms")


FIRST_TOKENS: Final[dict[str, Callable[[Stage], Any]]] = {
    "client": lambda at: list(ask(at, "slow+long", stream=True)),
    "LangChain": lambda at: list(chat(at, "slow+long").stream(PROMPT)),
    "LlamaIndex": lambda at: list(like(at, "slow+long").stream_chat(CHAT)),
}


async def time_to_first_token(at: Stage) -> None:
    wrong = []
    for name, program in FIRST_TOKENS.items():
        await at.clear()
        program(at)
        await at.settle(0.3)
        real_s = (at.seen[0].first_piece_ns - at.seen[0].start_ns) / 1e9
        told = [call.time_to_first_token_s for call in at.calls]
        if not told or any(one is None or abs(one - real_s) > 2 * TOLERANCE_NS / 1e9 for one in told):
            wrong.append(name)
    expect(not wrong, "none or wrong: " + ", ".join(wrong))


async def tokens(at: Stage) -> None:
    ask(at, "m")
    list(ask(at, "m", stream=True, stream_options={"include_usage": True}))
    list(chat(at, "m", stream_usage=True).stream(PROMPT))
    client(at).responses.create(model="m", input=PROMPT)
    like(at, "m").chat(CHAT)
    await at.settle(0.3)
    told = {(call.input_tokens, call.cached_tokens, call.output_tokens) for call in at.calls}
    expect(told == {(9, 4, 5)}, " and ".join(sorted(str(one) for one in told if one != (9, 4, 5))) + ", not (9, 4, 5)")


async def raw_responses(at: Stage) -> None:
    raw = client(at).chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    with client(at).chat.completions.with_streaming_response.create(model="m", messages=MESSAGES) as response:
        text = response.read()
    expect(raw.parse().choices and text, "the answer is changed")
    for call in at.expect_calls():
        expect(call.output_tokens == 5, "without tokens")


async def other_endpoints(at: Stage) -> None:
    client(at).completions.create(model="m", prompt=PROMPT)
    client(at).embeddings.create(model="m", input=PROMPT)
    await aclient(at).responses.parse(model="m", input=PROMPT)
    client(at).chat.completions.parse(model="m", messages=MESSAGES)
    with openai.AzureOpenAI(azure_endpoint=at.url, api_key="key", api_version="1") as azure:
        azure.chat.completions.create(model="m", messages=MESSAGES)
    at.expect_calls()


async def cache_hits(at: Stage) -> None:
    model = chat(at, "m", cache=InMemoryCache())
    for _ in range(3):
        model.invoke(PROMPT)
    counted = [call for call in at.calls if call.status != FROM_CACHE]
    expect(len(counted) == len(at.seen) == 1, f"{len(counted)} calls for {len(at.seen)}")


async def framework_retries(at: Stage) -> None:
    failing = chat(at, "broken", max_retries=0)
    with suppress(openai.InternalServerError):
        failing.with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke(PROMPT)
    await failing.with_fallbacks([chat(at, "m")]).ainvoke(PROMPT)
    expect(len(at.calls) == len(at.seen) == 4, f"{len(at.calls)} calls for {len(at.seen)}")
    failed = sum(call.status == FAILED for call in at.calls)
    expect(failed == 3, f"{failed} failed for 3")


async def gathered(at: Stage) -> None:
    asks = aclient(at)

    async def agent(index: int) -> None:
        await asks.chat.completions.create(model=f"m{index}", messages=MESSAGES)

    runs = [RunnableLambda(agent).with_config(run_name=f"agent {index}") for index in range(8)]
    await asyncio.gather(*(run.ainvoke(index) for index, run in enumerate(runs)))
    for call in at.expect_calls():
        names = [above.label or above.name for above in at.above(call)]
        expect(any(f"agent {call.model[1:]}" in name for name in names), "calls under no agent, or another")


async def prompts(at: Stage) -> None:
    ask(at, "m")
    chat(at, "m").invoke(PROMPT)
    like(at, "m").chat(CHAT)
    await at.settle(0.3)
    expect(at.spans, "nothing was captured")
    expect(not any(PROMPT in span.to_json() for span in at.spans), "recorded unasked")


CASES: Final[dict[str, Callable[[Stage], Awaitable[None]]]] = {
    "LangChain over openai: one span": one_call_of_langchain,
    "LlamaIndex over openai: one span": one_call_of_llama_index,
    "client in a chain: below its step": client_in_a_chain,
    "client in a node: below its node": client_in_nodes,
    "LangGraph nodes, once each": nodes_of_a_graph,
    "interrupt is no error": interrupted_graph,
    "agents at once: right parents": gathered,
    "cancelled runs": cancelled_runs,
    "cancelled requests": cancelled_requests,
    "astream that is left": left_async_stream,
    "client stream that is left": left_client_stream,
    "LlamaIndex stream that is left": left_llama_index_stream,
    "client streams: duration": client_streams,
    "LlamaIndex stream: duration": llama_index_stream,
    "LlamaIndex streamed query": llama_index_query,
    "LlamaIndex workflow steps": llama_index_workflow,
    "LlamaIndex error": llama_index_error,
    "openai error": client_error,
    "traceparent to the server": traceparent,
    "retries of the client apart": retries,
    "retries of the framework": framework_retries,
    "time to first token": time_to_first_token,
    "tokens, cached ones too": tokens,
    "raw responses": raw_responses,
    "other endpoints, Azure": other_endpoints,
    "cache hits are no calls": cache_hits,
    "prompts not recorded": prompts,
}


async def run_all(at: Stage) -> dict[str, str]:
    """Every case: its name, and what is wrong; empty where nothing is."""
    verdicts: dict[str, str] = {}
    for name, case in CASES.items():
        await at.clear()
        try:
            await asyncio.wait_for(case(at), 30)
        except Exception as error:  # noqa: BLE001 - whatever an instrumentation does to the program is its verdict
            verdicts[name] = str(error).split("\n", 1)[0][:60] or type(error).__name__
        else:
            verdicts[name] = ""
        gc.collect()
    return verdicts
