"""The three ways to hear of LangChain's runs tell the same of the same programs."""

import asyncio
import subprocess
import sys
from contextlib import suppress

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool

import scepsy
from scepsy import semconv
from scepsy.capture import recorder
from scepsy_integrations.langchain import ScepsyCallbackHandler, managers

MODEL = FakeListChatModel(responses=["answer"] * 1000)
# Cancelled after a twentieth of this; its thread sleeps on, and the test ends only after it.
SLOW = FakeListChatModel(responses=["a"] * 1000, sleep=1)
COMPLETION = FakeListLLM(responses=["answer"] * 1000)
CHAIN = ChatPromptTemplate.from_template("a {question}") | MODEL | StrOutputParser()
CALL = ("chat FakeListChatModel", [])


class Library(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return [Document(MODEL.invoke(query, {"callbacks": run_manager.get_child()}).content)]


@tool
def look_up(what: str) -> str:
    """Look something up."""
    return MODEL.invoke(what).content


@RunnableLambda
def fails(_):
    MODEL.invoke("q")
    raise ValueError


async def left(config):
    stream = CHAIN.astream({"question": 1}, config)
    async for _ in stream:
        break
    await stream.aclose()
    for _ in range(2000):  # the generators below it are closed by the event loop, when it comes to it
        if recorder.open:
            await asyncio.sleep(0.01)


async def cancelled(config):
    task = asyncio.create_task(SLOW.ainvoke("q", config))
    await asyncio.sleep(0.05)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def failed(config):
    with suppress(ValueError):
        fails.invoke("q", config)
    with suppress(ValueError):
        await fails.ainvoke("q", config)


PROGRAMS = {
    "whole": lambda config: asyncio.to_thread(CHAIN.invoke, {"question": 1}, config),
    "awaited": lambda config: CHAIN.ainvoke({"question": 1}, config),
    "batch": lambda config: MODEL.abatch(["one", "two"], config),
    "prompts": lambda config: MODEL.agenerate_prompt(
        [ChatPromptTemplate.from_template(text).invoke({}) for text in ("one", "two")], **config
    ),
    "stream left": left,
    "completion": lambda config: COMPLETION.ainvoke("q", config),
    "tool": lambda config: look_up.ainvoke("q", config),
    "tool in a thread": lambda config: asyncio.to_thread(look_up.invoke, "q", config),
    "retriever": lambda config: Library().ainvoke("q", config),
    "cancelled": cancelled,
    "failed": failed,
}


def told(recorded):
    about = (semconv.KIND, semconv.OUTCOME, semconv.ERROR_TYPE, semconv.ROLE)
    return [
        (recorded.path(span), [span.attributes.get(key) for key in about], span.status.status_code)
        for span in recorded.spans
    ]


@pytest.mark.parametrize("program", PROGRAMS)
async def test_all_ways_tell_the_same(recorded, monkeypatch, program):
    await PROGRAMS[program]({})
    straight = told(recorded)
    assert any(kind == semconv.KIND_LLM for _, (kind, *_), _ in straight)

    scepsy.uninstrument()
    recorded.clear()
    monkeypatch.setattr(managers, "_as_known", lambda *_: False)
    scepsy.instrument(provider=recorded.provider)
    await PROGRAMS[program]({})
    assert told(recorded) == straight

    scepsy.uninstrument()
    recorded.clear()
    recorder.use(recorded.provider)
    await PROGRAMS[program]({"callbacks": [ScepsyCallbackHandler()]})
    assert told(recorded) == straight


def test_other_managers_are_not_touched(monkeypatch):
    class Strange:
        def on_chain_start(self, somehow, otherwise):
            """Not as we know it."""

    before = dict(vars(managers.langchain.CallbackManager))
    monkeypatch.setattr(managers.langchain, "AsyncCallbackManager", Strange)
    assert not managers.hook_managers({"on_chain_start": None}, {})
    assert dict(vars(managers.langchain.CallbackManager)) == before


FIRST = (
    "langchain_core.callbacks",
    "langchain_core.runnables",
    "langchain_core.prompts",
    "langchain_openai",
    "langgraph.graph",
)


@pytest.mark.parametrize("first", FIRST)
def test_whichever_module_is_imported_first(first):
    """LangChain's modules import each other in circles, and the hooks are made in the middle of one."""
    program = f"import scepsy; scepsy.instrument(); import {first}\n"
    program += "import langchain_core.runnables.config\n"
    program += "from scepsy_integrations.langchain import managers; print(len(managers._patches))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (int(shown.stdout) > 0, shown.stderr) == (True, "")
