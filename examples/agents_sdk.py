"""The OpenAI Agents SDK on one's own models: a planner, helpers with a tool at work side by side, then an author.

The planner names points, a helper notes what there is to say about each, looking words up in a glossary where it
wishes to, and the author writes. How many points and how many look-ups there are depends on the models.

    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python examples/agents_sdk.py "Why do tides matter?"

The endpoint may be any OpenAI-compatible one that serves chat completions. GENERATOR_MODEL and WRITER_MODEL name its
models. The SDK calls models through the openai client, which is hooked; the marks name the workflow and the roles.
"""

from __future__ import annotations

import asyncio
import os
import sys

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

import scepsy

set_tracing_disabled(disabled=True)  # the SDK's own traces go to OpenAI, with prompts and answers

POINTS = 4  # at most

GLOSSARY = {
    "tide": "The rise and fall of the sea, twice a day, by the pull of moon and sun.",
    "barrage": "A dam across an estuary that holds the tide back and lets it out through turbines.",
    "range": "The height between low and high water: below five metres a barrage hardly pays.",
}

client = AsyncOpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=600)


def served(variable: str, name: str) -> OpenAIChatCompletionsModel:
    """A chat model of the endpoint."""
    return OpenAIChatCompletionsModel(model=os.environ.get(variable, name), openai_client=client)


@function_tool
def look_up(word: str) -> str:
    """What a word means."""
    return GLOSSARY.get(word.lower(), "not in the glossary")


planner = Agent(
    name="planner",
    instructions=f"Name up to {POINTS} points that an answer must treat, one per line.",
    model=served("GENERATOR_MODEL", "generator"),
    model_settings=ModelSettings(max_tokens=80),
)
helper = Agent(
    name="helper",
    instructions="Write short notes on the point. Look up words that you are not sure of.",
    model=served("GENERATOR_MODEL", "generator"),
    model_settings=ModelSettings(max_tokens=120),
    tools=[look_up],
)
author = Agent(
    name="author",
    instructions="Answer the question from the notes.",
    model=served("WRITER_MODEL", "writer"),
    model_settings=ModelSettings(max_tokens=300),
)


async def ask(agent: Agent, text: str) -> str:
    """What an agent ends with."""
    return str((await Runner.run(agent, text)).final_output)


@scepsy.agent
async def plan(question: str) -> list[str]:
    """The points of an answer; an answer that is all in one line is cut into pieces of a few words."""
    answer = await ask(planner, question)
    lines = [line for line in answer.splitlines() if line.strip()]
    words = answer.split()
    return (lines if len(lines) > 1 else [" ".join(words[at : at + 20]) for at in range(0, len(words), 20)])[:POINTS]


@scepsy.agent
async def note(question: str, point: str) -> str:
    """Notes on a point."""
    return await ask(helper, f"Question: {question}\nPoint: {point}")


@scepsy.agent
async def write(question: str, notes: list[str]) -> str:
    """The answer itself."""
    return await ask(author, "\n\n".join([f"Question: {question}", *notes]))


@scepsy.workflow(name="agents-sdk")
async def run(question: str) -> str:
    """An answer to a question."""
    points = await plan(question)
    return await write(question, list(await asyncio.gather(*(note(question, point) for point in points))))


if __name__ == "__main__":
    scepsy.instrument()
    print(asyncio.run(run(" ".join(sys.argv[1:]) or "What limits tidal power?")))
