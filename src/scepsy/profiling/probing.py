"""Step times of a running engine, one kind of step at a time.

Prefill: single requests of one output token on an idle engine; their time is one prefill step and the way through the
API. Where the engine counts the step itself (vLLM does), the rest is the time per request outside its steps. Decode:
requests of equal length that start together, once with few and once with more tokens; the difference is decode steps of
the full batch and nothing else. The moments at which single tokens arrive are not used: an API server that lacks a core
sends them in bursts. Everything is timed several times and the shortest counts: whatever else a machine does can only
make it longer, and the loads that follow (arrivals.py) see what is usual.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from scepsy.profiling.endpoint import Endpoint
from scepsy.profiling.journal import Journal
from scepsy.profiling.progress import Work

_WARM_UP = (64, 16)
# How often a point of up to so many prompt tokens is timed, and once beyond.
_REPEATS = ((2048, 3), (8192, 2))
# How often more where it took longer than it can, and how much longer counts as that.
_AGAIN = 3
_NOISE = 1.2
# How many tokens more the longer calls have.
_DECODE_TOKENS = 32
_SHORTEST_STEP_S = 1e-5
# Guessed before anything is known, only for the time that is left; what is measured corrects it.
_GUESSED_TOKEN_S = 0.0001
_GUESSED_STEP_S = 0.01
# Contexts are made by real prefills: more prompt tokens than this in one point take longer than they tell.
_PROMPT_BUDGET = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPoint:
    """Time of a prefill step of that many tokens, and of the rest of the request's way."""

    tokens: int
    step_s: float
    request_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePoint:
    """Time of a decode step of a batch at a mean context."""

    batch: int
    context_tokens: int
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What to measure."""

    prefill_tokens: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]

    @property
    def points(self) -> int:
        """How many measurements that is."""
        return len(self.prefill_tokens) + len(self.decode)

    def guesses_s(self, engine: str) -> dict[str, float]:
        """A first guess of each measurement's time, for the `Work` of that engine."""
        prefill = {
            _key(engine, "prefill", tokens): _repeats(tokens) * tokens * _GUESSED_TOKEN_S
            for tokens in self.prefill_tokens
        }
        decode = {}
        for batch, context in self.decode:
            steps = 2 * _longest_answer(batch, context) - _DECODE_TOKENS
            once_s = 2 * batch * context * _GUESSED_TOKEN_S + steps * _GUESSED_STEP_S
            decode[_key(engine, "decode", batch, context)] = _repeats(batch * context) * once_s
        return prefill | decode


def probe_grid(*, max_model_len: int, max_num_seqs: int, kv_tokens: int | None) -> Grid:
    """Prompts up to the model's length by factors of 4, batches up to `max_num_seqs` by factors of 2 and 4.

    Long contexts are measured at the batches that the KV cache and a budget of prompt tokens allow; a model that has no
    long ones is measured at half of its length as well, because it is contexts that tell what keys and values cost.
    """
    longest = max_model_len - _DECODE_TOKENS - 1
    prefill = [tokens for tokens in (16, 64, 256, 1024, 4096, 16384) if tokens < longest]
    # The longest prompt itself: beyond it nothing is asked for.
    prefill.append(min(longest, 32768))
    batches = [batch for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256) if batch <= max_num_seqs]
    contexts = [64, *([context for context in (1024, 4096, 16384) if context < longest] or [longest // 2])]
    room = min(_PROMPT_BUDGET, kv_tokens or _PROMPT_BUDGET)
    decode = [
        (batch, context)
        for context in contexts
        for batch in batches
        if context + _longest_answer(batch, context) <= max_model_len
        and (batch * (context + _longest_answer(batch, context)) <= room or (batch == 1 and context == contexts[0]))
    ]
    return Grid(prefill_tokens=tuple(prefill), decode=tuple(decode))


def _longest_answer(batch: int, context: int) -> int:
    """Tokens of the longer calls: prefills come one after another, and the first one must still run at the last."""
    return 8 + batch * context // 2048 + batch // 8 + _DECODE_TOKENS


async def probe(
    endpoint: Endpoint, grid: Grid, journal: Journal, work: Work, engine: str
) -> tuple[list[PrefillPoint], list[DecodePoint]]:
    """Measure every point of the grid that the journal does not have. Nothing else may use the engine meanwhile.

    `work` is told each point, also those from the journal, as one of `engine`. Raises ScepsyError where the engine
    fails.
    """
    await endpoint.complete(*_WARM_UP)
    prefill = []
    for tokens in grid.prefill_tokens:
        point, took_s = await kept(journal, f"prefill {tokens}", partial(_prefill, endpoint, tokens))
        prefill.append(PrefillPoint(tokens=tokens, **point))
        text = f"prefill of {tokens} tokens: {point['step_s'] * 1000:.1f} ms"
        work.finish(_key(engine, "prefill", tokens), text, took_s=took_s)
    decode: list[DecodePoint] = []
    for batch, context in grid.decode:
        most_s = _at_most_s(decode, batch, context)
        measure = partial(_decode, endpoint, batch, context, most_s)
        point, took_s = await kept(journal, f"decode {batch} {context}", measure)
        decode.append(DecodePoint(batch=batch, context_tokens=context + _DECODE_TOKENS // 2, **point))
        text = f"decode of {batch} at {context} tokens: {point['step_s'] * 1000:.2f} ms"
        work.finish(_key(engine, "decode", batch, context), text, took_s=took_s)
    return prefill, decode


async def kept(
    journal: Journal, key: str, measure: Callable[[], Awaitable[dict[str, float]]]
) -> tuple[dict[str, float], float | None]:
    """The point of that key from the journal, else measured and kept there; and how long that took, None if kept."""
    known = journal.get(key)
    if known is not None:
        return known, None
    begun_s = time.perf_counter()
    found = await measure()
    journal.put(key, found)
    return found, time.perf_counter() - begun_s


def _key(engine: str, *what: object) -> str:
    return f"steps of {engine}: {' '.join(str(part) for part in what)}"


def _repeats(prompt_tokens: int) -> int:
    return next((repeats for most, repeats in _REPEATS if prompt_tokens <= most), 1)


async def _prefill(endpoint: Endpoint, tokens: int) -> dict[str, float]:
    steps, rests = [], []
    for _ in range(_repeats(tokens)):
        before = await endpoint.counters()
        timing = await endpoint.complete(tokens, 1)
        counted_s = (await endpoint.counters()).prefill_time_s - before.prefill_time_s
        steps.append(counted_s if 0 < counted_s < timing.first_token_s else timing.first_token_s)
        rests.append(timing.first_token_s - steps[-1])
    return {"step_s": min(steps), "request_s": min(rests)}


def _at_most_s(before: list[DecodePoint], batch: int, context: int) -> float:
    """What a decode step can take: as many times as long as the smaller batch's as it has calls, and some noise."""
    if not before or before[-1].context_tokens != context + _DECODE_TOKENS // 2:
        return math.inf
    return _NOISE * before[-1].step_s * batch / before[-1].batch


async def _decode(endpoint: Endpoint, batch: int, context: int, most_s: float) -> dict[str, float]:
    few, many = _longest_answer(batch, context) - _DECODE_TOKENS, _longest_answer(batch, context)
    pairs: list[tuple[float, float]] = []
    repeats = _repeats(batch * context)
    step_s = math.inf
    # What takes longer than it can was disturbed, and would stay in the profile as if larger batches were slow.
    while len(pairs) < repeats or (step_s > most_s and len(pairs) < repeats + _AGAIN):
        pairs.append((await _batch_s(endpoint, batch, context, few), await _batch_s(endpoint, batch, context, many)))
        shortest_s = min(many_s for _, many_s in pairs) - min(few_s for few_s, _ in pairs)
        step_s = max(_SHORTEST_STEP_S, shortest_s / _DECODE_TOKENS)
    return {"step_s": step_s}


async def _batch_s(endpoint: Endpoint, batch: int, context: int, tokens: int) -> float:
    """Mean time of the calls of a batch that starts together."""
    timings = await asyncio.gather(*(endpoint.complete(context, tokens) for _ in range(batch)))
    return statistics.mean(timing.call_s for timing in timings)
