"""What this machine has: GPUs, MPS, cores. Checked before anything is started."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from scepsy.discovery.products import device_type_of
from scepsy.discovery.visible import left_visible
from scepsy_optimizer.cluster import Node
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan

_ANSWER_S: Final = 60
_MPS_CONTROL = "nvidia-cuda-mps-control"
_DEFAULT_MPS_DIRECTORY = "/tmp/nvidia-mps"  # noqa: S108 - NVIDIA's default, the same on every machine
_PCI: Final = Path("/sys/bus/pci/devices")
_LISTED_GPU: Final = re.compile(r"GPU (\d+): (.+) \(UUID: (GPU-\S+)\)")
_LISTED_MIG: Final = re.compile(r"\s+(MIG \S+)\s.*\(UUID: (MIG-\S+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU of this machine, or a MIG instance; `cores` are those on its side of the machine, empty where all are."""

    uuid: str
    name: str
    cores: tuple[int, ...] = ()


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def find_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in their order; those of CUDA_VISIBLE_DEVICES if it is set.

    A GPU in MIG mode stands for its instances. Raises ScepsyError where NVIDIA's driver does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise ScepsyError(
            "engine 'vllm' needs NVIDIA GPUs, but this machine has no nvidia-smi; "
            "without GPUs use engine 'vllm-cpu' or 'emulator'"
        )
    buses = _asked(tool, "--query-gpu=uuid,pci.bus_id", "--format=csv,noheader")
    beside = {uuid.strip(): _cores_beside(bus.strip()) for uuid, _, bus in (one.partition(",") for one in buses)}
    index, whole = "", Gpu(uuid="", name="")
    found: dict[Gpu, tuple[str, ...]] = {}
    for line in _asked(tool, "-L"):
        if gpu := _LISTED_GPU.match(line):
            index, whole = gpu[1], Gpu(uuid=gpu[3], name=gpu[2], cores=beside.get(gpu[3], ()))
            found[whole] = (index, whole.uuid)
        elif mig := _LISTED_MIG.match(line):
            found.pop(whole, None)
            found[replace(whole, uuid=mig[2], name=f"{whole.name} {mig[1]}")] = (index, whole.uuid, mig[2])
    gpus = list(found)
    return [gpus[number] for number in left_visible(list(found.values()))]


def _asked(tool: str, *words: str) -> list[str]:
    try:
        shown = subprocess.run([tool, *words], capture_output=True, text=True, check=False, timeout=_ANSWER_S)
    except subprocess.TimeoutExpired:
        raise ScepsyError(f"nvidia-smi does not answer within {_ANSWER_S} s: the driver hangs; see dmesg") from None
    except OSError as error:
        raise ScepsyError(f"{tool}: cannot be run ({error.strerror})") from error
    if shown.returncode != 0:
        said = (shown.stderr or shown.stdout).strip() or f"exit code {shown.returncode}"
        raise ScepsyError(f"engine 'vllm' needs NVIDIA GPUs, but nvidia-smi says: {said}")
    return shown.stdout.splitlines()


def _cores_beside(bus: str) -> tuple[int, ...]:
    """The cores of a PCI device's socket that this process may use; empty where it may use no others, or none."""
    try:
        # The driver writes the domain in eight digits, the kernel in four.
        text = (_PCI / bus.lower()[-12:] / "local_cpulist").read_text(encoding="ascii")
    except OSError:
        return ()
    local: set[int] = set()
    for piece in text.strip().split(","):
        first, _, last = piece.partition("-")
        local.update(range(int(first), int(last or first) + 1) if first else ())
    mine = set(cores())
    return tuple(sorted(local & mine)) if not mine <= local else ()


def check_gpus(plan: Plan, gpus: list[Gpu]) -> list[str]:
    """Raises ScepsyError if a device of the plan is not here; returns what is odd but may be meant."""
    return [remark for node in plan.cluster.nodes for remark in _check_node(plan, node, gpus)]


def _check_node(plan: Plan, node: Node, gpus: list[Gpu]) -> list[str]:
    here = {gpu.uuid: gpu for gpu in gpus}
    slots = [slot for part in plan.llms for slot in part.slots if slot.node == node.name]
    used = sorted({device for slot in slots for device in slot.devices})
    if node.uuids:
        missing = [node.uuids[device] for device in used if node.uuids[device] not in here]
        if missing:
            raise ScepsyError(f"the plan uses GPUs that this machine does not have: {', '.join(missing)}")
        chosen = [here[node.uuids[device]] for device in used]
    else:
        missing = [str(device) for device in used if device >= len(gpus)]
        if missing:
            raise ScepsyError(
                f"the plan uses GPUs {', '.join(missing)} of {node.devices}, but this machine has {len(gpus)}; "
                f"plan for --cluster {len(gpus)}x{node.device_type}"
            )
        chosen = [gpus[device] for device in used]
    # A type may end with a memory that the product's name does not tell.
    others = sorted(
        {gpu.name for gpu in chosen if not f"{node.device_type}_".startswith(f"{device_type_of(gpu.name)}_")}
    )
    return [f"the plan is for {node.device_type}, this machine has {', '.join(others)}"] if others else []


def running_mps() -> str | None:
    """The pipe directory of an MPS daemon that already runs for this user; None if none does."""
    directory = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", _DEFAULT_MPS_DIRECTORY)
    return directory if (Path(directory) / "control").exists() else None


def mps_command() -> list[str]:
    """How to start an MPS daemon in the foreground. Raises ScepsyError if NVIDIA's tool is not installed."""
    tool = shutil.which(_MPS_CONTROL)
    if tool is None:
        raise ScepsyError(
            f"the plan gives LLMs a fraction of a GPU, which needs NVIDIA MPS, but there is no {_MPS_CONTROL}; "
            "install the driver's tools, or plan with whole devices"
        )
    return [tool, "-f"]
