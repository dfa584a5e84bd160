"""What can be packed, as linear rows: against every filling of a device, HiGHS and exhaustive packing."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from scepsy_optimizer.allocation import Choice, ReplicaKind
from scepsy_optimizer.cluster import Cluster, Node, parse_cluster
from scepsy_optimizer.packing import fewest_bins
from scepsy_optimizer.placement import place
from scepsy_optimizer.room import DUAL_FEASIBLE, room_of, undominated

AREA = tuple(range(1, 11))
FILLINGS = [
    filling
    for filling in itertools.product(*(range(10 // size + 1) for size in range(1, 10)))
    if sum(size * count for size, count in enumerate(filling, start=1)) <= 10
]


def kind(tenths):
    """A replica of some tenths of a device, or of some devices."""
    if tenths < 10:
        return ReplicaKind(tensor_parallel_size=1, fraction=Fraction(tenths, 10))
    return ReplicaKind(tensor_parallel_size=tenths // 10, fraction=Fraction(1))


def test_no_filling_of_a_device_counts_more_than_the_device():
    for counted in DUAL_FEASIBLE:
        assert all(np.dot(filling, counted[:9]) <= counted[9] for filling in FILLINGS)
        # None is the blend of others: at some counts it alone says what there is.
        others = [row for row in (*DUAL_FEASIBLE, AREA) if row != counted]
        tighter = linprog(
            -np.array(counted[:9]) / counted[9],
            A_ub=np.array([np.array(row[:9]) / row[9] for row in others]),
            b_ub=np.ones(len(others)),
        )
        assert -tighter.fun > 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=9, max_size=9))
def test_the_rows_say_all_that_linear_rows_can_say(counts):
    """Their largest is the least mixture of fillings that holds the counts, by HiGHS."""
    mixture = linprog(np.ones(len(FILLINGS)), A_ub=-np.array(FILLINGS).T, b_ub=-np.array(counts), method="highs")
    largest = max(np.dot(counts, row[:9]) / row[9] for row in (*DUAL_FEASIBLE, AREA))
    assert largest == pytest.approx(mixture.fun, abs=1e-9)


def fits_by_trying(items, bins):
    """Whether items fit into devices of ten, by trying every device for every item."""
    if not items:
        return True
    tried = set()
    for index, left in enumerate(bins):
        if items[0] <= left and left not in tried:
            tried.add(left)
            if fits_by_trying(items[1:], [*bins[:index], left - items[0], *bins[index + 1 :]]):
                return True
    return False


@settings(max_examples=150, deadline=None)
@given(items=st.lists(st.integers(1, 9), max_size=11), devices=st.integers(1, 5))
def test_fewest_bins_equals_trying_everything(items, devices):
    found = fewest_bins(10, Counter(items), most=devices)
    assert (found is not None) == fits_by_trying(sorted(items, reverse=True), [10] * devices)
    assert found is None or found <= devices


@settings(max_examples=150, deadline=None)
@given(
    domains=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    sizes=st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30, 40]), min_size=1, max_size=12),
)
@example(domains=[1, 1], sizes=[20])
def test_what_the_room_holds_is_placed_and_what_is_placed_keeps_the_rows(domains, sizes):
    nodes = [
        Node(name=f"n{i}", device_type="H100", devices=size, memory_gib=80, nvlink_domains=(tuple(range(size)),))
        for i, size in enumerate(domains)
    ]
    cluster = Cluster(nodes=tuple(nodes))
    counts = Counter(map(kind, sizes))
    room = room_of(cluster, counts)
    groups = {
        str(index): (Choice(tensor_parallel_size=one.tensor_parallel_size, fraction=one.fraction, replicas=count),)
        for index, (one, count) in enumerate(counts.items())
    }
    keeps = (room.taken(room.kinds, np.array([[counts[one] for one in room.kinds]])) <= room.budgets).all()
    placed = place(groups, cluster) is not None
    assert placed == (keeps and room.holds(counts))
    if placed:
        assert keeps


def test_less_than_the_cluster_is_as_many_devices_as_it_needs():
    kinds = [kind(6), kind(4)]
    room = room_of(parse_cluster("4xH100"), kinds, max_units=18)
    assert not room.holds({kind(6): 3})
    assert room.holds({kind(6): 2, kind(4): 1})
    assert (room.taken(kinds, np.array([[3, 0]])) > room.budgets).any()
    assert (room.taken(kinds, np.array([[2, 1]])) <= room.budgets).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_undominated_rows(seed):
    rows = np.unique(np.random.default_rng(seed).integers(0, 4, (30, 3)), axis=0)
    kept = undominated(rows).tolist()
    for row in rows.tolist():
        beaten = any((np.array(other) <= row).all() and other != row for other in rows.tolist())
        assert (row in kept) != beaten
