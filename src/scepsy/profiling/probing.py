"""Step times of a running engine, one kind of step at a time.

Prefill: single requests of one output token on an idle engine; their time is one prefill step and the way through the
API. Where the engine counts the step itself (vLLM does), the rest is the time per request outside its steps. Decode:
requests of equal length that start together; between the last one's first token and the first one's last token nothing
but decode steps of the full batch runs.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from scepsy.profiling.endpoint import Endpoint, Timing
from scepsy.profiling.journal import Journal

_WARM_UP = (64, 16)
_REPEATS = 3
# Up to this many prompt tokens a batch is decoded as often as prompts are prefilled; the median drops a hiccup.
_CHEAP = 4096
# A batch decodes at least this long, so that the window in which all of it runs holds a good number of steps.
_DECODE_TOKENS = 48
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
        if batch * (context + _DECODE_TOKENS) <= room or (batch == 1 and context == contexts[0])
    ]
    return Grid(prefill_tokens=tuple(prefill), decode=tuple(decode))


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
    # Prefills of a batch come one after another: its first member must still run when the last one starts.
    tokens = _DECODE_TOKENS + (batch * context // 2048) + batch // 8
    found = []
    for _ in range(_REPEATS if batch * context <= _CHEAP else 1):
        timings = await asyncio.gather(*(endpoint.complete(context, tokens) for _ in range(batch)))
        found.append(_shared_step_s(timings))
    return {"step_s": statistics.median(found)}


def _shared_step_s(timings: Sequence[Timing]) -> float:
    """Time per token while all of the requests decode; over all of their decoding if they never do together."""
    start = max(timing.tokens_s[0][0] for timing in timings)
    end = min(timing.tokens_s[-1][0] for timing in timings)
    found = []
    for timing in timings:
        inside = [(at, count) for at, count in timing.tokens_s if start <= at <= end]
        if len(inside) > 4:
            (first, before), (last, count) = inside[0], inside[-1]
            found.append((last - first) / (count - before))
    return statistics.median(found or [timing.per_token_s for timing in timings])
