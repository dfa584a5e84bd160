"""A supervisor and its team on LangGraph: a small LLM decides who acts next, a large one does the work.

The supervisor looks at what is there and names the next worker: one that gathers facts, one that writes, one that
criticises. How many turns that takes depends on its decisions.

    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python examples/supervisor.py "Why do leaves fall?"

The endpoint may be any OpenAI-compatible one. GENERATOR_MODEL decides, WRITER_MODEL works. Nothing of the graph is
marked: its name names the workflow, and its nodes are the roles.
"""

from __future__ import annotations

import asyncio
import operator
import os
import sys
import zlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langgraph.types import Command

import scepsy

TURNS = 6  # of workers, at most
Worker = Literal["facts", "draft", "critic"]
TASKS: dict[Worker, str] = {
    "facts": "State facts that help to answer the question and are not there yet.",
    "draft": "Write an answer to the question from what is there.",
    "critic": "Say what is wrong or missing in the last answer.",
}

API_KEY = os.environ.get("OPENAI_API_KEY", "none")
supervisor = ChatOpenAI(model=os.environ.get("GENERATOR_MODEL", "generator"), api_key=API_KEY, max_completion_tokens=8)
worker = ChatOpenAI(model=os.environ.get("WRITER_MODEL", "writer"), api_key=API_KEY, max_completion_tokens=200)


class State(TypedDict):
    """A question and what the team has said so far."""

    question: str
    said: Annotated[list[str], operator.add]


def shown(state: State) -> str:
    """The state as a prompt."""
    return "\n\n".join([f"Question: {state['question']}", *state["said"]])


async def supervise(state: State) -> Command[Literal["facts", "draft", "critic", "__end__"]]:
    """Who acts next."""
    if len(state["said"]) >= TURNS:
        return Command(goto="__end__")
    answer = await supervisor.ainvoke(f"{shown(state)}\n\nWho acts next? Answer facts, draft, critic, or done.")
    decision = decide(str(answer.content), done=bool(state["said"]))
    return Command(goto="__end__" if decision == "done" else decision)


def work(name: Worker) -> Callable[[State], Awaitable[Command[Literal["supervise"]]]]:
    """A node that does one worker's task and gives the word back."""

    async def act(state: State) -> Command[Literal["supervise"]]:
        answer = await worker.ainvoke(f"{shown(state)}\n\n{TASKS[name]}")
        return Command(goto="supervise", update={"said": [f"{name}: {answer.content}"]})

    return act


def decide(answer: str, *, done: bool) -> Literal["facts", "draft", "critic", "done"]:
    """The first worker that an answer names; one that names nobody is taken by what it says instead."""
    words = [*TASKS, "done"] if done else [*TASKS]
    named = [word for word in answer.lower().split() if word in words]
    return named[0] if named else words[zlib.crc32(answer.encode()) % len(words)]


building = StateGraph(State)
building.add_node("supervise", supervise)
for name in TASKS:
    building.add_node(name, work(name))
building.add_edge(START, "supervise")
graph = building.compile(name="supervisor")


async def run(question: str) -> str:
    """What the team said last."""
    state = await graph.ainvoke({"question": question, "said": []})
    return state["said"][-1]


if __name__ == "__main__":
    scepsy.instrument()
    print(asyncio.run(run(" ".join(sys.argv[1:]) or "Why do leaves change their colour in autumn?")))
