from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.planner import optimize
from scepsy_optimizer.requirements import LLMRequirements, Requirements, check_requirements
from scepsy_optimizer.robust import load_factors, loaded_workload, plan_robustly
from scepsy_optimizer.search import highest_rate
from scepsy_optimizer.workload import aggregate

CLUSTER = parse_cluster("4xH100")


@pytest.fixture(scope="module")
def workload(make_execution):
    """Few executions: a is called rarely and for long, b always alike."""
    runs = [
        make_execution(f"e{n}", [("b", 0, 1), *([("a", 1, 9), ("a", 9, 15)] if n % 4 == 0 else [])]) for n in range(12)
    ]
    return aggregate(runs)


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {"a": make_profile("a"), "b": make_profile("b", scale=0.5, weights_gib=4.0)}


def test_factors_are_the_quantiles_of_resampled_means(workload):
    factors = load_factors(workload, quantile=0.9, rng=np.random.default_rng(1))
    assert factors["b"] == pytest.approx(1)
    # Three of twelve executions call a: a binomial of twelve draws, whose 0.9 quantile is 5.
    assert factors["a"] == pytest.approx(5 / 3)
    assert load_factors(workload, quantile=0.5, rng=np.random.default_rng(1))["a"] == pytest.approx(1)


@settings(max_examples=20)
@given(low=st.floats(0.5, 0.98), high=st.floats(0.5, 0.98), seed=st.integers(0, 9))
def test_factors_rise_with_the_quantile(workload, low, high, seed):
    low, high = sorted((low, high))
    lower = load_factors(workload, quantile=low, rng=np.random.default_rng(seed))
    upper = load_factors(workload, quantile=high, rng=np.random.default_rng(seed))
    assert all(1 <= lower[llm] <= upper[llm] for llm in lower)


def test_loads_rise_and_executions_stay(workload):
    loaded = loaded_workload(workload, {"a": 2.0, "b": 1.0})
    assert loaded.demand("a").visits == 2 * workload.demand("a").visits
    assert sum(loaded.demand("a").visits_by_role.values()) == pytest.approx(loaded.demand("a").visits)
    assert loaded.demand("b") == workload.demand("b")
    assert loaded.timelines == workload.timelines


@pytest.mark.parametrize("load", [0.1, 0.5])
def test_a_robust_plan_carries_what_the_plain_one_may_not(workload, profiles, load):
    rate = load * highest_rate(workload, profiles, CLUSTER)[0]
    plan, found = plan_robustly(
        lambda asked: optimize(asked, profiles, CLUSTER, rate_rps=rate),
        workload,
        profiles,
        quantile=0.9,
        rng=np.random.default_rng(0),
    )
    assert found.plain == optimize(workload, profiles, CLUSTER, rate_rps=rate)
    assert plan.prediction is not None
    assert found.plain.prediction is not None
    # Its price at the mean is within what the plain plan's own certificate leaves open, or positive.
    assert plan.prediction.latency_s >= found.plain.prediction.lower_bound_s
    assert plan.prediction.lower_bound_s == pytest.approx(found.plain.prediction.lower_bound_s)
    assert plan.prediction.gap == pytest.approx(1 - plan.prediction.lower_bound_s / plan.prediction.latency_s)
    assert all(load_of(plan, llm) * factor <= 0.85 + 1e-9 for llm, factor in found.factors.items())
    assert found.at_quantile.latency_s < float("inf")
    # Where the plain plan would do as well, it is at most as fast there.
    if found.plain_at_quantile.utilisation <= 0.85:
        assert found.at_quantile.latency_s <= found.plain_at_quantile.latency_s * 1.001


def load_of(plan, llm):
    """An LLM's load over all its groups, as a part of their saturation."""
    groups = plan.parts(llm)
    return 0.85 * sum(one.rate_rps for one in groups) / sum(one.replicas * one.replica_rps for one in groups)


def test_near_saturation_only_the_robust_plan_survives_the_quantile(workload, profiles):
    factors = load_factors(workload, quantile=0.9, rng=np.random.default_rng(0))
    rate = 0.999 * highest_rate(loaded_workload(workload, factors), profiles, CLUSTER)[0]
    plan, found = plan_robustly(
        lambda asked: optimize(asked, profiles, CLUSTER, rate_rps=rate),
        workload,
        profiles,
        quantile=0.9,
        rng=np.random.default_rng(0),
    )
    assert all(load_of(plan, llm) * factor <= 0.85 + 1e-9 for llm, factor in found.factors.items())
    assert any(load_of(found.plain, llm) * factor > 0.85 + 1e-9 for llm, factor in found.factors.items())
    assert found.at_quantile.utilisation < found.plain_at_quantile.utilisation
    with pytest.raises(ScepsyError, match="is out of reach"):
        plan_robustly(
            lambda asked: optimize(asked, profiles, CLUSTER, rate_rps=rate * 1.01),
            workload,
            profiles,
            quantile=0.9,
            rng=np.random.default_rng(0),
        )


@pytest.mark.parametrize("quantile", [0.4, 1.0, 90, float("nan")])
def test_quantiles_are_between_a_half_and_one(workload, quantile):
    with pytest.raises(ScepsyError, match="at least 0.5 and below 1"):
        load_factors(workload, quantile=quantile, rng=np.random.default_rng(0))


def test_a_robust_plan_keeps_its_requirements(workload, profiles):
    def robust(requirements):
        return plan_robustly(
            lambda asked: optimize(asked, profiles, parse_cluster("3x4xH100"), rate_rps=0.5, requirements=requirements),
            workload,
            profiles,
            quantile=0.9,
            rng=np.random.default_rng(1),
        )[0]

    def fixed(replicas):
        return LLMRequirements(fixed=(Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=replicas),))

    together = Requirements(llms={"a": LLMRequirements(max_nodes=1, min_replicas=3)})
    assert check_requirements(robust(together), together) == []
    apart = robust(Requirements(llms={"a": fixed(3), "b": fixed(1)}, spread=True))
    assert len({slot.node for part in apart.parts("a") for slot in part.slots}) == 3
