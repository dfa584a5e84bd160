"""From a running plan to a new one: what stays, what restarts, and in which order.

A replica stays where the new plan has an equal one on the same devices. All others of the new plan are starts, all
others of the old one stops; a start and a stop of equal replicas are a move, paired so that it goes the least distance.
A stop waits until its LLM has another replica running, a start until its devices have room; where an order exists in
which no LLM is ever without a replica, that order is found, on free devices with a temporary replica if need be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, islice
from typing import Literal

from scepsy_optimizer.cluster import Cluster, same_devices
from scepsy_optimizer.move_order import (
    Device,
    Occupation,
    Step,
    Work,
    interrupted,
    order_steps,
    order_with_last,
    order_without,
)
from scepsy_optimizer.plan import LLMPlan, Plan, Slot, exact_fraction

# Slots looked at for one temporary replica, where each of them is in the way of something.
_MAX_SLOTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What two replicas must have in common to be equal: the model and every setting that an engine starts with."""

    llm: str
    model: str
    tensor_parallel_size: int
    fraction: Fraction
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    gpu_memory_utilization: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One step: start or stop a replica on a slot, and wait until it is ready or gone.

    A slot of a stop is named as in the old plan's cluster, one of a start as in the new one's. `partner` is, for the
    two steps of a move, the slot at the other end. `interrupts` marks a stop that leaves its LLM without any replica,
    `temporary` a replica that only serves between the others and is in neither plan.
    """

    action: Literal["start", "stop"]
    engine: Engine
    slot: Slot
    partner: Slot | None = None
    interrupts: bool = False
    temporary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """The steps in their order, and the replicas that stay, with their slots in the new plan."""

    steps: tuple[Move, ...]
    stay: tuple[tuple[Engine, Slot], ...]

    @property
    def restarts(self) -> int:
        """How many replicas have to be started."""
        return sum(step.action == "start" for step in self.steps)

    @property
    def interrupted(self) -> tuple[str, ...]:
        """LLMs that are for a while without any replica."""
        return tuple(sorted({step.engine.llm for step in self.steps if step.interrupts}))


def plan_moves(old: Plan, new: Plan) -> Moves:
    """The fewest restarts that turn the old plan into the new one, in an order that keeps every LLM served if one does.

    Devices of the two clusters are the same where `same_devices` says so. A temporary replica, one more restart, is
    added only where fewer LLMs are interrupted with it.
    """
    same = same_devices(old.cluster, new.cluster)
    at: dict[tuple[Engine, frozenset[Device]], list[Slot]] = defaultdict(list)
    for engine, slot in _replicas(old):
        at[engine, frozenset(same[device] for device in _devices(slot) if device in same)].append(slot)
    stay: list[tuple[Engine, Slot]] = []
    starts: list[tuple[Engine, Slot]] = []
    for engine, slot in _replicas(new):
        here = at[engine, _devices(slot)]
        if here:
            here.pop()
            stay.append((engine, slot))
        else:
            starts.append((engine, slot))
    stops = [(engine, slot) for (engine, _), slots in at.items() for slot in slots]
    leaving = [_occupation(engine, devices) for (engine, devices), slots in at.items() for _ in slots]
    coming = [_occupation(engine, _devices(slot)) for engine, slot in starts]
    staying = [_occupation(engine, _devices(slot)) for engine, slot in stay]
    steps = order_steps(leaving, coming, staying)
    steps, bridges = _bridged(steps, stops, (leaving, coming, staying), old.cluster, new.cluster)
    own = len(stops)
    stops += bridges
    moves = [Move(action="start", engine=engine, slot=slot, temporary=True) for engine, slot in bridges]
    goes, comes = _pairs(stops[:own], starts, old.cluster, new.cluster)
    for step in steps:
        engine, slot = (starts if step.start else stops)[step.index]
        moves.append(
            Move(
                action="start" if step.start else "stop",
                engine=engine,
                slot=slot,
                partner=(comes if step.start else goes).get(step.index),
                interrupts=step.interrupts,
                temporary=not step.start and step.index >= own,
            )
        )
    return Moves(steps=tuple(moves), stay=tuple(stay))


def engine_of(part: LLMPlan) -> Engine:
    """What the replicas of a group of a plan are."""
    return Engine(
        llm=part.llm,
        model=part.model,
        tensor_parallel_size=part.tensor_parallel_size,
        fraction=exact_fraction(part.fraction),
        max_num_seqs=part.max_num_seqs,
        max_num_batched_tokens=part.max_num_batched_tokens,
        max_model_len=part.max_model_len,
        gpu_memory_utilization=part.gpu_memory_utilization,
    )


def _replicas(plan: Plan) -> Iterator[tuple[Engine, Slot]]:
    for part in plan.llms:
        engine = engine_of(part)
        for slot in part.slots:
            yield engine, slot


def _devices(slot: Slot) -> frozenset[Device]:
    return frozenset((slot.node, device) for device in slot.devices)


def _occupation(engine: Engine, devices: frozenset[Device]) -> Occupation:
    return Occupation(llm=engine.llm, part=engine.fraction, devices=devices)


def _bridged(
    steps: list[Step],
    stops: Sequence[tuple[Engine, Slot]],
    occupations: tuple[Sequence[Occupation], Sequence[Occupation], Sequence[Occupation]],
    old: Cluster,
    new: Cluster,
) -> tuple[list[Step], list[tuple[Engine, Slot]]]:
    """An order that interrupts fewer LLMs than `steps`, where temporary replicas give one, and these replicas.

    Each is one more of the stops, after the own ones. One for each LLM is enough: it can end when the first new
    replica of its LLM runs, and whatever runs just before that has run from the beginning.
    """
    leaving, coming, staying = occupations
    type_of = {node.name: node.device_type for node in old.nodes}
    bridges: list[tuple[Engine, Slot]] = []
    running = list(leaving)
    tried: set[str] = set()
    work = Work()
    while lost := [
        stops[step.index]
        for step in steps
        if step.interrupts and step.index < len(stops) and stops[step.index][0].llm not in tried
    ]:
        engine, slot = lost[0]
        tried.add(engine.llm)
        now = len(interrupted(steps, running))
        best = steps
        for free in _free_slots(engine, type_of[slot.node], new, [*running, *staying], coming, staying):
            more = [*running, _occupation(engine, _devices(free))]
            found = order_with_last(steps, more, coming, staying, work)
            if found is not None and len(interrupted(found, more)) < now:
                now, best, chosen = len(interrupted(found, more)), found, free
            if now == 0:
                break
        if best is steps:
            continue
        steps = best
        running.append(_occupation(engine, _devices(chosen)))
        bridges.append((engine, chosen))
    # Later ones may do what earlier ones did, and one whose LLM is interrupted after all does nothing.
    index = len(bridges) - 1
    while index >= 0:
        rest = order_without(len(stops) + index, steps, running, coming, staying, work)
        if rest is None:
            index -= 1
        else:
            steps = rest
            del running[len(stops) + index], bridges[index]
            # The new order may interrupt others, and so need fewer of those that were looked at.
            index = len(bridges) - 1
    return steps, bridges


def _free_slots(
    engine: Engine,
    device_type: str,
    cluster: Cluster,
    running: Sequence[Occupation],
    coming: Sequence[Occupation],
    staying: Sequence[Occupation],
) -> list[Slot]:
    """Where one more such replica can start before anything stops and may keep its LLM served until another starts.

    The first new replica of its LLM has to fit beside it: one that ends before that leaves the LLM with replicas that
    have been there all the time. Where nothing is to start on a slot, it is the only one that is named.
    """
    used, kept = _used(running), _used(staying)
    awaited = {device for one in coming for device in one.devices}
    own = [one for one in coming if one.llm == engine.llm]
    costs: dict[Slot, int] = {}
    for node in cluster.nodes:
        for domain in node.nvlink_domains if node.device_type == device_type else ():
            open_ = [device for device in domain if used[node.name, device] + engine.fraction <= 1]
            open_.sort(key=lambda device: (node.name, device) in awaited)
            beside = {
                tuple(
                    device
                    for device in open_
                    if (node.name, device) not in one.devices
                    or kept[node.name, device] + engine.fraction + one.part <= 1
                ): None
                for one in own
            }
            for devices in beside:
                for chosen in islice(combinations(devices, engine.tensor_parallel_size), _MAX_SLOTS):
                    cost = sum((node.name, device) in awaited for device in chosen)
                    costs.setdefault(Slot(node=node.name, devices=tuple(sorted(chosen))), cost)
    slots = sorted(costs, key=lambda slot: costs[slot])[:_MAX_SLOTS]
    return slots[:1] if slots and costs[slots[0]] == 0 else slots


def _used(replicas: Sequence[Occupation]) -> dict[Device, Fraction]:
    used: dict[Device, Fraction] = defaultdict(Fraction)
    for one in replicas:
        for device in one.devices:
            used[device] += one.part
    return used


def _pairs(
    stops: Sequence[tuple[Engine, Slot]], starts: Sequence[tuple[Engine, Slot]], old: Cluster, new: Cluster
) -> tuple[dict[int, Slot], dict[int, Slot]]:
    """Of equal replicas that stop and start, which goes where: the slot at the other end, for stops and for starts.

    As many as possible within a node, then below a switch, then anywhere: in a tree that is the least total distance.
    """
    switch = {node.name: node.switch for cluster in (old, new) for node in cluster.nodes}
    goes: dict[int, Slot] = {}
    comes: dict[int, Slot] = {}
    for level in ("node", "switch", "network"):
        near: dict[tuple[Engine, str], list[int]] = defaultdict(list)

        def place(engine: Engine, slot: Slot, level: str = level) -> tuple[Engine, str]:
            return engine, {"node": slot.node, "switch": switch[slot.node] or slot.node}.get(level, "")

        for index, (engine, slot) in enumerate(stops):
            if index not in goes:
                near[place(engine, slot)].append(index)
        for index, (engine, slot) in enumerate(starts):
            here = near[place(engine, slot)]
            if index not in comes and here:
                other = here.pop(0)
                goes[other], comes[index] = slot, stops[other][1]
    return goes, comes


def describe_moves(moves: Moves) -> list[str]:
    """What would change, in words, one line for each step in its order."""
    return [_describe(move) for move in moves.steps]


def _describe(move: Move) -> str:
    llm, where = move.engine.llm, _place(move.engine, move.slot)
    if move.temporary:
        return f"{llm}: {move.action} a temporary replica on {where}"
    if move.partner is None:
        text = f"{llm}: {move.action} {_kind(move.engine)} on {where}"
    elif move.action == "start":
        text = f"{llm}: start {_kind(move.engine)} on {where}, moved from {_place(move.engine, move.partner)}"
    else:
        text = f"{llm}: stop {_kind(move.engine)} on {where}, moved to {_place(move.engine, move.partner)}"
    return f"{text} (interrupts {llm})" if move.interrupts else text


def _kind(engine: Engine) -> str:
    if engine.fraction < 1:
        return f"{float(engine.fraction):g} device"
    return f"tensor_parallel_size {engine.tensor_parallel_size}"


def _place(engine: Engine, slot: Slot) -> str:
    devices = ",".join(str(device) for device in slot.devices)
    return (
        f"{slot.node}: {devices}" if engine.fraction == 1 else f"{slot.node}: {float(engine.fraction):g} of {devices}"
    )
