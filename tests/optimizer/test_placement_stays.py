"""Where replicas already run: as many as can stay where they are."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import combinations

from allocations import OFFERED, allocations, cluster_of, group, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.cluster import Cluster, Node, parse_cluster, same_devices
from scepsy_optimizer.placement import check_placement, place
from scepsy_optimizer.plan import Slot


def stays(old, new):
    """Replicas of the new plan that are where an equal one of the old plan is."""

    def where(plan):
        return Counter(
            (part.llm, part.tensor_parallel_size, part.fraction, slot.node, frozenset(slot.devices))
            for part in plan.llms
            for slot in part.slots
        )

    return sum((where(old) & where(new)).values())


def most_that_can_stay(allocation, old, domains):
    """Exhaustive: the largest set of old replicas that leaves a place for the rest."""
    node = {f"n{index}": index for index in range(len(domains))}
    had = [
        (
            part.llm,
            part.tensor_parallel_size,
            Fraction(part.fraction).limit_denominator(),
            node[slot.node],
            slot.devices,
        )
        for part in old.llms
        for slot in part.slots
    ]
    wanted = Counter(
        (llm, choice.tensor_parallel_size, choice.fraction)
        for llm, groups in allocation.items()
        for choice in groups
        for _ in range(choice.replicas)
    )
    for size in range(len(had), 0, -1):
        for keep in combinations(had, size):
            left = wanted - Counter(one[:3] for one in keep)
            if sum(left.values()) != sum(wanted.values()) - size:
                continue
            if rest_fits(left, keep, domains):
                return size
    return 0


def rest_fits(left, keep, domains):
    free = list(domains)
    shared = {}
    for _, size, fraction, domain, devices in keep:
        if fraction == 1:
            free[domain] -= size
        else:
            shared.setdefault((domain, devices), Fraction(1))
            shared[domain, devices] -= fraction
    for domain, _ in shared:
        free[domain] -= 1
    todo = sorted(((size * fraction, fraction < 1) for _, size, fraction in left.elements()), reverse=True)

    def fits(number, free, rooms):
        if number == len(todo):
            return True
        amount, part = todo[number]
        for domain, have in enumerate(free):
            if have >= (1 if part else amount):
                after = list(free)
                after[domain] -= 1 if part else int(amount)
                if fits(number + 1, after, [*rooms, 1 - amount] if part else rooms):
                    return True
        return part and any(
            fits(number + 1, free, [*rooms[:at], room - amount, *rooms[at + 1 :]])
            for at, room in enumerate(rooms)
            if room >= amount
        )

    return fits(0, free, list(shared.values()))


SMALL = [(2, 1), (1, 1), (1, Fraction(1, 2))]


@settings(max_examples=120, deadline=None)
@given(allocations(SMALL, 5), allocations(SMALL, 5), st.permutations(range(2)))
def test_as_many_as_can_stay_where_they_are(before, after, order):
    domains = [2, 3]
    cluster = cluster_of(domains)
    cluster = Cluster(nodes=tuple(replace(node, name=f"n{index}") for index, node in enumerate(cluster.nodes)))
    # The old plan sits as it would on the nodes in another order, so that it is not what would be chosen now.
    slots = place(before, Cluster(nodes=tuple(cluster.nodes[index] for index in order)), spread=True)
    if slots is None:
        return
    old = plan_of(cluster, before, slots)
    found = place(after, cluster, prefer=old)
    assert (found is not None) == (place(after, cluster) is not None)
    if found is not None:
        new = plan_of(cluster, after, found)
        assert check_placement(new) == []
        assert stays(old, new) == most_that_can_stay(after, old, domains)


@settings(max_examples=50, deadline=None)
@given(allocations(OFFERED, 15), st.integers(2, 3), st.booleans())
def test_the_same_allocation_stays_where_it_is(allocation, nodes, spread):
    cluster = parse_cluster(f"{nodes}x4xH100")
    slots = place(allocation, cluster, spread=spread)
    if slots is not None:
        again = place(allocation, cluster, prefer=plan_of(cluster, allocation, slots), calls={("a", "b"): 1.0})
        assert again == slots


def test_replicas_stay_on_devices_that_are_known_by_their_uuid():
    node = Node(
        name="old", device_type="H100", devices=2, memory_gib=80, nvlink_domains=((0, 1),), uuids=("GPU-a", "GPU-b")
    )
    before = Cluster(nodes=(node,))
    after = Cluster(nodes=(replace(node, name="new", uuids=("GPU-b", "GPU-c")),))
    assert same_devices(before, after) == {("old", 1): ("new", 0)}
    allocation = {"a": (group(1, replicas=2),)}
    old = plan_of(before, {"a": (group(1),)}, {"a": ((Slot(node="old", devices=(1,)),),)})
    slots = place(allocation, after, prefer=old)
    assert slots is not None
    assert slots["a"][0][0] == Slot(node="new", devices=(0,))


def test_what_is_in_the_way_moves_and_nothing_else():
    """A group of four needs a node; on one node a single replica has to go, on the other two."""
    cluster = parse_cluster("2x4xH100")
    before = {"a": (group(1, replicas=1),), "b": (group(1, replicas=2),)}
    old = plan_of(
        cluster,
        before,
        {
            "a": ((Slot(node="node0", devices=(2,)),),),
            "b": ((Slot(node="node1", devices=(0,)), Slot(node="node1", devices=(3,))),),
        },
    )
    slots = place({**before, "c": (group(4),)}, cluster, prefer=old)
    assert slots is not None
    assert slots["c"][0][0].node == "node0"
    assert {slot.devices for slot in slots["b"][0]} == {(0,), (3,)}
    assert slots["a"][0][0].node == "node1"
