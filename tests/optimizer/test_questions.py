import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.allocation import (
    MAX_UTILISATION,
    UTILISATION_TOLERANCE,
    Choice,
    evaluate_groups,
    replica_kinds,
)
from scepsy_optimizer.cluster import Cluster, Node, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.judging import with_replay
from scepsy_optimizer.pipeline import build_pipeline
from scepsy_optimizer.placement import check_placement
from scepsy_optimizer.planner import find_plans, optimize, plan_choices
from scepsy_optimizer.questions import optimize_devices, optimize_rate
from scepsy_optimizer.requirements import Requirements, WorkflowRequirements
from scepsy_optimizer.search import find_allocation, highest_rate
from scepsy_optimizer.workload import aggregate

CLUSTER = parse_cluster("4xH100")


@pytest.fixture(scope="module")
def workload(make_execution):
    runs = [make_execution(f"e{n}", [("a", 0, 2 + n % 3), ("a", 0, 3), ("b", 5, 7)]) for n in range(10)]
    return aggregate(runs)


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {"a": make_profile("a"), "b": make_profile("b", scale=0.5, weights_gib=4.0)}


def used(plan):
    return sum(part.device_count for part in plan.llms)


def test_the_highest_rate_within_a_latency_is_a_limit(workload, profiles):
    light = optimize(workload, profiles, CLUSTER, rate_rps=0.01).prediction
    assert light is not None
    plan = optimize_rate(workload, profiles, CLUSTER, latency_s=light.latency_s * 1.3)
    assert plan.prediction is not None
    assert plan.prediction.latency_s <= light.latency_s * 1.3
    beyond = optimize(workload, profiles, CLUSTER, rate_rps=plan.rate_rps * 1.01).prediction
    assert beyond is not None
    assert beyond.latency_s > light.latency_s * 1.3
    with pytest.raises(ScepsyError, match="even without load: the least is"):
        optimize_rate(workload, profiles, CLUSTER, latency_s=light.latency_s / 2)


def test_next_to_the_highest_rate_there_is_still_a_choice(workload, make_profile):
    """What carries most is not what is quickest; beyond the highest rate nothing is tolerated."""
    profiles = {"a": make_profile("a"), "b": make_profile("b", scale=0.2, weights_gib=4.0)}
    cluster = parse_cluster("3xH100")
    highest, _ = highest_rate(workload, profiles, cluster)
    gained = []
    for part in (0.97, 0.99, 0.9999):
        plan = optimize(workload, profiles, cluster, rate_rps=highest * part)
        (strict,) = find_plans(workload, profiles, cluster, rate_rps=highest * part, most=1)
        utilisation = max(
            evaluate_groups(
                demand, (profiles[demand.llm],), plan_choices(plan)[demand.llm], calls_rps=plan.rate_rps * demand.visits
            ).utilisation
            for demand in workload.demands
        )
        assert utilisation <= MAX_UTILISATION * (1 + UTILISATION_TOLERANCE) * (1 + 1e-9)
        assert plan.rate_rps <= plan.prediction.max_rate_rps * (1 + 1e-9)
        assert plan.prediction.latency_s <= strict.prediction.latency_s * (1 + 1e-9)
        gained.append(1 - plan.prediction.latency_s / strict.prediction.latency_s)
    assert gained[0] == pytest.approx(0, abs=1e-9)
    assert gained[-1] > 0.05
    with pytest.raises(ScepsyError, match="out of reach"):
        optimize(workload, profiles, cluster, rate_rps=highest * 1.001)


@pytest.mark.parametrize("options", [{}, {"replay_seed": 0}, {"percentile": 95}])
def test_a_limit_that_only_what_is_tolerated_keeps(workload, make_profile, options):
    """Next to the highest rate the quickest plan is beyond the strict limit on utilisation; it is an answer, too."""
    profiles = {"a": make_profile("a"), "b": make_profile("b", scale=0.2, weights_gib=4.0)}
    cluster = parse_cluster("3xH100")
    rate = highest_rate(workload, profiles, cluster)[0] * 0.9999
    tolerated = optimize(workload, profiles, cluster, rate_rps=rate, replay_seed=0).prediction
    (strict,) = find_plans(workload, profiles, cluster, rate_rps=rate, most=1)
    limit_s = (
        optimize(workload, profiles, cluster, rate_rps=rate).prediction.latency_s + strict.prediction.latency_s
    ) / 2
    if options.get("percentile"):
        limit_s = tolerated.replayed.p95_s * 1.001
    plan = optimize_devices(workload, profiles, cluster, rate_rps=rate, latency_s=limit_s, **options)
    found = plan.prediction
    assert (found.replayed.p95_s if options.get("percentile") else found.latency_s) <= limit_s


def test_the_parts_of_the_latency_add_up_to_it(workload, profiles):
    found = optimize(workload, profiles, CLUSTER, rate_rps=0.5).prediction
    assert found is not None
    assert found.llm_latency_s.keys() == {"a", "b"}
    assert sum(found.llm_latency_s.values()) + found.tool_s == pytest.approx(found.latency_s, rel=1e-9)


def test_a_search_for_a_limit_says_how_far_it_is(workload, profiles):
    light = optimize(workload, profiles, CLUSTER, rate_rps=0.01).prediction
    assert light is not None
    limit_s = light.latency_s * 1.3
    told: list[list[float]] = [[], []]
    plan = optimize_rate(workload, profiles, CLUSTER, latency_s=limit_s, on_progress=told[0].append)
    optimize_devices(
        workload, profiles, CLUSTER, rate_rps=plan.rate_rps / 4, latency_s=limit_s, on_progress=told[1].append
    )
    for parts in told:
        assert parts[0] == 0
        assert parts == sorted(parts)
        assert 0.7 < parts[-1] <= 1


@pytest.mark.parametrize("latency_s", [0.0, -1.0, float("nan")])
def test_a_latency_limit_is_a_positive_number(workload, profiles, latency_s):
    with pytest.raises(ScepsyError, match="must be a positive number of seconds"):
        optimize_rate(workload, profiles, CLUSTER, latency_s=latency_s)
    with pytest.raises(ScepsyError, match="must be a positive number of seconds"):
        optimize_devices(workload, profiles, CLUSTER, rate_rps=1.0, latency_s=latency_s)


def test_a_model_that_fits_nowhere_is_named(workload, profiles, make_profile):
    huge = {**profiles, "b": make_profile("b", weights_gib=900.0)}
    with pytest.raises(ScepsyError, match="^b does not fit at any profiled tensor parallelism up to 4: use devices"):
        optimize(workload, huge, CLUSTER, rate_rps=1.0)


def test_a_generous_latency_leaves_the_rate_to_saturation(workload, profiles):
    plan = optimize_rate(workload, profiles, CLUSTER, latency_s=1000)
    with pytest.raises(ScepsyError, match="is out of reach"):
        optimize(workload, profiles, CLUSTER, rate_rps=plan.rate_rps * 1.01)


def test_the_fewest_devices_are_a_limit(workload, profiles):
    whole = optimize(workload, profiles, CLUSTER, rate_rps=2.0)
    assert whole.prediction is not None
    limit_s = whole.prediction.latency_s * 1.5
    plan = optimize_devices(workload, profiles, CLUSTER, rate_rps=2.0, latency_s=limit_s)
    assert check_placement(plan) == []
    assert plan.prediction is not None
    assert plan.prediction.latency_s <= limit_s
    assert used(plan) < used(whole)
    fewer = find_allocation(workload, profiles, CLUSTER, rate_rps=2.0, max_units=round(used(plan) * 10) - 1)
    assert fewer is None or fewer.latency_s > limit_s
    with pytest.raises(ScepsyError, match="is out of reach on 4 H100: the least is"):
        optimize_devices(workload, profiles, CLUSTER, rate_rps=2.0, latency_s=limit_s / 10)


def exhaustive(workload, profiles, rate, devices=2):
    """Units and true mean makespan of every combination of groups of equal replicas that carries the rate.

    Of half a device or more each: smaller ones would only make it longer.
    """
    tables = []
    for demand in workload.demands:
        offers = []
        for kind in replica_kinds(
            profiles[demand.llm], max_tensor_parallel_size=devices, fractions=(Fraction(1), Fraction(1, 2))
        ):
            for replicas in range(1, devices * 10 // kind.units + 1):
                group = Choice(
                    tensor_parallel_size=kind.tensor_parallel_size, fraction=kind.fraction, replicas=replicas
                )
                option = evaluate_groups(demand, [profiles[demand.llm]], (group,), calls_rps=rate * demand.visits)
                if option.utilisation <= MAX_UTILISATION * (1 + 1e-9):
                    offers.append((demand.llm, option))
        tables.append(offers)
    for chosen in itertools.product(*tables):
        units = sum(option.units for _, option in chosen)
        if units <= devices * 10:
            speeds = {llm: option.speed for llm, option in chosen}
            yield units, build_pipeline(workload, speeds).built_latency_s


@pytest.mark.parametrize("slack", [1.05, 2.0])
def test_both_limits_are_those_of_exhaustive_search(workload, profiles, slack):
    cluster = parse_cluster("2xH100")
    rate = 3.0
    limit_s = min(latency_s for _, latency_s in exhaustive(workload, profiles, rate)) * slack
    fewest = min(units for units, latency_s in exhaustive(workload, profiles, rate) if latency_s <= limit_s)
    plan = optimize_devices(workload, profiles, cluster, rate_rps=rate, latency_s=limit_s)
    assert round(used(plan) * 10) <= fewest
    assert plan.prediction is not None
    assert plan.prediction.latency_s <= limit_s
    low, high = rate, highest_rate(workload, profiles, cluster)[0]
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        within = any(latency_s <= limit_s for _, latency_s in exhaustive(workload, profiles, middle))
        low, high = (middle, high) if within else (low, middle)
    assert optimize_rate(workload, profiles, cluster, latency_s=limit_s).rate_rps >= low * 0.998


def test_limits_of_workflows_bound_the_highest_rate(workload, profiles):
    light_s = optimize(workload, profiles, CLUSTER, rate_rps=0.01).prediction.latency_s
    limited = Requirements(workflows={"w": WorkflowRequirements(latency_limit_s=light_s * 1.2)})
    plan = optimize_rate(workload, profiles, CLUSTER, requirements=limited)
    assert plan.prediction is not None
    assert plan.prediction.workflow_latency_s["w"] <= light_s * 1.2 * (1 + 1e-9)
    asked = optimize_rate(workload, profiles, CLUSTER, latency_s=light_s * 1.2)
    assert plan.rate_rps == pytest.approx(asked.rate_rps, rel=3e-3)
    hopeless = Requirements(workflows={"w": WorkflowRequirements(latency_limit_s=0.1)})
    with pytest.raises(ScepsyError, match="0.1 s of workflow 'w' is out of reach on 4 H100, even without load"):
        optimize_rate(workload, profiles, CLUSTER, requirements=hopeless)


def test_the_highest_rate_is_of_groups_that_fit_into_domains(workload, make_profile):
    """Two domains of three devices hold one pair each, however many pairs six devices make."""
    nodes = tuple(
        Node(name=f"n{i}", device_type="H100", devices=3, memory_gib=80, nvlink_domains=((0, 1, 2),)) for i in range(2)
    )
    pairs = {llm: make_profile(llm, sizes=(2,)) for llm in "ab"}
    rate = optimize(workload, pairs, Cluster(nodes=nodes), rate_rps=1.0).prediction.max_rate_rps
    assert highest_rate(workload, pairs, Cluster(nodes=nodes))[0] == pytest.approx(rate, rel=2e-6)
    with pytest.raises(ScepsyError, match=f"out of reach on 6 H100: the highest is {rate:.3g}/s, limited by 'a'"):
        optimize(workload, pairs, Cluster(nodes=nodes), rate_rps=rate * 1.5)


def test_without_a_limit_the_highest_rate_is_that_of_saturation(workload, profiles):
    plan = optimize_rate(workload, profiles, CLUSTER)
    assert plan.rate_rps == highest_rate(workload, profiles, CLUSTER)[0]
    assert plan.prediction is not None
    assert plan.prediction.max_rate_rps == pytest.approx(plan.rate_rps, rel=1e-3)


def p95_s(plan):
    return plan.prediction.replayed.p95_s


def test_a_percentile_is_kept_by_the_replay_of_the_answer(workload, profiles):
    cluster = parse_cluster("1xH100")
    light = with_replay(optimize(workload, profiles, cluster, rate_rps=0.01), profiles, workload, 0)
    limit_s = p95_s(light) * 1.1
    asked = {"latency_s": limit_s, "percentile": 95, "replay_seed": 0}
    highest = optimize_rate(workload, profiles, cluster, **asked)
    assert p95_s(highest) <= limit_s
    assert p95_s(with_replay(highest, profiles, workload, 0)) == p95_s(highest)
    beyond = find_plans(workload, profiles, cluster, rate_rps=highest.rate_rps * 1.02)
    assert all(p95_s(with_replay(plan, profiles, workload, 0)) > limit_s for plan in beyond)
    fewest = optimize_devices(workload, profiles, cluster, rate_rps=highest.rate_rps / 2, **asked)
    assert p95_s(fewest) <= limit_s
    assert used(fewest) < used(highest)
    with pytest.raises(ScepsyError, match="a p95 latency of .* is out of reach on 1 H100, even without load"):
        optimize_rate(workload, profiles, cluster, latency_s=0.1, percentile=95)
    with pytest.raises(ScepsyError, match=r"a p99 latency of .* at 1 executions/s is out of reach"):
        optimize_devices(workload, profiles, cluster, rate_rps=1.0, latency_s=0.1, percentile=99)


def test_percentiles_that_cannot_be_asked_for(workload, profiles):
    with pytest.raises(ScepsyError, match="percentile 90: a replay tells 50, 95, 99"):
        optimize_rate(workload, profiles, CLUSTER, latency_s=5.0, percentile=90)
    with pytest.raises(ScepsyError, match="belongs to a latency limit"):
        optimize_rate(workload, profiles, CLUSTER, percentile=95)


@settings(max_examples=10, deadline=None)
@given(rates=st.tuples(st.floats(0.1, 12), st.floats(0.1, 12)), units=st.tuples(st.integers(2, 40), st.integers(2, 40)))
def test_more_devices_are_never_worse_and_a_higher_rate_never_faster(workload, profiles, rates, units):
    def least_s(rate, budget):
        plans = find_plans(workload, profiles, CLUSTER, rate_rps=rate, max_units=budget)
        return (plans[0].prediction.latency_s, plans[0].prediction.lower_bound_s) if plans else (float("inf"),) * 2

    (slow, fast), (few, many) = sorted(rates), sorted(units)
    best_s, bound_s = least_s(slow, many)
    for worse_s, _ in (least_s(slow, few), least_s(fast, many)):
        # A search may end within its certificate of the optimum, and no further off; speeds are bisected to 10^-6.
        assert bound_s <= worse_s * (1 + 1e-6)
        assert best_s <= worse_s * (1 + 1e-6) + (best_s - bound_s) if worse_s < float("inf") else True
