"""Poisson arrivals of given lengths at a running engine: what its profile must predict.

Steps are measured one kind at a time (probing.py); here they mix as they do in service, with lengths as they were
traced. The points calibrate the profile, and left out in turn they tell its error.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scepsy.profiling.calibrating import ServingPoint, calibrate
from scepsy.profiling.endpoint import Endpoint, Timing
from scepsy.profiling.journal import Journal
from scepsy.profiling.serving import Load, Response, predict_response
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replica import CallShape, saturation_rps

UTILISATIONS = (0.2, 0.5, 0.8)
Lengths = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalPlan:
    """What to send: at each utilisation that many `requests` of each set of lengths.

    A set is the prompt and answer lengths of calls; a request takes one of them at random.
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
        for tokens, generated in lengths:
            longest = max(2, round(generated * answer))
            made.append((max(1, min(round(tokens * prompt), max_model_len - longest - 1)), longest))
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
            load = Load(
                input_tokens=kept["input_tokens"], output_tokens=kept["output_tokens"], rate_rps=kept["rate_rps"]
            )
            measured = Response(first_token_s=kept["first_token_s"], per_token_s=kept["per_token_s"])
            points.append(ServingPoint(tensor_parallel_size=size, load=load, measured=measured))
            on_point(
                f"{load.rate_rps:.3g} requests/s of {load.input_tokens:.0f} + {load.output_tokens:.0f} tokens: "
                f"{measured.call_s(load.output_tokens):.2f} s"
            )
    return points


def left_out_errors(profile: LLMProfile, points: Sequence[ServingPoint]) -> list[float]:
    """Relative errors of whole calls at each point, by the profile that the other points calibrate."""
    errors = []
    for index, point in enumerate(points):
        others = [other for number, other in enumerate(points) if number != index]
        guess = predict_response(calibrate(profile, others), point.tensor_parallel_size, point.load)
        tokens = point.load.output_tokens
        errors.append(guess.call_s(tokens) / point.measured.call_s(tokens) - 1)
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
        input_tokens=statistics.mean(tokens for tokens, _ in lengths),
        cached_tokens=0,
        output_tokens=statistics.mean(generated for _, generated in lengths),
        overlap=1.0,
    )
    rate = utilisation * saturation_rps(profile, size, 1.0, shape)
    if rate <= 0:
        raise ScepsyError(f"{profile.llm!r} has no room for a call of {shape.input_tokens:.0f} prompt tokens")
    count = plan.requests
    rng = random.Random(f"{utilisation} {shape}")  # noqa: S311 - a reproducible load, not a secret
    chosen = [rng.choice(lengths) for _ in range(count)]
    gaps = [rng.expovariate(rate) for _ in range(count)]
    timings = await _send(endpoint, chosen, gaps)
    answered = [timing for timing, (_, generated) in zip(timings, chosen, strict=True) if generated > 1]
    return {
        "input_tokens": statistics.mean(tokens for tokens, _ in chosen),
        "output_tokens": statistics.mean(generated for _, generated in chosen),
        # What the drawn gaps amount to, not what was asked for.
        "rate_rps": count / sum(gaps),
        "first_token_s": statistics.mean(timing.first_token_s for timing in timings),
        # Over all tokens, as a call's time is: not the mean of the calls' means.
        "per_token_s": sum(timing.call_s - timing.first_token_s for timing in answered)
        / sum(generated - 1 for _, generated in chosen),
    }


async def _send(endpoint: Endpoint, chosen: Sequence[Lengths], gaps: Sequence[float]) -> list[Timing]:
    begin_s = time.perf_counter()
    at_s = 0.0
    tasks: list[asyncio.Task[Timing]] = []
    try:
        for (tokens, generated), gap_s in zip(chosen, gaps, strict=True):
            at_s += gap_s
            await asyncio.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(endpoint.complete(tokens, generated)))
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
