"""What capture costs: microseconds added per run, beside the other instrumentations on the same frameworks.

Each instrumentation runs in a process of its own: first without it, then with it, processor time of all threads,
minimum over batches. Spans go to a processor that drops them; Scepsy is measured twice, the default way (its own trace
files, the writing included) and on the same SDK provider as the others. HTTP is answered within the process. Memory is
what 100,000 calls leave behind, every twentieth of them cancelled.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks import rivals
from benchmarks.outcome import Bound, finish

SMALL, LARGE = "hi", "word " * 40_000
BATCH, BATCHES = 40, 25
MEMORY_CALLS = 100_000
PER_RUN_BOUND_US = 60.0


def _sync_us(run: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(BATCHES):
        begin = time.process_time()
        for _ in range(BATCH):
            run()
        best = min(best, (time.process_time() - begin) / BATCH)
    return best * 1e6


def _async_us(run: Callable[[], Awaitable[Any]]) -> float:
    async def loop() -> float:
        best = float("inf")
        for _ in range(BATCHES):
            begin = time.process_time()
            for _ in range(BATCH):
                await run()
            best = min(best, (time.process_time() - begin) / BATCH)
        return best * 1e6

    return asyncio.run(loop())


def _columns() -> dict[str, Callable[[], float]]:
    """Every column: its name and how to measure it now."""
    columns: dict[str, Callable[[], float]] = {}
    columns |= _langchain_columns()
    columns |= _llama_index_columns()
    columns |= _openai_columns()
    return columns


def _langchain_columns() -> dict[str, Callable[[], float]]:
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
        "LangChain run": lambda: _sync_us(lambda: model.invoke(small)),
        "LangChain run, async": lambda: _async_us(lambda: model.ainvoke(small)),
        "LangChain run, 200 kB": lambda: _sync_us(lambda: model.invoke(large)),
        "LangChain run, async, 200 kB": lambda: _async_us(lambda: model.ainvoke(large)),
        # Three runs: the graph and its two nodes.
        "LangGraph node": lambda: _sync_us(lambda: app.invoke({"x": SMALL})) / 3,
        "LangGraph node, 200 kB": lambda: _sync_us(lambda: app.invoke({"x": LARGE})) / 3,
    }


def _llama_index_columns() -> dict[str, Callable[[], float]]:
    from llama_index.core.llms import ChatMessage, MockLLM

    model = MockLLM(max_tokens=1)
    small, large = [ChatMessage(SMALL)], [ChatMessage(LARGE)]
    return {
        "LlamaIndex call": lambda: _sync_us(lambda: model.chat(small)),
        "LlamaIndex call, async": lambda: _async_us(lambda: model.achat(small)),
        "LlamaIndex call, 200 kB": lambda: _sync_us(lambda: model.chat(large)),
    }


def _openai_columns() -> dict[str, Callable[[], float]]:
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

    async def read() -> None:
        async for _ in await aclient.chat.completions.create(model="m", messages=small, stream=True):
            pass

    return {
        "openai call": lambda: _sync_us(lambda: plain(small)),
        "openai call, async": lambda: _async_us(lambda: aclient.chat.completions.create(model="m", messages=small)),
        "openai call, 200 kB": lambda: _sync_us(lambda: plain(large)),
        "openai stream, 20 pieces": lambda: _sync_us(
            lambda: list(client.chat.completions.create(model="m", messages=small, stream=True))
        ),
        "openai stream, async, 20 pieces": lambda: _async_us(read),
    }


def _worker(name: str) -> None:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    class Drop(SpanProcessor):
        """Spans are made, counted and dropped."""

        ended = 0

        def on_end(self, span: Any) -> None:  # noqa: ARG002 - the processor interface has it
            self.ended += 1

    drop = Drop()
    provider = TracerProvider()
    provider.add_span_processor(drop)
    columns = _columns()
    # Twice, the best counts: what is measured first also warms every cache for what comes after.
    before = {column: min(measure(), measure()) for column, measure in columns.items()}
    with tempfile.TemporaryDirectory() as directory:
        rivals.turn_on(name, provider, directory)
        added, captured = {}, {}
        for column, measure in columns.items():
            drop.ended = 0
            added[column] = min(measure(), measure()) - before[column]
            captured[column] = name == "scepsy" or drop.ended > 0
        print(json.dumps({"added_us": added, "before_us": before, "captured": captured}), flush=True)


def _memory_worker(name: str) -> None:
    """Bytes left behind per call, over many calls of which some are cancelled."""
    import resource

    from langchain_core.language_models.chat_models import BaseChatModel
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_core.outputs import ChatGeneration, ChatResult
    from opentelemetry.sdk.trace import TracerProvider

    class Model(BaseChatModel):
        def _generate(self, *_args: Any, **_kwargs: Any) -> ChatResult:
            raise NotImplementedError

        async def _agenerate(self, messages: Any, *_args: Any, **_kwargs: Any) -> ChatResult:
            if messages[0].content == "wait":
                await asyncio.sleep(3600)
            return ChatResult(generations=[ChatGeneration(message=AIMessage("x"))])

        @property
        def _llm_type(self) -> str:
            return "model"

    model = Model()
    go, wait = [HumanMessage("go")], [HumanMessage("wait")]

    async def many(count: int) -> None:
        for start in range(0, count, 200):
            tasks = [
                asyncio.create_task(model.ainvoke(wait if index % 20 == 0 else go))
                for index in range(start, min(start + 200, count))
            ]
            await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            for task in tasks[::20]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with tempfile.TemporaryDirectory() as directory:
        rivals.turn_on(name, TracerProvider(), directory)
        asyncio.run(many(MEMORY_CALLS // 10))
        gc.collect()
        before = _resident_bytes()
        asyncio.run(many(MEMORY_CALLS))
        gc.collect()
        if name.startswith("scepsy"):
            from scepsy.capture import flush, recorder

            flush()
            left = len(recorder.open)
        else:
            left = -1
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        grown = (_resident_bytes() - before) / MEMORY_CALLS
        print(json.dumps({"bytes_per_call": grown, "left_open": left, "peak_mib": peak_mib}), flush=True)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - one short read of the kernel's file
        return int(file.read().split()[1]) * 4096


def main() -> int:
    """Measure all, print the table, judge."""
    rivals.prepare()
    results = {name: rivals.run_worker("benchmarks.capture_overhead", name) for name in rivals.NAMES}
    columns = list(results["scepsy"]["added_us"])
    print(f"{'µs added per':<34}" + "".join(f"{title:>28}" for title in rivals.NAMES.values()))
    for column in columns:
        cells = (
            f"{result['added_us'][column]:.0f}" if result["captured"][column] else "captures nothing"
            for result in results.values()
        )
        print(f"{column:<34}" + "".join(f"{cell:>28}" for cell in cells))
    memory = {
        name: rivals.run_worker("benchmarks.capture_overhead", f"memory:{name}") for name in ("scepsy", "scepsy-sdk")
    }
    print(f"\nmemory over {MEMORY_CALLS:,} calls, one in 20 cancelled:")
    for name, figures in memory.items():
        print(
            f"  {rivals.NAMES[name]}: {figures['bytes_per_call']:.1f} bytes per call, {figures['left_open']} left open"
        )
    ours = results["scepsy"]["added_us"]
    others = [name for name in rivals.NAMES if not name.startswith("scepsy")]
    bounds = [
        Bound(name=f"{column}: µs", value=ours[column], at_most=PER_RUN_BOUND_US)
        for column in columns
        if column.startswith("LangC")
    ]
    for column in columns:
        best = min(results[name]["added_us"][column] for name in others if results[name]["captured"][column])
        bounds.append(Bound(name=f"{column}: part of the best other", value=ours[column] / best, at_most=1 / 3))
    bounds.append(Bound(name="bytes left per call", value=memory["scepsy"]["bytes_per_call"], at_most=50))
    bounds.append(Bound(name="calls left open", value=memory["scepsy"]["left_open"], at_most=0))
    return finish("capture_overhead", bounds, {"added_us": {n: r["added_us"] for n, r in results.items()}})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        wanted = sys.argv[2]
        if wanted.startswith("memory:"):
            _memory_worker(wanted.removeprefix("memory:"))
        else:
            _worker(wanted)
        sys.exit(0)
    sys.exit(main())
