"""In which order replicas stop and start, so that devices are never given out twice and no LLM is left without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

Device = tuple[str, int]

# States looked at times replicas to move: small cases are searched through, large ones as far as a second goes.
_MAX_WORK = 100_000


@dataclass(slots=True)
class Work:
    """What may still be spent on making orders, shared by those that belong together."""

    left: int = 4 * _MAX_WORK

    def portion(self) -> int:
        """What one search may go through: at most half of what is left, so that those after it can look too."""
        return min(_MAX_WORK, self.left // 2)


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
    """What is still to stop and to start, and what runs; parts of devices in whole numbers, for speed."""

    stops: set[int]
    starts: set[int]
    whole: int
    stop_parts: list[int]
    start_parts: list[int]
    used: dict[Device, int]
    stops_on: dict[Device, list[int]]
    served: Counter[str]


def order_steps(
    stops: Sequence[Occupation],
    starts: Sequence[Occupation],
    staying: Sequence[Occupation],
    work: Work | None = None,
) -> list[Step]:
    """Every stop and every start once: a start where its devices have room, a stop where its LLM has another replica.

    LLMs that start nothing and keep nothing are given up, so their stops never wait. Where no such order exists, or, of
    dozens of moves, none was found in the time that is allowed, some stops come early and say that they interrupt.
    """
    wanted = {one.llm for one in (*starts, *staying)}
    state = _begin(stops, starts, staying)
    work = work or Work()
    steps = _uninterrupted(state, stops, starts, wanted, work)
    return steps if steps is not None else _interrupted(state, stops, starts, wanted, work)


def interrupted(steps: Sequence[Step], stops: Sequence[Occupation]) -> set[str]:
    """The LLMs that an order leaves without any replica for a while."""
    return {stops[step.index].llm for step in steps if step.interrupts}


def order_with_last(
    steps: Sequence[Step],
    stops: Sequence[Occupation],
    starts: Sequence[Occupation],
    staying: Sequence[Occupation],
    work: Work,
) -> list[Step] | None:
    """From an order without the last of the stops, a temporary replica of an LLM that starts others, one with it.

    Either the same, with the temporary replica stopped after the first start of its LLM, or, where that has no room or
    interrupts some still, a new one. None where neither is found in the time that is allowed.
    """
    last = len(stops) - 1
    after = 1 + next(at for at, step in enumerate(steps) if step.start and starts[step.index].llm == stops[last].llm)
    kept = _checked([*steps[:after], Step(start=False, index=last), *steps[after:]], stops, starts, staying)
    if work.left <= 0 or (kept is not None and not interrupted(kept, stops)):
        return kept
    found = order_steps(stops, starts, staying, work)
    return min([found, *([kept] if kept else [])], key=lambda order: len(interrupted(order, stops)))


def order_without(
    index: int,
    steps: Sequence[Step],
    stops: Sequence[Occupation],
    starts: Sequence[Occupation],
    staying: Sequence[Occupation],
    work: Work,
) -> list[Step] | None:
    """From an order with `stops` one without that of this index that interrupts no more LLMs; None if none is found."""
    most = len(interrupted(steps, stops))
    fewer = [*stops[:index], *stops[index + 1 :]]
    rest = [
        step if step.start or step.index < index else replace(step, index=step.index - 1)
        for step in steps
        if step.start or step.index != index
    ]
    kept = _checked(rest, fewer, starts, staying)
    if kept is not None and len(interrupted(kept, fewer)) <= most:
        return kept
    found = order_steps(fewer, starts, staying, work) if work.left > 0 else None
    return found if found is not None and len(interrupted(found, fewer)) <= most else None


def _begin(stops: Sequence[Occupation], starts: Sequence[Occupation], staying: Sequence[Occupation]) -> _State:
    """Everything old runs, nothing new does."""
    whole = lcm(*(one.part.denominator for one in (*stops, *starts, *staying)))
    state = _State(
        stops=set(range(len(stops))),
        starts=set(range(len(starts))),
        whole=whole,
        stop_parts=[int(one.part * whole) for one in stops],
        start_parts=[int(one.part * whole) for one in starts],
        used={},
        stops_on={},
        served=Counter(),
    )
    for index, one in enumerate(stops):
        for device in one.devices:
            state.stops_on.setdefault(device, []).append(index)
    for one in (*stops, *staying):
        _change(state, one, 1, int(one.part * whole))
    return state


def _checked(
    order: Sequence[Step], stops: Sequence[Occupation], starts: Sequence[Occupation], staying: Sequence[Occupation]
) -> list[Step] | None:
    """The order with its interruptions told anew, or None where a start has no room."""
    wanted = {one.llm for one in (*starts, *staying)}
    state = _begin(stops, starts, staying)
    found = []
    for step in order:
        one = (starts if step.start else stops)[step.index]
        if step.start and _full(step.index, starts, state):
            return None
        _do(state, step, stops, starts)
        lost = not step.start and state.served[one.llm] == 0 and one.llm in wanted
        found.append(replace(step, interrupts=lost))
    return found


def _uninterrupted(
    state: _State, stops: Sequence[Occupation], starts: Sequence[Occupation], wanted: set[str], work: Work
) -> list[Step] | None:
    """Depth first, the most promising step first; None where no order serves every LLM all the time."""
    size = len(stops) + len(starts) + 1
    max_states = work.portion() // size
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
        work.left -= size
    return path


def _interrupted(
    state: _State, stops: Sequence[Occupation], starts: Sequence[Occupation], wanted: set[str], work: Work
) -> list[Step]:
    """As far as it goes without interruption; then the start that interrupts the fewest LLMs, and on."""
    path: list[Step] = []
    while state.starts or state.stops:
        steps = _steps(state, stops, starts, wanted)
        if not steps:
            start = min(sorted(state.starts), key=lambda index: _hurt(index, state, stops, starts))
            blocker = _in_the_way(start, starts, state)[0]
            last = state.served[stops[blocker].llm] == 1
            steps = [Step(start=False, index=blocker, interrupts=last)]
        _do(state, steps[0], stops, starts)
        path.append(steps[0])
        work.left -= len(stops) + len(starts) + 1
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
        blockers = _in_the_way(index, starts, state)
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


def _in_the_way(index: int, starts: Sequence[Occupation], state: _State) -> list[int]:
    """The replicas still running on devices that have too little room for a start; empty where it can happen."""
    on = {stop for device in _full(index, starts, state) for stop in state.stops_on.get(device, ())}
    return sorted(on & state.stops)


def _full(index: int, starts: Sequence[Occupation], state: _State) -> list[Device]:
    """The devices that have too little room for a start."""
    room = state.whole - state.start_parts[index]
    return [device for device in starts[index].devices if state.used.get(device, 0) > room]


def _hurt(
    index: int, state: _State, stops: Sequence[Occupation], starts: Sequence[Occupation]
) -> tuple[int, int, bool]:
    """How many LLMs, and replicas, a start would interrupt or end now, and whether one of another LLM is among them."""
    blockers = _in_the_way(index, starts, state)
    ended = Counter(stops[blocker].llm for blocker in blockers)
    lost = sum(count >= state.served[llm] for llm, count in ended.items())
    return lost, len(blockers), any(llm != starts[index].llm for llm in ended)


def _do(state: _State, step: Step, stops: Sequence[Occupation], starts: Sequence[Occupation]) -> None:
    if step.start:
        state.starts.remove(step.index)
        _change(state, starts[step.index], 1, state.start_parts[step.index])
    else:
        state.stops.remove(step.index)
        _change(state, stops[step.index], -1, state.stop_parts[step.index])


def _undo(state: _State, step: Step, stops: Sequence[Occupation], starts: Sequence[Occupation]) -> None:
    if step.start:
        state.starts.add(step.index)
        _change(state, starts[step.index], -1, state.start_parts[step.index])
    else:
        state.stops.add(step.index)
        _change(state, stops[step.index], 1, state.stop_parts[step.index])


def _change(state: _State, one: Occupation, sign: int, part: int) -> None:
    state.served[one.llm] += sign
    for device in one.devices:
        state.used[device] = state.used.get(device, 0) + sign * part
