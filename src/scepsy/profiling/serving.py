"""One replica under a measured load, in closed form: what a benchmark of it would report.

Load generators keep a number of requests in flight (closed loop: `--max-concurrency`) or send them at a rate (open
loop). Both are points to compare a profile with and to calibrate it by. The open loop is that of the planner
(`scepsy_optimizer.replica`). In the closed loop, N requests of prefill work M and L further tokens share steps of d(B),
of which the prefills of the others take their part. With the request time T and the batch B that decodes,

    d = d(B) / (1 - (N - 1) M / T)  and  B = N L d / T  give  T = (N - 1) M + N L d(B) / B,

and Little's law for those that wait for their first token, T (1 - B / N) = time to the first token, gives B.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scepsy_optimizer.profile import LLMProfile, StepClock
from scepsy_optimizer.replica import CallShape, loaded_speeds

_HALVINGS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a load generator did: requests of equal mean lengths at a concurrency or at a rate, exactly one of them.

    `input_tokens` includes `cached_tokens`, which the prefix cache holds.
    A closed loop that sends `waves` requests per client starts all clients at once: its first wave queues for prefill,
    and a mean over few waves shows it.
    """

    input_tokens: float
    output_tokens: float
    concurrency: int | None = None
    rate_rps: float | None = None
    waves: float = 10.0
    cached_tokens: float = 0.0

    @property
    def computed_tokens(self) -> float:
        """Prompt tokens that are not cached; an engine always computes at least one."""
        return max(1.0, self.input_tokens - self.cached_tokens)

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate_rps is None):
            raise ValueError("a load has either a concurrency or a rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """Mean time to the first token, and mean time per output token after it."""

    first_token_s: float
    per_token_s: float

    def call_s(self, output_tokens: float) -> float:
        """Time of a whole call."""
        return self.first_token_s + max(0.0, output_tokens - 1) * self.per_token_s


def predict_response(profile: LLMProfile, tensor_parallel_size: int, load: Load, *, fraction: float = 1.0) -> Response:
    """What the profile says of a load; infinite where an open loop saturates it or the LLM does not fit."""
    if load.rate_rps is not None:
        return _open_loop(profile, tensor_parallel_size, load, fraction)
    return _closed_loop(profile, tensor_parallel_size, load, fraction)


def _open_loop(profile: LLMProfile, size: int, load: Load, fraction: float) -> Response:
    shape = CallShape(
        input_tokens=load.input_tokens,
        cached_tokens=load.cached_tokens,
        output_tokens=load.output_tokens,
        overlap=1.0,
    )
    speeds = loaded_speeds(profile, size, fraction, shape, np.array([load.rate_rps]), np.array([1.0]))
    per_token_s = float(speeds.output_s[0])
    # The first token is part of the output tokens' time in the planner's form.
    first_s = float(speeds.fixed_s[0] + speeds.input_s[0] * load.computed_tokens) + per_token_s
    return Response(first_token_s=first_s, per_token_s=per_token_s)


def _closed_loop(profile: LLMProfile, size: int, load: Load, fraction: float) -> Response:
    clients = float(load.concurrency or 1)
    clock = StepClock(profile, size, fraction)
    tokens = max(0.0, load.output_tokens - 1)
    context = load.input_tokens + load.output_tokens / 2
    room = min(float(profile.max_num_seqs), profile.kv_tokens(size, fraction) / context)
    if room < 1:
        return Response(first_token_s=float("inf"), per_token_s=float("inf"))
    alone_s = clock.prefill_s(load.computed_tokens) + clock.prompt_s
    fixed_s = profile.outside_s + clock.host_s + alone_s
    if tokens == 0:
        return Response(first_token_s=max(fixed_s, clients * (alone_s + clock.host_s)), per_token_s=0.0)
    work_s = max(0.0, alone_s - clock.overlap_s)

    def times(batch: float) -> tuple[float, float, float]:
        """Time of a request, of one of its steps and to its first token, if that many decode on average."""
        bare_s = clock.decode_s(max(1.0, batch), context) + clock.host_s
        total_s = (clients - 1) * work_s + clients * tokens * bare_s / batch
        step_s = batch * total_s / (clients * tokens)
        busy = (clients - 1) * work_s / total_s
        # On the way in: half of a running step, and the prefills that are ahead in the queue.
        ahead_s = (step_s / 2 if clients > 1 else 0.0) + work_s * busy / (2 * (1 - busy))
        return total_s, step_s, fixed_s + ahead_s

    low, high = 0.0, min(clients, room)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        total_s, _, first_s = times(middle)
        low, high = (middle, high) if first_s < total_s * (1 - middle / clients) else (low, middle)
    total_s, step_s, first_s = times(high)
    queue_s = max(0.0, total_s * (1 - high / clients) - first_s)
    start_s = (min(clients, room) - 1) / 2 * work_s / load.waves
    return Response(first_token_s=first_s + queue_s + start_s, per_token_s=step_s)
