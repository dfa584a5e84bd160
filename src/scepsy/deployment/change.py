"""From the plan that runs to another one: which replicas start and stop, in which order, and what then runs.

The starter works a change out and leaves it in the deployment's folder, in a folder of its own; the controller, told by
a signal, carries it out and writes there what happens, line by line, the last one saying how it ended. Nothing of this
goes through the endpoint: whoever may call models must not be able to end them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter

from scepsy.deployment.specs import ReplicaSpec
from scepsy.deployment.state import Order, replace_files
from scepsy_optimizer.cluster import same_devices
from scepsy_optimizer.moves import Move, describe_moves, engine_of, plan_moves
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

CHANGES: Final = "changes"
"""The folder of changes in a deployment's folder; each has one of its number there."""

EVENTS: Final = "events.jsonl"
PLAN: Final = "plan.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Start that replica, or stop it; `text` says so to people."""

    action: Literal["start", "stop"]
    spec: ReplicaSpec
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Steps in their order, and the order (what runs) that they lead to.

    A replica that stops may take `drain_s` to end what it answers. `mps_directory` is where an MPS daemon is to be
    started first, if there is none yet and one is needed.
    """

    steps: tuple[Step, ...]
    after: Order
    drain_s: float


_CHANGE = TypeAdapter(Change)


def make_change(
    old: Plan,
    new: Plan,
    order: Order,
    spec_of: Callable[[Plan], ReplicaSpec],
    *,
    drain_s: float,
) -> Change:
    """What turns the order of the old plan, which runs, into one of the new plan.

    `spec_of` makes the replica of a plan that has only one. Raises ScepsyError where it does.
    """
    moves = plan_moves(old, new)
    same = same_devices(old.cluster, new.cluster)
    starting = [step for step in moves.steps if step.action == "start"]
    types = {node.name: node.device_type for node in new.cluster.nodes}
    taken = {spec.id for spec in order.specs}
    started: list[ReplicaSpec] = []
    for step in starting:
        # One by one: a temporary replica may be one of a group of the new plan.
        made = spec_of(replace(new, llms=(_part_of(step, old if step.temporary else new, types),)))
        started.append(replace(made, id=_free_id(made, taken)))
        taken.add(started[-1].id)
    running = list(order.specs)
    stays = []
    for engine, slot in moves.stay:
        here = _taken(running, engine.llm, float(engine.fraction), slot, lambda place: same.get(place, place))
        weight = next(part.replica_weight for part in new.llms if part.llm == engine.llm and slot in part.slots)
        stays.append(replace(here, node=slot.node, devices=slot.devices, weight=weight))
    steps = []
    bridges: list[ReplicaSpec] = []
    coming = iter(started)
    for move, text in zip(moves.steps, describe_moves(moves), strict=True):
        if move.action == "start":
            spec = next(coming)
            if move.temporary:
                bridges.append(spec)
        else:
            spec = _taken(
                bridges if move.temporary else running, move.engine.llm, float(move.engine.fraction), move.slot
            )
        steps.append(Step(action=move.action, spec=spec, text=text))
    kept = [spec for spec, move in zip(started, starting, strict=True) if not move.temporary]
    places = [(part.llm, slot.node, slot.devices) for part in new.llms for slot in part.slots]
    runs = sorted((*stays, *kept), key=lambda spec: places.index((spec.llm, spec.node, spec.devices)))
    return Change(steps=tuple(steps), after=replace(order, specs=tuple(runs)), drain_s=drain_s)


def _part_of(move: Move, plan: Plan, types: Mapping[str, str]) -> LLMPlan:
    """The group that a move's replica is one of, with only that replica; `types` are of the nodes' devices.

    Groups of one LLM on several types of devices may start equal engines, which do not carry the same.
    """
    device_type = types[move.slot.node]
    for part in plan.llms:
        if engine_of(part) == move.engine and part.device_type in ("", device_type):
            return replace(part, replicas=1, slots=(move.slot,))
    raise AssertionError(f"{move}: of no group of its plan")


def _taken(
    specs: list[ReplicaSpec],
    llm: str,
    fraction: float,
    slot: Slot,
    same: Callable[[tuple[str, int]], tuple[str, int]] = lambda place: place,
) -> ReplicaSpec:
    """The replica of an LLM on those devices, taken from the list."""
    wanted = {(slot.node, device) for device in slot.devices}
    for index, spec in enumerate(specs):
        here = {same((spec.node, device)) for device in spec.devices}
        if spec.llm == llm and here == wanted and abs(spec.fraction - fraction) < 1e-3:
            return specs.pop(index)
    raise AssertionError(f"no replica of {llm!r} runs on {slot}")


def _free_id(spec: ReplicaSpec, taken: Iterable[str]) -> str:
    """Its id with the least number that is free: logs and headers of a replica keep their name."""
    word = re.sub(r"-\d+$", "", spec.id)
    used = set(taken)
    return next(name for number in range(len(used) + 1) if (name := f"{word}-{number}") not in used)


def new_folder(directory: Path) -> Path:
    """A folder for the next change of the deployment in `directory`."""
    changes = directory / CHANGES
    changes.mkdir(exist_ok=True)
    number = 1 + max((int(path.name) for path in changes.iterdir() if path.name.isdigit()), default=0)
    folder = changes / str(number)
    folder.mkdir()
    return folder


def waiting(directory: Path) -> Sequence[Path]:
    """Folders of changes that nobody has begun to carry out, oldest first."""
    found = sorted((directory / CHANGES).glob("*/change.json"), key=lambda path: int(path.parent.name))
    return [path.parent for path in found if not (path.parent / EVENTS).exists()]


def unfinished(directory: Path) -> bool:
    """Whether a change was asked for that has not ended yet."""
    return any(not _has_ended(path.parent / EVENTS) for path in (directory / CHANGES).glob("*/change.json"))


def _has_ended(events: Path) -> bool:
    try:
        lines = events.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False
    return bool(lines) and not lines[-1].startswith('{"event"')


def write_change(folder: Path, change: Change) -> None:
    """Leave it where the controller finds it, as a whole."""
    replace_files({folder / "change.json": _CHANGE.dump_json(change)})


def read_change(folder: Path) -> Change:
    """The change of that folder."""
    return _CHANGE.validate_json((folder / "change.json").read_bytes())
