"""Scepsy in one process with another instrumentation: neither may disturb the other, and no call may count twice."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import openai

import scepsy
from benchmarks import rivals
from benchmarks.truth_cases import CHAT, MESSAGES, PROMPT, aclient, chat, client, like
from benchmarks.truth_stage import Stage, WrongError, expect
from scepsy.capture.recorder import SCOPE
from scepsy.traces import read_executions
from scepsy_optimizer.errors import ScepsyError

HOOKED: Final = [
    (owner, name)
    for owner in (openai.OpenAI, openai.AsyncOpenAI)
    for name in ("request", "_prepare_request", "_sleep_for_retry", "_process_response")
]


async def program(at: Stage) -> list[str]:
    """Calls of every sort, each of a model of its own; returns the models that have answered, sorted."""
    from langchain_core.runnables import RunnableLambda, RunnableParallel

    at.server.seen.clear()

    def raw(_: Any) -> Any:
        return client(at).chat.completions.create(model="in-a-chain", messages=MESSAGES).id

    RunnableParallel(a=RunnableLambda(raw), b=chat(at, "branch")).invoke(PROMPT)
    await chat(at, "awaited").ainvoke(PROMPT)
    list(chat(at, "pieces+chain", stream_usage=True).stream(PROMPT))
    like(at, "index").chat(CHAT)
    list(like(at, "pieces+index").stream_chat(CHAT))
    client(at).chat.completions.create(model="flaky", messages=MESSAGES)
    async for _ in await aclient(at).chat.completions.create(model="pieces", messages=MESSAGES, stream=True):
        pass
    client(at).embeddings.create(model="embedding", input=PROMPT)
    await at.settle(0.3)
    return sorted(seen.model for seen in at.server.good)


def _calls(paths: list[Path]) -> list[str]:
    """The models of all calls that are read from trace files, sorted."""
    return sorted(span.call.llm for run in read_executions(paths).executions for span in run.calls if span.call)


def _expect_once(told: list[str], answered: list[str], where: str) -> None:
    twice, lost = Counter(told) - Counter(answered), Counter(answered) - Counter(told)
    expect(not twice, f"{where}: {twice.total()} of {len(answered)} calls twice")
    expect(not lost, f"{where}: {lost.total()} of {len(answered)} calls lost")


async def alone_and_beside(at: Stage, name: str) -> None:
    """Each on its own destination: first the other one alone, then both, then the other one alone again."""
    turn_off = rivals.turn_on(name, at.provider, "")
    await program(at)  # the first time is not compared: some spans tell of first uses
    theirs = []
    with tempfile.TemporaryDirectory() as directory:
        for beside in (False, True, False):
            await at.clear()
            before = [getattr(owner, method) for owner, method in HOOKED]
            if beside:
                scepsy.instrument(directory=directory)
            answered = await program(at)
            if beside:
                scepsy.uninstrument()
                _expect_once(_calls([Path(directory)]), answered, "own files")
            after = [getattr(owner, method) for owner, method in HOOKED]
            expect(before == after, "uninstrument() leaves something behind")
            theirs.append(Counter(span.name for span in at.spans))
        turn_off()
    expect(theirs[0] == theirs[1], f"{theirs[1].total()} of its spans beside Scepsy, {theirs[0].total()} alone")
    expect(theirs[0] == theirs[2], f"{theirs[2].total()} of its spans after Scepsy, {theirs[0].total()} before")


async def on_one_provider(at: Stage, name: str) -> None:
    """Both on the provider of the application, Scepsy first: its own files, and whole executions."""
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as warm:
        scepsy.instrument(provider=at.provider, directory=warm)
        turn_off = rivals.turn_on(name, at.provider, "")
        await program(at)
        await at.clear()
        scepsy.instrument(provider=at.provider, directory=directory)
        answered = await program(at)
        scepsy.flush()
        _expect_once(_calls([Path(directory)]), answered, "files")
        runs = read_executions([directory]).executions
        chain = [run for run in runs if any(span.call and span.call.llm == "in-a-chain" for span in run.spans)]
        expect(len(chain) == 1 and len(chain[0].calls) == 2, "an execution is torn apart")
        turn_off()
        scepsy.uninstrument()
        await at.clear()
        await program(at)
        left = [span for span in at.spans if span.instrumentation_scope and span.instrumentation_scope.name == SCOPE]
        expect(not left, f"{len(left)} spans of Scepsy after it was turned off")


BESIDE: Final[dict[str, Callable[[Stage, str], Any]]] = {
    "own destinations": alone_and_beside,
    "one provider": on_one_provider,
}


async def run(at: Stage, name: str, title: str) -> str:
    """One case beside the instrumentation of that name: what is wrong; empty where nothing is."""
    try:
        await asyncio.wait_for(BESIDE[title](at, name), 120)
    except (WrongError, ScepsyError) as error:
        return str(error)
    return ""
