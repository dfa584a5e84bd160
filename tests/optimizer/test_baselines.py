"""Allocations of others: by hand, by an autoscaler, and the paper's enumeration against one written plainly."""

import itertools
from fractions import Fraction

import pytest

from scepsy_optimizer.allocation import MAX_UTILISATION, Choice, group_loads
from scepsy_optimizer.baselines import AUTOSCALING_TARGET, autoscaled, paper_enumeration, split_by_weight
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.placement import place
from scepsy_optimizer.replica import CallShape, saturation_rps
from scepsy_optimizer.workload import aggregate

HALVES = 2


@pytest.fixture(scope="module")
def workload(make_execution):
    return aggregate(
        [make_execution(f"e{n}", [("a", 0, 2), ("a", 0, 1), ("b", 2, 3 + n % 3), ("c", 6, 6.2)]) for n in range(6)]
    )


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {
        "a": make_profile("a"),
        "b": make_profile("b", scale=2.0, weights_gib=28.0),
        "c": make_profile("c", scale=0.3, weights_gib=2.0),
    }


def whole(replicas, size=1):
    return (Choice(tensor_parallel_size=size, fraction=Fraction(1), replicas=replicas),)


def test_a_split_follows_its_weights(profiles):
    split = split_by_weight({"a": 1, "b": 1, "c": 1}, profiles, devices=6, max_tensor_parallel_size=4)
    assert split == {"a": whole(2), "b": whole(2), "c": whole(2)}
    split = split_by_weight({"a": 5, "b": 2, "c": 0.1}, profiles, devices=8, max_tensor_parallel_size=4)
    assert split == {"a": whole(5), "b": whole(2), "c": whole(1)}


def test_a_split_uses_the_smallest_size_that_holds_the_llm(make_profile):
    profiles = {"a": make_profile("a"), "big": make_profile("big", weights_gib=100.0)}
    split = split_by_weight({"a": 1, "big": 1}, profiles, devices=8, max_tensor_parallel_size=4)
    assert split == {"a": whole(4), "big": whole(2, size=2)}
    with pytest.raises(ScepsyError, match=r"at least 3 for a \(1\), big \(2\); the cluster has 2"):
        split_by_weight({"a": 1, "big": 1}, profiles, devices=2, max_tensor_parallel_size=4)
    with pytest.raises(ScepsyError, match="does not fit at any tensor parallelism up to 1"):
        split_by_weight({"a": 1, "big": 1}, profiles, devices=8, max_tensor_parallel_size=1)


def test_an_autoscaler_keeps_every_llm_below_its_target_while_devices_last(workload, profiles):
    def utilisation(choices, rate_rps):
        return {
            demand.llm: rate_rps
            * demand.visits
            / saturation_rps(profiles[demand.llm], 1, 1.0, CallShape.of(demand))
            / choices[demand.llm][0].replicas
            for demand in workload.demands
        }

    light = autoscaled(workload, profiles, rate_rps=1e-3, devices=64, max_tensor_parallel_size=4)
    assert light == {"a": whole(1), "b": whole(1), "c": whole(1)}
    for rate_rps in (5.0, 20.0, 60.0):
        choices = autoscaled(workload, profiles, rate_rps=rate_rps, devices=64, max_tensor_parallel_size=4)
        for llm, used in utilisation(choices, rate_rps).items():
            replicas = choices[llm][0].replicas
            assert used <= AUTOSCALING_TARGET * 1.000001
            # And not one replica more than that takes.
            assert replicas == 1 or used * replicas / (replicas - 1) > AUTOSCALING_TARGET


def test_an_autoscaler_stops_at_the_cluster(workload, profiles):
    choices = autoscaled(workload, profiles, rate_rps=1e6, devices=7, max_tensor_parallel_size=4)
    assert sum(groups[0].replicas for groups in choices.values()) == 7
    with pytest.raises(ScepsyError, match="needs 3 devices, the cluster has 2"):
        autoscaled(workload, profiles, rate_rps=1.0, devices=2, max_tensor_parallel_size=4)


def plain_enumeration(workload, profiles, devices, rate_rps, order):
    """The paper's search, one share after the other, by the allocation's own evaluation."""
    best = float("inf")
    total = devices * HALVES
    for shares in itertools.product(range(1, total + 1), repeat=len(order)):
        if sum(shares) != total or list(shares) != sorted(shares, reverse=True):
            continue
        offset, latency_s = 0, 0.0
        for llm, share in zip(order, shares, strict=True):
            demand, used, pieces, devices_whole = workload.demand(llm), 0, 0, 0
            while used < share:
                step = min(share - used, HALVES - (offset + used) % HALVES)
                devices_whole, pieces = devices_whole + (step == HALVES), pieces + (step != HALVES)
                used += step
            offset += share
            latency_s += min(
                (
                    mean_s(demand, profiles[llm], groups, rate_rps * demand.visits)
                    for size in (1, 2, 4)
                    if devices_whole % size == 0
                    if (groups := made_of(devices_whole, size, pieces))
                ),
                default=float("inf"),
            )
        best = min(best, latency_s)
    return best


def made_of(devices_whole, size, pieces):
    groups = whole(devices_whole // size, size) if devices_whole else ()
    if pieces:
        groups += (Choice(tensor_parallel_size=1, fraction=Fraction(1, HALVES), replicas=pieces),)
    return groups


def mean_s(demand, profile, groups, calls_rps):
    loads = group_loads(demand, [profile], groups, calls_rps=calls_rps)
    if loads[0].utilisation > MAX_UTILISATION:
        return float("inf")
    shape = CallShape.of(demand)
    each = sum(
        load.calls_rps / calls_rps * load.speed.call_s(shape.computed_tokens, shape.generated_tokens) for load in loads
    )
    return each * demand.visits / demand.parallelism


@pytest.mark.parametrize("devices", [2, 3, 4, 6])
def test_the_papers_enumeration_finds_what_a_plain_one_finds(make_execution, profiles, devices):
    # One call of an LLM at a time: siblings, which the paper does not know of, play no part.
    runs = [make_execution(f"e{n}", [("a", 0, 2), ("b", 2, 3 + n % 3), ("c", 6, 6.2)]) for n in range(6)]
    workload, cluster = aggregate(runs), parse_cluster(f"{devices}xH100")
    for rate_rps in (0.5, 3.0):
        found = paper_enumeration(workload, profiles, cluster, rate_rps=rate_rps, steps_per_device=HALVES)
        orders = [tuple(found.choices)] if found else list(itertools.permutations(profiles))
        expected = min(plain_enumeration(workload, profiles, devices, rate_rps, order) for order in orders)
        if found is None:
            assert expected == float("inf")
            continue
        assert found.latency_s == pytest.approx(expected, rel=2e-3)
        assert place(found.choices, cluster) is not None
        units = [sum(group.units for group in groups) for groups in found.choices.values()]
        assert sum(units) == devices * 10
        assert units == sorted(units, reverse=True)


def test_the_papers_enumeration_says_when_no_allocation_carries_the_rate(workload, profiles):
    assert paper_enumeration(workload, profiles, parse_cluster("4xH100"), rate_rps=1e4) is None
