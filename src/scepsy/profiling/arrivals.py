"""Poisson arrivals of given lengths at a running engine: what its profile must predict.

Steps are measured one kind at a time (probing.py); here they mix as they do in service, with lengths as they were
traced. The points calibrate the profile, and left out in turn they tell its error.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from scepsy.profiling.calibrating import ServingPoint, calibrate
from scepsy.profiling.endpoint import Endpoint, Timing
from scepsy.profiling.journal import Journal
from scepsy.profiling.serving import Load, Response, predict_response
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Execution
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replica import CallShape, saturation_rps

UTILISATIONS = (0.2, 0.45, 0.7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of one call; `input_tokens` includes `cached_tokens`, which the prefix cache held."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0


def traced_lengths(executions: Iterable[Execution], llm: str) -> tuple[Lengths, ...]:
    """The lengths of all calls of an LLM. Raises ScepsyError where there is none."""
    calls = [span.call for execution in executions for span in execution.calls if span.call is not None]
    found = tuple(
        Lengths(
            input_tokens=max(1, call.input_tokens),
            output_tokens=max(1, call.output_tokens),
            cached_tokens=min(call.cached_tokens, max(0, call.input_tokens - 1)),
        )
        for call in calls
        if call.llm == llm
    )
    if not found:
        known = ", ".join(sorted({call.llm for call in calls})) or "none"
        raise ScepsyError(f"the traces have no call of {llm!r}; they have calls of: {known}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalPlan:
    """What to send: at each utilisation that many `requests` of each set of lengths.

    A request takes one of the lengths of its set at random.
    """

    shapes: tuple[tuple[Lengths, ...], ...]
    utilisations: tuple[float, ...] = UTILISATIONS
    requests: int = 100

    @property
    def points(self) -> int:
        """How many measurements that is."""
        return len(self.shapes) * len(self.utilisations)


def three_shapes(lengths: Sequence[Lengths], max_model_len: int) -> tuple[tuple[Lengths, ...], ...]:
    """The lengths as they are, with prompts of double length and half the answer, and the other way round.

    One shape alone cannot tell what prompts cost from what answers cost.
    """

    def scaled(prompt: float, answer: float) -> tuple[Lengths, ...]:
        made = []
        for one in lengths:
            output = max(2, round(one.output_tokens * answer))
            tokens = max(1, min(round(one.input_tokens * prompt), max_model_len - output - 1))
            cached = min(round(one.cached_tokens * prompt), tokens - 1)
            made.append(Lengths(input_tokens=tokens, output_tokens=output, cached_tokens=cached))
        return tuple(made)

    return scaled(1, 1), scaled(2, 0.5), scaled(0.5, 2)


async def measure_arrivals(
    endpoint: Endpoint,
    profile: LLMProfile,
    size: int,
    plan: ArrivalPlan,
    journal: Journal,
    on_point: Callable[[str], None],
) -> list[ServingPoint]:
    """Send every load of the plan that the journal does not have; rates are parts of the profile's saturation."""
    points = []
    for index, lengths in enumerate(plan.shapes):
        for utilisation in plan.utilisations:
            key = f"arrivals {index} {utilisation}"
            kept = journal.get(key)
            if kept is None:
                kept = await _measure(endpoint, profile, size, lengths, utilisation, plan)
                journal.put(key, kept)
            names = ("input_tokens", "cached_tokens", "output_tokens", "rate_rps")
            load = Load(**{name: kept[name] for name in names})
            measured = Response(first_token_s=kept["first_token_s"], per_token_s=kept["per_token_s"])
            points.append(ServingPoint(tensor_parallel_size=size, load=load, measured=measured))
            on_point(
                f"{load.rate_rps:.3g} requests/s of {load.input_tokens:.0f} + {load.output_tokens:.0f} tokens: "
                f"{measured.call_s(load.output_tokens):.2f} s"
            )
    return points


def left_out_errors(profile: LLMProfile, points: Sequence[ServingPoint]) -> list[float]:
    """Relative errors of whole calls at each point, by the profile that the other points calibrate.

    Where that profile would not carry the load, the error is 1.
    """
    errors = []
    for index, point in enumerate(points):
        others = [other for number, other in enumerate(points) if number != index]
        guess = predict_response(calibrate(profile, others), point.tensor_parallel_size, point.load)
        tokens = point.load.output_tokens
        error = guess.call_s(tokens) / point.measured.call_s(tokens) - 1
        errors.append(error if isfinite(error) else 1.0)
    return errors


async def _measure(
    endpoint: Endpoint,
    profile: LLMProfile,
    size: int,
    lengths: Sequence[Lengths],
    utilisation: float,
    plan: ArrivalPlan,
) -> dict[str, Any]:
    shape = CallShape(
        input_tokens=statistics.mean(one.input_tokens for one in lengths),
        cached_tokens=statistics.mean(one.cached_tokens for one in lengths),
        output_tokens=statistics.mean(one.output_tokens for one in lengths),
        overlap=1.0,
    )
    rate = utilisation * saturation_rps(profile, size, 1.0, shape)
    if rate <= 0:
        raise ScepsyError(f"{profile.llm!r} has no room for a call of {shape.input_tokens:.0f} prompt tokens")
    count = plan.requests
    rng = random.Random(f"{utilisation} {shape}")  # noqa: S311 - a reproducible load, not a secret
    chosen = [rng.choice(lengths) for _ in range(count)]
    drawn = [rng.expovariate(1.0) for _ in range(count)]
    # A few gaps drawn at random are of another rate than was asked for: they are stretched to it.
    gaps = [gap * count / sum(drawn) / rate for gap in drawn]
    timings = await _send(endpoint, chosen, gaps)
    return {
        "input_tokens": statistics.mean(one.input_tokens for one in chosen),
        "cached_tokens": statistics.mean(one.cached_tokens for one in chosen),
        "output_tokens": statistics.mean(one.output_tokens for one in chosen),
        "rate_rps": rate,
        "first_token_s": statistics.mean(timing.first_token_s for timing in timings),
        # Over all tokens, as a call's time is: not the mean of the calls' means.
        "per_token_s": sum(timing.call_s - timing.first_token_s for timing in timings)
        / sum(one.output_tokens - 1 for one in chosen),
    }


async def _send(endpoint: Endpoint, chosen: Sequence[Lengths], gaps: Sequence[float]) -> list[Timing]:
    begin_s = time.perf_counter()
    at_s = 0.0
    tasks: list[asyncio.Task[Timing]] = []
    try:
        for one, gap_s in zip(chosen, gaps, strict=True):
            at_s += gap_s
            await asyncio.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
            sending = endpoint.complete(one.input_tokens, one.output_tokens, shared_tokens=one.cached_tokens)
            tasks.append(asyncio.create_task(sending))
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
