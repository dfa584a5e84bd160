from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster, parts_of
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.node_limits import place_on_few_nodes
from scepsy_optimizer.placement import check_placement, place
from scepsy_optimizer.planner import optimize
from scepsy_optimizer.requirements import LLMRequirements, Requirements, check_requirements
from scepsy_optimizer.search import highest_rate
from scepsy_optimizer.workload import aggregate


def whole(size, replicas):
    return Choice(tensor_parallel_size=size, fraction=Fraction(1), replicas=replicas)


def half(replicas):
    return Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=replicas)


def nodes_of(slots, llm):
    return {slot.node for group in slots[llm] for slot in group}


def test_a_limited_llm_gets_nodes_of_its_own_first():
    """Left alone, the half devices fill up what the others leave of the first node and go on to the second."""
    cluster = parse_cluster("2x4xH100")
    allocation = {"wholes": (whole(2, 1), whole(1, 1)), "halves": (half(5),)}
    alone = place(allocation, cluster)
    assert alone is not None
    assert len(nodes_of(alone, "halves")) == 2
    assert place_on_few_nodes(allocation, cluster, {"halves": 2}) == alone
    slots = place_on_few_nodes(allocation, cluster, {"halves": 1, "wholes": 1})
    assert slots is not None
    assert len(nodes_of(slots, "halves")) == len(nodes_of(slots, "wholes")) == 1
    assert place_on_few_nodes({"a": (whole(1, 5),)}, cluster, {"a": 1}) is None


@settings(max_examples=60, deadline=None)
@given(
    limited=st.lists(st.sampled_from([whole(2, 1), whole(1, 1), half(1)]), min_size=1, max_size=3, unique=True),
    others=st.lists(st.sampled_from([whole(4, 1), whole(2, 1), whole(1, 2), half(3)]), max_size=5),
    most=st.integers(1, 3),
)
def test_one_limited_llm_on_equal_nodes_is_placed_wherever_it_can_be(limited, others, most):
    """Oracle: on equal nodes a placement exists where one does with the limited LLM on the first `most` nodes."""
    cluster = parse_cluster("3x4xH100")
    allocation = {"limited": tuple(limited), **{f"o{number}": (choice,) for number, choice in enumerate(others)}}
    slots = place_on_few_nodes(allocation, cluster, {"limited": most})
    if slots is not None:
        assert len(nodes_of(slots, "limited")) <= most
    elif place(allocation, cluster) is not None:
        # It takes no more than 3.5 devices: any node that is still whole would hold it.
        assert sum(choice.units for choice in others) > 80


def test_a_plan_keeps_to_the_nodes_that_it_may_use(make_execution, make_profile):
    workload = aggregate([make_execution(f"e{n}", [("a", 0, 2 + n % 3), ("b", 5, 7)]) for n in range(6)])
    profiles = {"a": make_profile("a", sizes=(1,)), "b": make_profile("b", sizes=(1,), weights_gib=4.0)}
    for llm in "ab":
        limit = LLMRequirements(max_nodes=1, min_replicas=2)
        requirements = Requirements(llms={llm: limit})
        plan = optimize(workload, profiles, parse_cluster("3x2xH100"), rate_rps=5.0, requirements=requirements)
        assert check_requirements(plan, requirements) == []


@pytest.fixture
def workload(make_execution):
    return aggregate([make_execution(f"e{n}", [("a", 0, 2), ("b", 2, 3 + n)]) for n in range(3)])


@pytest.fixture
def profiles(make_profile):
    return {"a": make_profile("a"), "b": make_profile("b", scale=2.0)}


def test_the_whole_plan_keeps_to_a_number_of_nodes(workload, profiles):
    """On nodes alike it is the plan for so many of them; of different ones the best part is taken."""
    cluster = parse_cluster("3x2xH100+1x4xH100")
    limit = Requirements(max_nodes=1)
    rate = highest_rate(workload, profiles, parse_cluster("4xH100"))[0]
    assert highest_rate(workload, profiles, cluster, requirements=limit)[0] == rate
    plan = optimize(workload, profiles, cluster, rate_rps=0.5 * rate, requirements=limit)
    assert {slot.node for part in plan.llms for slot in part.slots} == {"node3"}
    assert plan.cluster == cluster
    assert not check_placement(plan)
    assert not check_requirements(plan, limit)
    alone = optimize(workload, profiles, parse_cluster("4xH100"), rate_rps=0.5 * rate).prediction
    assert plan.prediction.latency_s == pytest.approx(alone.latency_s, rel=1.01e-4)
    assert plan.prediction.lower_bound_s <= plan.prediction.latency_s
    free = optimize(workload, profiles, cluster, rate_rps=1.2 * rate)
    assert check_requirements(free, limit)[0].endswith("nodes, at most 1 are allowed")
    with pytest.raises(ScepsyError, match="the highest is"):
        optimize(workload, profiles, cluster, rate_rps=1.2 * rate, requirements=limit)


def test_parts_of_a_cluster():
    cluster = parse_cluster("3x2xH100+1x4xH100+2x4xL40S")
    parts = {tuple(node.name for node in part.nodes) for part in parts_of(cluster, 2)}
    assert parts == {("node0", "node1"), ("node0", "node3"), ("node0", "node4"), ("node3", "node4"), ("node4", "node5")}
    assert parts_of(cluster, 6) == (cluster,)
    different = parse_cluster("+".join(f"{devices}xH100" for devices in range(1, 14)))
    with pytest.raises(ScepsyError, match="more than 64 ways to choose 5 of 13 nodes"):
        parts_of(different, 5)
    with pytest.raises(ScepsyError, match="max_nodes 0 must be at least 1"):
        Requirements(max_nodes=0)
