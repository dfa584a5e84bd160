"""Step times of a running engine, one kind of step at a time.

Prefill: single requests of one output token on an idle engine; their time is one prefill step and the way through the
API. Where the engine counts the step itself (vLLM does), the rest is the time per request outside its steps. Decode:
requests of equal length that start together, once with few and once with more tokens; the difference is decode steps of
the full batch and nothing else. The moments at which single tokens arrive are not used: an API server that lacks a core
sends them in bursts.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from scepsy.profiling.endpoint import Endpoint
from scepsy.profiling.journal import Journal

_WARM_UP = (64, 16)
_REPEATS = 3
# Up to this many prompt tokens a batch is decoded as often as prompts are prefilled; the median drops a hiccup.
_CHEAP = 4096
# How many tokens more the longer calls have.
_DECODE_TOKENS = 64
_SHORTEST_STEP_S = 1e-5
# Contexts are made by real prefills: more prompt tokens than this in one point take longer than they tell.
_PROMPT_BUDGET = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPoint:
    """Median time of a prefill step of that many tokens, and of the rest of the request's way."""

    tokens: int
    step_s: float
    request_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePoint:
    """Median time of a decode step of a batch at a mean context."""

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


def probe_grid(*, max_model_len: int, max_num_seqs: int, kv_tokens: int | None) -> Grid:
    """Prompts up to the model's length by factors of 4, batches up to `max_num_seqs` by factors of 2 and 4.

    Long contexts are measured at the batches that the KV cache and a budget of prompt tokens allow.
    """
    longest = max_model_len - _DECODE_TOKENS - 1
    prefill = [tokens for tokens in (16, 64, 256, 1024, 4096, 16384) if tokens < longest]
    # The longest prompt itself: beyond it nothing is asked for.
    prefill.append(min(longest, 32768))
    batches = [batch for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256) if batch <= max_num_seqs]
    contexts = [64, *(context for context in (1024, 4096, 16384) if context < longest)]
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
    endpoint: Endpoint, grid: Grid, journal: Journal, on_point: Callable[[str], None]
) -> tuple[list[PrefillPoint], list[DecodePoint]]:
    """Measure every point of the grid that the journal does not have. Nothing else may use the engine meanwhile.

    `on_point` is told each point, also those from the journal. Raises ScepsyError where the engine fails.
    """
    await endpoint.complete(*_WARM_UP)
    prefill = []
    for tokens in grid.prefill_tokens:
        key = f"prefill {tokens}"
        point = await _kept(journal, key, partial(_prefill, endpoint, tokens))
        prefill.append(PrefillPoint(tokens=tokens, **point))
        on_point(f"prefill of {tokens} tokens: {point['step_s'] * 1000:.1f} ms")
    decode = []
    for batch, context in grid.decode:
        key = f"decode {batch} {context}"
        point = await _kept(journal, key, partial(_decode, endpoint, batch, context))
        decode.append(DecodePoint(batch=batch, context_tokens=context + _DECODE_TOKENS // 2, **point))
        on_point(f"decode of {batch} at {context} tokens: {point['step_s'] * 1000:.2f} ms")
    return prefill, decode


async def _kept(journal: Journal, key: str, measure: Callable[[], Awaitable[dict[str, float]]]) -> dict[str, float]:
    known = journal.get(key)
    if known is None:
        known = await measure()
        journal.put(key, known)
    return known


async def _prefill(endpoint: Endpoint, tokens: int) -> dict[str, float]:
    calls, steps = [], []
    for _ in range(_REPEATS):
        before = await endpoint.counters()
        timing = await endpoint.complete(tokens, 1)
        counted_s = (await endpoint.counters()).prefill_time_s - before.prefill_time_s
        calls.append(timing.first_token_s)
        steps.append(counted_s if 0 < counted_s < timing.first_token_s else timing.first_token_s)
    rest = [call - step for call, step in zip(calls, steps, strict=True)]
    return {"step_s": statistics.median(steps), "request_s": statistics.median(rest)}


async def _decode(endpoint: Endpoint, batch: int, context: int) -> dict[str, float]:
    few, many = _longest_answer(batch, context) - _DECODE_TOKENS, _longest_answer(batch, context)
    found = []
    for _ in range(_REPEATS if batch * context <= _CHEAP else 1):
        short_s = await _batch_s(endpoint, batch, context, few)
        long_s = await _batch_s(endpoint, batch, context, many)
        found.append((long_s - short_s) / _DECODE_TOKENS)
    return {"step_s": max(_SHORTEST_STEP_S, statistics.median(found))}


async def _batch_s(endpoint: Endpoint, batch: int, context: int, tokens: int) -> float:
    """Mean time of the calls of a batch that starts together."""
    timings = await asyncio.gather(*(endpoint.complete(context, tokens) for _ in range(batch)))
    return statistics.mean(timing.call_s for timing in timings)
