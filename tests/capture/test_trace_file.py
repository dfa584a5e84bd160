import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from google.protobuf.json_format import Parse
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

import scepsy
from scepsy.capture import Recorder
from scepsy.capture.otlp_json import encode_request
from scepsy.capture.trace_file import TraceFile
from scepsy.traces import read_executions
from scepsy_optimizer.errors import ScepsyError


def lines(directory):
    return [
        (path, json.loads(line))
        for path in sorted(Path(directory).glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def spans(directory):
    return [
        span
        for _, request in lines(directory)
        for resource in request["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def run(code, directory, **kwargs):
    env = {**os.environ, "SCEPSY_TRACES": str(directory)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=60, **kwargs
    )


def test_a_line_is_what_the_protobuf_exporter_would_send(recorded):
    @scepsy.agent
    def fails():
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it has no text
        fails()
    line = encode_request(recorded.spans, {})
    ours = json.loads(line)
    # OTLP/JSON writes ids in hex, where protobuf's own JSON form has base64: compare the rest through the schema.
    for resource in ours["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                (real,) = recorded.spans
                assert span.pop("traceId") == f"{real.context.trace_id:032x}"
                assert span.pop("spanId") == f"{real.context.span_id:016x}"
    theirs = encode_spans(recorded.spans)
    for resource in theirs.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                span.ClearField("trace_id")
                span.ClearField("span_id")
                span.ClearField("flags")
    assert Parse(json.dumps(ours), ExportTraceServiceRequest()) == theirs


def test_values_of_every_type():
    provider = TracerProvider(resource=Resource({"service.name": "x"}))
    attributes = {"a": "text", "b": True, "c": 2**60, "d": 0.5, "e": ("x", "y")}
    with provider.get_tracer("scepsy").start_as_current_span("s", attributes=attributes) as span:
        pass
    (resource,) = json.loads(encode_request([span], {"process.pid": 3}))["resourceSpans"]
    assert resource["resource"]["attributes"] == [
        {"key": "service.name", "value": {"stringValue": "x"}},
        {"key": "process.pid", "value": {"intValue": "3"}},
    ]
    (encoded,) = resource["scopeSpans"][0]["spans"]
    assert [one["value"] for one in encoded["attributes"]] == [
        {"stringValue": "text"},
        {"boolValue": True},
        {"intValue": str(2**60)},
        {"doubleValue": 0.5},
        {"arrayValue": {"values": [{"stringValue": "x"}, {"stringValue": "y"}]}},
    ]


def test_a_handle_is_written_as_its_span_would_be(recorded):
    """The short way, without OpenTelemetry's SDK, writes what the SDK's span of the same handle would be."""
    ended = []
    direct = Recorder()
    direct.use(sink=ended.append)
    for target in (Recorder(recorded.provider), direct):
        root = target.start("workflow", 'quoted "é" \n name')
        child = target.start("llm", "model", operation="chat", parent=root)
        child.attributes |= {"text": "é\\", "yes": True, "count": 3, "part": 0.25}
        child.end(error=ValueError())
        root.end()
    ours = [json.loads(encode_request([handle], {})) for handle in ended]
    theirs = [json.loads(encode_request([span], {})) for span in reversed(recorded.spans)]
    for mine, other in zip(ours, theirs, strict=True):
        (mine,), (other,) = (one["resourceSpans"][0]["scopeSpans"][0]["spans"] for one in (mine, other))
        for key in ("traceId", "spanId", "parentSpanId", "startTimeUnixNano", "endTimeUnixNano"):
            assert len(mine.pop(key, "")) == len(other.pop(key, ""))
        assert mine == other
    assert ended[0].parent_id == ended[1].span_id
    assert ended[0].trace_id == ended[1].trace_id


def test_of_other_peoples_spans_only_the_skeleton_is_written():
    provider = TracerProvider()
    tracer = provider.get_tracer("somebody")
    with tracer.start_as_current_span("s", attributes={"prompt": "secret"}) as span:
        span.add_event("secret")
    assert b"secret" not in encode_request([span], {})


def test_what_lies_below_spans_that_go_elsewhere_is_read_all_the_same(tmp_path):
    elsewhere = TracerProvider().get_tracer("other")

    @scepsy.agent
    def inner():
        pass

    @scepsy.workflow
    def main():
        with elsewhere.start_as_current_span("between"):
            inner()

    scepsy.instrument(directory=tmp_path)
    main()
    with elsewhere.start_as_current_span("around"):
        main()
    scepsy.uninstrument()
    reading = read_executions([tmp_path])
    for execution in reading.executions:
        assert [span.name for span in execution.spans] == ["invoke_workflow main", "invoke_agent inner"]
    assert len(reading.executions) == 2
    assert (reading.dropped, reading.repaired) == ({}, {})


def test_files_of_instrumented_programs(tmp_path):
    done = run(
        """
        import scepsy
        scepsy.instrument()
        @scepsy.workflow
        def main(): ...
        main()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    ((path, request),) = lines(tmp_path)
    assert path.name.startswith("spans-")
    (span,) = spans(tmp_path)
    assert span["name"] == "invoke_workflow main"
    resource = {one["key"]: one["value"] for one in request["resourceSpans"][0]["resource"]["attributes"]}
    assert int(resource["process.pid"]["intValue"]) > 0


def test_a_process_without_spans_leaves_no_file(tmp_path):
    assert run("import scepsy; scepsy.instrument()", tmp_path).returncode == 0
    assert lines(tmp_path) == []


def test_a_killed_process_loses_at_most_its_last_moments(tmp_path):
    done = run(
        """
        import os, signal, time
        import scepsy
        scepsy.instrument()
        @scepsy.workflow
        def early(): ...
        early()
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    assert [span["name"] for span in spans(tmp_path)] == ["invoke_workflow early"]


@pytest.mark.parametrize("leave", ["os._exit(0)", "raise SystemExit"])
def test_forked_children_write_files_of_their_own_and_nothing_twice(tmp_path, leave):
    done = run(
        f"""
        import os, time
        import scepsy
        scepsy.instrument()
        @scepsy.tool
        def child_work(): ...
        @scepsy.tool
        def queued(): ...
        @scepsy.workflow
        def main():
            queued()
            pid = os.fork()
            if pid == 0:
                child_work()
                time.sleep(1.0)
                {leave}
            os.waitpid(pid, 0)
        main()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = sorted((span["name"], span.get("parentSpanId")) for span in spans(tmp_path))
    (root,) = [span for span in spans(tmp_path) if span["name"] == "invoke_workflow main"]
    assert found == [
        ("execute_tool child_work", root["spanId"]),
        ("execute_tool queued", root["spanId"]),
        ("invoke_workflow main", None),
    ]
    assert len({path for path, _ in lines(tmp_path)}) == 2


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_lose_nothing_at_their_exit(tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing
            import scepsy
            scepsy.instrument(directory={str(tmp_path)!r})
            @scepsy.workflow
            def work(index): ...
            if __name__ == "__main__":
                context = multiprocessing.get_context({method!r})
                children = [context.Process(target=work, args=(i,)) for i in range(3)]
                for child in children: child.start()
                for child in children: child.join()
            """
        )
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(spans(tmp_path)) == 3


@pytest.mark.parametrize("pool", ["concurrent.futures.ProcessPoolExecutor(1)", "multiprocessing.Pool(1)"])
def test_a_forked_pool_does_not_stay_in_its_first_workflow(tmp_path, pool):
    """What is given to it in a context of its own belongs there; one process for one task keeps that of its start."""
    done = run(
        f"""
        import concurrent.futures, multiprocessing
        import scepsy
        multiprocessing.set_start_method("fork")
        scepsy.instrument()
        @scepsy.agent
        def pooled(): ...
        @scepsy.agent
        def carried(): ...
        @scepsy.agent
        def started(): ...
        def submit(pool, function):
            if hasattr(pool, "submit"):
                pool.submit(function).result()
            else:
                pool.apply(function)
        @scepsy.workflow
        def first(pool):
            submit(pool, pooled)
        @scepsy.workflow
        def second(pool):
            submit(pool, pooled)
            submit(pool, scepsy.propagate(carried))
            process = multiprocessing.Process(target=started)
            process.start()
            process.join()
        with {pool} as pool:
            first(pool)
            second(pool)
            getattr(pool, "close", lambda: None)()
            getattr(pool, "join", lambda: None)()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for span in spans(tmp_path):
        found.setdefault(span["name"].rpartition(" ")[2], []).append(span)
    assert [span.get("parentSpanId") for span in found["pooled"]][-1:] == [None]
    (second,) = found["second"]
    for name in ("carried", "started"):
        assert [span["parentSpanId"] for span in found[name]] == [second["spanId"]]


def test_workers_of_celerys_pools_lose_nothing_at_their_exit(tmp_path):
    done = run(
        """
        import scepsy
        scepsy.instrument()
        @scepsy.workflow
        def work(index): ...
        import billiard, billiard.pool
        before = billiard.pool.Worker._do_exit
        pool = billiard.Pool(2, maxtasksperchild=2)
        pool.map(work, range(8), chunksize=1)
        pool.close()
        pool.join()
        scepsy.uninstrument()
        assert before is not billiard.pool.Worker._do_exit
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [span["name"] for span in spans(tmp_path)] == ["invoke_workflow work"] * 8


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ScepsyError, match="traces cannot be written here"):
        scepsy.instrument(directory=blocked)
    scepsy.uninstrument()


def test_a_full_disk_costs_spans_but_not_the_program(tmp_path, caplog, recorded):
    @scepsy.workflow
    def main(): ...

    main()
    file = TraceFile(tmp_path)
    file.path = tmp_path / "gone" / "spans.jsonl"
    file.on_end(recorded.spans[0])
    assert file.force_flush() is False
    assert "capture failed" in caplog.text
    file.shutdown()


def test_of_a_line_that_a_full_disk_tears_nothing_stays(tmp_path):
    done = run(
        """
        import resource, signal
        import scepsy
        from scepsy.capture.trace_file import flush_all
        scepsy.instrument()
        @scepsy.workflow
        def work(): ...
        def some(count):
            for _ in range(count): work()
            flush_all()
        some(3)
        from scepsy.capture.trace_file import _files
        (path,) = [file.path for file in _files]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
        some(4)
        some(6)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        some(5)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("capture failed") == 1
    (path,) = tmp_path.rglob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    counts = [len(line["resourceSpans"][0]["scopeSpans"][0]["spans"]) for line in lines]
    assert sum(counts) == 8


def test_every_span_is_written_once_when_many_threads_end_them(tmp_path):
    done = run(
        """
        import threading
        import scepsy
        scepsy.instrument()
        @scepsy.workflow
        def work(): ...
        def many():
            for _ in range(500): work()
        threads = [threading.Thread(target=many) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len({span["spanId"] for span in spans(tmp_path)}) == len(spans(tmp_path)) == 4000


def test_what_is_written_to_while_it_is_encoded_or_cannot_be_costs_nothing_else(tmp_path):
    """The thread that writes lives on, and so do the other spans of the batch."""
    done = run(
        """
        import logging, sys, time
        import scepsy
        from scepsy.capture import recorder, trace_file
        logging.basicConfig()
        trace_file.FLUSH_INTERVAL_S = 0.05
        scepsy.instrument()
        @scepsy.workflow
        def work(): ...
        work()
        bad = recorder.start("step", "bad")
        endless = []
        endless.append(endless)
        bad.attributes["endless"] = endless
        bad.end()
        work()
        time.sleep(0.3)
        work()
        time.sleep(0.3)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [span["name"] for span in spans(tmp_path)] == ["invoke_workflow work"] * 3
    assert done.stderr.count("capture failed in encoding a span (RecursionError)") == 1


def test_what_the_garbage_collector_closes_in_the_thread_that_writes_ends_there(tmp_path):
    """Wherever that thread is: a lock that it held then would be held for ever."""
    done = run(
        """
        import gc, threading, time
        import scepsy
        from scepsy.capture import trace_file
        trace_file.FLUSH_INTERVAL_S = 0.02
        @scepsy.workflow
        def stream():
            yield 1
        class Box: ...
        def give_up():
            box = Box()
            box.itself, box.stream = box, stream()
            next(box.stream)
        gc.disable()
        real = threading._allocate_lock
        def allocate():
            if threading.current_thread().name == "scepsy-trace-file":
                gc.collect()
            return real()
        threading._allocate_lock = allocate
        scepsy.instrument()
        def use():
            for _ in range(5):
                give_up()
                scepsy.workflow(lambda: None)()
                time.sleep(0.1)
        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        gc.collect()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len([span for span in spans(tmp_path) if span["name"] == "invoke_workflow stream"]) == 5


def test_what_is_open_at_the_end_of_the_program_is_written_as_abandoned(tmp_path):
    done = run(
        """
        import atexit, threading, time
        late = []
        atexit.register(lambda: late[0]())
        import scepsy
        scepsy.instrument()
        @scepsy.agent
        def inner(): ...
        @scepsy.workflow
        def left():
            inner()
            threading.Event().wait()
        @scepsy.workflow
        def last(): ...
        late.append(last)
        threading.Thread(target=left, daemon=True).start()
        time.sleep(0.3)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = {span["name"]: span for span in spans(tmp_path)}
    assert sorted(found) == ["invoke_agent inner", "invoke_workflow last", "invoke_workflow left"]
    assert found["invoke_agent inner"]["parentSpanId"] == found["invoke_workflow left"]["spanId"]
    attributes = {pair["key"]: pair["value"] for pair in found["invoke_workflow left"]["attributes"]}
    assert attributes["scepsy.outcome"] == {"stringValue": "abandoned"}
