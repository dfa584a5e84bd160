"""How the time that is left is told."""

import pytest

from scepsy.profiling.progress import Work


@pytest.fixture
def told():
    return []


@pytest.fixture
def work(told):
    work = Work(told.append)
    work.expect("a", {"start of a": 10.0, "steps of a: 1": 1.0, "steps of a: 2": 3.0, "loads of a: 1": 5.0})
    return work


def test_nothing_is_known_before_the_first_measurement(work, told):
    work.tell("begins")
    assert (told[-1].text, told[-1].done, told[-1].points, told[-1].left_s) == ("begins", 0, 4, None)


def test_what_was_taken_corrects_the_guesses_of_its_kind(work, told):
    work.finish("start of a", "ready", took_s=20.0)
    assert told[-1].left_s == pytest.approx(1 + 3 + 5)
    work.finish("steps of a: 1", "one", took_s=2.0)
    assert told[-1].left_s == pytest.approx(2 * 3 + 5)
    # What is expected of an engine is known better once it runs; of another one it stays.
    work.expect("b", {"start of b": 10.0})
    work.expect("a", {"steps of a: 1": 1.0, "steps of a: 2": 3.0, "loads of a: 1": 40.0, "loads of a: 2": 10.0})
    work.finish("steps of a: 2", "two", took_s=2.0)
    assert (told[-1].done, told[-1].points) == (3, 6)
    assert told[-1].left_s == pytest.approx(2 * 10 + 40 + 10)
    work.finish("loads of a: 1", "load", took_s=20.0)
    assert told[-1].left_s == pytest.approx(2 * 10 + 10 / 2)


def test_what_was_done_before_teaches_nothing(work, told):
    work.finish("steps of a: 1", "kept")
    assert (told[-1].done, told[-1].left_s) == (1, None)
