"""What executions add up to, in memory that does not grow with their number, so that parts add up to the whole.

Every sum is one of whole numbers (nanoseconds, tokens, counts, shares in units of 2^-40), so it is exact and the order
of the executions changes nothing: the totals of two halves, merged, equal the totals of the whole. What is not a sum is
a maximum, a bounded sample, or a sum in each of the bootstrap's resamples, whose weights depend on the execution alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, auto

import numpy as np

from scepsy_optimizer.executions import Execution, Span
from scepsy_optimizer.sampling import (
    Sample,
    Sampled,
    SampleLimits,
    Sampler,
    bootstrap_weights,
    hash_of,
    merge_samples,
)
from scepsy_optimizer.shape import bursts_of, shape_of
from scepsy_optimizer.timeline import Timeline, compile_timeline, waits

SHARE_UNIT = 2.0**-40
_BLOCK = 256


class Sum(IntEnum):
    """What is added up over the executions of a workflow. Squares and shares are of one execution each.

    Of the workflow: EXECUTIONS to KNOWN_QUEUE_CALL_NS. By LLM: CALLS to SHARE_SQUARED. By LLM and role: ROLE_CALLS
    to ROLE_SERVICE_NS. STARTS counts calls of an (LLM, role) that wait for none, TRANSITIONS those of the second
    (LLM, role) that wait for a call of the first. RUNNING_NS adds up, over the time that calls of the LLM run in an
    execution, how many do; BUSY_NS that time; SEEN_NS the square of their number. DECODED_TOKENS are output tokens, at
    least one per call; DECODED_CONTEXT_TWICE adds up twice the mean context that each of them sees; PROMPT_PAIRS the
    squares of input tokens without those of cached ones; BURSTS counts calls of an execution that start together as
    one, BURST_SQUARES their squared numbers, BURST_BESIDE_TOKENS the prompt tokens of all but one of them.
    """

    EXECUTIONS = auto()
    MAKESPAN_NS = auto()
    MAKESPAN_NS_SQUARED = auto()
    FIXED_NS = auto()
    WITH_SERVICE = auto()
    WIDTH = auto()
    DEPTH = auto()
    ROUNDS = auto()
    KNOWN_QUEUE_CALLS = auto()
    QUEUE_NS = auto()
    KNOWN_QUEUE_CALL_NS = auto()
    CALLS = auto()
    CALL_NS = auto()
    INPUT_TOKENS = auto()
    CACHED_TOKENS = auto()
    OUTPUT_TOKENS = auto()
    OUTPUT_TOKENS_SQUARED = auto()
    DECODED_TOKENS = auto()
    DECODED_CONTEXT_TWICE = auto()
    PROMPT_PAIRS = auto()
    SERVICE_NS = auto()
    CRITICAL_CALLS = auto()
    CRITICAL_NS = auto()
    RUNNING_NS = auto()
    BUSY_NS = auto()
    SEEN_NS = auto()
    BURSTS = auto()
    BURST_SQUARES = auto()
    BURST_BESIDE_TOKENS = auto()
    SHARE = auto()
    SHARE_SQUARED = auto()
    ROLE_CALLS = auto()
    ROLE_INPUT_TOKENS = auto()
    ROLE_OUTPUT_TOKENS = auto()
    ROLE_SERVICE_NS = auto()
    STARTS = auto()
    TRANSITIONS = auto()


class Peak(IntEnum):
    """What is greatest over the executions of a workflow, LONGEST_TOKENS (of a call's context) by LLM."""

    WIDTH = auto()
    DEPTH = auto()
    RECURSION = auto()
    ROUNDS = auto()
    LONGEST_TOKENS = auto()


Names = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowTotals:
    """The totals of one workflow.

    `sums` and `peaks` are keyed by what they are of and the names it needs: none, (LLM), (LLM, role), or two of the
    latter. `resampled` has, for each LLM, its service time in each bootstrap resample in whole microseconds.
    """

    sums: Mapping[tuple[Sum, Names], int] = field(default_factory=dict)
    peaks: Mapping[tuple[Peak, Names], int] = field(default_factory=dict)
    resampled: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sample: Sample = field(default_factory=Sample)

    def sum(self, what: Sum, *names: str) -> int:
        """A sum, 0 where nothing was added to it."""
        return self.sums.get((what, names), 0)

    def peak(self, what: Peak, *names: str) -> int:
        """A maximum, 0 where there was nothing."""
        return self.peaks.get((what, names), 0)

    def named(self, what: Sum) -> list[Names]:
        """The names under which there is such a sum, sorted."""
        return sorted(names for of, names in self.sums if of is what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The totals of executions, by workflow; `limits` are those of each workflow's sample."""

    workflows: Mapping[str, FlowTotals]
    limits: SampleLimits

    @property
    def executions(self) -> int:
        """Number of executions that were added up."""
        return sum(flow.sum(Sum.EXECUTIONS) for flow in self.workflows.values())

    @property
    def calls(self) -> int:
        """Number of calls in them."""
        return sum(flow.sum(Sum.CALLS, *names) for flow in self.workflows.values() for names in flow.named(Sum.CALLS))

    @property
    def llms(self) -> list[str]:
        """The LLMs that are called, sorted."""
        return sorted({llm for flow in self.workflows.values() for (llm,) in flow.named(Sum.CALLS)})

    @property
    def complete(self) -> bool:
        """Whether the samples hold every execution."""
        return all(flow.sample.cut is None for flow in self.workflows.values())

    @property
    def sampled(self) -> list[Execution]:
        """The executions in the samples of all workflows, in the order of their start."""
        found = [item for flow in self.workflows.values() for item in flow.sample.executions]
        return sorted(found, key=lambda execution: (execution.started_ns, execution.id))


def total(executions: Iterable[Execution], *, limits: SampleLimits | None = None) -> Totals:
    """Add up executions, one after another; none is kept but those in the sample."""
    limits = limits or SampleLimits()
    flows: dict[str, _Flow] = {}
    for execution in executions:
        flow = flows.get(execution.workflow)
        if flow is None:
            flow = flows[execution.workflow] = _Flow(limits)
        flow.add(execution)
    return Totals(workflows={name: flow.totals() for name, flow in sorted(flows.items())}, limits=limits)


def merge(one: Totals, other: Totals) -> Totals:
    """The totals of two sets of executions that have none in common: exactly what adding up all of them gives.

    Raises ValueError if their samples have different limits.
    """
    if one.limits != other.limits:
        raise ValueError("totals with different limits of their samples cannot be merged")
    nothing = FlowTotals()
    return Totals(
        workflows={
            name: _merge_flows(one.workflows.get(name, nothing), other.workflows.get(name, nothing), one.limits)
            for name in sorted({*one.workflows, *other.workflows})
        },
        limits=one.limits,
    )


def _merge_flows(one: FlowTotals, other: FlowTotals, limits: SampleLimits) -> FlowTotals:
    peaks = dict(one.peaks)
    for key, value in other.peaks.items():
        peaks[key] = max(value, peaks.get(key, 0))
    sums = Counter(one.sums)
    sums.update(other.sums)
    resampled = dict(one.resampled)
    for llm, values in other.resampled.items():
        mine = resampled.get(llm)
        resampled[llm] = values if mine is None else tuple(map(int.__add__, mine, values))
    return FlowTotals(
        sums=dict(sums), peaks=peaks, resampled=resampled, sample=merge_samples(one.sample, other.sample, limits)
    )


class _Calls:
    """The sums over the calls of one LLM in one role: plain attributes, since there are millions of calls."""

    def __init__(self) -> None:
        self.calls = self.call_ns = self.service_ns = 0
        self.known_queue = self.queue_ns = self.known_queue_call_ns = 0
        self.input_tokens = self.cached_tokens = self.longest_tokens = 0
        self.output_tokens = self.output_tokens_squared = 0
        self.decoded_tokens = self.decoded_context_twice = self.prompt_pairs = 0

    def into(self, sums: Counter[tuple[Sum, Names]], peaks: dict[tuple[Peak, Names], int], llm: str, role: str) -> None:
        """Add them to the sums of the workflow, of the LLM and of the role."""
        sums[Sum.KNOWN_QUEUE_CALLS, ()] += self.known_queue
        sums[Sum.QUEUE_NS, ()] += self.queue_ns
        sums[Sum.KNOWN_QUEUE_CALL_NS, ()] += self.known_queue_call_ns
        of_llm = {
            Sum.CALLS: self.calls,
            Sum.CALL_NS: self.call_ns,
            Sum.INPUT_TOKENS: self.input_tokens,
            Sum.CACHED_TOKENS: self.cached_tokens,
            Sum.OUTPUT_TOKENS: self.output_tokens,
            Sum.OUTPUT_TOKENS_SQUARED: self.output_tokens_squared,
            Sum.DECODED_TOKENS: self.decoded_tokens,
            Sum.DECODED_CONTEXT_TWICE: self.decoded_context_twice,
            Sum.PROMPT_PAIRS: self.prompt_pairs,
            Sum.SERVICE_NS: self.service_ns,
        }
        for what, value in of_llm.items():
            sums[what, (llm,)] += value
        of_role = {
            Sum.ROLE_CALLS: self.calls,
            Sum.ROLE_INPUT_TOKENS: self.input_tokens,
            Sum.ROLE_OUTPUT_TOKENS: self.output_tokens,
            Sum.ROLE_SERVICE_NS: self.service_ns,
        }
        for what, value in of_role.items():
            sums[what, (llm, role)] += value
        longest = (Peak.LONGEST_TOKENS, (llm,))
        peaks[longest] = max(self.longest_tokens, peaks.get(longest, 0))


class _Flow:
    """The totals of one workflow while its executions come."""

    def __init__(self, limits: SampleLimits) -> None:
        self._sums: Counter[tuple[Sum, Names]] = Counter()
        self._peaks: dict[tuple[Peak, Names], int] = {}
        self._calls: dict[tuple[str, str], _Calls] = {}
        self._sampler = Sampler(limits)
        self._resampled: dict[str, list[int]] = {}
        # Executions whose service times are not resampled yet: hash, and microseconds by LLM.
        self._block: list[tuple[int, Mapping[str, int]]] = []

    def add(self, execution: Execution) -> None:
        timeline = compile_timeline(execution)
        durations_ns = [_ns(traced_s) for traced_s in timeline.traced_s]
        self._add_shape(execution)
        service_ns = self._add_calls(timeline, durations_ns)
        self._add_path(timeline, durations_ns)
        self._add_shares(service_ns)
        self._add_concurrency(execution)
        for source, target in waits(timeline):
            call = timeline.calls[target]
            if source < 0:
                self._sums[Sum.STARTS, (call.llm, call.role)] += 1
            else:
                before = timeline.calls[source]
                self._sums[Sum.TRANSITIONS, (before.llm, before.role, call.llm, call.role)] += 1
        hashed = hash_of(execution.id)
        self._sampler.add(Sampled(key=(hashed, execution.id), execution=execution))
        self._block.append((hashed, {llm: round(spent / 1000) for llm, spent in service_ns.items()}))
        if len(self._block) == _BLOCK:
            self._resample()

    def totals(self) -> FlowTotals:
        if self._block:
            self._resample()
        sums, peaks = self._sums.copy(), dict(self._peaks)
        for (llm, role), found in self._calls.items():
            found.into(sums, peaks, llm, role)
        return FlowTotals(
            sums={key: value for key, value in sums.items() if value},
            peaks=peaks,
            resampled={llm: tuple(values) for llm, values in self._resampled.items()},
            sample=self._sampler.sample(),
        )

    def _add_shape(self, execution: Execution) -> None:
        shape = shape_of(execution)
        sums = self._sums
        sums[Sum.WIDTH, ()] += shape.width
        sums[Sum.DEPTH, ()] += shape.depth
        sums[Sum.ROUNDS, ()] += shape.rounds
        self._peak(Peak.WIDTH, (), shape.width)
        self._peak(Peak.DEPTH, (), shape.depth)
        self._peak(Peak.RECURSION, (), shape.recursion)
        self._peak(Peak.ROUNDS, (), shape.rounds)

    def _add_calls(self, timeline: Timeline, durations_ns: Sequence[int]) -> Mapping[str, int]:
        """Returns the service time by LLM."""
        service_ns: Counter[str] = Counter()
        for call, duration_ns in zip(timeline.calls, durations_ns, strict=True):
            sums = self._calls.get((call.llm, call.role))
            if sums is None:
                sums = self._calls[call.llm, call.role] = _Calls()
            served_ns = duration_ns
            if call.queue_s is not None:
                queue_ns = _ns(call.queue_s)
                served_ns = max(0, duration_ns - queue_ns)
                sums.known_queue += 1
                sums.queue_ns += queue_ns
                sums.known_queue_call_ns += duration_ns
            service_ns[call.llm] += served_ns
            prompt, output = call.input_tokens, call.output_tokens
            decoded = output or 1
            sums.calls += 1
            sums.call_ns += duration_ns
            sums.service_ns += served_ns
            sums.input_tokens += prompt
            sums.cached_tokens += call.cached_tokens
            sums.output_tokens += output
            sums.output_tokens_squared += output * output
            sums.decoded_tokens += decoded
            sums.decoded_context_twice += decoded * (2 * prompt + output)
            sums.prompt_pairs += prompt * prompt - call.cached_tokens * call.cached_tokens
            if prompt + output > sums.longest_tokens:
                sums.longest_tokens = prompt + output
        return service_ns

    def _add_path(self, timeline: Timeline, durations_ns: Sequence[int]) -> None:
        path = timeline.critical_path(timeline.traced_s)
        makespan_ns = _ns(path.makespan_s)
        sums = self._sums
        sums[Sum.EXECUTIONS, ()] += 1
        sums[Sum.MAKESPAN_NS, ()] += makespan_ns
        sums[Sum.MAKESPAN_NS_SQUARED, ()] += makespan_ns**2
        sums[Sum.FIXED_NS, ()] += _ns(path.fixed_s)
        for index in path.calls:
            llm = (timeline.calls[index].llm,)
            sums[Sum.CRITICAL_CALLS, llm] += 1
            sums[Sum.CRITICAL_NS, llm] += durations_ns[index]

    def _add_shares(self, service_ns: Mapping[str, int]) -> None:
        together_ns = sum(service_ns.values())
        if together_ns == 0:
            return
        self._sums[Sum.WITH_SERVICE, ()] += 1
        for llm, spent_ns in service_ns.items():
            share = round(spent_ns / together_ns / SHARE_UNIT)
            self._sums[Sum.SHARE, (llm,)] += share
            self._sums[Sum.SHARE_SQUARED, (llm,)] += share**2

    def _add_concurrency(self, execution: Execution) -> None:
        calls: dict[str, list[Span]] = defaultdict(list)
        for span in execution.calls:
            if span.call is not None:
                calls[span.call.llm].append(span)
        for llm, spans in calls.items():
            edges = sorted([(_ns(span.start_s), 1) for span in spans] + [(_ns(span.end_s), -1) for span in spans])
            running = since_ns = running_ns = busy_ns = seen_ns = 0
            for time_ns, change in edges:
                length_ns = time_ns - since_ns if running else 0
                busy_ns += length_ns
                running_ns += running * length_ns
                seen_ns += running * running * length_ns
                running += change
                since_ns = time_ns
            self._sums[Sum.BUSY_NS, (llm,)] += busy_ns
            self._sums[Sum.RUNNING_NS, (llm,)] += running_ns
            self._sums[Sum.SEEN_NS, (llm,)] += seen_ns
            bursts = bursts_of(spans)
            self._sums[Sum.BURSTS, (llm,)] += bursts.number
            self._sums[Sum.BURST_SQUARES, (llm,)] += bursts.squares
            self._sums[Sum.BURST_BESIDE_TOKENS, (llm,)] += bursts.beside_tokens

    def _peak(self, what: Peak, names: Names, value: int) -> None:
        if value > self._peaks.get((what, names), 0):
            self._peaks[what, names] = value

    def _resample(self) -> None:
        weights = bootstrap_weights(hashed for hashed, _ in self._block)
        for llm in {llm for _, spent in self._block for llm in spent}:
            spent_us = np.array([spent.get(llm, 0) for _, spent in self._block], dtype=np.int64)
            added = (spent_us @ weights).tolist()
            before = self._resampled.get(llm)
            self._resampled[llm] = added if before is None else list(map(int.__add__, before, added))
        self._block = []


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
