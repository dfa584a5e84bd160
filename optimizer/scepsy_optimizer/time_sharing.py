"""Time sharing, as a baseline: every device serves every LLM, one after another, as Aegaeon does (SOSP 2025).

Its scheduler is not public, so this is a model of it, kind where it is open:

* Every LLM that fits a whole device may run on each of them, at tensor parallelism 1. Larger ones are refused.
* A device works for one LLM at a time: until it has nothing more to do, or until its turn is over and another waits.
  Turns go round; the one in progress is never broken within a step.
* Handing a device over costs `switch_s`, whatever the sizes: weights are taken to be prefetched in time.
* The LLM whose turn it is has the whole device's memory for its KV cache; what the others hold there waits outside, and
  coming back is part of the switch.
* Calls go to the device with the fewest outstanding ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.engine import Engine, Stretch
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replay import Replay, Replica, replay_on
from scepsy_optimizer.timeline import Timeline

SWITCH_S = 0.05
"""Weights already on the device, KV cache of a few thousand tokens moved over PCIe."""

TURN_S = 0.5


def replay_time_shared(
    profiles: Mapping[str, LLMProfile],
    timelines: Sequence[Timeline],
    arrivals_s: Sequence[float] | NDArray[np.float64],
    *,
    devices: int,
    turn_s: float = TURN_S,
    switch_s: float = SWITCH_S,
) -> Replay:
    """Send `timelines[i]` at `arrivals_s[i]` (ascending) through devices that all LLMs of `profiles` share in time.

    Raises ScepsyError where an LLM does not fit one device, or a call its KV cache.
    """
    replicas = []
    for number in range(devices):
        engines = {
            llm: Engine(profile, tensor_parallel_size=1, fraction=1.0) for llm, profile in sorted(profiles.items())
        }
        shared = Turns(tuple(engines.values()), turn_s=turn_s, switch_s=switch_s)
        replicas.append(Replica(stepper=shared, queues=engines, weight=1.0, number=number))
    outside_s = {llm: profile.outside_s for llm, profile in profiles.items()}
    return replay_on(dict.fromkeys(profiles, replicas), outside_s, timelines, arrivals_s)


class Turns:
    """Engines that share one device in time. It steps like an `Engine`; requests are submitted to the engines."""

    def __init__(self, engines: Sequence[Engine], *, turn_s: float, switch_s: float) -> None:
        """The first engine has the device."""
        self._engines = engines
        self._turn_s = turn_s
        self._switch_s = switch_s
        self._current = 0
        self._left_s = turn_s

    def begin(self, *, others_bandwidth: float = 0.0) -> Stretch | None:
        """Begin as many steps as are alike and within the turn, where another engine waits for its own.

        A stretch after a switch is one step, as much longer. None if no engine has anything to do.
        """
        busy = [index for index, engine in enumerate(self._engines) if engine.waiting or engine.running]
        if not busy:
            return None
        switched_s = 0.0
        if self._current not in busy or (self._left_s <= 0 and len(busy) > 1):
            behind = [index for index in busy if index > self._current]
            self._current = min(behind or busy)
            switched_s = self._switch_s
        if switched_s or self._left_s <= 0:
            self._left_s = self._turn_s
        stretch = self._engines[self._current].begin(
            max_steps=1 if switched_s else None, others_bandwidth=others_bandwidth
        )
        if stretch is None:
            return None
        if switched_s:
            return replace(stretch, step_s=stretch.step_s + switched_s)
        if len(busy) > 1:
            fitting = max(1, int(self._left_s / stretch.step_s))
            return replace(stretch, steps=min(stretch.steps, fitting))
        return stretch

    def complete(self, stretch: Stretch, steps: int) -> tuple[Hashable, ...]:
        """End a stretch after `steps` of its steps; returns the requests that are finished then."""
        self._left_s -= stretch.step_s * steps
        return self._engines[self._current].complete(stretch, steps)
