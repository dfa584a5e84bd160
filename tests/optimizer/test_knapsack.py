"""The knapsack against exhaustive enumeration and HiGHS."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from scepsy_optimizer.knapsack import solve

OFFERS = st.lists(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 50)), min_size=1, max_size=6), min_size=1, max_size=4
)


def columns(offers):
    listed = [sorted(table) for table in offers]
    return (
        listed,
        [np.array([size for size, _ in table]) for table in listed],
        [np.array([float(cost) for _, cost in table]) for table in listed],
    )


@settings(max_examples=300)
@given(OFFERS, st.integers(1, 30))
def test_it_equals_exhaustive_search(offers, budget):
    listed, units, costs = columns(offers)
    feasible = [
        (sum(cost for _, cost in chosen), sum(size for size, _ in chosen))
        for chosen in itertools.product(*offers)
        if sum(size for size, _ in chosen) <= budget
    ]
    found = solve(units, costs, budget)
    if not feasible:
        assert found is None
        return
    assert found is not None
    assert (found.cost, found.units) == min(feasible)
    chosen = [table[row] for table, row in zip(listed, found.rows, strict=True)]
    assert sum(cost for _, cost in chosen) == found.cost
    assert sum(size for size, _ in chosen) == found.units


@pytest.mark.parametrize("seed", range(6))
def test_it_equals_highs_on_large_cases(seed):
    rng = np.random.default_rng(seed)
    offers = [
        [(int(size), float(cost)) for size, cost in zip(rng.integers(1, 80, 60), rng.uniform(1, 50, 60), strict=True)]
        for _ in range(12)
    ]
    budget = int(rng.integers(60, 400))
    _, units, costs = columns(offers)
    found = solve(units, costs, budget)
    assert found is not None
    flat = [(group, *offer) for group, table in enumerate(offers) for offer in table]
    one_each = np.array([[float(group == row) for group, _, _ in flat] for row in range(len(offers))])
    solution = milp(
        [cost for _, _, cost in flat],
        integrality=np.ones(len(flat)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array([[size for _, size, _ in flat]]), 0, budget),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.cost == pytest.approx(solution.fun)


def test_rows_that_are_never_possible_are_passed_over():
    found = solve([np.array([1, 2]), np.array([1, 3])], [np.array([np.inf, 4.0]), np.array([5.0, 1.0])], 4)
    assert found is not None
    assert found.rows == (1, 0)
    assert solve([np.array([1])], [np.array([np.inf])], 4) is None
