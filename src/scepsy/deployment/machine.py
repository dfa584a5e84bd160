"""What this machine has: GPUs, MPS, cores. Checked before anything is started."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan

_MPS_CONTROL = "nvidia-cuda-mps-control"
_DEFAULT_MPS_DIRECTORY = "/tmp/nvidia-mps"  # noqa: S108 - NVIDIA's default, the same on every machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU of this machine."""

    uuid: str
    name: str


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def find_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in their order; those of CUDA_VISIBLE_DEVICES if it is set.

    Raises ScepsyError where NVIDIA's driver does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise ScepsyError(
            "engine 'vllm' needs NVIDIA GPUs, but this machine has no nvidia-smi; "
            "without GPUs use engine 'vllm-cpu' or 'emulator'"
        )
    query = [tool, "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    shown = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    if shown.returncode != 0:
        said = (shown.stderr or shown.stdout).strip() or f"exit code {shown.returncode}"
        raise ScepsyError(f"engine 'vllm' needs NVIDIA GPUs, but nvidia-smi says: {said}")
    found = {}
    for line in shown.stdout.splitlines():
        index, uuid, name = (field.strip() for field in line.split(",", 2))
        found[index] = found[uuid] = Gpu(uuid=uuid, name=name)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = [key for key in found if key.isdigit()] if visible is None else [key.strip() for key in visible.split(",")]
    return [found[key] for key in wanted if key in found]


def check_gpus(plan: Plan, gpus: list[Gpu]) -> list[str]:
    """Raises ScepsyError if a device of the plan is not here; returns what is odd but may be meant."""
    node = plan.cluster.nodes[0]
    here = {gpu.uuid: gpu for gpu in gpus}
    used = sorted({device for part in plan.llms for slot in part.slots for device in slot.devices})
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
    others = sorted({gpu.name for gpu in chosen if node.device_type.lower() not in gpu.name.lower()})
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
