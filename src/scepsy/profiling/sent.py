"""Requests as a load generator sent them, one by one, and what an engine of a profile would have answered.

A measured load is short: it is over before a busy engine is in its steady state, and its few requests come as chance
has it. So what was measured is compared with the same requests at the same moments on the step-by-step engine, and not
with what a closed form says of their means.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from scepsy.profiling.serving import Response
from scepsy_optimizer.engine import Engine
from scepsy_optimizer.profile import LLMProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of one call; `input_tokens` includes `cached_tokens`, which the prefix cache held."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Requests in their order: each at its moment in `at_s`, or, where there are `clients`, when one has its answer.

    Of the means, the first and the last `edge` requests are no part: the engine fills up, and runs empty.
    """

    lengths: tuple[Lengths, ...]
    edge: int
    at_s: tuple[float, ...] = ()
    clients: int = 0

    @property
    def counted(self) -> slice:
        """The requests that are part of the means."""
        return slice(self.edge, len(self.lengths) - self.edge)


def emulate(profile: LLMProfile, tensor_parallel_size: int, sent: Sent) -> Response:
    """Mean times of the requests that count, on one replica of the profile on whole devices.

    Raises ScepsyError for a request that the replica has no room for.
    """
    engine = Engine(profile, tensor_parallel_size=tensor_parallel_size, fraction=1.0)
    count = len(sent.lengths)
    begun = sent.clients or count
    waiting = [(0.0 if sent.clients else sent.at_s[number], number) for number in range(min(begun, count))]
    heapq.heapify(waiting)
    sent_s, first_s, last_s = dict[int, float](), dict[int, float](), dict[int, float]()
    now_s = 0.0
    while len(last_s) < count:
        while waiting and waiting[0][0] + profile.outside_s <= now_s:
            moment_s, number = heapq.heappop(waiting)
            sent_s[number] = moment_s
            one = sent.lengths[number]
            engine.submit(
                number,
                prompt_tokens=one.input_tokens,
                output_tokens=one.output_tokens,
                cached_tokens=one.cached_tokens,
            )
        stretch = engine.begin()
        if stretch is None:
            now_s = waiting[0][0] + profile.outside_s
            continue
        steps = stretch.steps
        if waiting:
            # A request that arrives is seen by the step after the one in progress.
            left_s = waiting[0][0] + profile.outside_s - now_s
            steps = max(1, min(steps, math.ceil(left_s / stretch.step_s)))
        now_s += steps * stretch.step_s
        for sequence in stretch.prefilled:
            first_s.setdefault(sequence.id, now_s)  # type: ignore[arg-type] # our requests are known by their numbers
        for finished in engine.complete(stretch, steps):
            last_s[finished] = now_s  # type: ignore[index] # as above
            if sent.clients and begun < count:
                heapq.heappush(waiting, (now_s, begun))
                begun += 1
    counted = range(count)[sent.counted]
    tokens = sum(sent.lengths[number].output_tokens - 1 for number in counted)
    return Response(
        first_token_s=sum(first_s[number] - sent_s[number] for number in counted) / len(counted),
        per_token_s=sum(last_s[number] - first_s[number] for number in counted) / max(1, tokens),
    )
