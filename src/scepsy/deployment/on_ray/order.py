"""What each actor of a plan on Ray is to start. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from scepsy.deployment.specs import DEFAULT_COMMAND, Engine, ReplicaSpec, replica_ids, vllm_arguments
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

NAMESPACE: Final = "scepsy"
EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - the endpoint asks from another node
PROFILE: Final = "{profile}"
"""Stands in an emulator's arguments for the file that its actor writes on its own node."""


def head_name(name: str) -> str:
    """The head actor's name."""
    return f"{name}/head"


def keeper_name(name: str, replica_id: str) -> str:
    """The name of the actor beside a replica, and of its placement group."""
    return f"{name}/{replica_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayReplica:
    """One replica: what is started, on which node of Ray's, with which of its resources.

    `profile` is the text of an emulator's profile file. `needs_mps` is whether the node must have an MPS daemon.
    """

    spec: ReplicaSpec
    node_id: str
    resources: Mapping[str, float]
    profile: str | None = None
    needs_mps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOrder:
    """A whole deployment on Ray, as its head keeps it. Times in seconds."""

    name: str
    engine: Engine
    host: str
    port: int
    replicas: tuple[RayReplica, ...]
    start_timeout_s: float
    grace_s: float = 15.0
    drain_s: float = 30.0


def node_ids(plan: Plan, nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Ray's id of each of the plan's nodes, which are called by host name or by that id, as discovery calls them.

    Raises ScepsyError for a node that is not there, or that several have the name of.
    """
    live = [node for node in nodes if node["Alive"]]
    found = {}
    for wanted in {slot.node for part in plan.llms for slot in part.slots}:
        ids = [str(node["NodeID"]) for node in live if wanted in (node["NodeID"], node["NodeManagerHostname"])]
        labelled = [str(node["NodeID"]) for node in live if wanted in (node.get("Labels") or {}).values()]
        # Several nodes of a test have one host name: a label tells them apart.
        chosen = labelled if len(labelled) == 1 else ids
        if len(chosen) != 1:
            known = ", ".join(sorted({str(node["NodeManagerHostname"]) for node in live}))
            raise ScepsyError(
                f"the plan's node {wanted!r} is {len(chosen)} of the Ray cluster's nodes ({known}); plan for what is "
                "there: --cluster ray"
            )
        found[wanted] = chosen[0]
    return found


def replicas_of(
    plan: Plan,
    engine: Engine,
    ids: Mapping[str, str],
    *,
    profiles: Mapping[int, str],
    command: Sequence[str] = DEFAULT_COMMAND,
    engine_args: Sequence[str] = (),
    seed: int = 0,
) -> tuple[RayReplica, ...]:
    """Every replica of the plan. `profiles` has the text of a profile file for each of the plan's groups.

    Which devices of its node a replica gets, Ray decides. So a plan that gives one out twice is not refused here: its
    replicas get others, or Ray has no room for them. Raises ScepsyError for fractions of cores.
    """
    parts = [part.llm for part in plan.llms if part.fraction < 1]
    if engine == "vllm-cpu" and parts:
        raise ScepsyError(
            f"{', '.join(parts)}: a fraction of a core is not held on Ray, which has no quotas for processors; plan "
            "for whole cores there, or deploy on one machine"
        )
    groups = {id(part): number for number, part in enumerate(plan.llms)}
    return tuple(
        RayReplica(
            spec=_spec(name, part, slot, engine, command, engine_args, seed),
            node_id=ids[slot.node],
            resources=_resources(part, engine),
            profile=profiles.get(groups[id(part)]),
            needs_mps=engine == "vllm" and part.fraction < 1,
        )
        for name, part, slot in replica_ids(plan)
    )


def _resources(part: LLMPlan, engine: Engine) -> dict[str, float]:
    """In one bundle: then Ray keeps a tensor-parallel group on one node, and its actor has all of it."""
    if engine == "vllm-cpu":
        return {"CPU": float(part.tensor_parallel_size)}
    return {"GPU": part.tensor_parallel_size * part.fraction}


def _spec(
    name: str,
    part: LLMPlan,
    slot: Slot,
    engine: Engine,
    command: Sequence[str],
    engine_args: Sequence[str],
    seed: int,
) -> ReplicaSpec:
    """The port is chosen on the node, the devices are those that Ray gives: both are put in by the actor."""
    env: dict[str, str] = {}
    if engine == "emulator":
        argv: tuple[str, ...] = (
            *(sys.executable, "-m", "scepsy.emulator", "--profile", PROFILE, "--llm", part.llm),
            *("--tensor-parallel-size", str(part.tensor_parallel_size), "--fraction", f"{part.fraction:g}"),
            *("--host", EVERYWHERE, "--port", "0", "--seed", str(seed)),
        )
    else:
        argv = vllm_arguments(part, 0, command=command, host=EVERYWHERE)
        if engine == "vllm-cpu":
            env["VLLM_CPU_KVCACHE_SPACE"] = "1"
            argv = (*argv, "--enforce-eager", *engine_args)
        else:
            memory = int(part.gpu_memory_utilization * part.fraction * 10000) / 10000
            argv = (*argv, "--gpu-memory-utilization", f"{memory:g}", *engine_args)
            if part.fraction < 1:
                env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{100 * part.fraction:g}"
    return ReplicaSpec(
        id=name,
        llm=part.llm,
        model=part.model,
        node=slot.node,
        devices=slot.devices,
        fraction=part.fraction,
        tensor_parallel_size=part.tensor_parallel_size,
        port=0,
        argv=argv,
        env=env,
        weight=part.replica_weight,
        max_model_len=part.max_model_len,
    )
