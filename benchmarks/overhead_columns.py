"""What `capture_overhead` runs over and over: frameworks with fake models, clients answered within the process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

SMALL, LARGE = "hi", "word " * 40_000
BATCH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Something that is done over and over; `run` does it once, or gives the awaitable that does."""

    run: Callable[[], Any]
    asynchronous: bool = False
    parts: int = 1
    """How many runs of the framework it stands for."""

    def seconds(self, settle: Callable[[], object]) -> float:
        """Processor time of a run, averaged over a batch; `settle` finishes what the batch has left to do."""
        if self.asynchronous:
            return asyncio.run(self._loop(settle))
        self.run()
        begin = time.process_time()
        for _ in range(BATCH):
            self.run()
        settle()
        return (time.process_time() - begin) / BATCH / self.parts

    async def _loop(self, settle: Callable[[], object]) -> float:
        await self.run()
        begin = time.process_time()
        for _ in range(BATCH):
            await self.run()
        settle()
        return (time.process_time() - begin) / BATCH / self.parts


def all_columns() -> dict[str, Column]:
    """Every column of the table, by its title."""
    return _langchain_columns() | _llama_index_columns() | _openai_columns()


def _langchain_columns() -> dict[str, Column]:
    from langchain_core.language_models import FakeListChatModel
    from langchain_core.messages import HumanMessage
    from langgraph.graph import START, StateGraph

    class Model(FakeListChatModel):
        model_name: str = "model"  # some instrumentations pass over a model without a name

    model = Model(responses=["answer"])
    small, large = [HumanMessage(SMALL)], [HumanMessage(LARGE)]
    graph = StateGraph(dict)
    graph.add_node("one", lambda state: state)
    graph.add_node("two", lambda state: state)
    graph.add_edge(START, "one")
    graph.add_edge("one", "two")
    app = graph.compile()
    return {
        "LangChain run": Column(run=lambda: model.invoke(small)),
        "LangChain run, 200 kB": Column(run=lambda: model.invoke(large)),
        "LangChain run, async": Column(run=lambda: model.ainvoke(small), asynchronous=True),
        "LangChain run, async, 200 kB": Column(run=lambda: model.ainvoke(large), asynchronous=True),
        # Three runs: the graph and its two nodes.
        "LangGraph node": Column(run=lambda: app.invoke({"x": SMALL}), parts=3),
        "LangGraph node, 200 kB": Column(run=lambda: app.invoke({"x": LARGE}), parts=3),
        "LangGraph node, async": Column(run=lambda: app.ainvoke({"x": SMALL}), parts=3, asynchronous=True),
    }


def _llama_index_columns() -> dict[str, Column]:
    from llama_index.core.llms import ChatMessage, MockLLM

    model = MockLLM(max_tokens=1)
    small, large = [ChatMessage(SMALL)], [ChatMessage(LARGE)]
    return {
        "LlamaIndex call": Column(run=lambda: model.chat(small)),
        "LlamaIndex call, 200 kB": Column(run=lambda: model.chat(large)),
        "LlamaIndex call, async": Column(run=lambda: model.achat(small), asynchronous=True),
    }


def _openai_columns() -> dict[str, Column]:
    import httpx
    import openai

    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    message = {"role": "assistant", "content": "answer"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    whole = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    pieces = []
    for index in range(20):
        part = {"index": 0, "delta": {"content": "x"}, "finish_reason": None}
        pieces.append({"id": "x", "object": "chat.completion.chunk", "created": index, "model": "m", "choices": [part]})
    body = json.dumps(whole).encode()
    stream = b"".join(f"data: {json.dumps(piece)}\n\n".encode() for piece in pieces) + b"data: [DONE]\n\n"

    def answer(request: httpx.Request) -> httpx.Response:
        if b'"stream":true' in request.content[-200:] or b'"stream": true' in request.content[-200:]:
            return httpx.Response(200, content=stream, headers={"content-type": "text/event-stream"})
        return httpx.Response(200, content=body, headers={"content-type": "application/json"})

    transport = httpx.MockTransport(answer)
    client = openai.OpenAI(api_key="x", base_url="http://here/v1", http_client=httpx.Client(transport=transport))
    aclient = openai.AsyncOpenAI(
        api_key="x", base_url="http://here/v1", http_client=httpx.AsyncClient(transport=transport)
    )
    small, large = ([{"role": "user", "content": text}] for text in (SMALL, LARGE))

    def plain(messages: Any) -> Any:
        return client.chat.completions.create(model="m", messages=messages)

    def streamed(messages: Any) -> Any:
        return list(client.chat.completions.create(model="m", messages=messages, stream=True))

    def plain_async(messages: Any) -> Awaitable[Any]:
        return aclient.chat.completions.create(model="m", messages=messages)

    async def streamed_async() -> None:
        async for _ in await aclient.chat.completions.create(model="m", messages=small, stream=True):
            pass

    return {
        "openai call": Column(run=lambda: plain(small)),
        "openai call, 200 kB": Column(run=lambda: plain(large)),
        "openai call, async": Column(run=lambda: plain_async(small), asynchronous=True),
        "openai call, async, 200 kB": Column(run=lambda: plain_async(large), asynchronous=True),
        "openai stream, 20 pieces": Column(run=lambda: streamed(small)),
        "openai stream, 20 pieces, 200 kB": Column(run=lambda: streamed(large)),
        "openai stream, 20 pieces, async": Column(run=streamed_async, asynchronous=True),
    }
