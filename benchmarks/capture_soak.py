"""Fifty workflows at once for a minute, with faults: is every call that the server saw in the traces exactly once?

The workflows ask through LangChain, LlamaIndex and openai, whole and streamed. Tasks are cancelled, streams left,
connections cut, requests refused once or always, pieces malformed; and one hook in a hundred raises. Each call asks for
a model of its own name and names its span in its headers, so that what the server saw and what is in the trace files
can be laid side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import openai
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

import scepsy
from benchmarks.outcome import Bound, finish
from benchmarks.truth_stage import load_loopback
from scepsy import semconv
from scepsy.capture import recorder

SECONDS: Final = 60.0
WORKFLOWS: Final = 50
WISHES: Final = (
    "plain", "plain", "plain", "pieces", "pieces", "slow", "flaky", "broken", "cut", "malformed", "endless",
)  # fmt: skip
FAULTS: Final = ("cancelled", "abandoned", "failed", "attempted_again", "hook_errors")
"""What must have happened for the run to say anything."""
MESSAGES: Final[list[Any]] = [{"role": "user", "content": "hi"}]


class Faults:
    """What the programs do, and what goes wrong with it, all from one seed."""

    def __init__(self, server: Any, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.made = 0
        # Shared, because making one costs more than the calls.
        self.http = openai.DefaultHttpxClient()
        self.async_http = openai.DefaultAsyncHttpxClient()
        self.client = openai.AsyncOpenAI(base_url=server.url, api_key="key", max_retries=1, http_client=self.async_http)
        self.hook_errors = 0

    def model(self) -> str:
        """A wish of the server, and a number that nobody else has."""
        self.made += 1
        return f"{self.random.choice(WISHES)}+{self.made}"

    async def read(self, stream: Any) -> None:
        """Read a stream, perhaps not to its end."""
        most = self.random.choice((1, 3, 1000))
        async for _ in stream:
            most -= 1
            if most == 0:
                break

    async def ask_client(self, model: str) -> None:
        """One call of openai."""
        streamed = model.startswith(("pieces", "cut", "malformed", "endless"))
        answer: Any = await self.client.chat.completions.create(model=model, messages=MESSAGES, stream=streamed)
        if streamed:
            async with answer:
                await self.read(answer)

    async def ask_langchain(self, model: str) -> None:
        """One call of LangChain, in a chain."""
        given: dict[str, Any] = {"base_url": self.server.url, "api_key": "key", "max_retries": 1}
        made = ChatOpenAI(model=model, http_client=self.http, http_async_client=self.async_http, **given)
        if model.startswith(("pieces", "cut", "malformed", "endless")):
            await self.read(made.astream("hi"))
        else:
            await RunnableLambda(made.ainvoke).ainvoke("hi")

    async def ask_llama_index(self, model: str) -> None:
        """One call of LlamaIndex."""
        given: dict[str, Any] = {"api_base": self.server.url, "api_key": "key", "is_chat_model": True}
        made = OpenAILike(model=model, max_retries=1, http_client=self.http, async_http_client=self.async_http, **given)
        if model.startswith(("pieces", "cut", "malformed", "endless")):
            await self.read(await made.astream_chat([ChatMessage("hi")]))
        else:
            await made.achat([ChatMessage("hi")])

    async def workflow(self, until_s: float, calls: int | None) -> None:
        """Calls, one or two at once, some of them cancelled, until it is time or `calls` were made by all workflows."""
        asks: list[Callable[[str], Awaitable[None]]] = [self.ask_client, self.ask_langchain, self.ask_llama_index]

        @scepsy.workflow
        async def soak() -> None:
            width = self.random.choice((1, 1, 2))
            tasks = [self.random.choice(asks)(self.model()) for _ in range(width)]
            patience_s = self.random.choice((0.05, 0.2, 1.0, 3.0))
            done = asyncio.gather(*tasks, return_exceptions=True)
            with suppress(TimeoutError):
                await asyncio.wait_for(done, patience_s)

        while time.monotonic() < until_s and (calls is None or self.made < calls):
            await soak()

    @contextmanager
    def failing_hooks(self) -> Iterator[None]:
        """Let one in a hundred notes about a call raise."""
        from scepsy.capture import Exchange

        note = Exchange.note

        def failing(exchange: Exchange, *args: Any) -> None:
            if self.random.random() < 0.01:
                self.hook_errors += 1
                raise RuntimeError("a fault in a hook")
            note(exchange, *args)

        Exchange.note = failing  # type: ignore[method-assign] # the fault
        try:
            yield
        finally:
            Exchange.note = note  # type: ignore[method-assign] # as above


def soak(
    directory: Path, *, seconds: float, calls: int | None = None, workflows: int = WORKFLOWS, seed: int = 1
) -> dict[str, int]:
    """Run for some time, or until `calls` were made, traces written to `directory`; returns counts of what happened."""
    server = load_loopback()
    faults = Faults(server, seed)
    scepsy.instrument(directory=directory)
    logger = logging.getLogger("scepsy")
    level = logger.level
    logger.setLevel(logging.ERROR)  # one line for each fault that is meant

    async def run() -> None:
        until_s = time.monotonic() + seconds
        await asyncio.gather(*(faults.workflow(until_s, calls) for _ in range(workflows)))
        await faults.async_http.aclose()
        faults.http.close()
        await asyncio.sleep(0.5)

    try:
        with faults.failing_hooks():
            asyncio.run(run())
    finally:
        left = len(recorder.open)
        scepsy.uninstrument()
        server.stop()
        logger.setLevel(level)
    # A connection may be cut before the server knows the model; the headers name the call in any case.
    seen = {one.headers.get("traceparent", "--").split("-")[2] for one in server.seen}
    spans = _told(directory)
    told = [attributes for _, attributes in spans]
    ended = Counter(attributes.get(semconv.OUTCOME, "") for attributes in told)
    models = Counter(attributes[semconv.REQUEST_MODEL] for attributes in told)
    return {
        "requests": len(server.seen),
        "calls_seen": len(seen),
        "calls_told": len(told),
        "lost": len(seen - {span_id for span_id, _ in spans}),
        "twice": sum(count - 1 for count in models.values()),
        "cancelled": ended["cancelled"],
        "abandoned": ended["abandoned"],
        "failed": sum(semconv.ERROR_TYPE in attributes and semconv.OUTCOME not in attributes for attributes in told),
        "attempted_again": sum(int(attributes.get(semconv.ATTEMPTS, 0)) > 1 for attributes in told),
        "hook_errors": faults.hook_errors,
        "left_open": left,
    }


def _told(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    """Of every LLM span in the files: its id and its attributes."""
    found = []
    for file in directory.glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            for group in json.loads(line)["resourceSpans"]:
                for span in group["scopeSpans"][0]["spans"]:
                    attributes = {pair["key"]: next(iter(pair["value"].values())) for pair in span["attributes"]}
                    if attributes.get(semconv.KIND) == semconv.KIND_LLM:
                        found.append((span["spanId"], attributes))
    return found


def main() -> int:
    """Soak, print the counts, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = soak(Path(directory), seconds=given.seconds)
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):<12} {count:>8,}")
    bounds = [
        Bound(name="calls lost", value=counts["lost"], at_most=0),
        Bound(name="calls told twice", value=counts["twice"], at_most=0),
        Bound(name="calls left open", value=counts["left_open"], at_most=0),
        *(Bound(name=fault.replace("_", " "), value=counts[fault], at_least=1) for fault in FAULTS),
    ]
    return finish("capture_soak", bounds, counts)


if __name__ == "__main__":
    raise SystemExit(main())
