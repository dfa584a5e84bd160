"""Requirements: what the search may give under them, against enumeration by hand, and what breaks them."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.allocation import Choice, evaluate_groups, replica_kinds
from scepsy_optimizer.cluster import Cluster, Node, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.pipeline import build_pipeline
from scepsy_optimizer.plan import Slot
from scepsy_optimizer.planner import optimize
from scepsy_optimizer.requirements import (
    NO_REQUIREMENTS,
    LLMRequirements,
    Requirements,
    WorkflowRequirements,
    check_requirements,
    kept,
    max_units_of,
    objective_weights,
    require_known,
)
from scepsy_optimizer.search import find_allocation, highest_rate
from scepsy_optimizer.workload import aggregate

CLUSTER = parse_cluster("3xH100")


@pytest.fixture(scope="module")
def workload(make_execution):
    runs = [
        make_execution(f"e{n}", [("a", 0, 2 + n % 3), ("b", 0, 3), ("b", 5, 7)], workflow="wx"[n % 2]) for n in range(8)
    ]
    return aggregate(runs)


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {"a": make_profile("a", sizes=(1, 2)), "b": make_profile("b", sizes=(1, 2), scale=0.5, weights_gib=4.0)}


@pytest.fixture(scope="module")
def plan(workload, profiles):
    return optimize(workload, profiles, CLUSTER, rate_rps=2.0)


def offers(demand, profile, rate, required):
    """Every group of equal replicas of half a device or more that an LLM may get, judged by hand."""
    found = []
    for kind in replica_kinds(profile, max_tensor_parallel_size=2, fractions=(Fraction(1), Fraction(1, 2))):
        for replicas in range(1, 30 // kind.units + 1):
            choice = Choice(tensor_parallel_size=kind.tensor_parallel_size, fraction=kind.fraction, replicas=replicas)
            if required.fixed and (choice,) != required.fixed:
                continue
            devices = replicas * kind.tensor_parallel_size * kind.fraction
            if replicas < required.min_replicas or devices > (required.max_devices or 99):
                continue
            option = evaluate_groups(demand, [profile], (choice,), calls_rps=rate * demand.visits)
            if option.utilisation <= 0.85 + 1e-12:
                found.append(option)
    return found


def exhaustive_s(workload, profiles, rate, requirements):
    """The least mean makespan over all combinations that fit into three devices; infinite without any."""
    tables = [
        offers(demand, profiles[demand.llm], rate, requirements.of_llm(demand.llm)) for demand in workload.demands
    ]
    best = float("inf")
    for chosen in itertools.product(*tables):
        if sum(option.units for option in chosen) <= 30:
            speeds = {demand.llm: option.speed for demand, option in zip(workload.demands, chosen, strict=True)}
            best = min(best, build_pipeline(workload, speeds).built_latency_s)
    return best


limits = st.builds(
    LLMRequirements,
    min_replicas=st.integers(1, 4),
    max_devices=st.none() | st.sampled_from([0.5, 1.0, 1.5, 2.0]),
)
fixed = st.builds(
    lambda size, tenths, replicas: LLMRequirements(
        fixed=(Choice(tensor_parallel_size=size, fraction=Fraction(10 if size > 1 else tenths, 10), replicas=replicas),)
    ),
    st.sampled_from([1, 2]),
    st.sampled_from([5, 10]),
    st.integers(1, 2),
)


@settings(max_examples=12, deadline=None)
@given(a=limits | fixed, b=limits, rate=st.sampled_from([0.3, 2.0, 6.0]))
def test_the_search_under_requirements_is_the_best_of_what_they_leave(workload, profiles, a, b, rate):
    requirements = Requirements(llms={"a": a, "b": b})
    found = find_allocation(workload, profiles, CLUSTER, rate_rps=rate, requirements=requirements)
    best = exhaustive_s(workload, profiles, rate, requirements)
    if found is None:
        assert best == float("inf")
        return
    # Speeds are found by bisection: those of a table and of one option by itself agree to a few parts in 10^7.
    assert found.lower_bound_s <= best * (1 + 1e-6)
    for llm, option in found.options.items():
        required = requirements.of_llm(llm)
        if required.fixed:
            assert option.groups == required.fixed
        else:
            assert sum(group.replicas for group in option.groups) >= required.min_replicas
            assert option.units <= 10 * (required.max_devices or 3)


@settings(max_examples=8, deadline=None)
@given(a=limits, b=limits)
def test_the_highest_rate_under_requirements_is_just_feasible(workload, profiles, a, b):
    requirements = Requirements(llms={"a": a, "b": b})
    try:
        rate, _ = highest_rate(workload, profiles, CLUSTER, requirements=requirements)
    except ScepsyError:
        assert exhaustive_s(workload, profiles, 1e-6, requirements) == float("inf")
        return
    assert find_allocation(workload, profiles, CLUSTER, rate_rps=rate * 0.9999, requirements=requirements) is not None
    assert find_allocation(workload, profiles, CLUSTER, rate_rps=rate * 1.001, requirements=requirements) is None


def test_weights_choose_and_limits_bind(make_execution, make_profile):
    """Two workflows with an LLM each share three devices: what one gets the other lacks."""
    workload = aggregate(
        [make_execution(f"{name}{n}", [(name, 0, 3), (name, 3, 5)], workflow=name) for name in "ab" for n in range(3)]
    )
    profiles = {llm: make_profile(llm, sizes=(1, 2)) for llm in "ab"}

    def latencies(**workflows):
        requirements = Requirements(workflows=workflows)
        plan = optimize(workload, profiles, CLUSTER, rate_rps=1.0, requirements=requirements)
        assert check_requirements(plan, requirements) == []
        prediction = plan.prediction
        weights = {name: workflows[name].weight if name in workflows else 1 for name in "ab"}
        weighted_s = sum(weights[name] * prediction.workflow_latency_s[name] for name in "ab") / sum(weights.values())
        if prediction.objective_s is not None:
            assert prediction.objective_s == pytest.approx(weighted_s)
        assert prediction.lower_bound_s <= weighted_s + 1e-9
        assert prediction.gap <= 1e-3
        return prediction.workflow_latency_s

    for_a = latencies(a=WorkflowRequirements(weight=5))
    for_b = latencies(b=WorkflowRequirements(weight=5))
    assert for_a["a"] == pytest.approx(for_b["b"])
    assert for_a["a"] < for_b["a"]
    limited = latencies(a=WorkflowRequirements(weight=5), b=WorkflowRequirements(latency_limit_s=for_b["b"] + 1e-6))
    assert limited["b"] == pytest.approx(for_b["b"])
    with pytest.raises(ScepsyError, match=r"of 0.1 s of workflow 'a' is out of reach at 1 executions/s on 3 H100: the"):
        latencies(a=WorkflowRequirements(latency_limit_s=0.1))
    both = {name: WorkflowRequirements(latency_limit_s=for_a["a"] + 1e-6) for name in "ab"}
    with pytest.raises(ScepsyError, match=r"limits of a and b cannot be kept together at 1 .*: raise them by [1-9]"):
        latencies(**both)


def test_an_llm_that_is_kept_stays_while_others_move(workload, profiles, plan):
    requirements = Requirements(llms={"a": kept(plan, "a")})
    for rate in (0.5, 4.0):
        other = optimize(workload, profiles, parse_cluster("6xH100"), rate_rps=rate, requirements=requirements)
        assert kept(other, "a") == kept(plan, "a")
        assert kept(other, "b") != kept(plan, "b")
        assert check_requirements(other, requirements) == []
    with pytest.raises(ScepsyError, match="no LLM 'z'"):
        kept(plan, "z")


def test_an_llm_that_is_kept_stays_on_its_device_type(workload, profiles, plan):
    mixed = parse_cluster("3xL40S+3xH100")
    both = {llm: (one, replace(one, device_type="L40S")) for llm, one in profiles.items()}
    requirements = Requirements(llms={"a": kept(plan, "a", mixed)})
    other = optimize(workload, both, mixed, rate_rps=2.0, requirements=requirements)
    assert {part.device_type for part in other.parts("a")} == {"H100"}
    assert check_requirements(other, requirements) == []
    with pytest.raises(ScepsyError, match="'a' cannot stay on H100: the new cluster has L40S, A100 only"):
        kept(plan, "a", parse_cluster("3xL40S+3xA100"))
    # On the plan's own cluster the type goes without saying, and may be said.
    assert kept(plan, "a", CLUSTER) == kept(plan, "a")
    assert check_requirements(plan, requirements) == []
    overloaded = Requirements(
        llms={"a": LLMRequirements(fixed=(Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=1),))}
    )
    with pytest.raises(ScepsyError, match="is out of reach on 6 H100: the highest is"):
        optimize(workload, profiles, parse_cluster("6xH100"), rate_rps=50.0, requirements=overloaded)


def test_what_a_plan_breaks_is_told(plan):
    part = replace(
        plan.parts("a")[0],
        tensor_parallel_size=1,
        fraction=1.0,
        replicas=2,
        slots=(Slot(node="n0", devices=(0,)), Slot(node="n1", devices=(0,))),
    )
    nodes = tuple(
        Node(name=f"n{index}", device_type=kind, devices=2, memory_gib=80, nvlink_domains=((0, 1),))
        for index, kind in enumerate(("H100", "A100"))
    )
    broken = replace(plan, cluster=Cluster(nodes=nodes), llms=(part,))
    assert check_requirements(broken, NO_REQUIREMENTS) == []
    required = LLMRequirements(min_replicas=3, max_devices=1.5, max_nodes=1, only_device_types=("H100",))
    told = check_requirements(broken, Requirements(llms={"a": required}))
    assert [line.partition(": ")[2] for line in told] == [
        "2 replicas, at least 3 are required",
        "2 devices, at most 1.5 are allowed",
        "on 2 nodes, at most 1 are allowed",
        "on A100, only H100 is allowed",
    ]
    other = LLMRequirements(fixed=(Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=1),))
    assert check_requirements(broken, Requirements(llms={"a": other})) == ["a: its groups are not the fixed ones"]
    late = Requirements(workflows={"w": WorkflowRequirements(latency_limit_s=0.5)})
    assert check_requirements(plan, late)[0].startswith("w: a mean latency of ")


def test_sizes_by_nodes_and_types():
    cluster = parse_cluster("8xH100+2x4xL40S")
    assert max_units_of(LLMRequirements(), cluster) == 160
    assert max_units_of(LLMRequirements(max_nodes=2), cluster) == 120
    assert max_units_of(LLMRequirements(max_nodes=1, only_device_types=("L40S",)), cluster) == 40
    assert max_units_of(LLMRequirements(max_devices=0.5), cluster) == 5


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_weights_of_workflows_shift_the_objective_alone(workload, first, second):
    requirements = Requirements(
        workflows={"w": WorkflowRequirements(weight=first), "x": WorkflowRequirements(weight=second)}
    )
    weights = np.array(objective_weights(workload, requirements))
    assert weights.sum() == pytest.approx(1)
    of_w = np.array([timeline.workflow == "w" for timeline in workload.timelines])
    assert weights[of_w].sum() / weights[~of_w].sum() == pytest.approx(first / second)
    assert objective_weights(workload, NO_REQUIREMENTS) == pytest.approx(workload.weights)


def test_what_makes_no_sense_is_told(workload):
    half = Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=1)
    assert LLMRequirements(fixed=(replace(half, fraction=Fraction(0.1)),)).fixed[0].fraction == Fraction(1, 10)
    for wrong, told in (
        (lambda: LLMRequirements(fixed=(half,), max_devices=1), "takes no further limits"),
        (lambda: LLMRequirements(fixed=(replace(half, fraction=Fraction(1, 3)),)), "not a whole number of tenths"),
        (lambda: LLMRequirements(fixed=(replace(half, tensor_parallel_size=2),)), "or of a fraction of one"),
        (lambda: LLMRequirements(fixed=(replace(half, replicas=0),)), "at least one replica"),
        (lambda: LLMRequirements(min_replicas=0), "min_replicas 0 must be at least 1"),
        (lambda: LLMRequirements(max_devices=0), "max_devices 0 must be above 0"),
        (lambda: LLMRequirements(max_nodes=0), "max_nodes 0 must be at least 1"),
        (lambda: WorkflowRequirements(weight=0), "must be a positive number"),
        (lambda: WorkflowRequirements(weight=float("nan")), "must be a positive number"),
        (lambda: WorkflowRequirements(latency_limit_s=-1), "must be a positive number"),
    ):
        with pytest.raises(ScepsyError, match=told):
            wrong()
    for requirements, told in (
        (Requirements(llms={"z": LLMRequirements()}), "no LLM z; there is a, b"),
        (Requirements(workflows={"z": WorkflowRequirements()}), "no workflow z; there is w, x"),
        (
            Requirements(llms={"a": LLMRequirements(only_device_types=("B200",))}),
            "no device type B200; there is H100",
        ),
    ):
        with pytest.raises(ScepsyError, match=told):
            require_known(requirements, workload, CLUSTER)
