"""One replica under load, in closed form: how long its calls take, and how much it can carry.

A call waits for the step in progress, computes its prompt, and then decodes token by token in steps shared with
whoever else is running. By Little's law the mean number of other calls decoding is `rate * decode time`; every prompt
that arrives meanwhile stretches the decoding by its own work. Both give a fixed point in the batch size, solved by
bisection, vectorised over arrival rates. Calls of one execution arrive together: a call sees its own siblings beside
the calls of other executions, so the batch is `1 + siblings + rate * decode time`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.profile import LLMProfile, StepClock
from scepsy_optimizer.workload import LLMDemand

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """Mean lengths of an LLM's calls, and the longest context that one of them reaches.

    `overlap` is the mean number of calls of one execution that run together.
    """

    input_tokens: float
    cached_tokens: float
    output_tokens: float
    overlap: float
    longest_tokens: int = 0

    @property
    def computed_tokens(self) -> float:
        """Prompt tokens that are not in the prefix cache; an engine always computes at least one."""
        return max(1.0, self.input_tokens - self.cached_tokens)

    @property
    def generated_tokens(self) -> float:
        """Output tokens; a call without output (an embedding) ends with its first step."""
        return max(1.0, self.output_tokens)

    @classmethod
    def of(cls, demand: LLMDemand) -> CallShape:
        """The shape of an LLM's traced calls."""
        return cls(
            input_tokens=demand.input_tokens,
            cached_tokens=demand.cached_tokens,
            output_tokens=demand.output_tokens,
            overlap=demand.overlap,
            longest_tokens=demand.longest_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSpeed:
    """Duration of a call as a linear function of its tokens: fixed + input * computed + output * generated tokens."""

    fixed_s: float
    input_s: float
    output_s: float

    def call_s(self, computed_tokens: float, generated_tokens: float) -> float:
        """Duration of a call of that many computed prompt tokens and generated tokens."""
        return self.fixed_s + self.input_s * computed_tokens + self.output_s * generated_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSpeeds:
    """`CallSpeed`s of one replica at several arrival rates: arrays of one entry per rate.

    `utilisation` is the rate over the saturation rate; where it reaches 1, the speeds are infinite.
    """

    fixed_s: Array
    input_s: Array
    output_s: Array
    utilisation: Array


def saturation_rps(profile: LLMProfile, tensor_parallel_size: int, fraction: float, shape: CallShape) -> float:
    """Calls per second at which a replica is full: every step decodes the largest batch that its memory allows.

    lambda* = 1 / (M + L d(B) / B) with the prompt's work M, L tokens and the step time d at the largest batch B. A
    fraction of a device never carries more than that fraction of what the whole device carries: isolated slowdowns
    alone would let ten tenths exceed one whole. Returns 0 where the LLM does not fit.
    """
    alone = _saturation_rps(profile, tensor_parallel_size, fraction, shape)
    if fraction == 1 or alone == 0:
        return alone
    return min(alone, fraction * _saturation_rps(profile, tensor_parallel_size, 1.0, shape))


def _saturation_rps(profile: LLMProfile, tensor_parallel_size: int, fraction: float, shape: CallShape) -> float:
    batch = max_batch(profile, tensor_parallel_size, fraction, shape)
    if batch < 1:
        return 0.0
    clock = StepClock(profile, tensor_parallel_size, fraction)
    step_s = clock.decode_s(batch, _context(shape)) + clock.host_s
    work_s = clock.prefill_s(shape.computed_tokens) - clock.overlap_s
    return 1 / (max(0.0, work_s) + shape.generated_tokens * step_s / batch)


def max_batch(profile: LLMProfile, tensor_parallel_size: int, fraction: float, shape: CallShape) -> float:
    """Calls that run at once at most, by `max_num_seqs` and by the KV cache at their mean full length.

    0 where the cache does not hold the longest call.
    """
    kv_tokens = profile.kv_tokens(tensor_parallel_size, fraction)
    if kv_tokens < max(1, shape.longest_tokens):
        return 0.0
    return min(float(profile.max_num_seqs), kv_tokens / max(1.0, shape.input_tokens + shape.generated_tokens))


def loaded_speeds(
    profile: LLMProfile,
    tensor_parallel_size: int,
    fraction: float,
    shape: CallShape,
    rates_rps: Array,
    overlaps: Array,
) -> LoadedSpeeds:
    """Speeds of one replica at each of `rates_rps`, when `overlaps` calls of one execution land on it together."""
    rates = np.asarray(rates_rps, dtype=float)
    clock = StepClock(profile, tensor_parallel_size, fraction)
    limit = max_batch(profile, tensor_parallel_size, fraction, shape)
    saturation = saturation_rps(profile, tensor_parallel_size, fraction, shape)
    never = np.full(rates.shape, np.inf)
    if saturation == 0:
        return LoadedSpeeds(fixed_s=never, input_s=never, output_s=never, utilisation=never)
    utilisation = rates / saturation
    prompt, tokens = shape.computed_tokens, shape.generated_tokens
    alone_s = clock.prefill_s(prompt)
    work_s = max(0.0, alone_s - clock.overlap_s)
    busy = np.minimum(rates * work_s, 0.999)
    step_s = _step_table(clock, profile, shape)
    batch = _batch(np.maximum(overlaps, 1.0), rates * (tokens - 1) / (1 - busy), step_s, limit)
    decode_s = step_s(batch) / (1 - busy)
    # Poisson arrivals find the engine idle when none of the calls in flight from other executions is there.
    occupied = -np.expm1(-rates * ((tokens - 1) * decode_s + work_s))
    together = prompt * np.minimum(np.maximum(overlaps, 1.0), limit)
    span = np.maximum(1.0, together / 4)
    low = np.maximum(1.0, together - span)
    slope = (clock.prefill_times_s(together + span) - clock.prefill_times_s(low)) / (together + span - low)
    input_s = slope * (together / prompt)
    prefill_s = clock.prefill_times_s(together)
    behind_s = occupied * np.maximum(0.0, 1.5 * step_s(batch) - clock.overlap_s)
    first_s = profile.request_s + clock.host_s + prefill_s + behind_s + work_s * busy / (2 * (1 - busy))
    fixed_s = first_s - input_s * prompt - decode_s
    full = utilisation >= 1
    return LoadedSpeeds(
        fixed_s=np.where(full, np.inf, fixed_s),
        input_s=np.where(full, np.inf, input_s),
        output_s=np.where(full, np.inf, decode_s),
        utilisation=utilisation,
    )


def _context(shape: CallShape) -> float:
    """Mean context of a decoding call: the prompt and half of the output."""
    return shape.input_tokens + shape.generated_tokens / 2


def _step_table(clock: StepClock, profile: LLMProfile, shape: CallShape) -> Callable[[Array], Array]:
    """Decode step time as a function of the batch, tabulated for the calls' mean context."""
    grid = np.unique(np.concatenate([np.linspace(1, 64, 64), np.linspace(64, profile.max_num_seqs, 48)]))
    context = _context(shape)
    values = np.array([clock.decode_s(float(batch), context) for batch in grid]) + clock.host_s
    return lambda batch: np.interp(batch, grid, values)


def _batch(own: Array, others_per_step_s: Array, step_s: Callable[[Array], Array], limit: float) -> Array:
    """Solve B = own + others_per_step_s * step_s(B) for the smallest B, at most `limit`, by bisection."""
    low = np.minimum(own, limit)
    high = np.full(low.shape, max(limit, 1.0))
    for _ in range(40):
        middle = (low + high) / 2
        short = middle < own + others_per_step_s * step_s(middle)
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return high
