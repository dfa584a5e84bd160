"""Capture below the OpenAI Agents SDK: both of OpenAI's APIs, whole and streamed, with a tool."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scepsy.traces import read_executions

_PATH = Path(__file__).parents[1] / "integrations" / "loopback.py"
_spec = importlib.util.spec_from_file_location("agents_loopback", _PATH)
_loopback = importlib.util.module_from_spec(_spec)
sys.modules["agents_loopback"] = _loopback
_spec.loader.exec_module(_loopback)

PROGRAM = """
import asyncio
import agents
import openai
import scepsy

agents.set_tracing_disabled(disabled=True)
scepsy.instrument(include_usage=True)

@agents.function_tool
def look_up(word: str) -> str:
    return word

async def stream(agent):
    result = agents.Runner.run_streamed(agent, "why?")
    async for _ in result.stream_events():
        pass

@scepsy.workflow(name="team")
async def team(client):
    chat = lambda model: agents.OpenAIChatCompletionsModel(model=model, openai_client=client)
    responses = agents.OpenAIResponsesModel(model="responses", openai_client=client)
    plain = agents.Agent(name="plain", model=chat("chat"))
    tooled = agents.Agent(name="tooled", model=chat("tools"), tools=[look_up], tool_use_behavior="stop_on_first_tool")
    other = agents.Agent(name="other", model=responses)
    await asyncio.gather(*(agents.Runner.run(agent, "why?") for agent in (plain, tooled, other)))
    await stream(plain)
    await stream(other)

async def main():
    async with openai.AsyncOpenAI() as client:
        await team(client)

asyncio.run(main())
"""


@pytest.fixture
def server():
    started = _loopback.Loopback().start()
    yield started
    started.stop()


def test_every_call_is_one_call_of_its_workflow(server, tmp_path):
    environment = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "none", "SCEPSY_TRACES": str(tmp_path)}
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (execution,) = read_executions([tmp_path]).executions
    assert execution.workflow == "team"
    assert Counter(span.call.llm for span in execution.calls) == Counter(seen.model for seen in server.good)
    assert Counter(seen.path for seen in server.good) == {"/v1/chat/completions": 3, "/v1/responses": 2}
    for span in execution.calls:
        # The SDK does not ask for the token counts of a chat stream; Scepsy does, out of its sight.
        assert (span.call.input_tokens, span.call.cached_tokens, span.call.output_tokens) == (9, 4, 5)
