"""Loads of given lengths on a running engine, from light to full: what its profile must predict.

Steps are measured one kind at a time (probing.py); here they mix as they do in service, with lengths as they were
traced: Poisson arrivals at several rates, and more clients than the engine takes at once. They calibrate the profile
and, left out in turn, tell its error; the throughput of the last is what its predicted saturation is compared with.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import ceil
from typing import TypeVar

from scepsy.profiling.calibrating import ServingPoint
from scepsy.profiling.endpoint import Endpoint, Timing
from scepsy.profiling.journal import Journal
from scepsy.profiling.probing import kept
from scepsy.profiling.progress import Work
from scepsy.profiling.sent import Lengths, Sent
from scepsy.profiling.serving import Load, Response, predict_response
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Execution
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replica import CallShape, max_batch, saturation_rps

T = TypeVar("T")

UTILISATIONS = (0.2, 0.45, 0.7)

# Clients of a full engine: so many times what it takes at once, each asking so often. The first and the last time are
# not counted, because then the engine fills up and runs empty.
_CROWD = 2
_WAVES = 4
# Guessed before the profile is known, only for the time that is left.
_GUESSED_CALL_S = 0.2


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
class LoadPlan:
    """What to send: of each set of lengths that many `requests` at each utilisation, and the first set without pause.

    A request takes one of the lengths of its set at random.
    """

    shapes: tuple[tuple[Lengths, ...], ...]
    utilisations: tuple[float, ...] = UTILISATIONS
    requests: int = 100

    def guesses_s(self, engine: str) -> dict[str, float]:
        """A first guess of each measurement's time, for the `Work` of that engine."""
        guesses_s = {
            _key(engine, index, utilisation): self.requests * _GUESSED_CALL_S / utilisation
            for index in range(len(self.shapes))
            for utilisation in self.utilisations
        }
        return guesses_s | ({_key(engine, "full"): self.requests * _GUESSED_CALL_S} if self.shapes else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Poisson loads and a full engine, which is the last point; its calls are of `full_shape`, `full_rps` of them."""

    points: tuple[ServingPoint, ...]
    full_shape: CallShape
    full_rps: float


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


async def measure_loads(
    endpoint: Endpoint, profile: LLMProfile, size: int, plan: LoadPlan, journal: Journal, work: Work, engine: str
) -> Measured:
    """Measure every load of the plan that the journal does not have; rates are parts of the profile's saturation.

    `work` is told each point as one of `engine`. Raises ScepsyError where the engine fails or has no room for a call.
    """
    points = []
    for index, lengths in enumerate(plan.shapes):
        for utilisation in plan.utilisations:
            measure = partial(_poisson, endpoint, profile, size, lengths, utilisation, plan.requests)
            found, took_s = await kept(journal, f"load {index} {utilisation}", measure)
            load = _load(found, rate_rps=found["rate_rps"])
            sent = _arrivals(lengths, utilisation, found["rate_rps"], int(found["edge"]), plan.requests)
            measured = Response(first_token_s=found["first_token_s"], per_token_s=found["per_token_s"])
            points.append(ServingPoint(tensor_parallel_size=size, load=load, measured=measured, sent=sent))
            text = (
                f"{load.rate_rps:.3g} requests/s of {load.input_tokens:.0f} + {load.output_tokens:.0f} tokens: "
                f"{measured.call_s(load.output_tokens):.2f} s"
            )
            work.finish(_key(engine, index, utilisation), text, took_s=took_s)
    measure = partial(_full, endpoint, profile, size, plan.shapes[0], plan.requests)
    found, took_s = await kept(journal, "load full", measure)
    sent = _crowd(plan.shapes[0], int(found["clients"]), plan.requests)
    load = _load(found, concurrency=sent.clients)
    measured = Response(first_token_s=found["first_token_s"], per_token_s=found["per_token_s"])
    points.append(ServingPoint(tensor_parallel_size=size, load=load, measured=measured, sent=sent))
    work.finish(_key(engine, "full"), f"full: {found['rate_rps']:.3g} requests/s", took_s=took_s)
    return Measured(points=tuple(points), full_shape=_shape(found), full_rps=found["rate_rps"])


def _key(engine: str, *what: object) -> str:
    return f"loads of {engine}: {' '.join(str(part) for part in what)}"


def _shape(means: Mapping[str, float]) -> CallShape:
    return CallShape(
        input_tokens=means["input_tokens"],
        cached_tokens=means["cached_tokens"],
        output_tokens=means["output_tokens"],
        overlap=1.0,
    )


def _load(means: Mapping[str, float], *, rate_rps: float | None = None, concurrency: int | None = None) -> Load:
    return Load(
        input_tokens=means["input_tokens"],
        cached_tokens=means["cached_tokens"],
        output_tokens=means["output_tokens"],
        rate_rps=rate_rps,
        concurrency=concurrency,
    )


async def _poisson(
    endpoint: Endpoint, profile: LLMProfile, size: int, lengths: Sequence[Lengths], utilisation: float, count: int
) -> dict[str, float]:
    shape = _shape(_mean_lengths(lengths))
    rate = utilisation * saturation_rps(profile, size, 1.0, shape)
    if rate <= 0:
        raise ScepsyError(f"{profile.llm!r} has no room for a call of {shape.input_tokens:.0f} prompt tokens")
    guess = predict_response(profile, size, _load(_mean_lengths(lengths), rate_rps=rate))
    # So many more before and after, not counted: first the engine fills up, and at the end it runs empty.
    edge = ceil(rate * guess.call_s(shape.output_tokens))
    sent = _arrivals(lengths, utilisation, rate, edge, count)
    timings = await _send(endpoint, sent)
    return _means(sent.lengths[sent.counted], timings[sent.counted]) | {"rate_rps": rate, "edge": edge}


def _arrivals(lengths: Sequence[Lengths], utilisation: float, rate_rps: float, edge: int, count: int) -> Sent:
    """Poisson arrivals, always the same for the same arguments."""
    total = count + 2 * edge
    rng = random.Random(f"{utilisation} {_shape(_mean_lengths(lengths))}")  # noqa: S311 - a reproducible load, not a secret
    chosen = tuple(rng.choice(lengths) for _ in range(total))
    drawn = [rng.expovariate(1.0) for _ in range(total)]
    # A few gaps drawn at random are of another rate than was asked for: they are stretched to it.
    stretch = total / sum(drawn) / rate_rps
    return Sent(lengths=chosen, edge=edge, at_s=tuple(accumulate(gap * stretch for gap in drawn)))


async def _full(
    endpoint: Endpoint, profile: LLMProfile, size: int, lengths: Sequence[Lengths], count: int
) -> dict[str, float]:
    """Clients who ask again at once, and more of them than the engine takes."""
    clients = _CROWD * max(1, int(max_batch(profile, size, 1.0, _shape(_mean_lengths(lengths)))))
    sent = _crowd(lengths, clients, count)
    found: dict[int, Timing] = {}
    numbers = iter(range(len(sent.lengths)))

    async def one() -> None:
        for number in numbers:
            found[number] = await _complete(endpoint, sent.lengths[number])

    await _all([asyncio.create_task(one()) for _ in range(clients)])
    timings = [found[number] for number in range(len(sent.lengths))][sent.counted]
    # By Little's law, over those that were sent and answered while all clients asked.
    call_s = statistics.mean(timing.call_s for timing in timings)
    return _means(sent.lengths[sent.counted], timings) | {"rate_rps": clients / call_s, "clients": clients}


def _crowd(lengths: Sequence[Lengths], clients: int, count: int) -> Sent:
    """Requests of clients who ask again at once, always the same for the same arguments."""
    rng = random.Random(f"full {clients}")  # noqa: S311 - as above
    chosen = tuple(rng.choice(lengths) for _ in range(max(count, _WAVES * clients)))
    return Sent(lengths=chosen, edge=clients, clients=clients)


def _mean_lengths(chosen: Sequence[Lengths]) -> dict[str, float]:
    return {
        "input_tokens": statistics.mean(one.input_tokens for one in chosen),
        "cached_tokens": statistics.mean(one.cached_tokens for one in chosen),
        "output_tokens": statistics.mean(one.output_tokens for one in chosen),
    }


def _means(chosen: Sequence[Lengths], timings: Sequence[Timing]) -> dict[str, float]:
    return _mean_lengths(chosen) | {
        "first_token_s": statistics.mean(timing.first_token_s for timing in timings),
        # Over all tokens, as a call's time is: not the mean of the calls' means.
        "per_token_s": sum(timing.call_s - timing.first_token_s for timing in timings)
        / max(1, sum(one.output_tokens - 1 for one in chosen)),
    }


def _complete(endpoint: Endpoint, one: Lengths) -> Coroutine[None, None, Timing]:
    return endpoint.complete(one.input_tokens, one.output_tokens, shared_tokens=one.cached_tokens)


async def _send(endpoint: Endpoint, sent: Sent) -> list[Timing]:
    begin_s = time.perf_counter()
    tasks: list[asyncio.Task[Timing]] = []
    try:
        for one, at_s in zip(sent.lengths, sent.at_s, strict=True):
            await asyncio.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(_complete(endpoint, one)))
    except asyncio.CancelledError:
        _cancel(tasks)
        raise
    return await _all(tasks)


async def _all(tasks: Sequence[asyncio.Task[T]]) -> list[T]:
    """What the tasks return; at the first error the others are cancelled."""
    try:
        return await asyncio.gather(*tasks)
    finally:
        _cancel(tasks)


def _cancel(tasks: Sequence[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
