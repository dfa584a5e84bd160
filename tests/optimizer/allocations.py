"""Allocations to place, at random and by hand, the clusters to place them on, and the plans they make."""

from collections import Counter
from fractions import Fraction

from hypothesis import strategies as st

from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.plan import LLMPlan, Plan

# Tensor-parallel size and fraction of what is offered.
OFFERED = [(4, 1), (2, 1), (1, 1), (1, Fraction(1, 2)), (1, Fraction(1, 5)), (1, Fraction(1, 10))]


def group(size, fraction=1, replicas=1, device_type=""):
    return Choice(tensor_parallel_size=size, fraction=Fraction(fraction), replicas=replicas, device_type=device_type)


def plan_of(cluster, allocation, slots):
    parts = [
        LLMPlan(
            llm=llm,
            model=llm,
            tensor_parallel_size=choice.tensor_parallel_size,
            fraction=float(choice.fraction),
            replicas=choice.replicas,
            slots=slots[llm][number],
            max_num_seqs=1,
            max_num_batched_tokens=1,
            max_model_len=1,
            gpu_memory_utilization=0.9,
            device_type=choice.device_type,
        )
        for llm, groups in allocation.items()
        for number, choice in enumerate(groups)
    ]
    return Plan(cluster=cluster, rate_rps=1, llms=tuple(parts))


def allocations(kinds, most=12):
    """LLMs a to d with groups of the kinds, each kind once per LLM."""
    picks = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(kinds)), min_size=1, max_size=most)
    return picks.map(counted)


def counted(picks):
    found = {}
    for (llm, (size, fraction)), count in Counter(picks).items():
        found.setdefault(llm, []).append(group(size, fraction, count))
    return {llm: tuple(groups) for llm, groups in sorted(found.items())}


def cluster_of(domains, per_node=1):
    """Nodes of H100 with fast-link domains of the given sizes."""
    nodes = []
    for start in range(0, len(domains), per_node):
        sizes = domains[start : start + per_node]
        numbers, parts = iter(range(sum(sizes))), []
        for size in sizes:
            parts += [tuple(next(numbers) for _ in range(size))]
        nodes.append(
            Node(name=f"n{start}", device_type="H100", devices=sum(sizes), memory_gib=80, nvlink_domains=tuple(parts))
        )
    return Cluster(nodes=tuple(nodes))
