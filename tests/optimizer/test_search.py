"""The search against exhaustive enumeration, HiGHS, and its own certificate."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.allocation import even_split
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.options import list_options, make_offer
from scepsy_optimizer.pipeline import build_pipeline, paper_latency_s
from scepsy_optimizer.replica import CallSpeed
from scepsy_optimizer.search import find_allocation, highest_rate
from scepsy_optimizer.workload import aggregate


@pytest.fixture(scope="module")
def workload(make_execution):
    """Fan-out over two LLMs at once, then a third: the critical path moves with the allocation."""
    runs = []
    for number in range(12):
        branches = [("a", 0, 2 + number % 3), ("b", 0, 1 + number % 5), ("a", 0, 1)]
        end = max(end for _, _, end in branches)
        runs.append(make_execution(f"e{number}", [*branches, ("c", end + 0.1, end + 1.1)], tokens=(800, 150)))
    return aggregate(runs)


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {
        "a": make_profile("a"),
        "b": make_profile("b", scale=2.0, weights_gib=28.0),
        "c": make_profile("c", scale=0.3, weights_gib=2.0),
    }


def exhaustive(workload, profiles, rate, cluster, units):
    """The best true mean makespan over every combination of options."""
    offers = [
        (
            demand.llm,
            list_options(
                make_offer(demand, [profiles[demand.llm]], cluster),
                calls_rps=rate * demand.visits,
                max_units=units,
            ),
        )
        for demand in workload.demands
    ]
    offers = [[(llm, table.option(row)) for row in range(len(table))] for llm, table in offers]
    best = float("inf")
    for chosen in itertools.product(*offers):
        if sum(offer.units for _, offer in chosen) <= units:
            best = min(best, build_pipeline(workload, {llm: offer.speed for llm, offer in chosen}).built_latency_s)
    return best


@pytest.mark.parametrize(("rate", "units"), [(0.5, 20), (2.0, 30), (6.0, 30)])
def test_the_search_is_within_its_certificate_of_the_true_optimum(workload, profiles, rate, units):
    cluster = parse_cluster("2x2xH100")
    found = find_allocation(workload, profiles, cluster, rate_rps=rate, max_units=units)
    best = exhaustive(workload, profiles, rate, cluster, units)
    assert found is not None
    assert found.lower_bound_s <= best + 1e-9 <= found.latency_s + 2e-9
    assert found.latency_s <= best * 1.02


def test_highest_rate_is_just_feasible(workload, profiles):
    cluster = parse_cluster("4xH100")
    rate, bottleneck = highest_rate(workload, profiles, cluster)
    assert find_allocation(workload, profiles, cluster, rate_rps=rate * 0.99999) is not None
    assert find_allocation(workload, profiles, cluster, rate_rps=rate * 1.0001) is None
    assert bottleneck in profiles


@settings(max_examples=25, deadline=None)
@given(rate=st.floats(0.1, 20), devices=st.integers(1, 8))
def test_no_allocation_breaks_its_limits(workload, profiles, rate, devices):
    found = find_allocation(workload, profiles, parse_cluster(f"{devices}xH100"), rate_rps=rate)
    if found is None:
        return
    assert sum(picked.units for picked in found.options.values()) <= devices * 10
    assert found.lower_bound_s <= found.latency_s
    for llm, picked in found.options.items():
        assert picked.utilisation <= 0.85 + 1e-9
        assert picked.max_rps >= rate * workload.demand(llm).visits * (1 - 1e-9)


def test_the_pipeline_is_exact_where_it_was_built_and_a_bound_elsewhere(workload):
    slow = {llm: CallSpeed(fixed_s=0.1, input_s=1e-4, output_s=0.01) for llm in "abc"}
    other = {**slow, "b": CallSpeed(fixed_s=0.1, input_s=1e-4, output_s=0.05)}
    pipeline = build_pipeline(workload, slow)
    assert pipeline.latency_s(slow) == pytest.approx(pipeline.built_latency_s)
    assert pipeline.latency_s(other) <= build_pipeline(workload, other).built_latency_s + 1e-9
    traced = build_pipeline(workload)
    assert traced.built_latency_s == pytest.approx(workload.latency_s)
    assert traced.fixed_s == pytest.approx(workload.tool_s)


def test_the_papers_formula_on_a_sequence_is_the_sum_of_calls(make_execution):
    workload = aggregate([make_execution("e", [("a", 0, 1), ("b", 1, 2), ("a", 2, 3)], tokens=(100, 10))])
    speeds = {
        "a": CallSpeed(fixed_s=0, input_s=0, output_s=0.1),
        "b": CallSpeed(fixed_s=0, input_s=0.01, output_s=0),
    }
    assert paper_latency_s(workload, speeds) == pytest.approx(2 * 1.0 + 1.0)


def test_bad_questions(workload, profiles):
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ScepsyError, match="must be a positive number"):
            find_allocation(workload, profiles, parse_cluster("4xH100"), rate_rps=rate)
    with pytest.raises(ScepsyError, match="no profile for c"):
        find_allocation(workload, {"a": profiles["a"], "b": profiles["b"]}, parse_cluster("1xH100"), rate_rps=1)
    with pytest.raises(ScepsyError, match="do not fit into 0.2 devices"):
        highest_rate(workload, profiles, parse_cluster("1xH100"), max_units=2)


def test_even_split_gives_equal_parts(profiles, make_profile):
    split = even_split(["a", "b", "c"], profiles, devices=8, max_tensor_parallel_size=8)
    assert {llm: choice.units for llm, (choice,) in split.items()} == {"a": 30, "b": 30, "c": 20}
    big = {"a": make_profile("a", weights_gib=130.0)}
    assert even_split(["a"], big, devices=4, max_tensor_parallel_size=4)["a"][0].tensor_parallel_size == 2
    with pytest.raises(ScepsyError, match="needs a device for each of 3 LLMs"):
        even_split(["a", "b", "c"], profiles, devices=2, max_tensor_parallel_size=2)
    with pytest.raises(ScepsyError, match="does not fit into its even part"):
        even_split(["a"], big, devices=1, max_tensor_parallel_size=1)
