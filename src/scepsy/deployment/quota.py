"""A fraction of a CPU core for one process: a quota of the kernel's fair scheduler, hard and linear.

The counterpart on a CPU of a share of a GPU under MPS.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from scepsy_optimizer.errors import ScepsyError

_PERIOD_US = 20_000
_ROOT = Path("/sys/fs/cgroup")


def check_quota() -> None:
    """Raises ScepsyError where this process may not limit others."""
    name = "scepsy-check"
    try:
        _create(name, 1.0)
    except OSError as error:
        raise ScepsyError(
            "a fraction of a CPU device needs a cgroup whose cpu controller this user may write "
            f"({error.strerror}: {error.filename}); run as root on the host, or plan with whole devices"
        ) from error
    release(name)


def limit(name: str, pid: int, part: float) -> None:
    """Let a process use that part of one core. The limit is known by `name` until it is released.

    Raises OSError.
    """
    group = _create(name, part)
    (group / "cgroup.procs").write_text(str(pid), encoding="ascii")


def release(name: str) -> None:
    """Forget a limit; its processes must have ended. An unknown one is ignored."""
    with contextlib.suppress(OSError):
        (_parent()[0] / name).rmdir()


def release_unused() -> None:
    """Forget the limits that a killed deployer has left: those without a process."""
    try:
        left = list(_parent()[0].glob("scepsy-*"))
    except OSError:
        return
    for group in left:
        with contextlib.suppress(OSError):  # the kernel refuses where a process is left
            group.rmdir()


def _create(name: str, part: float) -> Path:
    parent, version = _parent()
    quota = str(max(1000, int(part * _PERIOD_US)))
    group = parent / name
    group.mkdir(exist_ok=True)
    # The weight is for a core that others want as well: all fractions of it then lose as large a part of theirs.
    if version == 1:
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US), encoding="ascii")
        (group / "cpu.cfs_quota_us").write_text(quota, encoding="ascii")
        (group / "cpu.shares").write_text(str(max(2, round(1024 * part))), encoding="ascii")
    else:
        # It exists only where the parent passes its cpu controller on: the error names it.
        (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}", encoding="ascii")
        (group / "cpu.weight").write_text(str(max(1, round(100 * part))), encoding="ascii")
    return group


def _parent() -> tuple[Path, int]:
    """Where limits are made, and the version of its interface.

    In version 1 below this process's own group; in version 2, whose groups hold either processes or groups, beside it.
    """
    own = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    for controllers, path in own.items():
        if "cpu" in controllers.split(","):
            return _ROOT / "cpu" / path, 1
    group = _ROOT / own.get("", "")
    return (group if group == _ROOT else group.parent), 2
