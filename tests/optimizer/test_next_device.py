from dataclasses import replace

import pytest

from scepsy_optimizer.allocation import Choice, evaluate_groups, replica_kinds
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.next_device import next_device
from scepsy_optimizer.pipeline import build_pipeline
from scepsy_optimizer.planner import optimize, plan_choices
from scepsy_optimizer.requirements import LLMRequirements, Requirements, kept
from scepsy_optimizer.workload import aggregate


@pytest.fixture(scope="module")
def workload(make_execution):
    runs = [make_execution(f"e{n}", [("a", 0, 2 + n % 3), ("b", 0, 3), ("b", 5, 7)]) for n in range(8)]
    return aggregate(runs)


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {"a": make_profile("a", sizes=(1, 2)), "b": make_profile("b", sizes=(1, 2), scale=0.5, weights_gib=4.0)}


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_what_it_buys_is_at_least_what_any_group_of_equal_replicas_would_give(workload, profiles, rate):
    plan = optimize(workload, profiles, parse_cluster("3xH100"), rate_rps=rate)
    now = {
        demand.llm: evaluate_groups(
            demand, [profiles[demand.llm]], plan_choices(plan)[demand.llm], calls_rps=rate * demand.visits
        )
        for demand in workload.demands
    }
    found = {one.llm: one for one in next_device(workload, profiles, plan)}
    assert found.keys() == {"a", "b"}
    for demand in workload.demands:
        one = found[demand.llm]
        assert one.latency_s <= plan.prediction.latency_s + 1e-9
        assert one.max_rate_rps >= plan.prediction.max_rate_rps - 1e-9
        units = now[demand.llm].units + 10
        assert sum(group.units for group in one.groups) <= units
        speeds = {llm: option.speed for llm, option in now.items()}

        def latency_s(groups, demand=demand, speeds=speeds):
            option = evaluate_groups(demand, [profiles[demand.llm]], groups, calls_rps=rate * demand.visits)
            return build_pipeline(workload, {**speeds, demand.llm: option.speed}).built_latency_s

        assert one.latency_s == pytest.approx(latency_s(one.groups))
        for kind in replica_kinds(profiles[demand.llm], max_tensor_parallel_size=4):
            for replicas in range(1, units // kind.units + 1):
                group = Choice(
                    tensor_parallel_size=kind.tensor_parallel_size, fraction=kind.fraction, replicas=replicas
                )
                assert one.latency_s <= latency_s((group,)) + 1e-9


def test_only_the_bottleneck_lifts_the_highest_rate(workload, profiles):
    plan = optimize(workload, profiles, parse_cluster("3xH100"), rate_rps=20.0)
    for one in next_device(workload, profiles, plan):
        if one.llm == plan.prediction.bottleneck:
            assert one.max_rate_rps > plan.prediction.max_rate_rps
        else:
            assert one.max_rate_rps == pytest.approx(plan.prediction.max_rate_rps)


def test_each_device_type_is_told_for_itself(workload, profiles, make_profile):
    both = {
        "a": (profiles["a"], replace(make_profile("a", sizes=(1,), scale=3.0), device_type="L40S")),
        "b": profiles["b"],
    }
    plan = optimize(workload, both, parse_cluster("2xH100+1xL40S"), rate_rps=0.5)
    found = next_device(workload, both, plan)
    assert sorted((one.llm, one.device_type) for one in found) == [("a", "H100"), ("a", "L40S"), ("b", "H100")]
    assert [one.latency_s for one in found] == sorted(one.latency_s for one in found)
    for one in found:
        now = dict.fromkeys(("H100", "L40S"), 0)
        for group in plan_choices(plan)[one.llm]:
            now[group.device_type] += group.units
        now[one.device_type] += 10
        for group in one.groups:
            now[group.device_type] -= group.units
        assert min(now.values()) >= 0


def test_requirements_are_respected(workload, profiles, make_profile):
    plan = optimize(workload, profiles, parse_cluster("3xH100"), rate_rps=0.5)
    free = {one.llm: one for one in next_device(workload, profiles, plan)}
    assert free["b"].groups != plan_choices(plan)["b"]
    fixed = Requirements(llms={"a": kept(plan, "a")})
    assert [one.llm for one in next_device(workload, profiles, plan, requirements=fixed)] == ["b"]
    now = sum(group.units for group in plan_choices(plan)["b"]) / 10
    most = Requirements(llms={"b": LLMRequirements(max_devices=now)})
    limited = {one.llm: one for one in next_device(workload, profiles, plan, requirements=most)}
    assert sum(group.units for group in limited["b"].groups) <= now * 10
    assert limited["a"] == free["a"]
    both = {"a": (profiles["a"], replace(make_profile("a", sizes=(1,)), device_type="L40S")), "b": profiles["b"]}
    mixed = optimize(workload, both, parse_cluster("2xH100+1xL40S"), rate_rps=0.5)
    only = Requirements(llms={"a": LLMRequirements(only_device_types=("H100",))})
    found = next_device(workload, both, mixed, requirements=only)
    assert sorted((one.llm, one.device_type) for one in found) == [("a", "H100"), ("b", "H100")]
