import pytest

from scepsy.report.summary import summarise
from scepsy.traces import Reading
from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.totals import total
from scepsy_optimizer.totals_workload import workload_of


def span(own, parent, start, end, *, kind="agent", name=None, llm=None, role="", tokens=(100, 10), queue_s=None):
    call = None
    if llm is not None:
        kind = "llm"
        call = Call(llm=llm, role=role, input_tokens=tokens[0], output_tokens=tokens[1], queue_s=queue_s)
    return Span(id=own, parent=parent, name=name or own, kind=kind, start_s=start, end_s=end, call=call)


def execution(number, *, stretch=1.0, queue_s=None):
    """A fan-out of two calls, a tool, then another call; `stretch` scales it in time."""
    s = stretch
    return Execution(
        id=f"run {number}",
        workflow="</script><b>flow" if number % 2 else "other",
        spans=(
            span("root", None, 0, 10 * s, kind="workflow", name="flow"),
            span("plan", "root", 0, 5 * s, name="plan"),
            span("a", "plan", 1 * s, 4 * s, llm="big", role="plan", queue_s=queue_s),
            span("b", "plan", 1 * s, 5 * s, llm="small", role="plan", queue_s=queue_s),
            span("tool", "root", 5 * s, 7 * s, kind="tool", name="search"),
            span("c", "root", 7 * s, 10 * s, llm="big", role="write [it]", queue_s=queue_s),
        ),
    )


@pytest.fixture
def make_execution():
    return execution


@pytest.fixture
def make_span():
    return span


@pytest.fixture
def summarised():
    """The report on a reading, as the command makes it."""

    def make(reading, *, limits=None, **options):
        totals = total(reading.executions, limits=limits)
        return summarise(reading, totals, workload_of(totals), **options)

    return make


@pytest.fixture
def reading():
    runs = tuple(execution(number, stretch=1 + number % 5) for number in range(30))
    return Reading(executions=runs, dropped={"lines that are <not> JSON": 2}, repaired={}, files=1, spans=180)
