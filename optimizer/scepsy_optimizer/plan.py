"""The plan: which LLM runs where and how, what it is predicted to give, and where the prediction came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError

FORMAT = "scepsy-plan/1"
_FINEST = 1000


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
        seen: set[tuple[str, int, float, str]] = set()
        for part in self.llms:
            group = (part.llm, part.tensor_parallel_size, part.fraction, part.device_type)
            if group in seen:
                raise ScepsyError(f"plan: {part.llm!r} has two groups of equal replicas; make them one")
            seen.add(group)
        for part in self.llms:
            if len(part.slots) != part.replicas:
                raise ScepsyError(f"plan: {part.llm!r} has {part.replicas} replicas but {len(part.slots)} slots")
            if not 0 < part.fraction <= 1:
                raise ScepsyError(
                    f"plan: {part.llm!r} has fraction {part.fraction:g}; it must be above 0 and at most 1"
                )
            for slot in part.slots:
                if len(slot.devices) != part.tensor_parallel_size:
                    raise ScepsyError(
                        f"plan: {part.llm!r} has tensor_parallel_size {part.tensor_parallel_size} "
                        f"but a slot with devices {list(slot.devices)}"
                    )

    def parts(self, llm: str) -> tuple[LLMPlan, ...]:
        """The groups of one LLM. Raises ScepsyError if the plan has no such LLM."""
        found = tuple(part for part in self.llms if part.llm == llm)
        if not found:
            known = ", ".join(dict.fromkeys(part.llm for part in self.llms))
            raise ScepsyError(f"plan: no LLM {llm!r}; it has {known}")
        return found
