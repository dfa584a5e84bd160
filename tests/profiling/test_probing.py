"""Step times of an engine that is disturbed now and then."""

from __future__ import annotations

import pytest

from scepsy.profiling.endpoint import Counters, Timing
from scepsy.profiling.journal import Journal
from scepsy.profiling.probing import Grid, probe
from scepsy.profiling.progress import Work

STEP_S = 0.002
PREFILL_S = 0.1
DISTURBANCE_S = 3.0


class Disturbed:
    """Answers as an engine would whose decode step takes `STEP_S`, but for the calls whose turns are named."""

    def __init__(self, disturbed: set[int]) -> None:
        self.asked: list[tuple[int, int]] = []
        self._disturbed = disturbed

    async def complete(self, prompt_tokens: int, output_tokens: int) -> Timing:
        longer_s = DISTURBANCE_S if len(self.asked) in self._disturbed else 0.0
        self.asked.append((prompt_tokens, output_tokens))
        end_s = PREFILL_S + longer_s + STEP_S * (output_tokens - 1)
        return Timing(sent_s=0.0, tokens_s=((PREFILL_S, 1), (end_s, output_tokens)))

    async def counters(self) -> Counters:
        return Counters(prompt_tokens=0, requests=0, prefill_time_s=0, steps=0)


async def steps_of(endpoint: Disturbed, decode: tuple[tuple[int, int], ...]) -> dict[int, float]:
    """Decode step times by batch."""
    grid = Grid(prefill_tokens=(), decode=decode)
    _, points = await probe(endpoint, grid, Journal(None, {}), Work(lambda _: None), "engine")
    return {point.batch: point.step_s for point in points}


async def test_a_step_that_takes_longer_than_it_can_is_timed_again():
    # One warm-up, three times two calls for the batch of 1, then that of 16: timed once, its longer calls disturbed.
    calm, longer = Disturbed(set()), Disturbed(set(range(7 + 16, 7 + 32)))
    decode = ((1, 1024), (16, 1024))
    expected = await steps_of(calm, decode)
    assert expected == {1: pytest.approx(STEP_S), 16: pytest.approx(STEP_S)}
    assert await steps_of(longer, decode) == expected
    assert len(calm.asked) == 7 + 32
    assert len(longer.asked) == 7 + 64


async def test_an_engine_that_is_slow_at_large_batches_is_not_timed_for_ever():
    class Slow(Disturbed):
        async def complete(self, prompt_tokens: int, output_tokens: int) -> Timing:
            timing = await super().complete(prompt_tokens, output_tokens)
            end_s = timing.tokens_s[-1][0] + (output_tokens > 50) * len(self.asked) * 10.0
            return Timing(sent_s=0.0, tokens_s=((PREFILL_S, 1), (end_s, output_tokens)))

    slow = Slow(set())
    found = await steps_of(slow, ((1, 1024), (32, 1024)))
    assert found[32] > 100 * found[1]
    assert len(slow.asked) == 7 + 32 * 2 * 4
