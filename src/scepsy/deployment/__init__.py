"""A plan becomes running engines behind one OpenAI-compatible endpoint.

`deploy(plan)` starts every replica under a shim that leaves nothing behind, and a gateway that routes by model name to
the least loaded replica. `find`, `stop` and `list_deployments` work from any process.

Names are loaded on first use: the processes of a deployment need few of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scepsy.deployment.lifecycle import Deployment, ReplicaStatus, Status, deploy, find, list_deployments, stop
    from scepsy.deployment.specs import ReplicaSpec, emulator_specs, vllm_cpu_specs, vllm_specs

_HOMES = {
    "Deployment": "lifecycle",
    "ReplicaSpec": "specs",
    "ReplicaStatus": "lifecycle",
    "Status": "lifecycle",
    "deploy": "lifecycle",
    "emulator_specs": "specs",
    "find": "lifecycle",
    "list_deployments": "lifecycle",
    "stop": "lifecycle",
    "vllm_cpu_specs": "specs",
    "vllm_specs": "specs",
}

__all__ = [
    "Deployment",
    "ReplicaSpec",
    "ReplicaStatus",
    "Status",
    "deploy",
    "emulator_specs",
    "find",
    "list_deployments",
    "stop",
    "vllm_cpu_specs",
    "vllm_specs",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"scepsy.deployment.{home}"), name)
