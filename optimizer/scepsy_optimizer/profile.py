"""Profiles: how fast an LLM's engine steps are on a device, per tensor parallelism and device fraction."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.cluster import DEVICE_MEMORY_GB_S
from scepsy_optimizer.errors import ScepsyError

GIB = 1 << 30

_ATTENTION_SHOWS_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Engine step times at one tensor parallelism on whole devices.

    `decode_s[i][j]` is the time of one decode step with `batch_sizes[i]` sequences whose mean context is
    `context_tokens[j]`; `prefill_s[k]` the time of one step that computes `prefill_tokens[k]` new prompt tokens and
    nothing else. All grids ascend and all times are monotone in their grids. Memory is per device.
    """

    tensor_parallel_size: int
    batch_sizes: tuple[int, ...]
    context_tokens: tuple[int, ...]
    decode_s: tuple[tuple[float, ...], ...]
    prefill_tokens: tuple[int, ...]
    prefill_s: tuple[float, ...]
    weights_gib: float
    overhead_gib: float
    kv_bytes_per_token: float

    def __post_init__(self) -> None:
        """Raises ScepsyError where a grid, a time or a size means nothing."""
        where = f"step times at tensor_parallel_size {self.tensor_parallel_size}"
        if self.tensor_parallel_size < 1:
            raise ScepsyError(f"{where}: give the number of devices that a replica takes, at least 1")
        for name in ("batch_sizes", "context_tokens", "prefill_tokens"):
            grid = getattr(self, name)
            if not grid or list(grid) != sorted(set(grid)) or grid[0] < 1:
                raise ScepsyError(f"{where}: {name} must be ascending positive integers")
        if [len(row) for row in self.decode_s] != [len(self.context_tokens)] * len(self.batch_sizes):
            raise ScepsyError(f"{where}: decode_s must have one row per batch size and one column per context length")
        if len(self.prefill_s) != len(self.prefill_tokens):
            raise ScepsyError(f"{where}: prefill_s must have one entry per prefill_tokens")
        # Said apart: a time that is no number has no place in any order.
        for name, rows in (("decode_s", self.decode_s), ("prefill_s", (self.prefill_s,))):
            for row in rows:
                if not all(map(isfinite, row)):
                    wrong = next(time for time in row if not isfinite(time))
                    raise ScepsyError(f"{where}: {name} has {wrong}; every time must be a finite number of seconds")
        columns = [*self.decode_s, *zip(*self.decode_s, strict=True), self.prefill_s]
        if any(list(column) != sorted(column) or column[0] <= 0 for column in columns):
            raise ScepsyError(f"{where}: times must be positive and never fall with batch, context or tokens")
        for name in ("weights_gib", "kv_bytes_per_token"):
            if not 0 < getattr(self, name) < inf:
                raise ScepsyError(f"{where}: {name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.overhead_gib < inf:
            raise ScepsyError(f"{where}: overhead_gib must be finite and at least 0, got {self.overhead_gib}")


# Of an H100's bandwidth two processes under MPS that read weights side by side reached this part (tests/data/h100).
_READABLE = 0.95

_PREFILL_BETA, _DECODE_BETA, _DECODE_BETA_LARGE = 0.69, 0.18, 0.40


@dataclass(frozen=True, slots=True, kw_only=True)
class FractionSlowdown:
    """How a device fraction f below one slows a step: 1 + beta (1/f - 1), a beta for each phase.

    The defaults are fits to published measurements of SM shares under MPS (docs/design.md). `decode_beta` grows
    linearly in the batch from `decode_beta` at `small_batch` to `decode_beta_large` at `large_batch`. Betas of 1 are
    the pessimistic 1/f, which is also what MIG and CPU quotas do.

    `down_to` is the least fraction that the betas were measured on. Below it a step slows by the default betas, where
    those are larger: memory bandwidth that half the multiprocessors still reach, a tenth of them does not.
    """

    prefill_beta: float = _PREFILL_BETA
    decode_beta: float = _DECODE_BETA
    decode_beta_large: float = _DECODE_BETA_LARGE
    small_batch: int = 32
    large_batch: int = 64
    down_to: float = 0.0

    def __post_init__(self) -> None:
        """Raises ScepsyError where no slowdown is meant."""
        for name in ("prefill_beta", "decode_beta", "decode_beta_large"):
            beta = getattr(self, name)
            if beta < 0:
                raise ScepsyError(
                    f"slowdown: a fraction of a device is never faster than all of it: {name} must be at least 0, "
                    f"got {beta}"
                )
            if not isfinite(beta):
                raise ScepsyError(f"slowdown: {name} must be a finite number, got {beta}")
        if not 0 <= self.down_to <= 1:
            raise ScepsyError(f"slowdown: down_to must be a fraction from 0 to 1, got {self.down_to}")
        if not self.small_batch < self.large_batch:
            raise ScepsyError(f"slowdown: small_batch {self.small_batch} must be below large_batch {self.large_batch}")

    def prefill(self, fraction: float) -> float:
        """Factor on a prefill step's time."""
        return self._factor(self.prefill_beta, _PREFILL_BETA, fraction)

    def decode(self, fraction: float, batch_size: float) -> float:
        """Factor on a decode step's time at that many sequences."""
        span = self.large_batch - self.small_batch
        part = min(1.0, max(0.0, (batch_size - self.small_batch) / span))
        return self._factor(
            self.decode_beta + part * (self.decode_beta_large - self.decode_beta),
            _DECODE_BETA + part * (_DECODE_BETA_LARGE - _DECODE_BETA),
            fraction,
        )

    def _factor(self, beta: float, assumed: float, fraction: float) -> float:
        measured = max(fraction, self.down_to)
        return 1 + beta * (1 / measured - 1) + max(beta, assumed) * (1 / fraction - 1 / measured)


PROPORTIONAL = FractionSlowdown(prefill_beta=1.0, decode_beta=1.0, decode_beta_large=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a profile's numbers come from. `source` is "estimate" or "measured".

    `hardware` is what the device called itself, `flags` what the engine was started with, `enforcement` how fractions
    of a device were held.
    """

    source: str
    tool: str
    engine: str
    date: str
    hardware: str = ""
    flags: str = ""
    enforcement: str = "none"
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMProfile:
    """How fast one LLM runs on one device type.

    `llm` is the served model name that calls name, `model` what vLLM loads (a Hugging Face id or a directory).
    `host_s` is the engine's own time per step, added to every step time of the tables; `request_s` the time of a call
    outside the engine's steps (HTTP, tokenising). That occupies nothing that other calls wait for, unless
    `request_occupies`: server and engine share a core, and each new prompt keeps the engine from stepping so long.
    """

    llm: str
    model: str
    device_type: str
    device_memory_gib: float
    steps: tuple[StepTimes, ...]
    provenance: Provenance
    slowdown: FractionSlowdown = FractionSlowdown()
    host_s: float = 0.0
    request_s: float = 0.0
    request_occupies: bool = False
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32768
    gpu_memory_utilization: float = 0.92

    def __post_init__(self) -> None:
        """Raises ScepsyError where a number means nothing, or a tensor parallelism has two tables or there is none."""
        where = f"profile of {self.llm!r} on {self.device_type}"
        if not self.steps:
            raise ScepsyError(f"{where}: steps is empty; give the step times of at least one tensor_parallel_size")
        sizes = [steps.tensor_parallel_size for steps in self.steps]
        if len(set(sizes)) != len(sizes):
            twice = next(size for size in sizes if sizes.count(size) > 1)
            raise ScepsyError(f"{where}: steps has tensor_parallel_size {twice} twice; leave one of them out")
        if not 0 < self.device_memory_gib < inf:
            raise ScepsyError(f"{where}: device_memory_gib must be positive and finite, got {self.device_memory_gib}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ScepsyError(
                f"{where}: gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        for name in ("host_s", "request_s"):
            if not 0 <= getattr(self, name) < inf:
                raise ScepsyError(f"{where}: {name} must be finite and at least 0, got {getattr(self, name)}")
        # A plan cuts max_model_len to what a KV cache holds, which may be nothing; that is told where it is used.
        for name, least in (("max_num_seqs", 1), ("max_num_batched_tokens", 1), ("max_model_len", 0)):
            if getattr(self, name) < least:
                raise ScepsyError(f"{where}: {name} must be at least {least}, got {getattr(self, name)}")

    @property
    def outside_s(self) -> float:
        """Time of a call that delays nobody else."""
        return 0.0 if self.request_occupies else self.request_s

    @property
    def prompt_s(self) -> float:
        """Time that a new prompt occupies the engine besides its tokens."""
        return self.request_s if self.request_occupies else 0.0

    def at(self, tensor_parallel_size: int) -> StepTimes:
        """The tables at that tensor parallelism. Raises ScepsyError if it was not profiled."""
        for steps in self.steps:
            if steps.tensor_parallel_size == tensor_parallel_size:
                return steps
        known = ", ".join(str(steps.tensor_parallel_size) for steps in self.steps)
        raise ScepsyError(
            f"{self.llm!r} on {self.device_type} was profiled at tensor_parallel_size {known}, "
            f"not {tensor_parallel_size}"
        )

    def kv_tokens(self, tensor_parallel_size: int, fraction: float) -> int:
        """Tokens of KV cache that a replica holds in its fraction of each device's memory; 0 if it does not fit."""
        steps = self.at(tensor_parallel_size)
        budget_gib = self.device_memory_gib * self.gpu_memory_utilization * fraction
        free_gib = budget_gib - steps.weights_gib - steps.overhead_gib
        return max(0, int(free_gib * GIB / steps.kv_bytes_per_token))

    def with_slowdown(self, slowdown: FractionSlowdown) -> LLMProfile:
        """The same profile under another slowdown model, such as PROPORTIONAL."""
        return replace(self, slowdown=slowdown)


Profiles = Mapping[str, LLMProfile | Sequence[LLMProfile]]
"""Profiles by LLM: one, or one for each of several device types."""


def profiles_of(profiles: Profiles, llm: str) -> tuple[LLMProfile, ...]:
    """The profiles of one LLM, one per device type. Raises ScepsyError where it has none."""
    found = profiles.get(llm, ())
    if not found:
        raise ScepsyError(f"no profile for {llm}; there are profiles for {', '.join(sorted(profiles)) or 'nothing'}")
    return (found,) if isinstance(found, LLMProfile) else tuple(found)


def find_profile(profiles: Sequence[LLMProfile], device_type: str = "") -> LLMProfile:
    """The profile for a device type, the first for "". Raises ScepsyError where there is none."""
    for profile in profiles:
        if device_type in ("", profile.device_type):
            return profile
    known = ", ".join(profile.device_type for profile in profiles)
    raise ScepsyError(f"the profile of {profiles[0].llm!r} is for {known}, not {device_type}: profile it there")


class StepClock:
    """Step times of one replica: a profile at a tensor parallelism and fraction, as a function.

    Between grid points the tables are interpolated linearly; beyond the last one they continue along its last
    segment, below the first one they stay. A step that decodes and prefills reads the weights once, so the smaller of
    the two phases' floors is counted once. Attention makes prefill grow with the square of a prompt, the rest with the
    tokens of the step: `attention_s` is the part per pair of tokens, so that several short prompts in one step cost
    less than one long prompt, and a later chunk of a long prompt more than its first. `prompt_s` is what each prompt
    costs whatever its length.
    """

    __slots__ = (
        "_bandwidth",
        "_fraction",
        "_overlap_s",
        "_prefill_factor",
        "_profile",
        "_steps",
        "attention_s",
        "prompt_s",
    )

    def __init__(self, profile: LLMProfile, tensor_parallel_size: int, fraction: float) -> None:
        self._profile = profile
        self._steps = profile.at(tensor_parallel_size)
        self._fraction = fraction
        self._prefill_factor = profile.slowdown.prefill(fraction)
        self._overlap_s = min(
            self._steps.prefill_s[0] * self._prefill_factor,
            self._steps.decode_s[0][0] * profile.slowdown.decode(fraction, 1),
        )
        self.attention_s = _attention_s(self._steps) * self._prefill_factor
        self.prompt_s = profile.prompt_s * self._prefill_factor
        self._bandwidth = _bandwidth(self._steps, profile.device_type)

    @property
    def host_s(self) -> float:
        """The engine's own time per step."""
        return self._profile.host_s

    @property
    def overlap_s(self) -> float:
        """What a step that both decodes and prefills saves against two steps, the host time apart."""
        return self._overlap_s

    def decode_s(self, batch_size: float, context_tokens: float) -> float:
        """Time of one decode step without the host's part, at the mean context of the batch."""
        contexts, rows, grid = self._steps.context_tokens, self._steps.decode_s, self._steps.batch_sizes
        right = min(bisect_right(grid, batch_size), len(grid) - 1)
        left = max(0, right - 1)
        pair = [interpolate(context_tokens, contexts, rows[index]) for index in (left, right)]
        base = interpolate(batch_size, (grid[left], grid[right]), pair) if left != right else pair[0]
        return base * self._profile.slowdown.decode(self._fraction, batch_size)

    def prefill_s(self, tokens: float, pairs: float | None = None) -> float:
        """Time of one step that only computes that many prompt tokens, without the host's part.

        `pairs` is the sum of end^2 - start^2 over the chunks [start, end) of the prompts; without it all tokens are
        those of one prompt, from its start.
        """
        alone = interpolate(tokens, self._steps.prefill_tokens, self._steps.prefill_s) * self._prefill_factor
        return alone if pairs is None else alone + self.attention_s * (pairs - tokens * tokens)

    def prefill_times_s(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """`prefill_s` of many token counts at once."""
        grid, times = np.array(self._steps.prefill_tokens, dtype=float), np.array(self._steps.prefill_s)
        found: NDArray[np.float64] = np.interp(tokens, grid, times)
        if len(grid) > 1:
            slope = (times[-1] - times[-2]) / (grid[-1] - grid[-2])
            found = np.where(tokens > grid[-1], times[-1] + slope * (tokens - grid[-1]), found)
        times_s: NDArray[np.float64] = found * self._prefill_factor
        return times_s

    def step_s(
        self,
        decoding: int,
        context_tokens: float,
        prefill_tokens: int,
        pairs: float | None = None,
        contention: float = 1.0,
        prompts: int = 0,
    ) -> float:
        """Time of one engine step: `decoding` sequences at their mean context plus chunks of new prompt tokens.

        `pairs` is as in `prefill_s`, `contention` a factor on decoding where replicas share a device's bandwidth, and
        `prompts` the number of prompts whose last chunk this is.
        """
        if decoding and prefill_tokens:
            decode_s = self.decode_s(decoding, context_tokens) * contention
            work = decode_s + self.prefill_s(prefill_tokens, pairs) - self._overlap_s
        elif decoding:
            work = self.decode_s(decoding, context_tokens) * contention
        else:
            work = self.prefill_s(prefill_tokens, pairs)
        return self._profile.host_s + prompts * self.prompt_s + work

    def bandwidth_share(self, decoding: float, context_tokens: float) -> float:
        """The part of a device's memory bandwidth that such decode steps take, one after another and undisturbed.

        A step reads the weights and the contexts. What the device can read is nearly what its data sheet says; of a
        device without one, and where the table has it faster, the most that any step of the table does.
        """
        step_s = self._profile.host_s + self.decode_s(decoding, context_tokens)
        return _bytes_read(self._steps, decoding, context_tokens) / step_s / self._bandwidth


def _attention_s(steps: StepTimes) -> float:
    """Seconds of prefill per pair of tokens: half the curvature of the table's last three points.

    Never so much that what is left of the table would fall. 0 for tables that end where attention does not show yet.
    """
    tokens, times = steps.prefill_tokens, steps.prefill_s
    if len(tokens) < 3 or tokens[-1] < _ATTENTION_SHOWS_TOKENS:
        return 0.0
    slopes = [(times[index] - times[index - 1]) / (tokens[index] - tokens[index - 1]) for index in (-2, -1)]
    most = min(
        (times[index] - times[index - 1]) / (tokens[index] ** 2 - tokens[index - 1] ** 2)
        for index in range(1, len(tokens))
    )
    return max(0.0, min(most, (slopes[1] - slopes[0]) / (tokens[-1] - tokens[-3])))


def _bytes_read(steps: StepTimes, batch_size: float, context_tokens: float) -> float:
    """Bytes that one decode step reads on each device."""
    return steps.weights_gib * GIB + batch_size * context_tokens * steps.kv_bytes_per_token


def _bandwidth(steps: StepTimes, device_type: str) -> float:
    """Bytes per second that all who share a device can read together."""
    fastest = max(
        _bytes_read(steps, batch, context) / time
        for batch, row in zip(steps.batch_sizes, steps.decode_s, strict=True)
        for context, time in zip(steps.context_tokens, row, strict=True)
    )
    return max(fastest, _READABLE * 1e9 * DEVICE_MEMORY_GB_S.get(device_type, 0.0))


def interpolate(x: float, grid: Sequence[float], values: Sequence[float]) -> float:
    """Linear between grid points, constant below the first, along the last segment beyond the last."""
    if x <= grid[0] or len(grid) == 1:
        return values[0]
    right = min(bisect_right(grid, x), len(grid) - 1)
    left = right - 1
    return values[left] + (values[right] - values[left]) * (x - grid[left]) / (grid[right] - grid[left])
