"""Carry a change out on what runs: step by step, and back again where a step fails."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from scepsy.deployment.change import EVENTS, PLAN, Change, Step, read_change
from scepsy.deployment.fleet import Endpoint, Fleet
from scepsy.deployment.shimmed import StartError
from scepsy.deployment.state import write_order
from scepsy_optimizer.errors import ScepsyError


class Tell(Protocol):
    """Writes one line about a change: an event, an error that ended it, or that it is done."""

    def __call__(self, **fields: object) -> None:
        """Write it so that the one who asked for the change reads it."""


async def carry_out(
    directory: Path,
    folder: Path,
    fleet: Fleet,
    endpoint: Endpoint,
    *,
    start_mps: Callable[[str], Awaitable[None]],
    on_event: Callable[[str], None],
) -> Change | None:
    """Do what the change in `folder` says and note what then runs in `directory`; None where the old plan runs again.

    Whatever happens, the last line that is written says how it ended.
    """
    with (folder / EVENTS).open("w", encoding="utf-8") as lines:
        is_told = False

        def tell(**fields: object) -> None:
            nonlocal is_told
            is_told = "event" not in fields
            lines.write(json.dumps(fields) + "\n")
            lines.flush()
            if not is_told:
                on_event(str(fields["event"]))

        try:
            change = read_change(folder)
            is_done = await _try(change, fleet, endpoint, tell, start_mps)
            if is_done:
                for spec in change.after.specs:
                    fleet.rename(spec)
                _keep(directory, folder, change)
                tell(done=True)
            return change if is_done else None
        finally:
            if not is_told:
                tell(error="the change broke off: the deployment is ending, or has failed; see its controller.log")


async def _try(
    change: Change, fleet: Fleet, endpoint: Endpoint, tell: Tell, start_mps: Callable[[str], Awaitable[None]]
) -> bool:
    done: list[Step] = []
    try:
        if change.after.mps_directory is not None:
            await start_mps(change.after.mps_directory)
        for step in change.steps:
            tell(event=step.text)
            if step.action == "start":
                await fleet.add(step.spec, endpoint)
            else:
                await fleet.retire(step.spec.id, endpoint, change.drain_s)
            done.append(step)
    except (StartError, ScepsyError) as error:
        tell(event=f"{str(error).splitlines()[0]}; going back")
        lost = [step.spec.id for step in reversed(done) if not await _undo(step, fleet, endpoint, tell, change.drain_s)]
        again = f"; of it {', '.join(lost)} did not start again yet and is tried further" if lost else ""
        tell(error=f"the change was undone, the old plan runs again{again}. It failed because {error}")
        return False
    return True


async def _undo(step: Step, fleet: Fleet, endpoint: Endpoint, tell: Tell, drain_s: float) -> bool:
    """Whether what was before is again."""
    if step.action == "start":
        tell(event=f"{step.spec.id}: stopped again")
        await fleet.retire(step.spec.id, endpoint, drain_s)
        return True
    tell(event=f"{step.spec.id}: started again")
    try:
        await fleet.add(step.spec, endpoint)
    except StartError as error:
        reason = str(error).splitlines()[0]
        tell(event=reason)
        fleet.add_broken(step.spec, endpoint, reason)
        return False
    return True


def _keep(directory: Path, folder: Path, change: Change) -> None:
    """Plan and order of what runs now, each replaced as a whole."""
    write_order(directory, change.after)
    part = directory / f"{PLAN}.part"
    part.write_bytes((folder / PLAN).read_bytes())
    part.replace(directory / PLAN)
