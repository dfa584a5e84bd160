"""In which order replicas stop and start, so that devices are never given out twice and no LLM is left without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

Device = tuple[str, int]

# States looked at times replicas to move: small cases are searched through, large ones as far as a second goes.
_MAX_WORK = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupation:
    """A replica of an LLM that takes a part of each of some devices."""

    llm: str
    part: Fraction
    devices: frozenset[Device]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Stop or start the replica of that index; `interrupts` where its LLM is then without any."""

    start: bool
    index: int
    interrupts: bool = False


@dataclass(slots=True)
class _State:
    stops: set[int]
    starts: set[int]
    used: dict[Device, Fraction]
    stops_on: dict[Device, list[int]]
    served: Counter[str]


def order_steps(stops: Sequence[Occupation], starts: Sequence[Occupation], staying: Sequence[Occupation]) -> list[Step]:
    """Every stop and every start once: a start where its devices have room, a stop where its LLM has another replica.

    LLMs that start nothing and keep nothing are given up, so their stops never wait. Where no such order exists, or, of
    dozens of moves, none was found in the time that is allowed, some stops come early and say that they interrupt.
    """
    wanted = {one.llm for one in (*starts, *staying)}
    state = _State(set(range(len(stops))), set(range(len(starts))), {}, {}, Counter())
    for index, one in enumerate(stops):
        for device in one.devices:
            state.stops_on.setdefault(device, []).append(index)
    for one in (*stops, *staying):
        state.served[one.llm] += 1
        for device in one.devices:
            state.used[device] = state.used.get(device, Fraction(0)) + one.part
    steps = _uninterrupted(state, stops, starts, wanted)
    return steps if steps is not None else _interrupted(state, stops, starts, wanted)


def _uninterrupted(
    state: _State, stops: Sequence[Occupation], starts: Sequence[Occupation], wanted: set[str]
) -> list[Step] | None:
    """Depth first, the most promising step first; None where no order serves every LLM all the time."""
    max_states = _MAX_WORK // (len(stops) + len(starts) + 1)
    dead: set[tuple[frozenset[int], frozenset[int]]] = set()
    path: list[Step] = []
    choices: list[Iterator[Step]] = [iter(_steps(state, stops, starts, wanted))]
    while state.starts or state.stops:
        step = next(choices[-1], None)
        if step is None:
            dead.add((frozenset(state.stops), frozenset(state.starts)))
            choices.pop()
            if not path or len(dead) > max_states:
                while path:
                    _undo(state, path.pop(), stops, starts)
                return None
            _undo(state, path.pop(), stops, starts)
            continue
        _do(state, step, stops, starts)
        if (frozenset(state.stops), frozenset(state.starts)) in dead:
            _undo(state, step, stops, starts)
            continue
        path.append(step)
        choices.append(iter(_steps(state, stops, starts, wanted)))
    return path


def _interrupted(
    state: _State, stops: Sequence[Occupation], starts: Sequence[Occupation], wanted: set[str]
) -> list[Step]:
    """As far as it goes without interruption; then the start that interrupts the fewest LLMs, and on."""
    path: list[Step] = []
    while state.starts or state.stops:
        steps = _steps(state, stops, starts, wanted)
        if not steps:
            start = min(sorted(state.starts), key=lambda index: _hurt(index, state, stops, starts))
            blocker = _in_the_way(starts[start], state)[0]
            last = state.served[stops[blocker].llm] == 1
            steps = [Step(start=False, index=blocker, interrupts=last)]
        _do(state, steps[0], stops, starts)
        path.append(steps[0])
    return path


def _steps(state: _State, stops: Sequence[Occupation], starts: Sequence[Occupation], wanted: set[str]) -> list[Step]:
    """What can be done now, the most promising first: LLMs that are given up end, then starts, then stops.

    Of the stops those come first that are the fewest away from letting a start happen, of the same LLM if possible.
    """
    given_up = [index for index in sorted(state.stops) if stops[index].llm not in wanted]
    if given_up:
        return [Step(start=False, index=given_up[0])]
    ready = []
    urgency: dict[int, tuple[int, bool]] = {}
    for index in sorted(state.starts):
        blockers = _in_the_way(starts[index], state)
        if not blockers:
            ready.append(index)
        for blocker in blockers:
            rank = (len(blockers), stops[blocker].llm != starts[index].llm)
            urgency[blocker] = min(urgency.get(blocker, rank), rank)
    found = [Step(start=True, index=index) for index in sorted(ready, key=lambda i: state.served[starts[i].llm])]
    last = (len(stops) + 1, True)
    may = [index for index in state.stops if state.served[stops[index].llm] > 1]
    found += [
        Step(start=False, index=index) for index in sorted(may, key=lambda index: (urgency.get(index, last), index))
    ]
    return found


def _in_the_way(start: Occupation, state: _State) -> list[int]:
    """The replicas still running on devices that have too little room for a start; empty where it can happen."""
    full = [device for device in start.devices if state.used.get(device, 0) + start.part > 1]
    on = {index for device in full for index in state.stops_on.get(device, ())}
    return sorted(on & state.stops)


def _hurt(
    index: int, state: _State, stops: Sequence[Occupation], starts: Sequence[Occupation]
) -> tuple[int, int, bool]:
    """How many LLMs, and replicas, a start would interrupt or end now, and whether one of another LLM is among them."""
    blockers = _in_the_way(starts[index], state)
    ended = Counter(stops[blocker].llm for blocker in blockers)
    lost = sum(count >= state.served[llm] for llm, count in ended.items())
    return lost, len(blockers), any(llm != starts[index].llm for llm in ended)


def _do(state: _State, step: Step, stops: Sequence[Occupation], starts: Sequence[Occupation]) -> None:
    if step.start:
        state.starts.remove(step.index)
        _change(state, starts[step.index], 1)
    else:
        state.stops.remove(step.index)
        _change(state, stops[step.index], -1)


def _undo(state: _State, step: Step, stops: Sequence[Occupation], starts: Sequence[Occupation]) -> None:
    if step.start:
        state.starts.add(step.index)
        _change(state, starts[step.index], -1)
    else:
        state.stops.add(step.index)
        _change(state, stops[step.index], 1)


def _change(state: _State, one: Occupation, sign: int) -> None:
    state.served[one.llm] += sign
    for device in one.devices:
        state.used[device] = state.used.get(device, Fraction(0)) + sign * one.part
