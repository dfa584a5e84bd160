"""Who holds a deployment's name, and what is left of one that has ended unasked."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from scepsy.deployment import processes, quota, state
from scepsy_optimizer.errors import ScepsyError

_ENDING_S: Final = 10.0
_POLL_S: Final = 0.05


def sweep(directory: Path) -> bool:
    """End what a dead controller has left; False if there is no dead controller."""
    note = state.read_state(directory)
    if note is None:
        return False
    if note.boot == processes.boot_id():
        if note.controller.alive:
            return False
        for kept in note.kept:
            state.end_kept(kept)
        quota.release_unused()
        with contextlib.suppress(FileNotFoundError):
            mps_directory = state.read_order(directory).mps_directory
            if mps_directory is not None:
                shutil.rmtree(mps_directory)
    # Meanwhile somebody may have started another under that name.
    if state.read_state(directory) == note:
        state.forget(directory)
    return True


@contextlib.contextmanager
def claim(name: str, directory: Path) -> Iterator[IO[bytes]]:
    """Hold the name: the lock passes on to the controller, and is free when that has ended.

    Raises ScepsyError where it is held, or where what the block writes cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("wb")
    except OSError as error:
        raise ScepsyError(f"{directory}: cannot be written ({error.strerror}); set SCEPSY_HOME") from error
    with lock:
        begun_s = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # The threads of a killed controller hold the lock a moment longer than it lives.
                note = state.read_state(directory)
                is_ending = note is not None and not note.controller.alive
                if not is_ending or time.monotonic() - begun_s > _ENDING_S:
                    raise ScepsyError(
                        f"a deployment {name!r} is running; end it with `scepsy stop {name}` or give another name "
                        "(--name)"
                    ) from None
                time.sleep(_POLL_S)
        sweep(directory)
        try:
            yield lock
        except OSError as error:
            raise ScepsyError(f"deployment {name!r} cannot be started from {directory}: {error}") from error
