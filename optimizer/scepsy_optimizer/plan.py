"""The plan: which LLM runs where and how, what it is predicted to give, and where the prediction came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import inf

from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError

FORMAT = "scepsy-plan/1"
_FINEST = 1000
_LEAST = {
    "tensor_parallel_size": 1,
    "replicas": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    # Cut to what the KV cache holds, which may be nothing.
    "max_model_len": 0,
}


def exact_fraction(fraction: float | Fraction) -> Fraction:
    """The fraction of a device that the decimal number of a file means: tenths and thirds, to a thousandth."""
    return Fraction(fraction).limit_denominator(_FINEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one replica sits: devices of one node, in the order of its tensor-parallel ranks."""

    node: str
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMPlan:
    """A group of equal replicas of one LLM, one slot each. An LLM may have several groups.

    `device_type` may be empty where the cluster has only one type. `rate_rps` is the rate of calls that reach the
    group, `predicted_call_s` the mean time of one of them, `utilisation` the load as a part of saturation, and
    `replica_rps` the rate that one replica carries at the highest utilisation that is planned for, 0 where that is not
    known. `share` is the LLM's part of the LLM execution time in the traces, over all its groups.
    """

    llm: str
    model: str
    tensor_parallel_size: int
    fraction: float
    replicas: int
    slots: tuple[Slot, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    gpu_memory_utilization: float
    rate_rps: float = 0.0
    predicted_call_s: float = 0.0
    utilisation: float = 0.0
    share: float = 0.0
    device_type: str = ""
    replica_rps: float = 0.0

    def __post_init__(self) -> None:
        """Raises ScepsyError where a number means nothing, or the slots are not what the replicas need.

        A `gpu_memory_utilization` above 1 is left to `check_placement`, which knows who else is on the device.
        """
        where = f"plan: {self.llm!r}"
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ScepsyError(f"{where} has {name} {getattr(self, name)}; it must be at least {least}")
        if len(self.slots) != self.replicas:
            raise ScepsyError(f"{where} has {self.replicas} replicas but {len(self.slots)} slots")
        if not 0 < self.fraction <= 1:
            raise ScepsyError(f"{where} has fraction {self.fraction:g}; it must be above 0 and at most 1")
        if self.fraction < 1 and self.tensor_parallel_size > 1:
            raise ScepsyError(
                f"{where} has tensor_parallel_size {self.tensor_parallel_size} with fraction {self.fraction:g}; only "
                "whole devices work together: make one of them 1"
            )
        if not 0 < self.gpu_memory_utilization < inf:
            raise ScepsyError(
                f"{where} has gpu_memory_utilization {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )
        for name in ("rate_rps", "utilisation", "share", "replica_rps"):
            if not 0 <= getattr(self, name) < inf:
                raise ScepsyError(f"{where} has {name} {getattr(self, name)}; it must be finite and at least 0")
        # Beyond saturation a call takes for ever.
        if not self.predicted_call_s >= 0:
            raise ScepsyError(f"{where} has predicted_call_s {self.predicted_call_s}; it must be at least 0")
        for slot in self.slots:
            if len(slot.devices) != self.tensor_parallel_size:
                raise ScepsyError(
                    f"{where} has tensor_parallel_size {self.tensor_parallel_size} "
                    f"but a slot with devices {list(slot.devices)}"
                )

    @property
    def replica_weight(self) -> float:
        """What one replica can do beside the LLM's others: the rate that it carries, else the devices that it takes."""
        return self.replica_rps or self.tensor_parallel_size * self.fraction

    @property
    def device_count(self) -> float:
        """Devices that all its replicas take together."""
        return self.replicas * self.tensor_parallel_size * self.fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedLatency:
    """Latency of an execution when the traced executions are replayed on the plan: mean and percentiles.

    `executions` is the number that they are taken over.
    """

    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    executions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the plan is expected to give at its rate.

    `lower_bound_s` is a proven bound on the mean latency of every allocation of this cluster under the same model, and
    `gap` the relative distance of `latency_s` to it. `max_rate_rps` is the rate at which the bottleneck reaches the
    highest utilisation that is planned for. `tool_s` is the part of the latency that no LLM spends. `replayed` is what
    a replay of the plan gave, where one was made: it has the queues and bursts that the closed form only approximates.

    `llm_latency_s` is what each LLM adds to the latency: its calls on the mean critical path. With `tool_s` these parts
    are the latency.

    Where workflows have weights, `objective_s` is the mean latency with them; the bound and the gap are for it then.
    """

    latency_s: float
    max_rate_rps: float
    bottleneck: str
    lower_bound_s: float
    gap: float
    tool_s: float
    workflow_latency_s: Mapping[str, float] = field(default_factory=dict)
    replayed: ReplayedLatency | None = None
    objective_s: float | None = None
    llm_latency_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Allocation, placement and prediction for one cluster at one rate of executions.

    `llms` has one entry for each group of equal replicas, so an LLM may be there more than once.
    """

    cluster: Cluster
    rate_rps: float
    llms: tuple[LLMPlan, ...]
    prediction: Prediction | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ScepsyError where it has no LLMs, two equal groups of one, or a rate that means nothing."""
        if not self.llms:
            raise ScepsyError("plan: has no LLMs; name at least one under llms, or plan anew with scepsy optimize")
        if not 0 <= self.rate_rps < inf:
            raise ScepsyError(f"plan: has rate_rps {self.rate_rps}; it must be finite and at least 0")
        seen: set[tuple[str, int, float, str]] = set()
        for part in self.llms:
            group = (part.llm, part.tensor_parallel_size, part.fraction, part.device_type)
            if group in seen:
                raise ScepsyError(f"plan: {part.llm!r} has two groups of equal replicas; make them one")
            seen.add(group)

    def parts(self, llm: str) -> tuple[LLMPlan, ...]:
        """The groups of one LLM. Raises ScepsyError if the plan has no such LLM."""
        found = tuple(part for part in self.llms if part.llm == llm)
        if not found:
            known = ", ".join(dict.fromkeys(part.llm for part in self.llms))
            raise ScepsyError(f"plan: no LLM {llm!r}; it has {known}")
        return found


def unknown_devices(plan: Plan) -> list[str]:
    """The slots that name a node or a device which the plan's cluster does not have, in words; empty if none does."""
    devices = {node.name: node.devices for node in plan.cluster.nodes}
    wrong = []
    for part in plan.llms:
        for number, slot in enumerate(part.slots):
            where = f"{part.llm!r} replica {number}"
            if slot.node not in devices:
                wrong.append(f"{where}: the cluster has no node {slot.node!r}, it has {', '.join(devices)}")
                continue
            here = devices[slot.node]
            outside = [device for device in slot.devices if not 0 <= device < here]
            if outside:
                wrong.append(f"{where}: node {slot.node!r} has {here} devices from 0 on, no number {outside[0]}")
    return wrong
