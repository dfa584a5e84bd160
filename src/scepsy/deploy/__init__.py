"""A plan becomes running engines behind one OpenAI-compatible endpoint.

`deploy(plan)` starts every replica under a shim that leaves nothing behind, and a gateway that routes by model name to
the least loaded replica. `find`, `stop` and `list_deployments` work from any process.
"""

from scepsy.deploy.deployment import Deployment, ReplicaStatus, Status, deploy, find, list_deployments, stop
from scepsy.deploy.specs import ReplicaSpec, emulator_specs, vllm_cpu_specs, vllm_specs

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
