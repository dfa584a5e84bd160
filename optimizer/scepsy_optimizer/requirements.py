"""Requirements: what a plan must respect beside the rate, per LLM and per workflow.

The search asks three things of them: which options of an LLM are admitted (`admitted_rows`), how much a
second of each execution counts in what is minimised (`objective_weights`), and which limit the mean latency of a
workflow has (`latency_limits_s`). A finished plan is judged by `check_requirements`, which knows nothing of the search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.allocation import UNITS_PER_DEVICE, Choice, Ints
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan, exact_fraction
from scepsy_optimizer.workload import Workload

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMRequirements:
    """What one LLM must get.

    With `fixed` groups it gets exactly those ("the verifier stays as it is") and is not searched; the other fields are
    limits on what the search may give it: at least `min_replicas` replicas over all groups, at most `max_devices`
    devices in all, on at most `max_nodes` nodes, and only on the device types named, where any are.
    """

    fixed: tuple[Choice, ...] = ()
    min_replicas: int = 1
    max_devices: float | None = None
    max_nodes: int | None = None
    only_device_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limits = (self.min_replicas, self.max_devices, self.max_nodes, self.only_device_types)
        if self.fixed and limits != (1, None, None, ()):
            raise ScepsyError("requirements: an LLM with fixed groups takes no further limits; remove one or the other")
        meant = tuple(replace(one, fraction=exact_fraction(one.fraction)) for one in self.fixed)
        object.__setattr__(self, "fixed", meant)
        for choice in self.fixed:
            size, fraction = choice.tensor_parallel_size, choice.fraction
            if size < 1 or choice.replicas < 1 or not 0 < fraction <= 1 or (size > 1 and fraction < 1):
                raise ScepsyError(
                    f"requirements: a fixed group needs at least one replica of at least one device, or of a fraction "
                    f"of one; got {choice.replicas} of {float(fraction):g} x {size}"
                )
            if (fraction * UNITS_PER_DEVICE).denominator != 1:
                raise ScepsyError(f"requirements: a fixed fraction of {fraction} is not a whole number of tenths")
        if self.min_replicas < 1:
            raise ScepsyError(f"requirements: min_replicas {self.min_replicas} must be at least 1")
        if self.max_devices is not None and not self.max_devices > 0:
            raise ScepsyError(f"requirements: max_devices {self.max_devices:g} must be above 0")
        if self.max_nodes is not None and self.max_nodes < 1:
            raise ScepsyError(f"requirements: max_nodes {self.max_nodes} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowRequirements:
    """What one workflow is worth, and what it must get.

    A second of one of its executions counts `weight` times in what the search minimises; its mean latency must not
    exceed `latency_limit_s`.
    """

    weight: float = 1.0
    latency_limit_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ScepsyError(f"requirements: a workflow's weight of {self.weight:g} must be a positive number")
        if self.latency_limit_s is not None and not self.latency_limit_s > 0:
            raise ScepsyError(
                f"requirements: a workflow's latency limit of {self.latency_limit_s:g} s must be a positive number"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """All requirements on a plan, by LLM and by workflow. What is not named is free.

    With `spread` the replicas of an LLM sit on different nodes as far as there is room, so that the failure of one node
    takes few of them. The whole plan takes at most `max_nodes` nodes.
    """

    llms: Mapping[str, LLMRequirements] = field(default_factory=dict)
    workflows: Mapping[str, WorkflowRequirements] = field(default_factory=dict)
    spread: bool = False
    max_nodes: int | None = None

    def __post_init__(self) -> None:
        if self.max_nodes is not None and self.max_nodes < 1:
            raise ScepsyError(f"requirements: max_nodes {self.max_nodes} must be at least 1")

    def of_llm(self, llm: str) -> LLMRequirements:
        """The requirements of one LLM."""
        return self.llms.get(llm, _FREE_LLM)

    def of_workflow(self, workflow: str) -> WorkflowRequirements:
        """The requirements of one workflow."""
        return self.workflows.get(workflow, _FREE_WORKFLOW)

    @property
    def node_limits(self) -> dict[str, int]:
        """The most nodes of each LLM that has such a limit."""
        return {llm: one.max_nodes for llm, one in self.llms.items() if one.max_nodes is not None}

    @property
    def weighs_workflows(self) -> bool:
        """Whether some workflow counts more than another."""
        return any(one.weight != 1 for one in self.workflows.values())

    @property
    def latency_limits_s(self) -> dict[str, float]:
        """The limit on the mean latency of each workflow that has one."""
        return {
            workflow: one.latency_limit_s for workflow, one in self.workflows.items() if one.latency_limit_s is not None
        }


_FREE_LLM = LLMRequirements()
_FREE_WORKFLOW = WorkflowRequirements()
NO_REQUIREMENTS = Requirements()


def require_known(requirements: Requirements, workload: Workload, cluster: Cluster) -> None:
    """Raise ScepsyError where a requirement names an LLM, a workflow or a device type that there is not."""
    llms = sorted(demand.llm for demand in workload.demands)
    types = sorted({node.device_type for node in cluster.nodes})
    named_types = {name for one in requirements.llms.values() for name in one.only_device_types}
    for kind, named, known in (
        ("LLM", requirements.llms, llms),
        ("workflow", requirements.workflows, sorted(workload.workflows)),
        ("device type", named_types, types),
    ):
        if unknown := sorted(set(named) - set(known)):
            raise ScepsyError(f"requirements: no {kind} {', '.join(unknown)}; there is {', '.join(known)}")


def objective_weights(workload: Workload, requirements: Requirements) -> tuple[float, ...]:
    """How much each execution of the workload counts in the latency that is minimised; all together 1.

    Without weights of workflows these are the workload's own weights, so the objective is the mean latency. They do
    not touch the load: what every LLM is asked for follows from the workload's weights and the rate alone.
    """
    weights = [
        weight * requirements.of_workflow(timeline.workflow).weight
        for timeline, weight in zip(workload.timelines, workload.weights, strict=True)
    ]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def allowed_types(required: LLMRequirements, cluster: Cluster) -> tuple[str, ...]:
    """The device types of the cluster that an LLM may use, in alphabetical order."""
    types = sorted({node.device_type for node in cluster.nodes})
    return tuple(name for name in types if not required.only_device_types or name in required.only_device_types)


def max_units_of(required: LLMRequirements, cluster: Cluster) -> int:
    """The most tenths of a device that an LLM may get: of its `max_devices`, its `max_nodes` and its device types."""
    types = allowed_types(required, cluster)
    allowed = [node.devices for node in cluster.nodes if node.device_type in types]
    devices: float = sum(sorted(allowed, reverse=True)[: required.max_nodes])
    if required.max_devices is not None:
        devices = min(devices, required.max_devices)
    return int(devices * UNITS_PER_DEVICE + 1e-9)


def admitted_rows(required: LLMRequirements, cluster: Cluster, *, replicas: Ints, units: Ints) -> Bools:
    """Which options of an LLM its requirements admit, given the replicas and tenths of a device of each.

    Device types are for the caller: options are listed for `allowed_types` only. `max_nodes` is judged by size here, no
    option is larger than that many of the largest nodes; where the replicas really sit is for `check_requirements`.
    Fixed groups are not judged: their fraction may not be one that is offered, so such an LLM gets a table of just
    their row, from what they give at the rate.
    """
    found: Bools = (replicas >= required.min_replicas) & (units <= max_units_of(required, cluster))
    return found


def planned(plan: Plan, llm: str) -> tuple[Choice, ...]:
    """What a plan gives an LLM. Raises ScepsyError where the plan lacks it."""
    return tuple(
        Choice(
            tensor_parallel_size=part.tensor_parallel_size,
            fraction=exact_fraction(part.fraction),
            replicas=part.replicas,
            device_type=part.device_type,
        )
        for part in plan.parts(llm)
    )


def kept(plan: Plan, llm: str, cluster: Cluster | None = None) -> LLMRequirements:
    """The requirement that an LLM stays as it is in a plan, also on another `cluster`.

    Where only that one has several device types, the groups stay on the type that the plan's cluster has. Raises
    ScepsyError where the plan lacks the LLM, or such a cluster the type.
    """
    groups = planned(plan, llm)
    if cluster is not None and len(cluster.device_types) > 1:
        groups = _named(groups, plan.cluster)
        types = ", ".join(cluster.device_types)
        if lacking := {group.device_type for group in groups}.difference(cluster.device_types):
            raise ScepsyError(f"{llm!r} cannot stay on {', '.join(sorted(lacking))}: the new cluster has {types} only")
    return LLMRequirements(fixed=groups)


def _named(groups: tuple[Choice, ...], cluster: Cluster) -> tuple[Choice, ...]:
    """The groups with their device type, which goes without saying on a cluster of one type."""
    if len(cluster.device_types) > 1:
        return groups
    return tuple(replace(one, device_type=one.device_type or cluster.device_type) for one in groups)


def check_requirements(plan: Plan, requirements: Requirements) -> list[str]:
    """What a plan breaks, one sentence each; empty where it keeps all. Knows the plan alone, not how it was found."""
    return [
        *(line for llm, required in requirements.llms.items() for line in _broken_by_llm(plan, llm, required)),
        *_broken_limits(plan, requirements),
        *_broken_by_nodes(plan, requirements),
    ]


def _broken_by_nodes(plan: Plan, requirements: Requirements) -> list[str]:
    nodes = {slot.node for part in plan.llms for slot in part.slots}
    if requirements.max_nodes is None or len(nodes) <= requirements.max_nodes:
        return []
    return [f"the plan is on {len(nodes)} nodes, at most {requirements.max_nodes} are allowed"]


def _broken_by_llm(plan: Plan, llm: str, required: LLMRequirements) -> list[str]:
    if required.fixed:
        now = _named(planned(plan, llm), plan.cluster)
        same = sorted(now, key=_order) == sorted(_named(required.fixed, plan.cluster), key=_order)
        return [] if same else [f"{llm}: its groups are not the fixed ones"]
    parts = [part for part in plan.llms if part.llm == llm]
    types = {node.name: node.device_type for node in plan.cluster.nodes}
    nodes = {slot.node for part in parts for slot in part.slots}
    replicas = sum(part.replicas for part in parts)
    devices = sum(part.device_count for part in parts)
    wrong = []
    if replicas < required.min_replicas:
        wrong.append(f"{llm}: {replicas} replicas, at least {required.min_replicas} are required")
    if required.max_devices is not None and devices > required.max_devices + 1e-9:
        wrong.append(f"{llm}: {devices:g} devices, at most {required.max_devices:g} are allowed")
    if required.max_nodes is not None and len(nodes) > required.max_nodes:
        wrong.append(f"{llm}: on {len(nodes)} nodes, at most {required.max_nodes} are allowed")
    if required.only_device_types and (other := {types[node] for node in nodes} - set(required.only_device_types)):
        wrong.append(f"{llm}: on {', '.join(sorted(other))}, only {', '.join(required.only_device_types)} is allowed")
    return wrong


def _broken_limits(plan: Plan, requirements: Requirements) -> list[str]:
    if plan.prediction is None:
        return []
    found = plan.prediction.workflow_latency_s
    return [
        f"{workflow}: a mean latency of {found[workflow]:.3g} s, the limit is {limit_s:g} s"
        for workflow, limit_s in requirements.latency_limits_s.items()
        if workflow in found and found[workflow] > limit_s * (1 + 1e-9)
    ]


def _order(choice: Choice) -> tuple[int, Fraction, int, str]:
    return choice.tensor_parallel_size, choice.fraction, choice.replicas, choice.device_type
