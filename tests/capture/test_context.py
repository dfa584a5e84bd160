import asyncio
import gc
import pickle
import sys
import threading
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest

import scepsy
from scepsy.capture import ContextThreadPoolExecutor, propagate


@scepsy.tool
def work(index=0):
    return index


EXPECTED = [("invoke_workflow main", [("execute_tool work", [])] * 2)]


def test_propagate_carries_a_workflow_into_threads(recorded):
    @scepsy.workflow
    def main():
        threads = [threading.Thread(target=propagate(work)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    main()
    assert recorded.tree == EXPECTED


def test_one_propagated_function_may_run_many_times_at_once(recorded):
    together = threading.Barrier(2, timeout=10)

    @scepsy.tool(name="work")
    def meet(index):
        together.wait()
        return index

    @scepsy.workflow
    def main():
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(propagate(meet), range(2)))

    assert main() == [0, 1]
    assert recorded.tree == EXPECTED


def test_the_pool_that_carries_context(recorded):
    @scepsy.workflow
    def main():
        with ContextThreadPoolExecutor(2) as pool:
            return [*pool.map(work, range(1)), pool.submit(work, index=1).result()]

    assert main() == [0, 1]
    assert recorded.tree == EXPECTED


async def test_run_in_executor_with_that_pool(recorded):
    @scepsy.workflow
    async def main():
        with ContextThreadPoolExecutor(1) as pool:
            for _ in range(2):
                await asyncio.get_running_loop().run_in_executor(pool, work)

    await main()
    assert recorded.tree == EXPECTED


def test_the_opt_in_patch_carries_context_into_every_thread_and_is_undone(recorded):
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    scepsy.instrument(threads=True)
    scepsy.instrument(threads=True)

    class Custom(threading.Thread):
        def run(self):
            work()

    @scepsy.workflow
    def main():
        thread = Custom()
        thread.start()
        thread.join()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()

    main()
    assert recorded.tree == EXPECTED
    scepsy.uninstrument()
    assert threading.Thread.start is start
    assert ThreadPoolExecutor.submit is submit


def test_the_patch_keeps_nothing_that_a_thread_has_worked_on(recorded):
    scepsy.instrument(threads=True)

    class Data: ...

    class Custom(threading.Thread):
        def __init__(self):
            super().__init__()
            self.data = Data()

        def run(self):
            work()

    gc.disable()
    try:
        thread = Custom()
        left = weakref.ref(thread.data)
        thread.start()
        thread.join()
        del thread
        assert left() is None
    finally:
        gc.enable()


def test_without_any_of_them_a_thread_is_a_trace_of_its_own(recorded):
    @scepsy.workflow
    def main():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    main()
    assert sorted(recorded.tree) == [("execute_tool work", []), ("invoke_workflow main", [])]


def traceparent_in_child():
    from scepsy.capture import recorder

    handle = recorder.start("tool", "child")
    return dict(handle.traceparent())["traceparent"].split("-")[1]


def test_propagate_continues_the_trace_in_another_process(recorded):
    @scepsy.workflow
    def main():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(propagate(int), "7").result()

    assert main() == 7


def test_what_another_process_gets_is_the_identity_of_the_span(recorded):
    import pickle

    @scepsy.workflow
    def main():
        return pickle.loads(pickle.dumps(propagate(work)))  # noqa: S301 - our own bytes

    continued = main()
    continued(3)
    tool = recorded.named("execute_tool work")
    assert tool.parent.span_id == recorded.named("invoke_workflow main").context.span_id
    assert tool.parent.is_remote


def test_a_task_that_outlives_its_workflow_still_belongs_to_it(recorded):
    async def program():
        late = []

        async def later():
            await asyncio.sleep(0.01)
            work()

        @scepsy.workflow
        async def main():
            late.append(asyncio.create_task(later()))

        await main()
        await late[0]

    asyncio.run(program())
    assert recorded.tree == [("invoke_workflow main", [("execute_tool work", [])])]


def test_a_propagated_function_can_be_pickled_by_several_threads_at_once(recorded):
    @scepsy.workflow
    def main():
        carried = propagate(len)
        together = threading.Barrier(4, timeout=10)

        def many(_):
            together.wait()
            return {pickle.dumps(carried) for _ in range(300)}

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                return set().union(*pool.map(many, range(4)))
        finally:
            sys.setswitchinterval(interval)

    assert len(main()) == 1


def test_a_process_started_with_a_traceparent_continues_it(recorded, monkeypatch):
    monkeypatch.setenv("TRACEPARENT", f"00-{'ab' * 16}-{'cd' * 8}-01")
    scepsy.instrument(provider=recorded.provider)
    work()
    monkeypatch.delenv("TRACEPARENT")
    scepsy.instrument(provider=recorded.provider)
    work()
    first, second = recorded.spans
    assert first.parent.span_id == int("cd" * 8, 16)
    assert second.parent is None


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_propagated_functions_raise_what_they_raise(error):
    def fails():
        raise error

    with pytest.raises(error):
        propagate(fails)()
