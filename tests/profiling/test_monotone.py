import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scepsy.profiling.monotone import monotone

grids = arrays(float, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.floats(0, 100))


@given(grids)
def test_never_falls_along_any_axis(values):
    found = monotone(values)
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()
    assert values.min() <= found.min()
    assert found.max() <= values.max()


@given(grids)
def test_keeps_what_does_not_fall(values):
    ordered = np.sort(np.sort(values, axis=0), axis=1)
    assert (monotone(ordered) == ordered).all()


def test_halves_a_fall_instead_of_pushing_it_up():
    assert monotone([1.0, 3.0, 2.0, 4.0]).tolist() == [1.0, 2.5, 2.5, 4.0]
