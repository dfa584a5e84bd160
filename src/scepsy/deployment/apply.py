"""Ask a running deployment for another plan, and follow what it does about it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from scepsy.deployment.change import EVENTS, PLAN, Change, make_change, new_folder, unfinished, write_change
from scepsy.deployment.prepare import prepare
from scepsy.deployment.processes import Identity
from scepsy.deployment.specs import ReplicaSpec
from scepsy.deployment.state import read_order
from scepsy.files import load_plan, save_plan
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.placement import require_placed
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import Profiles

_POLL_S: Final = 0.05
_ASK_AGAIN_S: Final = 1.0


def apply(
    directory: Path,
    controller: Identity,
    plan: Plan,
    profiles: Profiles,
    drain_s: float,
    on_event: Callable[[str], None],
) -> None:
    """Have the deployment in that folder run this plan; returns when it does. Raises ScepsyError, see `Deployment`."""
    require_placed(plan)
    with _alone(directory):
        folder = new_folder(directory)
        order = read_order(directory)
        made = 0

        def spec_of(single: Plan) -> ReplicaSpec:
            nonlocal made, order
            made += 1
            (spec,), mps_directory = prepare(
                single,
                order.engine,
                profiles=profiles,
                directory=folder / str(made),
                command=order.command,
                engine_args=order.engine_args,
                seed=order.seed,
                on_event=on_event,
                mps_directory=order.mps_directory,
                kv_cache_bytes=order.kv_cache_bytes,
                otlp_endpoint=order.otlp_endpoint,
            )
            # The first one that needs a daemon has it started, for all of them.
            order = replace(order, mps_directory=order.mps_directory or mps_directory)
            return spec

        change = make_change(load_plan(directory / PLAN), plan, order, spec_of, drain_s=drain_s)
        change = replace(change, after=replace(change.after, mps_directory=order.mps_directory))
        try:
            save_plan(plan, folder / PLAN)
            write_change(folder, change)
        except OSError as error:
            raise ScepsyError(
                f"{folder}: the change cannot be written down ({error.strerror}); nothing changed"
            ) from error
        on_event(_summary(change))
        _follow(folder, controller, on_event)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One change at a time: the one who asks holds a lock, and one who was killed leaves a change without an end."""
    with (directory / "change.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(directory) from None
        if unfinished(directory):
            raise _busy(directory)
        yield


def _busy(directory: Path) -> ScepsyError:
    return ScepsyError(f"deployment {directory.name!r} is being changed already; wait until that is done")


def _summary(change: Change) -> str:
    started = {step.spec.id for step in change.steps if step.action == "start"}
    stays = sum(spec.id not in started for spec in change.after.specs)
    return f"{stays} replicas stay, {len(started)} start, {len(change.steps) - len(started)} stop"


def _follow(folder: Path, controller: Identity, on_event: Callable[[str], None]) -> None:
    """Pass on what the controller writes until it says how the change ended. Raises ScepsyError where it failed."""
    read = 0
    asked_s = 0.0
    while True:
        alive = controller.alive
        try:
            text = (folder / EVENTS).read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
            if alive and time.monotonic() - asked_s > _ASK_AGAIN_S:
                # Asked again until it has begun: a signal that comes while it ends another change may be overlooked.
                asked_s = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(controller.pid, signal.SIGUSR1)
        whole = text[: text.rfind("\n") + 1]
        for line in whole[read:].splitlines():
            fields = json.loads(line)
            if "error" in fields:
                raise ScepsyError(fields["error"])
            if "done" in fields:
                return
            on_event(fields["event"])
        read = len(whole)
        if not alive:
            raise ScepsyError(f"the deployment ended while it was being changed; see {folder.parents[1] / 'logs'}")
        time.sleep(_POLL_S)
