"""The choice of options against exhaustive enumeration: several cuts, budgets, groups and limits."""

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.branching import minimise
from scepsy_optimizer.master import Problem, can_pack

GAP = 1e-6


def made_up(seed, *, budgets, limits, refused=0):
    """A random problem whose groups' makespans are maxima of random planes, and those planes.

    Of choices that keep the budgets, `refused` in ten are impossible all the same.
    """
    rng = np.random.default_rng(seed)
    llms, groups = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    speeds, units = [], []
    for _ in range(llms):
        size = rng.integers(0, 12, (int(rng.integers(1, 7)), budgets))
        # What takes more is faster, most of the time.
        speeds.append(rng.uniform(0.1, 1, (len(size), 3)) * (10 / (1 + size.sum(axis=1)))[:, None])
        units.append(size)
    planes = [
        (rng.uniform(0, 1, count), rng.uniform(0, 1, (count, llms, 3)) * (rng.random((count, llms, 3)) < 0.6))
        for count in rng.integers(1, 6, groups)
    ]
    limited = rng.random((limits, groups)) < 0.7
    problem = Problem(
        speeds=speeds,
        units=units,
        budgets=rng.integers(2, 10 * llms, budgets),
        group_weights=rng.uniform(0.2, 2, groups),
        limited=limited,
        limits_s=rng.uniform(1, 12 * llms, limits),
        scale_s=10.0,
        areas=1,
        accepts=lambda rows: zlib.crc32(bytes(rows)) % 10 >= refused,
    )
    return problem, planes


def retimer(planes):
    def retime(speeds):
        makespans, fixed, coefficients = [], [], []
        for constants, slopes in planes:
            values = constants + np.tensordot(slopes, speeds, 2)
            top = int(values.argmax())
            makespans.append(values[top])
            fixed.append(constants[top])
            coefficients.append(slopes[top])
        return np.array(makespans), np.array(fixed), np.array(coefficients)

    return retime


def exhaustive(problem, retime):
    best = float("inf")
    for rows in itertools.product(*(range(len(table)) for table in problem.speeds)):
        taken = sum(units[row] for units, row in zip(problem.units, rows, strict=True))
        makespans, _, _ = retime(np.array([table[row] for table, row in zip(problem.speeds, rows, strict=True)]))
        keeps = (taken <= problem.budgets).all() and (problem.limited @ makespans <= problem.limits_s).all()
        if keeps and problem.accepts(rows):
            best = min(best, float(problem.group_weights @ makespans))
    return best


def check(seed, budgets, limits, refused=0):
    problem, planes = made_up(seed, budgets=budgets, limits=limits, refused=refused)
    retime = retimer(planes)
    best = exhaustive(problem, retime)
    found = minimise(problem, retime, gap=GAP)
    if not found.choices:
        assert best == float("inf")
        return
    objective_s, rows = found.choices[0]
    taken = sum(units[row] for units, row in zip(problem.units, rows, strict=True))
    makespans, _, _ = retime(np.array([table[row] for table, row in zip(problem.speeds, rows, strict=True)]))
    assert (taken <= problem.budgets).all()
    assert problem.accepts(rows)
    assert (problem.limited @ makespans <= problem.limits_s * (1 + 1e-9)).all()
    assert objective_s == pytest.approx(float(problem.group_weights @ makespans))
    assert objective_s <= best * (1 + 2 * GAP)
    assert found.lower_bound_s <= best * (1 + 1e-9) + 1e-9
    assert found.lower_bound_s >= objective_s * (1 - 2 * GAP)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), budgets=st.integers(1, 3), limits=st.integers(0, 2), refused=st.integers(0, 10))
def test_it_equals_exhaustive_search(seed, budgets, limits, refused):
    check(seed, budgets, limits, refused)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), limit_s=st.sampled_from([1e-300, 1e-9, 1e-5, 1e-3]))
def test_a_limit_far_below_the_scale_is_kept_by_no_choice(seed, limit_s):
    problem, planes = made_up(seed, budgets=2, limits=1)
    # At least one tangent of each group has a constant far above these limits.
    planes = [(constants + 0.1, slopes) for constants, slopes in planes]
    limited = replace(problem, limited=np.ones_like(problem.limited), limits_s=np.array([limit_s]))
    assert not minimise(limited, retimer(planes), gap=GAP).choices


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), limit_s=st.sampled_from([1e5, 1e16, 1e300]))
def test_a_limit_far_above_the_scale_changes_nothing(seed, limit_s):
    problem, planes = made_up(seed, budgets=2, limits=0)
    free = minimise(problem, retimer(planes), gap=GAP)
    limited = replace(problem, limited=np.ones((1, len(problem.group_weights)), bool), limits_s=np.array([limit_s]))
    found = minimise(limited, retimer(planes), gap=GAP)
    assert bool(found.choices) == bool(free.choices)
    if free.choices:
        assert found.choices[0][0] == pytest.approx(free.choices[0][0], rel=2 * GAP)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), budgets=st.integers(1, 3))
def test_packing_equals_exhaustive_search(seed, budgets):
    problem, _ = made_up(seed, budgets=budgets, limits=0)
    fits = any(
        (sum(units[row] for units, row in zip(problem.units, rows, strict=True)) <= problem.budgets).all()
        for rows in itertools.product(*(range(len(table)) for table in problem.units))
    )
    assert can_pack(problem.units, problem.budgets) == fits
