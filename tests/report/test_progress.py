import io
import threading

import pytest
from rich.console import Console

from scepsy.report import progress
from scepsy.report.progress import LateProgress, waiting
from scepsy.traces import Tally, iter_executions


@pytest.fixture
def clock(monkeypatch):
    """Moves on by half a second each time that it is looked at."""
    now = [0.0]

    def monotonic():
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(progress.time, "monotonic", monotonic)


def shown(steps, *, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    with LateProgress("reading traces", console) as bar:
        for step in range(steps):
            bar(step / 10)
    return out.getvalue()


def test_short_work_shows_nothing(clock):
    assert shown(3, terminal=True) == ""


def test_long_work_shows_how_far_it_is_and_how_long_it_lasts(clock):
    text = shown(9, terminal=True)
    assert "reading traces" in text
    assert "80%" in text
    assert "0:00:" in text


def test_without_a_terminal_nothing_is_shown(clock):
    assert shown(9, terminal=False) == ""


@pytest.mark.parametrize(("terminal", "patience_s"), [(True, 0.0), (True, 60.0), (False, 0.0)])
def test_what_has_no_known_end_shows_itself_when_it_is_late(monkeypatch, terminal, patience_s):
    monkeypatch.setattr(progress, "_PATIENCE_S", patience_s)
    out = io.StringIO()
    begun = threading.Event()

    class Screen(Console):
        def show_cursor(self, show=True):
            begun.set()
            return super().show_cursor(show)

    with waiting("starting", Screen(file=out, force_terminal=terminal, width=80, color_system=None)):
        if terminal and not patience_s:
            assert begun.wait(10)
    assert ("starting" in out.getvalue()) == (terminal and not patience_s)


def test_reading_says_how_far_it_is(pytestconfig):
    golden = pytestconfig.rootpath / "tests" / "data" / "golden"
    told = []
    count = sum(1 for _ in iter_executions([golden], Tally(), on_progress=told.append))
    assert count == 15
    assert told == sorted(told)
    assert 0 < told[0] < 0.25
    assert told[-1] == 1
