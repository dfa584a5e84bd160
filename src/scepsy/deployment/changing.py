"""Carry a change out on what runs: step by step, and back again where a step fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from scepsy.deployment.change import EVENTS, PLAN, Change, Step, read_change
from scepsy.deployment.fleet import Endpoint, Fleet
from scepsy.deployment.shimmed import StartError
from scepsy.deployment.state import ORDER, order_bytes, replace_files
from scepsy_optimizer.errors import ScepsyError

_AGAIN_S: Final = 1.0


class _Lines:
    """A file of JSON lines that somebody follows. On a full disk nothing of a line stays."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be made."""
        self._file = path.open("wb", buffering=0)

    def add(self, **fields: object) -> None:
        """Raises OSError where the line cannot be written whole."""
        begin = self._file.tell()
        line = json.dumps(fields).encode() + b"\n"
        written = 0
        with contextlib.suppress(OSError):
            written = self._file.write(line)
        if written != len(line):
            self._file.seek(begin)
            self._file.truncate()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def end(self, **fields: object) -> None:
        """Write the last line, however long that takes: whoever follows waits for it."""
        while True:
            try:
                self.add(**fields)
            except OSError:
                await asyncio.sleep(_AGAIN_S)
            else:
                return

    def close(self) -> None:
        """No more lines."""
        self._file.close()


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

    def tell(event: str) -> None:
        with contextlib.suppress(OSError):
            lines.add(event=event)
        on_event(event)

    with contextlib.closing(_Lines(folder / EVENTS)) as lines:
        try:
            change = read_change(folder)
            failure = await _try(change, directory, folder, fleet, endpoint, tell, start_mps)
        except BaseException:
            with contextlib.suppress(OSError):
                lines.add(error="the change broke off: the deployment is ending, or has failed; see its controller.log")
            raise
        if failure:
            await lines.end(error=failure)
            return None
        await lines.end(done=True)
        return change


async def _try(
    change: Change,
    directory: Path,
    folder: Path,
    fleet: Fleet,
    endpoint: Endpoint,
    tell: Callable[[str], None],
    start_mps: Callable[[str], Awaitable[None]],
) -> str:
    """Why it was undone; empty where it is done."""
    done: list[Step] = []
    try:
        if change.after.mps_directory is not None:
            await start_mps(change.after.mps_directory)
        for step in change.steps:
            tell(step.text)
            if step.action == "start":
                await fleet.add(step.spec, endpoint)
            else:
                await fleet.retire(step.spec.id, endpoint, change.drain_s)
            done.append(step)
        # Plan and order of what runs now: what cannot be written down is not to be, or the next change goes wrong.
        contents = {directory / PLAN: (folder / PLAN).read_bytes(), directory / ORDER: order_bytes(change.after)}
        replace_files(contents)
    except Exception as error:  # noqa: BLE001 - whatever it is, what ran before is to run
        reason = str(error) if isinstance(error, (StartError, ScepsyError, OSError)) else repr(error)
        tell(f"{reason.splitlines()[0]}; going back")
        lost = [step.spec.id for step in reversed(done) if not await _undo(step, fleet, endpoint, tell, change.drain_s)]
        again = f"; of it {', '.join(lost)} did not start again yet and is tried further" if lost else ""
        return f"the change was undone, the old plan runs again{again}. It failed because {reason}"
    for spec in change.after.specs:
        fleet.rename(spec)
        fleet.revive(spec.id)
    return ""


async def _undo(step: Step, fleet: Fleet, endpoint: Endpoint, tell: Callable[[str], None], drain_s: float) -> bool:
    """Whether what was before is again."""
    if step.action == "start":
        tell(f"{step.spec.id}: stopped again")
        await fleet.retire(step.spec.id, endpoint, drain_s)
        return True
    tell(f"{step.spec.id}: started again")
    try:
        await fleet.add(step.spec, endpoint)
    except StartError as error:
        reason = str(error).splitlines()[0]
        tell(reason)
        fleet.add_broken(step.spec, endpoint, reason)
        return False
    return True
