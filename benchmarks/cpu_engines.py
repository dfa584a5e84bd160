"""Real engines on CPU cores for benchmarks: models with random weights, their profiles, and workflows to send to them.

Needs .venv-vllm (`make test-vllm` makes it). Answers are as long as they are asked to be, so that the same workflow
asks the same of every deployment.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import aiohttp

from scepsy.collect.joining import CONVERSATION_HEADERS, WORKFLOW_HEADER
from scepsy.deployment import deploy
from scepsy.files import load_profile
from scepsy.profiling import shipped_profiles
from scepsy.traces import read_executions
from scepsy_optimizer.allocation import Choice, Groups
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.workload import Workload, aggregate

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
COMMAND = (str(PYTHON), "-m", "vllm.entrypoints.openai.api_server")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""For every engine: nothing is fetched, nothing is told."""

WHOLE: Groups = (Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=1),)
"""One replica on a core of its own."""

PROFILE_OPTIONS = ("--requests", "16", "--max-num-seqs", "8", "--max-num-batched-tokens", "1024")
PROFILE_OPTIONS += ("--max-model-len", "1024")
# Ids that are plain text in the models' vocabulary.
_TOKENS = range(10, 200)
_EXECUTION_HEADER = CONVERSATION_HEADERS[0]

Call = Callable[[str, int, int], Awaitable[None]]
"""Call an LLM with so many prompt and output tokens."""
Flow = Callable[[Call, random.Random], Awaitable[None]]
"""One execution of a workflow: what it asks is drawn from the random numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """When an execution was sent and when it was done, in seconds from the beginning of its load."""

    sent_s: float
    done_s: float

    @property
    def latency_s(self) -> float:
        """From the first request to the last answer."""
        return self.done_s - self.sent_s


def is_missing() -> bool:
    """Whether there is no vLLM; says so."""
    if not PYTHON.exists():
        print("there is no .venv-vllm; make test-vllm makes it", file=sys.stderr)
    return not PYTHON.exists()


def make_models(sizes: Mapping[str, tuple[int, int]], folder: Path) -> dict[str, Path]:
    """The directory of each model, with random weights; its size is hidden size and layers."""
    script = ROOT / "tests" / "vllm" / "make_model.py"
    for seed, (llm, size) in enumerate(sizes.items()):
        words = [str(PYTHON), str(script), str(folder / llm), *(str(part) for part in size), str(seed)]
        subprocess.run(words, check=True, capture_output=True)
    return {llm: folder / llm for llm in sizes}


def traced_name(number: int) -> str:
    """What the traced executions are called."""
    return f"traced {number}"


async def trace(flows: Mapping[str, Flow], llms: tuple[str, ...], count: int, folder: Path) -> dict[str, Workload]:
    """What `count` executions of each workflow ask of the LLMs, as an endpoint of emulators has recorded it."""
    # Any profile will do: only how long calls are and which waits for which is used of these traces.
    quick = shipped_profiles("H100")["reranker"]
    emulated = {llm: replace(quick, llm=llm) for llm in llms}
    plan = hand_made_plan(dict.fromkeys(llms, WHOLE), emulated, parse_cluster(f"{len(llms)}xH100"))
    with deploy(plan, engine="emulator", profiles=emulated, name="traced", record=folder) as running:
        async with client() as session:
            turns = asyncio.Semaphore(8)

            async def one(workflow: str, number: int) -> None:
                async with turns:
                    await execute(session, running.url, workflow, flows[workflow], traced_name(number))

            await asyncio.gather(*(one(workflow, number) for workflow in flows for number in range(count)))
    executions = read_executions([folder]).executions
    return {name: aggregate([one for one in executions if one.workflow == name]) for name in flows}


def profile(
    llm: str,
    model: Path,
    traces: Path,
    target: Path,
    device_type: str = "CPU",
    engine: str = "vllm-cpu",
    command: Sequence[str] = COMMAND,
    options: Sequence[str] = PROFILE_OPTIONS,
) -> LLMProfile:
    """What `scepsy profile` measures, called as a user calls it."""
    words = [sys.executable, "-m", "scepsy", "profile", str(model), "--llm", llm, "--device-type", device_type]
    words += ["--engine", engine, "--command", " ".join(command), "--traces", str(traces)]
    words += [*options, "-o", str(target)]
    subprocess.run(words, check=True, stdout=sys.stderr)
    return load_profile(target)


def client() -> aiohttp.ClientSession:
    """Without a limit on connections: nothing waits here."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300))


async def execute(
    session: aiohttp.ClientSession,
    url: str,
    workflow: str,
    flow: Flow,
    name: str,
    again: str = "",
    on_answer: Callable[[int], None] = lambda _tokens: None,
) -> None:
    """One execution, its answers streamed; the same name asks for as much, and only with the same `again` for the same.

    `on_answer` is told the tokens of each answer as soon as it is whole. Raises RuntimeError where an answer is not
    what was asked for.
    """
    words = random.Random(f"{workflow} {name} {again}")
    headers = {WORKFLOW_HEADER: workflow, _EXECUTION_HEADER: f"{workflow} {name} {again}"}

    async def call(llm: str, prompt_tokens: int, output_tokens: int) -> None:
        body = {"model": llm, "prompt": words.choices(_TOKENS, k=prompt_tokens), "max_tokens": output_tokens}
        body |= {"min_tokens": output_tokens, "ignore_eos": True, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with session.post(f"{url}/completions", json=body, headers=headers) as response:
            answer = await response.read()
        if response.status != 200 or _completion_tokens(answer) != output_tokens:
            raise RuntimeError(f"{llm} answered {response.status}: {answer[-300:].decode(errors='replace')}")
        on_answer(output_tokens)

    await flow(call, random.Random(f"{workflow} {name}"))


def _completion_tokens(answer: bytes) -> int | None:
    """What the last piece of a stream says of its usage."""
    pieces = [line[6:] for line in answer.splitlines() if line.startswith(b"data: {")]
    usage = json.loads(pieces[-1]).get("usage") if pieces else None
    return int(usage["completion_tokens"]) if usage else None


async def output_tokens(workflow: str, flow: Flow, name: str) -> int:
    """What an execution of that name generates in all."""
    total = 0

    async def call(_llm: str, _prompt_tokens: int, generated: int) -> None:
        nonlocal total
        total += generated

    await flow(call, random.Random(f"{workflow} {name}"))
    return total


async def draw_evenly(workflow: str, flow: Flow, names: Sequence[str], count: int, seed: str) -> list[str]:
    """So many of the names in random order, as long and as short ones among them as in all: by their output tokens
    every so-manieth, from a random first. A sample at random would be of another mean by a few percent."""
    rng = random.Random(seed)
    sizes = {name: await output_tokens(workflow, flow, name) for name in names}
    ordered = sorted(names, key=lambda name: (sizes[name], name))
    step = len(ordered) / count
    first = rng.uniform(0, step)
    drawn = [ordered[int(first + number * step) % len(ordered)] for number in range(count)]
    rng.shuffle(drawn)
    return drawn


async def poisson(
    one: Callable[[int], Awaitable[None]], *, rate_rps: float, seconds: float, seed: str
) -> list[Finished]:
    """Executions sent as Poisson arrivals whose number is known: as many as the rate says, at times drawn evenly."""
    rng = random.Random(seed)
    arrivals_s = sorted(rng.uniform(0, seconds) for _ in range(round(rate_rps * seconds)))
    finished: list[Finished] = []
    begun_s = time.perf_counter()

    async def timed(number: int) -> None:
        sent_s = time.perf_counter() - begun_s
        await one(number)
        finished.append(Finished(sent_s=sent_s, done_s=time.perf_counter() - begun_s))

    async with asyncio.TaskGroup() as group:
        for number, at_s in enumerate(arrivals_s):
            await asyncio.sleep(max(0.0, begun_s + at_s - time.perf_counter()))
            group.create_task(timed(number))
    return finished


async def saturate(one: Callable[[int], Awaitable[None]], *, at_once: int, seconds: float) -> list[Finished]:
    """So many executions in flight, each followed at once by another, until the time is over."""
    finished: list[Finished] = []
    begun_s = time.perf_counter()

    async def again_and_again(first: int) -> None:
        for number in range(first, sys.maxsize, at_once):
            sent_s = time.perf_counter() - begun_s
            await one(number)
            finished.append(Finished(sent_s=sent_s, done_s=time.perf_counter() - begun_s))

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(again_and_again(number) for number in range(at_once)))
    return finished
