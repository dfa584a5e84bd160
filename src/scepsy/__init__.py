"""Scepsy: serve agentic workflows on your own GPUs.

Names are loaded on first use, so that importing this package in an agent costs only OpenTelemetry.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scepsy.capture import (
        ContextThreadPoolExecutor,
        agent,
        flush,
        instrument,
        propagate,
        tool,
        uninstrument,
        workflow,
    )
    from scepsy.deployment import Deployment, deploy
    from scepsy.discovery import discover_cluster
    from scepsy.files import (
        load_cluster,
        load_plan,
        load_profile,
        load_requirements,
        save_cluster,
        save_plan,
        save_profile,
    )
    from scepsy.planning import aggregate, frontier, optimize, optimize_and_deploy
    from scepsy.profiling import estimate
    from scepsy.traces import read_executions
    from scepsy_optimizer.cluster import Cluster
    from scepsy_optimizer.errors import ScepsyError
    from scepsy_optimizer.plan import Plan
    from scepsy_optimizer.profile import LLMProfile
    from scepsy_optimizer.requirements import LLMRequirements, Requirements, WorkflowRequirements
    from scepsy_optimizer.workload import Workload

__version__ = "0.1.0"

_HOMES = {
    "Cluster": "scepsy_optimizer.cluster",
    "ContextThreadPoolExecutor": "scepsy.capture",
    "Deployment": "scepsy.deployment",
    "LLMProfile": "scepsy_optimizer.profile",
    "LLMRequirements": "scepsy_optimizer.requirements",
    "Plan": "scepsy_optimizer.plan",
    "Requirements": "scepsy_optimizer.requirements",
    "ScepsyError": "scepsy_optimizer.errors",
    "WorkflowRequirements": "scepsy_optimizer.requirements",
    "Workload": "scepsy_optimizer.workload",
    "agent": "scepsy.capture",
    "aggregate": "scepsy.planning",
    "deploy": "scepsy.deployment",
    "discover_cluster": "scepsy.discovery",
    "estimate": "scepsy.profiling",
    "flush": "scepsy.capture",
    "frontier": "scepsy.planning",
    "instrument": "scepsy.capture",
    "load_cluster": "scepsy.files",
    "load_plan": "scepsy.files",
    "load_profile": "scepsy.files",
    "load_requirements": "scepsy.files",
    "optimize": "scepsy.planning",
    "optimize_and_deploy": "scepsy.planning",
    "propagate": "scepsy.capture",
    "read_executions": "scepsy.traces",
    "save_cluster": "scepsy.files",
    "save_plan": "scepsy.files",
    "save_profile": "scepsy.files",
    "tool": "scepsy.capture",
    "uninstrument": "scepsy.capture",
    "workflow": "scepsy.capture",
}

__all__ = [
    "Cluster",
    "ContextThreadPoolExecutor",
    "Deployment",
    "LLMProfile",
    "LLMRequirements",
    "Plan",
    "Requirements",
    "ScepsyError",
    "WorkflowRequirements",
    "Workload",
    "agent",
    "aggregate",
    "deploy",
    "discover_cluster",
    "estimate",
    "flush",
    "frontier",
    "instrument",
    "load_cluster",
    "load_plan",
    "load_profile",
    "load_requirements",
    "optimize",
    "optimize_and_deploy",
    "propagate",
    "read_executions",
    "save_cluster",
    "save_plan",
    "save_profile",
    "tool",
    "uninstrument",
    "workflow",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
