import pytest

from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.placement import check_placement
from scepsy_optimizer.planner import optimize
from scepsy_optimizer.questions import optimize_devices, optimize_rate
from scepsy_optimizer.search import find_allocation
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
