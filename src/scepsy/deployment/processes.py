"""Processes that must be recognised later, by another process, and never confused with others."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from scepsy.deployment.shim import is_resource_tracker, signal_tree
from scepsy.deployment.specs import LOOPBACK
from scepsy_optimizer.errors import ScepsyError

_POLL_S = 0.02
_REST_S = 5.0
_TRACKER_S = 2.0
# Below the range from which Linux gives ports to outgoing connections.
_PORTS = range(18000, 32000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A process: its id, and when it started in ticks since the machine's boot, which together are unique."""

    pid: int
    ticks: int

    @property
    def alive(self) -> bool:
        """Whether it is still there, and not a zombie."""
        found = _stat(self.pid)
        return found is not None and found[0] == self.ticks and found[1] != "Z"


def identify(pid: int) -> Identity:
    """The identity of a running process. Raises ProcessLookupError if there is none."""
    found = _stat(pid)
    if found is None:
        raise ProcessLookupError(pid)
    return Identity(pid=pid, ticks=found[0])


def boot_id() -> str:
    """Identifies this boot of the machine: identities of processes mean nothing in another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def end(identity: Identity, grace_s: float) -> None:
    """Terminate a process, kill it after the grace, and wait until it is gone."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        if not identity.alive:
            return
        try:
            os.kill(identity.pid, number)
        except ProcessLookupError:
            return
        wait_gone(identity, wait_s)


def wait_gone(identity: Identity, timeout_s: float) -> bool:
    """Wait until a process is gone; False if it is still there after the time."""
    deadline = time.monotonic() + timeout_s
    while identity.alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def end_rest(leader: Identity | None, scratch: str) -> None:
    """Kill whatever is left of the session that a process led, the leader being dead or not, and of those that have
    left it: they were given the folder `scratch` for temporary files, and nobody else was."""
    mark = f"TMPDIR={scratch}\0".encode()
    begun = time.monotonic()
    while (passed_s := time.monotonic() - begun) < _REST_S:
        left = [pid for pid in _pids() if (leader and _belongs(pid, leader)) or _has_in_environment(pid, mark)]
        # Python's resource trackers end by themselves once all others have, and remove their shared memory.
        others = [pid for pid in left if passed_s > _TRACKER_S or not is_resource_tracker(pid)]
        if not left:
            return
        signal_tree(others, signal.SIGKILL)
        time.sleep(_POLL_S)


def _has_in_environment(pid: int, mark: bytes) -> bool:
    try:
        if mark not in Path(f"/proc/{pid}/environ").read_bytes():
            return False
    except OSError:
        return False
    found = _stat(pid)
    return found is not None and found[1] != "Z"


def _belongs(pid: int, leader: Identity) -> bool:
    try:
        if os.getsid(pid) != leader.pid:
            return False
    except (ProcessLookupError, PermissionError):
        return False
    # A new leader under the old number means that the old session is gone.
    present = _stat(leader.pid)
    found = _stat(pid)
    return (present is None or present[0] == leader.ticks) and found is not None and found[1] != "Z"


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> tuple[int, str] | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return int(fields[19]), fields[0]


def port_is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether the port can be bound now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now. Raises ScepsyError if there are not so many."""
    found: list[int] = []
    # Not secret: only spread, so that deployments started together seldom meet.
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(found) == count:
            return found
        if port_is_free(port):
            found.append(port)
    raise ScepsyError(f"{count} free ports are needed from {_PORTS.start} to {_PORTS.stop - 1}; there are {len(found)}")
