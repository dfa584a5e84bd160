import pytest

from scepsy.deployment.on_kubernetes.options import KubernetesOptions
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.plan import LLMPlan, Plan, Slot


def node(name, *, uuids=False, devices=4):
    return Node(
        name=name,
        device_type="H100",
        devices=devices,
        memory_gib=80.0,
        nvlink_domains=(tuple(range(devices)),),
        uuids=tuple(f"GPU-{name}-{number}" for number in range(devices)) if uuids else (),
    )


def part(llm, *slots, size=1, fraction=1.0):
    return LLMPlan(
        llm=llm,
        model=f"org/{llm}",
        tensor_parallel_size=size,
        fraction=fraction,
        replicas=len(slots),
        slots=tuple(Slot(node=name, devices=devices) for name, devices in slots),
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        max_model_len=8192,
        gpu_memory_utilization=0.9,
    )


@pytest.fixture
def make_plan():
    """Two nodes of four GPUs: a pair by tensor parallelism, whole replicas on both nodes, two fractions on one GPU."""

    def make(*parts, uuids=False):
        parts = parts or (
            part("Planner/70B", ("gpu-a", (0, 1)), size=2),
            part("writer", ("gpu-a", (2,)), ("gpu-b", (0,))),
            part("judge", ("gpu-b", (1,)), fraction=0.3),
            part("ranker", ("gpu-b", (1,)), fraction=0.5),
        )
        cluster = Cluster(nodes=(node("gpu-a", uuids=uuids), node("gpu-b", uuids=uuids)))
        return Plan(cluster=cluster, rate_rps=1.0, llms=parts)

    make.part = part
    return make


@pytest.fixture
def options():
    def make(**changes):
        return KubernetesOptions(**{"image": "registry.example/serving:1", "name": "agents", **changes})

    return make
