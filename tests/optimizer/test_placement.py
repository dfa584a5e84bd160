from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product

import pytest
from allocations import OFFERED, allocations, cluster_of, counted, group, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.cluster import Cluster, Node, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.packing import pack
from scepsy_optimizer.placement import check_placement, place
from scepsy_optimizer.plan import Slot

# What people ask for by hand.
ODD = [(3, 1), (2, 1), (1, 1), (1, Fraction(1, 3)), (1, Fraction(3, 10)), (1, Fraction(7, 10)), (1, Fraction(2, 5))]


def pieces(allocation):
    """Every replica as (whole devices, part of a shared device)."""
    return [
        (choice.tensor_parallel_size, Fraction(0)) if choice.fraction == 1 else (0, choice.fraction)
        for groups in allocation.values()
        for choice in groups
        for _ in range(choice.replicas)
    ]


def can_be_placed(allocation, domains):
    """Exhaustive: largest first, every domain and every shared device tried."""
    todo = sorted(pieces(allocation), reverse=True)
    dead = set()

    def fits(number, free, shared):
        if number == len(todo):
            return True
        key = (number, tuple(sorted(zip(free, map(tuple, shared), strict=True))))
        if key in dead:
            return False
        size, part = todo[number]
        for domain in range(len(free)):
            if size and free[domain] >= size:
                after = [have - size * (index == domain) for index, have in enumerate(free)]
                if fits(number + 1, after, shared):
                    return True
            if not size:
                for at, left in enumerate(shared[domain]):
                    if left >= part:
                        changed = sorted([*shared[domain][:at], left - part, *shared[domain][at + 1 :]])
                        if fits(number + 1, free, [*shared[:domain], changed, *shared[domain + 1 :]]):
                            return True
                if free[domain]:
                    after = [have - (index == domain) for index, have in enumerate(free)]
                    changed = sorted([*shared[domain], 1 - part])
                    if fits(number + 1, after, [*shared[:domain], changed, *shared[domain + 1 :]]):
                        return True
        dead.add(key)
        return False

    return fits(0, list(domains), [[] for _ in domains])


@settings(max_examples=150, deadline=None)
@given(allocations(OFFERED) | allocations(ODD, 8), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_whatever_can_be_placed_is_and_passes_the_check(allocation, domains, spread):
    cluster = cluster_of(domains, per_node=2)
    slots = place(allocation, cluster, spread=spread, calls={("a", "b"): 1.0, ("b", "c"): 2.0})
    assert (slots is not None) == can_be_placed(allocation, domains)
    if slots is not None:
        assert check_placement(plan_of(cluster, allocation, slots)) == []


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), max_size=8),
)
def test_packing_is_exact(capacities, items):
    packed = pack(capacities, Counter(items))
    every = product(range(len(capacities)), repeat=len(items)) if len(capacities) ** len(items) < 3000 else ()
    fits = any(
        all(sum(item for item, at in zip(items, where, strict=True) if at == bin_) <= room
            for bin_, room in enumerate(capacities))
        for where in every
    )  # fmt: skip
    if packed is None:
        assert not fits
    else:
        assert sum((Counter(filling) for filling in packed), Counter()) == Counter(items)
        for filling, room in zip(packed, capacities, strict=True):
            assert sum(size * count for size, count in filling.items()) <= room


def test_a_packing_that_largest_first_does_not_find():
    """5, 4 and 3 twice each fill two bins of 12 only as 5 + 4 + 3."""
    assert pack([12, 12], {5: 2, 4: 2, 3: 2}) == [{5: 1, 4: 1, 3: 1}, {5: 1, 4: 1, 3: 1}]
    assert pack([9, 6], {3: 5}) == [{3: 3}, {3: 2}]
    assert pack([9, 5], {3: 5}) is None
    assert pack([], {}) == []
    assert pack([], {1: 1}) is None


def test_fractions_that_best_fit_does_not_pack_are_placed():
    """Two devices hold 0.4, 0.3 and 0.3 twice; best fit puts 0.4 and 0.4 on one of them."""
    allocation = {"a": (group(1, Fraction(2, 5), 2),), "b": (group(1, Fraction(3, 10), 4),)}
    cluster = parse_cluster("2xH100")
    slots = place(allocation, cluster)
    assert slots is not None
    assert check_placement(plan_of(cluster, allocation, slots)) == []


def test_groups_are_aligned_blocks_below_one_socket():
    node = Node(
        name="n",
        device_type="H100",
        devices=8,
        memory_gib=80,
        nvlink_domains=(tuple(range(8)),),
        pcie_domains=((0, 2, 4, 6), (1, 3, 5, 7)),
    )
    slots = place({"a": (group(4),), "b": (group(2, replicas=2),)}, Cluster(nodes=(node,)))
    assert slots is not None
    assert slots["a"] == ((Slot(node="n", devices=(0, 2, 4, 6)),),)
    assert {slot.devices for slot in slots["b"][0]} == {(1, 3), (5, 7)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=16), st.integers(1, 3))
def test_groups_of_powers_of_two_are_aligned(sizes, nodes):
    allocation = {str(index): (group(size),) for index, size in enumerate(sizes)}
    slots = place(allocation, parse_cluster(f"{nodes}x8xH100"))
    assert (slots is not None) == (sum(sizes) <= 8 * nodes)
    for ((slot,),) in (slots or {}).values():
        assert slot.devices[0] % len(slot.devices) == 0
        assert slot.devices == tuple(range(slot.devices[0], slot.devices[0] + len(slot.devices)))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=14), st.lists(st.integers(1, 7), min_size=1, max_size=5)
)
def test_what_can_be_placed_is_linear_for_sizes_that_divide(sizes, domains):
    """What the search counts beside devices: groups of each size and larger, in groups of that size."""
    cluster = cluster_of(domains, per_node=2)
    allocation = {str(index): (group(size),) for index, size in enumerate(sizes)}
    counted_ = all(
        sum(larger // size for larger in sizes if larger >= size) <= cluster.groups_of("H100", size)
        for size in set(sizes)
    )
    assert (place(allocation, cluster) is not None) == counted_


@settings(max_examples=60, deadline=None)
@given(allocations(OFFERED, 20), st.integers(1, 4))
def test_what_is_free_stays_whole(allocation, nodes):
    """As few nodes and devices are touched as hold the replicas."""
    cluster = parse_cluster(f"{nodes}x8xH100")
    slots = place(allocation, cluster)
    if slots is None:
        return
    placed = [slot for groups in slots.values() for slots_ in groups for slot in slots_]
    devices = {(slot.node, device) for slot in placed for device in slot.devices}
    parts = sum((part for _, part in pieces(allocation)), Fraction(0))
    # An odd half beside fifths wastes at most a tenth of one device.
    least = sum(size for size, _ in pieces(allocation)) + -(-parts.numerator // parts.denominator)
    assert len(devices) <= least + 1
    assert len({slot.node for slot in placed}) == -(-len(devices) // 8)


def test_replicas_spread_on_request():
    cluster = parse_cluster("4x4xH100")
    allocation = {
        "a": (group(2, replicas=2), group(1, Fraction(1, 2), 2)),
        "b": (group(1, replicas=4),),
        "c": (group(1),),
    }
    apart = place(allocation, cluster, spread=True)
    together = place(allocation, cluster)
    assert apart is not None
    assert together is not None
    assert len({slot.node for groups in apart["a"] for slot in groups}) == 4
    assert len({slot.node for slot in apart["b"][0]}) == 4
    assert len({slot.node for slot in together["b"][0]}) < 4
    # On a full cluster the same replicas still fit.
    full = allocation | {"d": (group(4),), "e": (group(1, replicas=2),)}
    crowded = place(full, cluster, spread=True)
    assert crowded is not None
    assert check_placement(plan_of(cluster, full, crowded)) == []


def test_llms_that_call_each_other_share_nodes():
    cluster = parse_cluster("2x4xH100")
    allocation = {llm: (group(2, replicas=2),) for llm in ("a", "b")}
    slots = place(allocation, cluster, calls={("a", "b"): 1.0})
    assert slots is not None
    for llm in ("a", "b"):
        assert {slot.node for slot in slots[llm][0]} == {"node0", "node1"}
    # Pairs that do not call each other are kept apart from those that do.
    four = {llm: (group(2),) for llm in ("a", "b", "c", "d")}
    slots = place(four, cluster, calls={("a", "c"): 1.0, ("b", "d"): 1.0})
    assert slots is not None
    node = {llm: groups[0][0].node for llm, groups in slots.items()}
    assert node["a"] == node["c"] != node["b"] == node["d"]


def same_node(slots, calls):
    """The calls that stay on a node where each LLM's calls spread evenly over its replicas."""
    stay = 0.0
    for (one, other), rate in calls.items():
        pairs = [(x.node, y.node) for groups in slots[one] for x in groups for others in slots[other] for y in others]
        stay += rate * sum(x == y for x, y in pairs) / len(pairs)
    return stay


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from("abc"), min_size=6, max_size=6),
    st.tuples(*[st.integers(0, 3)] * 3),
)
def test_sharing_nodes_is_nearly_as_good_as_can_be(names, rates):
    """Within a tenth of the best of all ways to give six equal seats on two nodes to the replicas."""
    allocation = counted([(llm, (1, 1)) for llm in names])
    calls = {pair: float(rate) for pair, rate in zip(combinations("abc", 2), rates, strict=True)}
    calls = {pair: rate for pair, rate in calls.items() if rate and set(pair) <= set(allocation)}
    slots = place(allocation, parse_cluster("2x3xH100"), calls=calls)
    assert slots is not None
    best = 0.0
    for first in combinations(range(6), 3):
        nodes = ["x" if index in first else "y" for index in range(6)]
        seats = {
            llm: [[Slot(node=node, devices=(0,)) for name, node in zip(names, nodes, strict=True) if name == llm]]
            for llm in allocation
        }
        best = max(best, same_node(seats, calls))
    assert same_node(slots, calls) >= 0.9 * best - 1e-9


def test_a_switch_is_nearer_than_the_network():
    nodes = [
        Node(name=name, device_type="H100", devices=1, memory_gib=80, nvlink_domains=((0,),), switch=switch)
        for name, switch in (("n0", "x"), ("n1", "y"), ("n2", "x"), ("n3", "y"))
    ]
    allocation = {llm: (group(1),) for llm in ("a", "b", "c", "d")}
    slots = place(allocation, Cluster(nodes=tuple(nodes)), calls={("a", "d"): 1.0, ("b", "c"): 1.0})
    assert slots is not None
    switch = {llm: {"n0": "x", "n2": "x"}.get(groups[0][0].node, "y") for llm, groups in slots.items()}
    assert switch["a"] == switch["d"] != switch["b"] == switch["c"]


def test_several_device_types():
    cluster = parse_cluster("8xH100+8xL40S")
    allocation = {"a": (group(4, 1, 1, "H100"), group(1, Fraction(1, 2), 4, "L40S")), "b": (group(1, 1, 6, "L40S"),)}
    slots = place(allocation, cluster)
    assert slots is not None
    assert {slot.node for slot in slots["a"][0]} == {"node0"}
    assert {slot.node for slot in (*slots["a"][1], *slots["b"][0])} == {"node1"}
    plan = plan_of(cluster, allocation, slots)
    assert check_placement(plan) == []
    wrong = replace(plan.llms[0], device_type="L40S")
    assert any("planned for L40S" in line for line in check_placement(replace(plan, llms=(wrong, *plan.llms[1:]))))
    assert place({"b": (group(1, 1, 9, "L40S"),)}, cluster) is None
    with pytest.raises(ScepsyError, match="say which of H100, L40S"):
        place({"b": (group(1),)}, cluster)


def test_memory_is_checked_beside_compute():
    cluster = parse_cluster("1xH100")
    allocation = {"a": (group(1, Fraction(1, 2)),), "b": (group(1, Fraction(1, 2)),)}
    slots = place(allocation, cluster)
    assert slots is not None
    plan = plan_of(cluster, allocation, slots)
    greedy = tuple(replace(part, gpu_memory_utilization=1.2) for part in plan.llms)
    assert check_placement(replace(plan, llms=greedy)) == ["the replicas on device 0 of 'node0' take 1.2 of its memory"]
