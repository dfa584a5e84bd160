import pytest

from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.planner import hand_made_plan, optimize, plan_choices
from scepsy_optimizer.sharing import share_plan
from scepsy_optimizer.workload import aggregate

CLUSTER = parse_cluster("3xH100")


@pytest.fixture(scope="module")
def executions(make_execution):
    """One workflow calls a and b, the other b only."""
    both = [make_execution(f"e{n}", [("a", 0, 2 + n % 3), ("b", 5, 7)], workflow="both") for n in range(6)]
    return both + [make_execution(f"f{n}", [("b", 0, 3)], workflow="one") for n in range(6)]


@pytest.fixture(scope="module")
def alone(executions):
    return {name: aggregate([run for run in executions if run.workflow == name]) for name in ("both", "one")}


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {"a": make_profile("a"), "b": make_profile("b", scale=0.5, weights_gib=4.0)}


@pytest.mark.parametrize("rates", [{"both": 3.0, "one": 1.0}, {"both": 0.5, "one": 6.0}])
def test_what_workflows_use_adds_up_to_the_plan(executions, alone, profiles, rates):
    workload = aggregate(executions, rates_rps=rates)
    plan = optimize(workload, profiles, CLUSTER, rate_rps=sum(rates.values()))
    shares = {share.workflow: share for share in share_plan(plan, workload, alone, profiles)}
    assert {name: share.rate_rps for name, share in shares.items()} == pytest.approx(rates)
    devices = sum(part.device_count for part in plan.llms)
    assert sum(share.devices for share in shares.values()) == pytest.approx(devices)
    of_b = sum(part.device_count for part in plan.parts("b"))
    seconds = {name: rates[name] * alone[name].demand("b").service_s for name in rates}
    assert shares["one"].devices == pytest.approx(of_b * seconds["one"] / sum(seconds.values()))
    for name, share in shares.items():
        assert share.latency_s == plan.prediction.workflow_latency_s[name]
        # Alone it may use what it uses in the shared plan, with less load on it.
        assert share.alone_s <= share.latency_s * (1 + plan.prediction.gap + 0.01)
        assert share.alone_s <= share.part_s * 1.001
        assert share.gains == (share.latency_s <= share.part_s)


def test_a_workflow_that_has_all_to_itself_pays_for_itself(executions, alone, profiles):
    plan = optimize(alone["both"], profiles, CLUSTER, rate_rps=2.0)
    (share,) = share_plan(plan, alone["both"], alone, profiles)
    assert share.devices == pytest.approx(sum(part.device_count for part in plan.llms))
    assert share.alone_s == pytest.approx(share.latency_s)
    assert share.part_s == pytest.approx(share.latency_s, rel=0.01)


def test_a_part_too_small_to_live_on_is_told(executions, alone, make_profile):
    profiles = {llm: make_profile(llm, sizes=(1,), weights_gib=60.0) for llm in "ab"}
    rates = {"both": 0.001, "one": 4.0}
    workload = aggregate(executions, rates_rps=rates)
    plan = optimize(workload, profiles, CLUSTER, rate_rps=4.001)
    both, one = share_plan(plan, workload, alone, profiles)
    assert both.part_s == float("inf")
    assert both.gains
    assert one.part_s < float("inf")


def test_a_plan_without_prediction_says_nothing(executions, alone, profiles):
    workload = aggregate(executions)
    choices = plan_choices(optimize(workload, profiles, CLUSTER, rate_rps=1.0))
    with pytest.raises(ScepsyError, match="without a prediction"):
        share_plan(hand_made_plan(choices, profiles, CLUSTER), workload, alone, profiles)
