"""The search against exhaustive enumeration, HiGHS, and its own certificate."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.baselines import even_split
from scepsy_optimizer.choosing import choose
from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.makespans import Makespans
from scepsy_optimizer.pipeline import build_pipeline, paper_latency_s, workflow_latencies_s
from scepsy_optimizer.placement import place
from scepsy_optimizer.replica import CallSpeed
from scepsy_optimizer.requirements import NO_REQUIREMENTS, Requirements, WorkflowRequirements, objective_weights
from scepsy_optimizer.search import find_allocation, highest_rate, list_tables
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


def exhaustive(workload, tables, budgets, requirements=NO_REQUIREMENTS):
    """The least weighted mean makespan over every combination of options within the budgets by device type."""
    weights = np.array(objective_weights(workload, requirements))
    makespans = Makespans(workload)
    best = float("inf")
    for rows in itertools.product(*(range(len(tables[llm])) for llm in makespans.llms)):
        picked = list(zip((tables[llm] for llm in makespans.llms), rows, strict=True))
        if any(sum(table.units_of(kind)[row] for table, row in picked) > most for kind, most in budgets.items()):
            continue
        found = makespans.makespans_s(np.array([table.speeds[row] for table, row in picked]))
        means = {
            workflow: np.mean(
                [value for value, run in zip(found, workload.timelines, strict=True) if run.workflow == workflow]
            )
            for workflow in workload.workflows
        }
        if all(means[workflow] <= limit for workflow, limit in requirements.latency_limits_s.items()):
            best = min(best, float(weights @ found))
    return best


@pytest.fixture(scope="module")
def pair(make_execution):
    """Two workflows of two LLMs at once: whichever is slower decides."""
    runs = [
        make_execution(f"e{n}", [("a", 0, 2 + n % 3), ("b", 0, 3), ("b", 5, 7)], workflow="wx"[n % 2], tokens=(700, 90))
        for n in range(6)
    ] + [make_execution("f", [("a", 0, 2), ("a", 2, 4), ("b", 4, 5)], workflow="x", tokens=(300, 200))]
    return aggregate(runs)


@pytest.mark.parametrize(("rate", "units"), [(0.5, 20), (4.0, 30), (12.0, 40)])
def test_the_search_finds_the_optimum_over_all_options_and_proves_it(pair, profiles, rate, units):
    cluster = parse_cluster("2x2xH100")
    found = find_allocation(pair, profiles, cluster, rate_rps=rate, max_units=units)
    tables = list_tables(pair, profiles, cluster, rate_rps=rate, max_units=units)
    assert found is not None
    assert any(np.count_nonzero(table.counts, axis=1).max() > 1 for table in tables.values())
    best = exhaustive(pair, tables, {"": units})
    assert found.lower_bound_s <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.latency_s <= best * (1 + 1.01e-4)
    assert found.lower_bound_s >= found.latency_s * (1 - 1.01e-4)


def test_weights_and_limits_of_workflows_are_kept(pair, profiles):
    cluster = parse_cluster("3xH100")
    tables = list_tables(pair, profiles, cluster, rate_rps=4.0)
    free = find_allocation(pair, profiles, cluster, rate_rps=4.0)
    speeds = {llm: option.speed for llm, option in free.options.items()}
    limit_s = workflow_latencies_s(pair, speeds)["w"] * 0.985
    seen = set()
    for requirements in (
        Requirements(workflows={"x": WorkflowRequirements(weight=20.0)}),
        Requirements(workflows={"w": WorkflowRequirements(latency_limit_s=limit_s)}),
        Requirements(workflows={"w": WorkflowRequirements(latency_limit_s=limit_s / 100)}),
    ):
        best = exhaustive(pair, tables, {"": 30}, requirements)
        found = find_allocation(pair, profiles, cluster, rate_rps=4.0, requirements=requirements)
        assert (found is None) == (best == float("inf"))
        seen.add(found is None)
        if found is not None:
            assert found.latency_s == pytest.approx(best, rel=1.01e-4)
    assert seen == {True, False}


@pytest.mark.parametrize("load", [0.3, 0.97])
def test_two_device_types_share_an_llm_where_that_is_best(pair, profiles, load):
    cluster = Cluster(nodes=(*parse_cluster("1xH100").nodes, replace(parse_cluster("2xL40S").nodes[0], name="other")))
    both = {
        llm: (
            profile,
            replace(profile, device_type="L40S", device_memory_gib=44.7, steps=tuple(map(slower, profile.steps))),
        )
        for llm, profile in profiles.items()
    }
    highest, bottleneck = highest_rate(pair, both, cluster)
    assert bottleneck in {"a", "b"}
    assert highest > highest_rate(pair, both, parse_cluster("1xH100"))[0]
    rate = load * highest
    found = find_allocation(pair, both, cluster, rate_rps=rate)
    tables = list_tables(pair, both, cluster, rate_rps=rate)
    assert found is not None
    assert found.latency_s == pytest.approx(exhaustive(pair, tables, {"H100": 10, "L40S": 20}), rel=1.01e-4)
    assert find_allocation(pair, both, cluster, rate_rps=highest * 1.0001) is None
    types = {group.device_type for option in found.options.values() for group in option.groups}
    assert types == ({"H100", "L40S"} if load > 0.5 else types)
    for device_type, most in (("H100", 10), ("L40S", 20)):
        groups = [group for option in found.options.values() for group in option.groups]
        assert sum(group.units for group in groups if group.device_type == device_type) <= most


def packs(items, left):
    """Whether items of some tenths fit into devices with so many left, by trying all of them."""
    if not items:
        return True
    places = {free: index for index, free in enumerate(left) if free >= items[0]}
    return any(packs(items[1:], [*left[:index], free - items[0], *left[index + 1 :]]) for free, index in places.items())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), load=st.sampled_from([0.3, 0.7, 0.95, 1.0]), devices=st.integers(1, 3))
def test_of_any_tenths_it_takes_the_best_that_can_be_packed(pair, profiles, seed, load, devices):
    """From a few options of each LLM; devices of ten tenths are filled by trying everything."""
    cluster = parse_cluster(f"{devices}xH100")
    rate = load * highest_rate(pair, profiles, cluster)[0]
    rng = np.random.default_rng(seed)
    tables = {
        llm: table.select(rng.permutation(len(table))[:60])
        for llm, table in list_tables(pair, profiles, cluster, rate_rps=rate).items()
    }
    makespans = Makespans(pair)
    best = float("inf")
    for rows in itertools.product(*(range(len(tables[llm])) for llm in makespans.llms)):
        picked = [(tables[llm], row) for llm, row in zip(makespans.llms, rows, strict=True)]
        items = []
        for table, row in picked:
            for kind, count in zip(table.kinds, table.counts[row], strict=True):
                items += [kind.units] * count
        if sum(items) > 10 * devices:
            continue
        # A group of whole devices empties as many of them.
        whole = sum(item for item in items if item >= 10) // 10
        if packs(sorted((item for item in items if item < 10), reverse=True), [10] * (devices - whole)):
            found = makespans.makespans_s(np.array([table.speeds[row] for table, row in picked]))
            best = min(best, float(np.array(pair.weights) @ found))
    found = choose(pair, makespans, cluster, tables)
    assert (found is None) == (best == float("inf"))
    if found is not None:
        assert found.lower_bound_s <= best * (1 + 1e-9)
        assert best * (1 - 1e-9) <= found.latency_s <= best * (1 + 1.01e-4)
        assert place({llm: option.groups for llm, option in found.options.items()}, cluster) is not None


def test_candidates_are_near_the_best_and_differ_in_replicas(pair, profiles):
    cluster = parse_cluster("2x2xH100")
    found = find_allocation(pair, profiles, cluster, rate_rps=4.0, most=6)
    assert found == replace(found, candidates=tuple(sorted(found.candidates, key=lambda one: one.latency_s)))
    assert len(found.candidates) > 2
    assert found.candidates[-1].latency_s <= found.latency_s * 1.05
    seen = set()
    for candidate in found.candidates:
        groups = {llm: option.groups for llm, option in candidate.options.items()}
        assert place(groups, cluster) is not None
        speeds = {llm: option.speed for llm, option in candidate.options.items()}
        assert candidate.latency_s == pytest.approx(build_pipeline(pair, speeds).built_latency_s)
        replicas = Counter()
        for llm, one in ((name, group) for name, mine in groups.items() for group in mine):
            replicas[llm, one.tensor_parallel_size if one.fraction == 1 else "fractions"] += one.replicas
        seen.add(frozenset(replicas.items()))
    assert len(seen) == len(found.candidates)


@pytest.mark.parametrize("rate", [4.0, 9.0, 12.0])
def test_the_best_without_mixed_replicas_is_a_candidate(pair, profiles, rate):
    cluster = parse_cluster("2x2xH100")
    tables = list_tables(pair, profiles, cluster, rate_rps=rate)
    alone = {llm: table.select(np.count_nonzero(table.counts, axis=1) == 1) for llm, table in tables.items()}
    assert any(len(alone[llm]) < len(table) for llm, table in tables.items())
    best = choose(pair, Makespans(pair), cluster, alone)
    found = choose(pair, Makespans(pair), cluster, tables, most=6)
    assert found.latency_s <= best.latency_s * (1 + 1e-4)
    unmixed = [one for one in found.candidates if all(len(option.groups) == 1 for option in one.options.values())]
    assert min(one.latency_s for one in unmixed) == pytest.approx(best.latency_s, rel=2e-4)


def slower(steps):
    return replace(
        steps,
        decode_s=tuple(tuple(2.2 * time for time in row) for row in steps.decode_s),
        prefill_s=tuple(2.6 * time for time in steps.prefill_s),
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_makespans_in_arrays_are_those_of_the_timelines(workload, seed):
    rng = np.random.default_rng(seed)
    makespans = Makespans(workload)
    values = rng.uniform(0, 1, (3, 3)) * np.array([0.1, 1e-4, 0.02])
    speeds = {
        llm: CallSpeed(fixed_s=fixed, input_s=each, output_s=out)
        for llm, (fixed, each, out) in zip(makespans.llms, values.tolist(), strict=True)
    }
    tangents = makespans.tangents(makespans.speeds(speeds))
    weights = np.array(workload.weights)
    pipeline = build_pipeline(workload, speeds)
    assert weights @ tangents.makespans_s == pytest.approx(pipeline.built_latency_s)
    assert weights @ makespans.makespans_s(values) == pytest.approx(pipeline.built_latency_s)
    assert weights @ tangents.fixed_s == pytest.approx(pipeline.fixed_s)
    stages = [[stage.calls, stage.input_tokens, stage.output_tokens] for stage in pipeline.stages]
    assert np.tensordot(weights, tangents.coefficients, 1) == pytest.approx(np.array(stages))
    other = rng.uniform(0, 1, (3, 3)) * np.array([0.1, 1e-4, 0.02])
    bounds = tangents.fixed_s + np.tensordot(tangents.coefficients, other, 2)
    assert (bounds <= makespans.makespans_s(other) + 1e-9).all()


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
    with pytest.raises(ScepsyError, match=r"needs at least 3 for a \(1\), b \(1\), c \(1\); the cluster has 2"):
        even_split(["a", "b", "c"], profiles, devices=2, max_tensor_parallel_size=2)
    with pytest.raises(ScepsyError, match="'a' .* does not fit at any tensor parallelism up to 1"):
        even_split(["a"], big, devices=1, max_tensor_parallel_size=1)
