import logging
import time

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider

import scepsy
from scepsy.capture import Frame, Outcome, Recorder, harmless, recorder
from scepsy.capture.safety import tell


def test_memory_stays_bounded_by_number(recorded):
    small = Recorder(recorded.provider, limit=10)
    handles = [small.start("step", f"s{index}") for index in range(25)]
    assert len(small.open) <= 10
    assert [handle.live for handle in handles] == [False] * 15 + [True] * 10
    assert {span.attributes["scepsy.outcome"] for span in recorded.spans} == {"abandoned"}
    assert len(recorded.spans) == 15


def test_memory_stays_bounded_by_age(recorded):
    brief = Recorder(recorded.provider, max_age_s=0.01)
    brief.start("step", "old")
    time.sleep(0.02)
    brief.start("step", "young")
    brief.sweep()
    assert [span.name for span in recorded.spans] == ["old"]


def test_what_code_runs_in_or_something_is_open_below_is_not_swept(recorded):
    small = Recorder(recorded.provider, limit=10, max_age_s=0.0)
    running = small.start("workflow", "running")
    frame = Frame(running)
    above = small.start("step", "above")
    leaves = [small.start("step", f"leaf {number}", parent=above) for number in range(30)]
    assert (running.live, above.live) == (True, True)
    assert sum(leaf.live for leaf in leaves) <= 8
    for leaf in leaves:
        leaf.end()
    late = small.start("step", "late")
    small.sweep()
    assert (running.live, above.live, late.live) == (True, False, True)
    frame.end()
    late.end()
    assert not small.open


def test_where_nothing_may_be_swept_it_is_not_tried_at_every_start(recorded, monkeypatch):
    small, swept = Recorder(recorded.provider, limit=10), []
    sweep = small.sweep
    monkeypatch.setattr(small, "sweep", lambda: swept.append(sweep()))
    frames = [Frame(small.start("step", f"s{index}")) for index in range(500)]
    assert len(small.open) == 500
    assert len(swept) <= 2
    for frame in frames:
        frame.end()


def test_a_late_end_of_what_was_swept_is_ignored(recorded):
    small = Recorder(recorded.provider, limit=1)
    first = small.start("step", "first")
    small.start("step", "second")
    first.end()
    first.end(outcome=Outcome.CANCELLED)
    assert [span.attributes["scepsy.outcome"] for span in recorded.spans] == ["abandoned"]


def test_an_error_in_a_hook_is_one_line_and_no_more(caplog):
    @harmless
    def hook():
        raise RuntimeError("the prompt")

    with caplog.at_level(logging.WARNING, logger="scepsy"):
        assert hook() is None
        assert hook() is None
    (record,) = caplog.records
    assert "RuntimeError" in record.message
    assert "prompt" not in caplog.text


def test_interrupts_of_the_program_are_not_swallowed():
    @harmless
    def hook():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hook()


def test_a_broken_provider_does_not_reach_the_program(caplog):
    class Broken(TracerProvider):
        def get_tracer(self, *args, **kwargs):
            tracer = super().get_tracer(*args, **kwargs)
            tracer.start_span = None
            return tracer

    scepsy.instrument(provider=Broken())

    @scepsy.workflow
    def main():
        return 4

    assert main() == 4
    scepsy.uninstrument()
    recorder.forget()
    assert "capture failed" in caplog.text


def test_the_same_failure_is_told_once(caplog):
    for _ in range(3):
        tell("a place of this test", ZeroDivisionError())
    assert len(caplog.records) == 1


def test_the_latest_start_around_the_caller_is_the_parent(recorded):
    outer = recorder.start("step", "outer")
    inner = recorder.start("step", "inner", parent=outer)
    recorder.sources.append(lambda: outer)
    try:
        assert recorder.around(inner) == (inner, None)
        inner.end()
        assert recorder.around(inner) == (outer, None)
    finally:
        recorder.sources.pop()
        outer.end()


def test_an_unsampled_trace_is_not_recorded_but_its_parents_are_right():
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    scepsy.instrument(provider=TracerProvider(sampler=ALWAYS_OFF))
    handle = recorder.start("workflow", "main")
    child = recorder.start("step", "child", parent=handle)
    assert int(child.traceparent()["traceparent"][-2:], 16) & 1 == 0
    assert not trace.get_current_span(child.context).is_recording()
    child.end()
    handle.end()
    scepsy.uninstrument()


def test_spans_of_another_trace_are_not_between(recorded):
    @scepsy.workflow
    def main():
        tracer = recorded.provider.get_tracer("other")
        with tracer.start_as_current_span("mine"):
            recorder.start("step", "below").end()
        with tracer.start_as_current_span("its own", context=Context()):
            recorder.start("step", "beside").end()

    main()
    assert recorded.path(recorded.named("below")) == ["invoke_workflow main", "mine", "below"]
    assert recorded.path(recorded.named("beside")) == ["invoke_workflow main", "beside"]
