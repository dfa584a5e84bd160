"""Keeps one engine: starts it, and leaves nothing of it behind, however it or the deployer ends.

Run as a file by a bare interpreter (`python -I -S shim.py GRACE_S LOG SCRATCH COMMAND...`), so only the standard
library is imported. The shim is a session of its own and the subreaper of all that the engine starts; its standard
input is the death pipe: at its end the engine's tree is terminated, and killed after the grace. It prints the engine's
process id, and ends with the engine's exit code (128 + n for signal n) once the tree is gone and the scratch folder is
removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_GRACE_S = 5.0  # for the rest of a tree whose engine has ended by itself
POLL_S = 0.02

_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> int:
    """Run the command to its end; returns its exit code."""
    grace_s, log, scratch, command = float(argv[0]), argv[1], argv[2], argv[3:]
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: told.append(number))
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    raise_file_limit()
    try:
        child = start(command, log)
        if child is None:
            return 127
        os.write(1, f"{child}\n".encode())
        os.close(1)
        poller = select.poll()
        poller.register(0, select.POLLIN | select.POLLHUP)
        poller.register(wake_read, select.POLLIN)
        code = None
        while not told and code is None:
            ready = {fd for fd, _ in poller.poll()}
            if 0 in ready and not os.read(0, 1024):
                told.append(0)
            if wake_read in ready:
                os.read(wake_read, 1024)
            code = reap(child)
        if told and code is None:
            signal_tree([child], signal.SIGTERM)
        ended = end_tree(child, grace_s if told else ORPHAN_GRACE_S)
        return code if code is not None else ended
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def start(command: list[str], log: str) -> int | None:
    """Start the engine in a session of its own; its output goes to the log. None if it cannot be started."""

    def die_with_the_shim() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    with open_log(log) as output:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Only what the shim was told to pass on is inheritable.
                close_fds=False,
                preexec_fn=die_with_the_shim,
            )
        except OSError as error:
            with contextlib.suppress(OSError):
                output.write(f"cannot start {command[0]}: {error.strerror}\n".encode())
            return None
    # The shim reaps by itself, adopted processes too.
    child.returncode = 0
    return child.pid


def open_log(log: str) -> BinaryIO:
    """The log to add to, or nothing where it cannot be written: serving does not depend on it."""
    try:
        return Path(log).open("ab", buffering=0)
    except OSError:
        return Path(os.devnull).open("ab", buffering=0)


def reap(child: int) -> int | None:
    """Collect whatever has ended; returns the exit code of `child` if it is among it."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code


def end_tree(child: int, grace_s: float) -> int:
    """Wait for the whole tree, kill what is left after the grace; returns the exit code of `child` if it is seen."""
    code = 0
    deadline = time.monotonic() + grace_s
    killed = False
    while tree := descendants():
        if time.monotonic() > deadline:
            # Python's resource trackers end by themselves once all others have, and remove their shared memory.
            others = [pid for pid in tree if killed or not is_resource_tracker(pid)]
            signal_tree(others, signal.SIGKILL)
            if len(others) < len(tree):
                killed, deadline = True, time.monotonic() + 2.0
        elif child not in tree and not killed:
            signal_tree([pid for pid in tree if not is_resource_tracker(pid)], signal.SIGTERM)
        time.sleep(POLL_S)
        found = reap(child)
        code = found if found is not None else code
    return code


def descendants() -> list[int]:
    """Every process below this one: as its subreaper, nothing that the engine started can be elsewhere."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - once every 20 ms while ending: names suffice
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        parent = int(stat[stat.rindex(b")") + 2 :].split()[1])
        children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def is_resource_tracker(pid: int) -> bool:
    """Whether it is a process of Python's that removes leaked shared memory."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def signal_tree(pids: list[int], number: int) -> None:
    """Send a signal to each that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue  # it has ended, or has become another user's


def raise_file_limit() -> None:
    """vLLM opens a connection per request; the usual soft limit is too low for that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
