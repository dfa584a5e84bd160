"""A handle among threads: branches of one step start and end at the same moment."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry.sdk.trace import SpanProcessor

from scepsy.capture import Recorder, handle

BRANCHES = 4


def end_branches(recorder):
    """A step whose branches end each in its own thread, all at once; the step's handle and theirs."""
    step = recorder.start("step", "together")
    branches = [recorder.start("step", f"branch {number}", parent=step) for number in range(BRANCHES)]
    ready = threading.Barrier(BRANCHES)

    def end(branch):
        ready.wait(10)
        branch.end()

    with ThreadPoolExecutor(BRANCHES) as pool:
        list(pool.map(end, branches))
    return step, branches


def test_the_wall_clock_is_read_at_one_moment_with_the_steady_one():
    """Every reading but one is interrupted for ten milliseconds, before the wall clock is read or after it."""
    truth, steady, gaps = 1_000_000, 0, iter([10**7, 40, 40, 10**7, 10**7, 40, 40, 40, 40, *[10**7] * 99])

    def tick():
        nonlocal steady
        steady += next(gaps)
        return steady

    found = handle.clock_offset_ns(wall_ns=lambda: truth + tick(), steady_ns=tick)
    assert abs(found - truth) < 100


class _Slow(SpanProcessor):
    """Gives the other threads time to come in between."""

    def __init__(self):
        self.started = []

    def on_start(self, span, parent_context=None):
        self.started.append(span.name)
        time.sleep(0.02)


def test_branches_that_end_at_once_have_one_step_above_them(recorded):
    slow = _Slow()
    recorded.provider.add_span_processor(slow)
    step, _ = end_branches(Recorder(recorded.provider))
    step.end()
    assert slow.started.count("together") == 1
    ((name, branches),) = recorded.tree
    assert (name, sorted(branches)) == ("together", [(f"branch {number}", []) for number in range(BRANCHES)])


class _SlowIds(random.Random):
    def getrandbits(self, bits):
        drawn = super().getrandbits(bits)
        time.sleep(0.02)
        return drawn


def test_nor_without_a_tracer(monkeypatch):
    monkeypatch.setattr(handle, "_ids", _SlowIds())
    recorder, ended = Recorder(), []
    recorder.use(None, sink=ended.append)
    step, branches = end_branches(recorder)
    step.end()
    assert len({id(one) for one in ended}) == BRANCHES + 1
    assert {(one.trace_id, one.parent_id) for one in branches} == {(step.trace_id, step.span_id)}
    assert len({one.span_id for one in ended}) == BRANCHES + 1


def test_what_is_noted_while_another_thread_asks_who_it_is_stays(recorded):
    step = Recorder(recorded.provider).start("step", "above")
    attributes = step.attributes
    attributes["early"] = 1
    step.identify()
    attributes["early"] = 2
    attributes["late"] = 3
    step.end()
    assert {recorded.named("above").attributes[name] for name in ("early", "late")} == {2, 3}


class _Waiting(SpanProcessor):
    """Waits, for the first span, until it is told."""

    def __init__(self):
        self.reached, self.go_on = threading.Event(), threading.Event()

    def on_start(self, span, parent_context=None):
        if not self.reached.is_set():
            self.reached.set()
            self.go_on.wait(20)


def being_identified(recorded):
    """A recorder, a step whose span another thread is starting, and what lets that thread go on."""
    waiting = _Waiting()
    recorded.provider.add_span_processor(waiting)
    recorder = Recorder(recorded.provider)
    step = recorder.start("step", "slow")
    thread = threading.Thread(target=step.identify)
    thread.start()
    assert waiting.reached.wait(10)

    def go_on():
        waiting.go_on.set()
        thread.join()

    return recorder, step, go_on


def test_what_a_processor_waits_for_may_be_captured(recorded):
    """A processor of the program waits for a thread of it, which starts something else; or for a branch of the same."""
    recorder, step, go_on = being_identified(recorded)
    begun_s = time.monotonic()
    other = recorder.start("step", "other")
    other.end()
    assert time.monotonic() - begun_s < 0.5
    recorder.start("step", "branch", parent=step).end()
    assert time.monotonic() - begun_s < 10
    go_on()
    step.end()
    assert {"other", "branch", "slow"} <= {span.name for span in recorded.spans}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_is_at_it_can_go_on(recorded):
    """The thread that holds the lock is not there in the child."""
    recorder, step, go_on = being_identified(recorded)
    child = os.fork()
    if child == 0:
        begun_s = time.monotonic()
        recorder.start("step", "in the child", parent=step).end()
        os._exit(int(time.monotonic() - begun_s > 0.5))
    go_on()
    step.end()
    deadline_s = time.monotonic() + 20
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    if found == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert found == (child, 0)


def test_only_the_handle_itself_ends(recorded):
    """Frameworks may call two runs the same."""
    recorder = Recorder(recorded.provider)
    first = recorder.start("step", "first", key=1)
    second = recorder.start("step", "second", key=1)
    first.end()
    second.end()
    second.end()
    assert [span.name for span in recorded.spans] == ["second"]


def test_a_span_stays_where_it_began(recorded, tmp_path):
    """Its tracer has started it; what comes later goes to the new place, below it."""
    recorder, ended = Recorder(recorded.provider), []
    step = recorder.start("step", "above")
    step.identify()
    recorder.use(sink=ended.append)
    child = recorder.start("step", "below", parent=step)
    child.end()
    step.end()
    assert [span.name for span in recorded.spans] == ["above"]
    assert ended == [child]
    assert (child.trace_id, child.parent_id) == (step.trace_id, step.span_id)
