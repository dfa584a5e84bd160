import pytest
from hypothesis import given
from hypothesis import strategies as st

from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.frontier import FrontierPoint, device_counts, find_frontier, undominated
from scepsy_optimizer.requirements import LLMRequirements, Requirements
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


def beats(one, other):
    """As good in every respect, and better in one."""
    mine = (one.devices, one.latency_s, -one.rate_rps)
    theirs = (other.devices, other.latency_s, -other.rate_rps)
    return mine != theirs and all(here <= there for here, there in zip(mine, theirs, strict=True))


points = st.builds(
    FrontierPoint,
    devices=st.integers(1, 4),
    rate_rps=st.sampled_from([1.0, 2.0, 3.0]),
    latency_s=st.sampled_from([1.0, 2.0, 3.0, 4.0]),
    lower_bound_s=st.just(0.0),
    allocation=st.just({}),
)


@given(st.lists(points, max_size=12))
def test_what_stays_is_what_nothing_beats(given_points):
    kept = undominated(given_points)
    expected = {
        (point.devices, point.rate_rps, point.latency_s)
        for point in given_points
        if not any(beats(other, point) for other in given_points)
    }
    assert sorted((point.devices, point.rate_rps, point.latency_s) for point in kept) == sorted(expected)


def test_rates_and_devices_that_are_asked_for_are_tried_as_well(workload, profiles):
    highest, _ = highest_rate(workload, profiles, CLUSTER)
    own = 0.37 * highest
    plain, more = (find_frontier(workload, profiles, CLUSTER, more_rates_rps=rates) for rates in ((), (own,)))
    assert own in {point.rate_rps for point in more}
    assert all(point in plain for point in more if point.rate_rps != own)
    wide = parse_cluster("5x8xH100")
    assert 29 not in device_counts(wide.devices)
    tried = find_frontier(workload, profiles, wide, rates_rps=[highest * 6], more_devices=[29])
    least = find_allocation(workload, profiles, wide, rate_rps=highest * 6, max_units=290)
    within = [point.latency_s for point in tried if point.devices <= 29]
    assert (least is None) == (not within)
    if least is not None:
        assert min(within) == pytest.approx(least.latency_s, rel=1e-3)


def test_the_frontier_covers_every_search(workload, profiles):
    highest, _ = highest_rate(workload, profiles, CLUSTER)
    rates = [highest * level for level in (0.1, 0.5, 0.9)]
    told = []
    frontier = find_frontier(
        workload, profiles, CLUSTER, rates_rps=rates, on_progress=lambda done, total: told.append((done, total))
    )
    assert frontier == undominated(frontier)
    assert {point.rate_rps for point in frontier} == set(rates)
    assert all(done < total == 12 for done, total in told)
    for rate in rates:
        for devices in range(1, 5):
            found = find_allocation(workload, profiles, CLUSTER, rate_rps=rate, max_units=devices * 10)
            if found is not None:
                assert any(
                    point.devices <= devices and point.rate_rps >= rate and point.latency_s <= found.latency_s * 1.001
                    for point in frontier
                )
    for point in frontier:
        units = sum(group.units for groups in point.allocation.values() for group in groups)
        assert point.devices == -(-units // 10)
        assert 0 < point.lower_bound_s <= point.latency_s


def test_more_devices_are_faster_and_higher_rates_slower(workload, profiles):
    frontier = find_frontier(workload, profiles, CLUSTER)
    assert max(point.rate_rps for point in frontier) > 0.99 * highest_rate(workload, profiles, CLUSTER)[0]
    for one in frontier:
        for other in frontier:
            if one.rate_rps == other.rate_rps and one.devices < other.devices:
                assert one.latency_s > other.latency_s
            if one.devices == other.devices and one.rate_rps < other.rate_rps:
                assert one.latency_s < other.latency_s


def test_requirements_hold_on_the_frontier(workload, profiles):
    requirements = Requirements(llms={"b": LLMRequirements(min_replicas=3)})
    frontier = find_frontier(workload, profiles, CLUSTER, rates_rps=[1.0], requirements=requirements)
    assert frontier
    for point in frontier:
        assert sum(group.replicas for group in point.allocation["b"]) >= 3


def test_bad_frontiers(workload, profiles, make_profile):
    with pytest.raises(ScepsyError, match="must be positive numbers"):
        find_frontier(workload, profiles, CLUSTER, rates_rps=[1.0, 0.0])
    with pytest.raises(ScepsyError, match="does not fit"):
        find_frontier(workload, {**profiles, "b": make_profile("b", weights_gib=900.0)}, CLUSTER)


@given(st.integers(1, 5000))
def test_the_numbers_of_devices_reach_from_one_to_all(devices):
    counts = device_counts(devices)
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (1, devices)
    assert len(counts) <= 16
