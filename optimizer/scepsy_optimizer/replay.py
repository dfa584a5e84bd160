"""Replay: traced executions through a plan's engines, event by event.

Every execution arrives at a given moment and follows its timeline: a call starts when what it waits for has ended, goes
to the replica of its LLM with the least outstanding work for its fraction (as the endpoint does), and takes the time
that the engine's steps give it. Replicas on fractions of one device share its memory bandwidth. What the pipeline can
only approximate happens here: bursts, queues, full caches.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.engine import Engine, Stretch
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import Profiles, find_profile, profiles_of
from scepsy_optimizer.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedCall:
    """One call as replayed: when it was sent and done, and on which replica of its LLM."""

    execution: int
    call: int
    llm: str
    replica: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMUse:
    """What an LLM's replicas did, of all the time from the first arrival to the last end.

    `busy` is the mean part of that time in which a replica was stepping, `running` and `waiting` the mean numbers of
    requests in their batches and in their queues, all together; `preemptions` counts sequences that had to be computed
    again because the KV cache was full.
    """

    llm: str
    busy: float
    running: float
    waiting: float
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay gives: `latencies_s` per arrival, in their order, and every call in the order of their ends."""

    latencies_s: NDArray[np.float64]
    calls: tuple[ReplayedCall, ...]
    uses: tuple[LLMUse, ...]


def poisson_arrivals_s(rng: np.random.Generator, *, rate_rps: float, executions: int) -> NDArray[np.float64]:
    """Moments of that many Poisson arrivals."""
    return rng.exponential(1 / rate_rps, executions).cumsum()


def replay(
    plan: Plan,
    profiles: Profiles,
    timelines: Sequence[Timeline],
    arrivals_s: Sequence[float] | NDArray[np.float64],
) -> Replay:
    """Send `timelines[i]` at `arrivals_s[i]` (ascending) through the plan's engines.

    Raises ScepsyError where the plan lacks an LLM, a call fits no replica's cache, or a weight does not fit.
    """
    return replay_on(*_replicas_of(plan, profiles), timelines, arrivals_s)


def replay_on(
    replicas: Mapping[str, Sequence[Replica]],
    outside_s: Mapping[str, float],
    timelines: Sequence[Timeline],
    arrivals_s: Sequence[float] | NDArray[np.float64],
) -> Replay:
    """The same on any replicas: those that serve each LLM, and what its calls spend outside of them.

    Raises ScepsyError where an LLM is not served, or a call fits no replica's cache.
    """
    run = _Run(replicas, outside_s, timelines)
    for index, arrival_s in enumerate(arrivals_s):
        run.at(float(arrival_s), index, 0)
    run.drain()
    latencies_s = np.array(run.ends_s) - np.asarray(arrivals_s, dtype=float)
    span_s = max(run.ends_s, default=0.0) - float(arrivals_s[0]) if len(arrivals_s) else 0.0
    return Replay(latencies_s=latencies_s, calls=tuple(run.calls), uses=run.uses(span_s))


class Stepper(Protocol):
    """What does the steps of a replica: an `Engine`, or several that take turns."""

    def begin(self, *, others_bandwidth: float = 0.0) -> Stretch | None:
        """Begin as many steps as are alike; None if there is nothing to do.

        `others_bandwidth` is what other replicas on the same device ask of its memory bandwidth.
        """

    def complete(self, stretch: Stretch, steps: int) -> tuple[Hashable, ...]:
        """End a stretch after `steps` of its steps; returns the requests that are finished then."""


@dataclass(slots=True)
class Replica:
    """What calls are sent to: `queues` takes them by LLM, `stepper` does the steps, `weight` is for balancing.

    `neighbours` are on fractions of the same device.
    The rest is where it stands: the stretch of steps it is in, since `since_s`; `version` outdates the ends of
    stretches that were cut.
    """

    stepper: Stepper
    queues: Mapping[str, Engine]
    weight: float
    number: int
    neighbours: tuple[Replica, ...] = ()
    outstanding: int = 0
    stretch: Stretch | None = None
    since_s: float = 0.0
    version: int = 0
    busy_s: float = 0.0


def _replicas_of(plan: Plan, profiles: Profiles) -> tuple[dict[str, list[Replica]], dict[str, float]]:
    """The plan's replicas by LLM, and what calls of each LLM spend outside the engine."""
    found: dict[str, list[Replica]] = {}
    outside_s: dict[str, float] = {}
    fractional: dict[tuple[str, int], list[Replica]] = {}
    for part in plan.llms:
        if part.llm not in profiles:
            raise ScepsyError(f"replay: no profile for {part.llm!r}")
        profile = find_profile(profiles_of(profiles, part.llm), part.device_type or plan.cluster.device_type)
        outside_s[part.llm] = profile.outside_s
        replicas = found.setdefault(part.llm, [])
        for slot in part.slots:
            engine = Engine(profile, tensor_parallel_size=part.tensor_parallel_size, fraction=part.fraction)
            replica = Replica(
                stepper=engine, queues={part.llm: engine}, weight=part.replica_weight, number=len(replicas)
            )
            replicas.append(replica)
            if part.fraction < 1:
                fractional.setdefault((slot.node, slot.devices[0]), []).append(replica)
    for sharing in fractional.values():
        for replica in sharing:
            replica.neighbours = tuple(other for other in sharing if other is not replica)
    return found, outside_s


class _Run:
    """The event loop. Events: something in an execution happens (its index, its event), or a stretch ends.

    What a call spends outside the engine comes before it is submitted; its submission is the complement of its event.
    """

    def __init__(
        self,
        replicas: Mapping[str, Sequence[Replica]],
        outside_s: Mapping[str, float],
        timelines: Sequence[Timeline],
    ) -> None:
        self._timelines = timelines
        self._replicas = replicas
        self._outside_s = outside_s
        called = {call.llm for timeline in timelines for call in timeline.calls}
        if missing := sorted(called - self._replicas.keys()):
            raise ScepsyError(f"replay: the executions call {', '.join(missing)}, which the plan does not serve")
        self._successors: dict[int, list[list[int]]] = {}
        self._running_s = dict.fromkeys(replicas, 0.0)
        self._waiting_s = dict.fromkeys(replicas, 0.0)
        self._common: dict[int, dict[str, int]] = {}
        # What each execution still waits for, per event; made when it arrives. Some of it may happen after its end.
        self._open: dict[int, list[int]] = {}
        self._heap: list[tuple[float, int, Replica | None, int, int]] = []
        self._order = count()
        self._sent_s: dict[tuple[int, int], float] = {}
        self.ends_s = [0.0] * len(timelines)
        self.calls: list[ReplayedCall] = []

    def at(self, time_s: float, execution: int, event: int) -> None:
        """Let an event of an execution happen."""
        heapq.heappush(self._heap, (time_s, next(self._order), None, execution, event))

    def drain(self) -> None:
        """Let everything happen."""
        while self._heap:
            time_s, _, replica, first, second = heapq.heappop(self._heap)
            if replica is None and second < 0:
                self._submit(time_s, first, ~second)
            elif replica is None:
                self._happen(time_s, first, second)
            elif replica.version == first and replica.stretch is not None:
                self._end_stretch(time_s, replica)

    def _happen(self, time_s: float, execution: int, event: int) -> None:
        timeline = self._timelines[execution]
        if execution not in self._open:
            self._open[execution] = [len(before) for before in timeline.predecessors]
        if event == timeline.sink:
            self.ends_s[execution] = time_s
        waiting = self._open[execution]
        for follower in self._following(timeline)[event]:
            waiting[follower] -= 1
            if waiting[follower]:
                continue
            # A child that the clocks show before its parent cannot be sent before now.
            ready_s = time_s + max(0.0, timeline.delay_s[follower])
            call = timeline.call_of[follower]
            if call < 0:
                self.at(ready_s, execution, follower)
            else:
                self._sent_s[execution, follower] = ready_s
                outside_s = self._outside_s[timeline.calls[call].llm]
                self.at(ready_s + outside_s, execution, ~follower)

    def _following(self, timeline: Timeline) -> list[list[int]]:
        found = self._successors.get(id(timeline))
        if found is None:
            found = [[] for _ in timeline.predecessors]
            for event, before in enumerate(timeline.predecessors):
                for earlier in before:
                    found[earlier].append(event)
            self._successors[id(timeline)] = found
        return found

    def _submit(self, time_s: float, execution: int, event: int) -> None:
        """A call reaches the replica with the least outstanding work for its devices."""
        timeline = self._timelines[execution]
        request = timeline.calls[timeline.call_of[event]]
        replica = min(self._replicas[request.llm], key=lambda one: ((one.outstanding + 1) / one.weight, one.number))
        common = self._common_tokens(timeline).get(request.llm)
        replica.queues[request.llm].submit(
            (execution, event),
            prompt_tokens=max(1, request.input_tokens),
            output_tokens=max(1, request.output_tokens),
            cached_tokens=request.cached_tokens,
            prefix=None if common is None else execution,
            common_tokens=common or 0,
        )
        replica.outstanding += 1
        if replica.stretch is None:
            self._begin(time_s, replica)
        else:
            # At its end the stretch counts those who wait then as waiting all along.
            self._waiting_s[request.llm] -= time_s - replica.since_s
            self._cut(time_s, replica)

    def _common_tokens(self, timeline: Timeline) -> dict[str, int]:
        """Of each LLM whose calls found prompts cached, the part that was cached before the execution's own calls.

        That much the first call found; what later ones found beyond it must come from those before them.
        """
        found = self._common.get(id(timeline))
        if found is None:
            found = {}
            for call in timeline.calls:
                found.setdefault(call.llm, call.cached_tokens)
            cached = {call.llm for call in timeline.calls if call.cached_tokens}
            found = {llm: tokens for llm, tokens in found.items() if llm in cached}
            self._common[id(timeline)] = found
        return found

    def _cut(self, time_s: float, replica: Replica) -> None:
        """End a stretch with the step in progress: the next one is another."""
        stretch = replica.stretch
        if stretch is not None and stretch.steps > 1:
            done = int((time_s - replica.since_s) / stretch.step_s) + 1
            if done < stretch.steps:
                replica.version += 1
                replica.stretch = replace(stretch, steps=done)
                self._await(replica)

    def _begin(self, time_s: float, replica: Replica) -> None:
        was_reading = replica.stretch is not None and replica.stretch.bandwidth > 0
        others = sum(other.stretch.bandwidth for other in replica.neighbours if other.stretch is not None)
        replica.stretch = replica.stepper.begin(others_bandwidth=others)
        replica.since_s = time_s
        replica.version += 1
        if replica.stretch is not None:
            self._await(replica)
        if was_reading != (replica.stretch is not None and replica.stretch.bandwidth > 0):
            # Those who share the device are slower, or faster, from their next step on.
            for other in replica.neighbours:
                self._cut(time_s, other)

    def _await(self, replica: Replica) -> None:
        assert replica.stretch is not None  # noqa: S101 - both callers have just set it
        end_s = replica.since_s + replica.stretch.steps * replica.stretch.step_s
        heapq.heappush(self._heap, (end_s, next(self._order), replica, replica.version, 0))

    def _end_stretch(self, time_s: float, replica: Replica) -> None:
        assert replica.stretch is not None  # noqa: S101 - its end has just come
        length_s = time_s - replica.since_s
        replica.busy_s += length_s
        for llm, queue in replica.queues.items():
            self._running_s[llm] += length_s * queue.running
            self._waiting_s[llm] += length_s * queue.waiting
        finished = replica.stepper.complete(replica.stretch, replica.stretch.steps)
        for key in finished:
            assert isinstance(key, tuple)  # noqa: S101 - the keys that _submit has made
            execution, event = key
            sent_s = self._sent_s.pop((execution, event))
            replica.outstanding -= 1
            timeline = self._timelines[execution]
            call = timeline.call_of[event]
            self.calls.append(
                ReplayedCall(
                    execution=execution,
                    call=call,
                    llm=timeline.calls[call].llm,
                    replica=replica.number,
                    start_s=sent_s,
                    end_s=time_s,
                )
            )
            self.at(time_s, execution, event)
        self._begin(time_s, replica)

    def uses(self, span_s: float) -> tuple[LLMUse, ...]:
        """What the replicas of every LLM did in that time."""
        span_s = span_s or 1.0
        return tuple(
            LLMUse(
                llm=llm,
                busy=sum(replica.busy_s for replica in replicas) / len(replicas) / span_s,
                running=self._running_s[llm] / span_s,
                waiting=self._waiting_s[llm] / span_s,
                preemptions=sum(replica.queues[llm].preemptions for replica in replicas),
            )
            for llm, replicas in self._replicas.items()
        )
