"""One replica under load, in closed form: how long its calls take, and how much it can carry.

A call waits for the step in progress, computes its prompt, and then decodes token by token in steps shared with
whoever else is running. By Little's law the mean number of other calls decoding is `rate * decode time`; every step
also computes the prompts that arrived during the one before, which share its reading of the weights. Both give a fixed
point in the step time, solved by bisection, vectorised over arrival rates. Calls of one execution arrive together: a
call sees its own siblings beside the calls of other executions, so the batch is `1 + siblings + rate * decode time`.

Where the batch is limited (by `max_num_seqs` or by the KV cache), calls also wait to be admitted: the number in the
system is taken as a birth-death process whose rate of ends is that of the steps at each batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile, StepClock
from scepsy_optimizer.workload import LLMDemand

Array = NDArray[np.float64]

# More rates than this are interpolated between so many of them: options differ in little but their rates.
_MAX_RATES = 32
# Iterations of bisection: to one part in a million of the longest step.
_BISECTIONS = 20
_PASSES = 3
# A queue at its very limit is infinite; the closed form is not asked about it.
_FULLEST = 0.98
# Stands for no calls where a division wants some.
_NONE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """Mean lengths of an LLM's calls, and the longest context that one of them reaches.

    `overlap` is the mean number of calls of one execution that run together. `context_tokens` is the mean context of a
    token being decoded, `prompt_pairs` the mean of what attention computes for a prompt, input^2 - cached^2; 0 stands
    for what they are where all calls are alike. `output_cv` is the coefficient of variation of the output tokens,
    `burst` the mean number of calls of one execution that start together, as a call sees it.

    `parallelism` is the same as `overlap`, but over the time that any of them runs: as an execution sees it that waits
    for the last of them. `beside_tokens` are the computed prompt tokens of the others of a burst, on average over
    bursts. Without these two, all executions are alike.
    """

    input_tokens: float
    cached_tokens: float
    output_tokens: float
    overlap: float
    longest_tokens: int = 0
    context_tokens: float = 0.0
    prompt_pairs: float = 0.0
    output_cv: float = 1.0
    burst: float = 1.0
    parallelism: float | None = None
    beside_tokens: float | None = None

    @property
    def computed_tokens(self) -> float:
        """Prompt tokens that are not in the prefix cache; an engine always computes at least one."""
        return max(1.0, self.input_tokens - self.cached_tokens)

    @property
    def generated_tokens(self) -> float:
        """Output tokens; a call without output (an embedding) ends with its first step."""
        return max(1.0, self.output_tokens)

    @property
    def context(self) -> float:
        """Mean context of a token being decoded."""
        return self.context_tokens or self.input_tokens + self.generated_tokens / 2

    @property
    def pairs(self) -> float:
        """Mean of what attention computes for a prompt."""
        return self.prompt_pairs or self.input_tokens**2 - self.cached_tokens**2

    @property
    def waiting_tokens(self) -> float:
        """Mean prompt of the call that is found waiting for memory: the longer, the more likely."""
        return self.pairs / max(1.0, self.input_tokens)

    @property
    def prompt_variability(self) -> float:
        """Squared coefficient of variation of the computed prompt tokens, as far as it shows in `prompt_pairs`."""
        alike = self.input_tokens**2 - self.cached_tokens**2
        return max(0.0, self.pairs / alike - 1) if alike > 0 else 0.0

    @classmethod
    def of(cls, demand: LLMDemand) -> CallShape:
        """The shape of an LLM's traced calls."""
        return cls(
            input_tokens=demand.input_tokens,
            cached_tokens=demand.cached_tokens,
            output_tokens=demand.output_tokens,
            overlap=demand.overlap,
            longest_tokens=demand.longest_tokens,
            context_tokens=demand.context_tokens,
            prompt_pairs=demand.prompt_pairs,
            output_cv=demand.output_cv,
            burst=demand.burst,
            parallelism=demand.parallelism,
            beside_tokens=demand.beside_tokens,
        )


def check_range(profile: LLMProfile, demand: LLMDemand) -> None:
    """Raise ScepsyError where calls are longer than the profile knows: nothing is extrapolated for them."""
    if demand.longest_tokens > profile.max_model_len:
        raise ScepsyError(
            f"calls of {demand.llm!r} reach {demand.longest_tokens:,} tokens, its profile on {profile.device_type} is "
            f"for engines with max_model_len {profile.max_model_len:,}: profile it with a longer one"
        )
    known = max(steps.context_tokens[-1] for steps in profile.steps)
    if demand.context_tokens > known:
        raise ScepsyError(
            f"calls of {demand.llm!r} decode at {demand.context_tokens:,.0f} tokens of context on average, its profile "
            f"on {profile.device_type} ends at {known:,}: profile it with longer contexts"
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

    Each step then also computes the prompts that take the places of the calls that end with it, as far as its budget of
    tokens allows. A fraction's device is then taken to be full of replicas like it, each as busy: what all read beyond
    the device's memory bandwidth slows their decoding, and prefilling gets no more than the fraction of the device. So
    ten tenths carry more than one whole only as far as one whole leaves the device waiting. Returns 0 where the LLM
    does not fit.
    """
    limit = max_batch(profile, tensor_parallel_size, fraction, shape)
    if limit < 1:
        return 0.0
    replica = _Steps(profile, tensor_parallel_size, fraction, shape)
    tokens = shape.generated_tokens
    # Of the places in the batch each call holds one for as many steps as it has tokens, the first of them its prompt's.
    prompts = min(limit / tokens, profile.max_num_batched_tokens / shape.computed_tokens)
    decoding = prompts * (tokens - 1)
    # Preempted calls compute their prompts again.
    computed = np.array([prompts * (1 + _preempted(profile, shape, limit))])
    prompts_s = float(replica.prompts_s(computed, np.ones(1), is_decoding=decoding > 0)[0])
    decode_s = float(replica.decode_s(np.array([decoding]))[0])
    if fraction < 1:
        contention = max(1.0, replica.clock.bandwidth_share(decoding, shape.context) / fraction)
        decode_s = profile.host_s + (decode_s - profile.host_s) * contention
        prompts_s *= max(1.0, 1 / fraction / profile.slowdown.prefill(fraction))
    return prompts / (decode_s + prompts_s)


def max_batch(profile: LLMProfile, tensor_parallel_size: int, fraction: float, shape: CallShape) -> float:
    """Calls that run at once at most, by `max_num_seqs` and by the KV cache at their mean context.

    0 where the cache does not hold the longest call.
    """
    kv_tokens = profile.kv_tokens(tensor_parallel_size, fraction)
    if kv_tokens < max(1, shape.longest_tokens):
        return 0.0
    # What is free is not enough for the next prompt: on average half of one as long as those that wait tend to be.
    return min(float(profile.max_num_seqs), max(1.0, (kv_tokens - shape.waiting_tokens / 2) / max(1.0, shape.context)))


def _preempted(profile: LLMProfile, shape: CallShape, limit: float) -> float:
    """The part of the calls that are preempted where the KV cache is always full, and not `max_num_seqs` the limit.

    After a call was admitted, what is left free is anything up to the prompt that waits; until the next call ends, the
    others grow by about as many tokens as one call generates. Where that is more, the youngest has to go.
    """
    if limit >= profile.max_num_seqs:
        return 0.0
    growth = shape.generated_tokens / max(1.0, shape.waiting_tokens)
    return float(growth * -np.expm1(-1 / growth))


def loaded_speeds(
    profile: LLMProfile,
    tensor_parallel_size: int,
    fraction: float,
    shape: CallShape,
    rates_rps: Array,
    overlaps: Array,
    replicas: Array | None = None,
) -> LoadedSpeeds:
    """Speeds of one replica at each of `rates_rps`, when `overlaps` calls of one execution land on it together.

    It is one of `replicas` alike (by default the only one) between which calls go to the least loaded, so that what
    comes and goes at random is shared by all. Fractions are taken to share their devices with others of these; who else
    is there, only the placement knows, and a replay of it.
    """
    rates = np.asarray(rates_rps, dtype=float)
    saturation = saturation_rps(profile, tensor_parallel_size, fraction, shape)
    if saturation == 0:
        never = np.full(rates.shape, np.inf)
        return LoadedSpeeds(fixed_s=never, input_s=never, output_s=never, utilisation=never)
    utilisation = rates / saturation
    # Beyond saturation there is nothing to solve for.
    order = np.argsort(rates)
    asked = order[rates[order] < saturation]
    if len(asked) > _MAX_RATES:
        between = np.linspace(rates[asked[0]], rates[asked[-1]], _MAX_RATES)
        asked = asked[np.unique(np.searchsorted(rates[asked], between))]
    columns = np.full((3, len(rates)), np.inf)
    if len(asked):
        limit = max_batch(profile, tensor_parallel_size, fraction, shape)
        replica = _Steps(profile, tensor_parallel_size, fraction, shape)
        own = np.clip(np.asarray(overlaps, dtype=float)[asked], 1.0, limit)
        sharing = np.ones(len(asked)) if replicas is None else np.maximum(1.0, np.asarray(replicas, dtype=float)[asked])
        found = _solve(replica, rates[asked], utilisation[asked], own, sharing, limit)
        below = rates < saturation
        columns[:, below] = [np.interp(rates[below], rates[asked], column) for column in found]
    return LoadedSpeeds(fixed_s=columns[0], input_s=columns[1], output_s=columns[2], utilisation=utilisation)


class _Steps:
    """Mean step times of a replica for calls of one shape, as functions of arrays."""

    def __init__(self, profile: LLMProfile, tensor_parallel_size: int, fraction: float, shape: CallShape) -> None:
        self.profile = profile
        self.fraction = fraction
        self.shape = shape
        self.clock = StepClock(profile, tensor_parallel_size, fraction)
        grid = np.unique(np.concatenate([np.linspace(1, 64, 64), np.linspace(64, profile.max_num_seqs, 48)]))
        times = np.array([self.clock.decode_s(float(batch), shape.context) for batch in grid])
        # A mean batch below one is no step of one call: the line through the first points goes on to 0.
        slope = (times[1] - times[0]) / (grid[1] - grid[0]) if len(grid) > 1 else 0.0
        self._grid = np.concatenate([[0.0], grid])
        self._times = np.concatenate([[max(0.0, times[0] - slope * grid[0])], times])
        # What the mean prompt costs beyond what the table has for one of as many computed tokens: its attention, and
        # what each costs anyway.
        self.each_s = self.clock.attention_s * shape.pairs + self.clock.prompt_s
        steps = profile.at(tensor_parallel_size)
        self._tokens = np.array(steps.prefill_tokens, dtype=float)
        self._flat = self.clock.prefill_times_s(self._tokens) - self.clock.attention_s * self._tokens**2
        last = len(self._tokens) - 1
        self._slope = 0.0 if last == 0 else (self._flat[-1] - self._flat[-2]) / (self._tokens[-1] - self._tokens[-2])

    def decode_s(self, batch: Array) -> Array:
        """Time of a step that decodes that many calls, the host's part included; the host's part alone for none."""
        times: Array = np.interp(batch, self._grid, self._times)
        return self.profile.host_s + np.where(batch > 0, times, 0.0)

    def together_s(self, prompts: Array) -> Array:
        """Time of prefilling that many mean prompts in one step, without the host's part."""
        tokens = prompts * self.shape.computed_tokens
        flat = np.interp(tokens, self._tokens, self._flat) + self._slope * np.maximum(0.0, tokens - self._tokens[-1])
        together: Array = flat + prompts * self.each_s
        return together

    def prompts_s(self, prompts: Array, burst: Array, *, is_decoding: bool) -> Array:
        """What prefilling adds to a mean step, where that many prompts arrive per step, in bursts of that size.

        Bursts are Poisson: a part 1 - exp(-bursts) of the steps has any, and those share them all.
        """
        part = -np.expm1(-np.maximum(prompts, 1e-12) / burst)
        saved = self.clock.overlap_s if is_decoding else 0.0
        return np.maximum(0.0, part * (self.together_s(prompts / part) - saved))


def _solve(
    replica: _Steps, rates: Array, utilisation: Array, own: Array, sharing: Array, limit: float
) -> tuple[Array, Array, Array]:
    """Columns of `LoadedSpeeds` for rates below saturation, with `own` calls of one execution together."""
    profile, clock, shape = replica.profile, replica.clock, replica.shape
    prompt, tokens = shape.computed_tokens, shape.generated_tokens
    burst = 1 + (np.maximum(1.0, shape.burst) - 1) / sharing
    is_decoding = tokens > 1
    # An execution waits for one path through its calls, and all executions count alike; calls are counted most where
    # they are many at once.
    waited_for = own if shape.parallelism is None else np.minimum(limit, 1 + (shape.parallelism - 1) / sharing)
    unseen = np.maximum(0.0, own - waited_for)
    beside = (shape.burst - 1 if shape.beside_tokens is None else shape.beside_tokens / prompt) / sharing
    contention = np.ones(rates.shape)
    bend_s = np.zeros(rates.shape)
    # First as if the batch never varied and the device had no neighbours, then with what was found.
    for _ in range(_PASSES):

        def decode_s(batch: Array, contention: Array = contention) -> Array:
            return profile.host_s + (replica.decode_s(np.minimum(batch, limit)) - profile.host_s) * contention

        def mean_step_s(step_s: Array) -> Array:
            prompts_s = replica.prompts_s(rates * step_s, burst, is_decoding=is_decoding)
            return decode_s(rates * (tokens - 1) * step_s) + prompts_s + bend_s  # noqa: B023 - called in this pass only

        step_s = _fixed_point(mean_step_s, rates.shape)
        prompts = rates * step_s
        decoding = prompts * (tokens - 1)
        some = np.maximum(_NONE, decoding)
        part = -np.expm1(-prompts / burst)
        present = prompts / np.maximum(part, 1e-12)
        span = np.maximum(1.0, prompt / 4) / prompt
        prompt_s = (replica.together_s(present + span) - replica.together_s(present)) / span
        call_s = np.maximum(0.0, decode_s(decoding + own + 1) - decode_s(decoding + own))
        # A step table that is steeper here than on its way to saturation would have the queue unstable below it.
        steep = np.maximum(1.0, rates * (prompt_s + (tokens - 1) * call_s) / utilisation)
        call_s, prompt_s = call_s / steep, prompt_s / steep
        arriving = prompts * (burst - 1 + 1 / sharing + shape.prompt_variability)
        moments = _moments(rates * call_s, rates * prompt_s, arriving, decoding / sharing, tokens)
        seen = (decoding + np.maximum(own, moments.decoding / some) - unseen) * is_decoding
        output_s = (
            decode_s(seen)
            + bend_s
            + replica.prompts_s(prompts, burst, is_decoding=is_decoding)
            + prompt_s * moments.both / some
        )
        # Step times bend upwards, so their mean is above that of the mean batch (three points of Gauss and Hermite).
        spread = np.sqrt(3 * moments.decoding)
        sides = decode_s(decoding + spread) + decode_s(np.maximum(np.minimum(decoding, _NONE), decoding - spread))
        bend_s = np.maximum(0.0, sides / 6 - decode_s(decoding) / 3)
        # Poisson arrivals find the engine idle when none of the calls in flight from other executions is there.
        occupied = -np.expm1(-rates * tokens * output_s / own)
        if replica.fraction < 1:
            share = np.array([clock.bandwidth_share(float(batch), shape.context) for batch in seen])
            contention = _contention(share, occupied, sharing, replica.fraction)
    # The step in progress, as an arrival finds it: by its length.
    variance = call_s**2 * moments.decoding + prompt_s**2 * moments.prompts + 2 * call_s * prompt_s * moments.both
    found_s = occupied * (step_s + variance / step_s)
    # The step that computes the prompt: also its siblings', and those that came in the same step.
    together = 1 + beside + rates * found_s
    decoding_s = occupied * np.maximum(0.0, decode_s(seen) - profile.host_s - clock.overlap_s)
    own_s = profile.host_s + replica.together_s(together) + decoding_s
    places_s = _place_wait_s(replica, rates, own, own - 1 + 1 / sharing, limit, contention)
    queue_s = _budget_wait_s(replica, rates, step_s) + places_s
    first_s = profile.outside_s + found_s / 2 + own_s + queue_s
    slope_s = (replica.together_s(together + span) - replica.together_s(together)) / (span * prompt)
    return first_s - slope_s * prompt - output_s, slope_s, output_s


def _contention(share: Array, occupied: Array, replicas: Array, fraction: float) -> Array:
    """How much longer decoding takes on average where so many replicas on fractions fill one device after another.

    Each asks for its `share` of the device's memory bandwidth, while it is `occupied`.
    """
    places = round(1 / fraction)
    last = np.mod(replicas, places)
    full, rest = (
        np.maximum(1.0, share * (1 + occupied * np.maximum(0.0, others - 1))) for others in (float(places), last)
    )
    mean: Array = full + last / replicas * (rest - full)
    return mean


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moments:
    """Variances of the calls that a step decodes and of the prompts that it computes, and their covariance."""

    decoding: Array
    prompts: Array
    both: Array


def _moments(by_call: Array, by_prompt: Array, arriving: Array, leaving: Array, tokens: float) -> _Moments:
    """Second moments over steps, in the linear approximation.

    From step to step, n' = (1 - x) n + k + e and k' = by_call n + by_prompt k + e', with x = 1 / (tokens - 1) the part
    of the calls that end with a step, e of variance x (1 - x) `leaving` and e' of variance `arriving`. Without prompt
    work this gives the variance of the processor-sharing queue.
    """
    ends = 1 / max(1.0, tokens - 1)
    stay = 1 - ends
    by_prompt = np.minimum(by_prompt, _FULLEST)
    count = len(by_call)
    rows = np.zeros((count, 3, 3))
    # Unknowns: var n, cov(n, k), var k.
    rows[:, 0] = np.column_stack([np.full(count, 1 - stay**2), np.full(count, -2 * stay), -np.ones(count)])
    rows[:, 1] = np.column_stack([-stay * by_call, 1 - stay * by_prompt - by_call, -by_prompt])
    rows[:, 2] = np.column_stack([-(by_call**2), -2 * by_call * by_prompt, 1 - by_prompt**2])
    noise = np.column_stack([leaving * ends * stay, np.zeros(count), arriving])
    solved = np.maximum(0.0, np.linalg.solve(rows, noise[:, :, None])[:, :, 0])
    return _Moments(decoding=solved[:, 0], both=solved[:, 1], prompts=solved[:, 2])


def _fixed_point(function: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """The smallest x with x = function(x), by bisection."""
    low = np.full(shape, 1e-9)
    high = function(low)
    for _ in range(60):
        short = high < function(high)
        if not short.any():
            break
        high = np.where(short, high * 1.5, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        short = middle < function(middle)
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return high


def _budget_wait_s(replica: _Steps, rates: Array, step_s: Array) -> Array:
    """Mean wait for the steps' budget of prompt tokens, as a queue of as many servers as prompts fit into a step.

    Source: Sakasegawa's approximation for M/D/c.
    """
    prompts = max(1.0, replica.profile.max_num_batched_tokens / replica.shape.computed_tokens)
    load = np.minimum(rates * step_s / prompts, _FULLEST)
    wait_s: Array = step_s / 2 * load ** (np.sqrt(2 * (prompts + 1)) - 1) / (prompts * (1 - load))
    return wait_s


def _place_wait_s(replica: _Steps, rates: Array, own: Array, swing: Array, limit: float, contention: Array) -> Array:
    """Mean wait for a place in a limited batch, whose size swings as if `swing` calls came and went as one.

    That is more than one where calls arrive in bursts, and less where several replicas share what comes at random.
    """
    places = np.arange(1, int(np.ceil(limit)) + 1, dtype=float)
    tokens = replica.shape.generated_tokens
    decode_s = replica.profile.host_s + np.outer(contention, replica.decode_s(places) - replica.profile.host_s)
    # Calls end at the rate n / (tokens * step), the prompts that keep the steps busy counted at the offered rate.
    prompts = rates[:, None] * decode_s
    for _ in range(3):
        step_s = decode_s + replica.prompts_s(prompts, own[:, None], is_decoding=tokens > 1)
        prompts = np.minimum(rates[:, None] * step_s, places / tokens)
        prompts[:, -1] *= 1 + _preempted(replica.profile, replica.shape, limit)
    ends = places / (tokens * step_s)
    logs = np.cumsum(np.log(rates[:, None] / ends), axis=1) / swing[:, None]
    logs = np.concatenate([np.zeros((len(rates), 1)), logs], axis=1)
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    load = np.minimum(rates / ends[:, -1], _FULLEST) ** (1 / swing)
    beyond = weights[:, -1] * load / (1 - load)
    queue = beyond / (1 - load) / (weights.sum(axis=1) + beyond)
    variability = (1 + replica.shape.output_cv**2) / 2
    wait_s: Array = variability * queue / rates
    return wait_s
