import asyncio
import contextvars
import inspect
import time

import pytest
from opentelemetry import context as context_api
from opentelemetry import trace

import scepsy
from scepsy.capture import recorder
from scepsy_optimizer.errors import ScepsyError


def test_kinds_names_and_nesting(recorded):
    @scepsy.tool
    def search():
        return 1

    @scepsy.agent(name="researcher")
    def research():
        return search() + search()

    @scepsy.workflow
    def answer():
        return research()

    assert answer() == 2
    tools = [("execute_tool search", [])] * 2
    assert recorded.tree == [("invoke_workflow answer", [("invoke_agent researcher", tools)])]
    assert dict(recorded.named("invoke_agent researcher").attributes) == {
        "scepsy.kind": "agent",
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "researcher",
    }


def test_recursion_shows_its_depth(recorded):
    @scepsy.workflow
    def divide(size):
        return size if size == 1 else divide(size // 2) + divide(size // 2)

    assert divide(4) == 4
    leaf = ("invoke_workflow divide", [])
    half = ("invoke_workflow divide", [leaf, leaf])
    assert recorded.tree == [("invoke_workflow divide", [half, half])]
    assert len({span.context.trace_id for span in recorded.spans}) == 1


async def test_async_functions_run_side_by_side_below_the_right_parent(recorded):
    @scepsy.tool
    async def fetch(index):
        await asyncio.sleep(0.01 * (3 - index))
        return index

    @scepsy.agent
    async def gather(base):
        return await asyncio.gather(*(fetch(base + index) for index in range(2)))

    @scepsy.workflow
    async def both():
        return await asyncio.gather(gather(0), gather(1))

    assert await both() == [[0, 1], [1, 2]]
    tools = [("execute_tool fetch", [])] * 2
    assert recorded.tree == [("invoke_workflow both", [("invoke_agent gather", tools)] * 2)]


async def test_a_function_stays_what_it_is():
    def plain(): ...
    async def coroutine(): ...
    def generator():
        yield

    async def async_generator():
        yield

    for function in (plain, coroutine, generator, async_generator):
        wrapped = scepsy.agent(function)
        for ask in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
            assert ask(wrapped) == ask(function)
        assert inspect.signature(wrapped) == inspect.signature(function)
        assert wrapped.__name__ == function.__name__


def test_methods_of_every_sort(recorded):
    class Team:
        @scepsy.agent
        def plan(self):
            return self

        @scepsy.agent
        @classmethod
        def hire(cls):
            return cls

        @scepsy.agent
        @staticmethod
        def rest():
            return "zzz"

    team = Team()
    assert team.plan() is team
    assert Team.hire() is Team
    assert team.rest() == "zzz"
    assert [span.name for span in recorded.spans] == [f"invoke_agent {name}" for name in ("plan", "hire", "rest")]


@pytest.mark.parametrize("mark", [scepsy.workflow, scepsy.agent, scepsy.tool])
def test_what_is_no_function_is_refused(mark):
    with pytest.raises(ScepsyError, match="marks functions, not"):
        mark("name")
    with pytest.raises(ScepsyError, match="right above the 'def' line"):
        mark(int)


def test_an_exception_passes_unchanged_and_its_text_is_not_recorded(recorded):
    secret = ValueError("the whole prompt")

    @scepsy.agent
    def fails():
        raise secret

    with pytest.raises(ValueError, match="the whole prompt") as caught:
        fails()
    assert caught.value is secret
    span = recorded.named("invoke_agent fails")
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.attributes["error.type"] == "ValueError"
    assert "prompt" not in span.to_json()


async def test_cancellation_is_not_an_error(recorded):
    @scepsy.agent
    async def sleeps():
        await asyncio.sleep(10)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sleeps(), 0.01)
    span = recorded.named("invoke_agent sleeps")
    assert span.attributes["scepsy.outcome"] == "cancelled"
    assert span.status.status_code is trace.StatusCode.UNSET


def test_a_generators_span_never_leaks_into_its_consumer(recorded):
    @scepsy.tool
    def step(): ...

    @scepsy.agent
    def writer():
        step()
        got = yield 1
        step()
        assert got == "more"
        yield 2
        return 3

    def consumer():
        generator = writer()
        before = context_api.get_current()
        assert next(generator) == 1
        assert context_api.get_current() == before
        assert recorder.around() == (None, None)
        step()
        assert generator.send("more") == 2
        with pytest.raises(StopIteration) as stop:
            next(generator)
        return stop.value.value

    assert consumer() == 3
    inside = [("execute_tool step", [])] * 2
    assert recorded.tree == [("invoke_agent writer", inside), ("execute_tool step", [])]


def test_context_left_by_a_generator_is_there_at_its_next_step(recorded):
    tracer = recorded.provider.get_tracer("user")
    seen = []

    @scepsy.agent
    def writer():
        with tracer.start_as_current_span("mine") as mine:
            yield 1
            seen.append(trace.get_current_span() is mine)
            yield 2
        seen.append(trace.get_current_span() is mine)

    for _ in writer():
        assert trace.get_current_span() is trace.INVALID_SPAN
    assert seen == [True, False]


def test_generators_receive_what_is_thrown_and_closed(recorded):
    log = []

    @scepsy.agent
    def writer():
        try:
            try:
                yield 1
            except KeyError:
                yield 2
            yield 3
        finally:
            log.append("closed")

    generator = writer()
    assert next(generator) == 1
    assert generator.throw(KeyError("x")) == 2
    generator.close()
    assert log == ["closed"]
    assert recorded.named("invoke_agent writer").attributes["scepsy.outcome"] == "abandoned"


def test_an_abandoned_generator_ends_where_it_was_left(recorded):
    @scepsy.agent
    def writer():
        while True:
            yield 1

    generator = writer()
    next(generator)
    left_ns = time.time_ns()
    time.sleep(0.02)
    del generator
    assert recorded.named("invoke_agent writer").end_time < left_ns + 2_000_000


async def test_async_generators_too(recorded):
    @scepsy.tool
    async def step():
        await asyncio.sleep(0)

    @scepsy.agent
    async def writer():
        await step()
        try:
            got = yield 1
        except KeyError:
            got = "thrown"
        await step()
        yield got

    async for _ in writer():
        assert recorder.around() == (None, None)
        await step()
    inside = [("execute_tool step", [])] * 2
    outside = [("execute_tool step", [])] * 2
    assert sorted(recorded.tree) == sorted([("invoke_agent writer", inside), *outside])
    generator = writer()
    assert await anext(generator) == 1
    assert await generator.athrow(KeyError("x")) == "thrown"
    await generator.aclose()


def test_the_event_loop_closes_a_generator_that_is_left_open_once(recorded):
    told, closed, held = [], [], []

    @scepsy.workflow
    async def stream():
        try:
            yield 1
        finally:
            await asyncio.sleep(0.01)
            closed.append(True)

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        held.append(stream())
        await anext(held[0])

    for _ in range(3):
        asyncio.run(main())
        held.clear()
    assert (told, closed) == ([], [True] * 3)


async def test_an_async_generator_may_be_driven_by_several_tasks(recorded):
    @scepsy.tool
    async def step(): ...

    @scepsy.agent
    async def writer():
        for _ in range(3):
            await step()
            yield

    generator = writer()
    for _ in range(3):
        await asyncio.create_task(anext(generator))
    with pytest.raises(StopAsyncIteration):
        await anext(generator)
    assert recorded.tree == [("invoke_agent writer", [("execute_tool step", [])] * 3)]


async def test_a_plain_function_that_returns_a_coroutine_lasts_as_long_as_it(recorded):
    async def work():
        await asyncio.sleep(0.02)
        return 7

    @scepsy.agent
    def start():
        return work()

    assert await start() == 7
    span = recorded.named("invoke_agent start")
    assert span.end_time - span.start_time > 15_000_000


def test_the_programs_own_spans_keep_their_place(recorded):
    tracer = recorded.provider.get_tracer("user")

    @scepsy.tool
    def step(): ...

    @scepsy.workflow
    def main():
        with tracer.start_as_current_span("mine"):
            step()

    with tracer.start_as_current_span("request"):
        main()
    mine = ("mine", [("execute_tool step", [])])
    assert recorded.tree == [("request", [("invoke_workflow main", [mine])])]


def test_without_a_provider_functions_just_run():
    variable = contextvars.ContextVar("x", default=0)

    @scepsy.workflow
    def main():
        variable.set(1)
        return 5

    assert main() == 5
    assert variable.get() == 1
    assert not recorder.open
