import asyncio
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

import scepsy
from scepsy_optimizer.errors import ScepsyError


def run(code, cwd, **env):
    environment = {name: value for name, value in os.environ.items() if name != "SCEPSY_TRACES"}
    command = code if isinstance(code, list) else [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(
        command, cwd=cwd, env={**environment, **env}, capture_output=True, text=True, timeout=60, check=False
    )


def names(directory):
    return [
        span["name"]
        for path in sorted(Path(directory).glob("*.jsonl"))
        for line in path.read_text().splitlines()
        for resource in json.loads(line)["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


MAIN = """
@scepsy.workflow
def main(): ...
main()
"""


def test_the_default_directory_is_beside_the_program(tmp_path):
    done = run("import scepsy\nscepsy.instrument()" + MAIN, tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "scepsy-traces") == ["invoke_workflow main"]


def test_an_applications_provider_is_used_and_never_replaced(tmp_path):
    code = """
        import scepsy
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        provider, exporter = TracerProvider(), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        scepsy.instrument()
        @scepsy.workflow
        def main(): ...
        main()
        assert trace.get_tracer_provider() is provider
        assert [span.name for span in exporter.get_finished_spans()] == ["invoke_workflow main"]
    """
    done = run(code, tmp_path, SCEPSY_TRACES=str(tmp_path / "unused"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "unused").exists()
    assert not (tmp_path / "scepsy-traces").exists()


def test_scepsy_takes_no_global_provider_so_the_application_can_still_set_one(tmp_path):
    code = """
        import scepsy
        scepsy.instrument()
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
        assert trace.get_tracer_provider() is provider
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not allowed" not in done.stderr


def test_decorators_alone_use_the_applications_provider(tmp_path):
    code = """
        import scepsy
        @scepsy.workflow
        def main(): ...
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        main()
        provider, exporter = TracerProvider(), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        main()
        assert [span.name for span in exporter.get_finished_spans()] == ["invoke_workflow main"]
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_given_directory_gets_files_beside_the_applications_provider(tmp_path, recorded):
    scepsy.instrument(directory=tmp_path, provider=recorded.provider)

    @scepsy.workflow
    def main(): ...

    with recorded.provider.get_tracer("mine").start_as_current_span("request"):
        main()
    scepsy.capture.flush()
    assert names(tmp_path) == ["invoke_workflow main", "request"]
    assert sorted(span.name for span in recorded.spans) == ["invoke_workflow main", "request"]
    scepsy.uninstrument()
    main()
    assert len(names(tmp_path)) == 2


def test_the_destination_can_be_changed(tmp_path):
    @scepsy.workflow
    def main(): ...

    for name in ("one", "two"):
        scepsy.instrument(directory=tmp_path / name)
        main()
    scepsy.instrument()
    main()
    scepsy.uninstrument()
    assert names(tmp_path / "one") == ["invoke_workflow main"]
    assert names(tmp_path / "two") == ["invoke_workflow main"] * 2


def test_said_again_while_it_works_nothing_is_lost(tmp_path):
    @scepsy.workflow
    def main(): ...

    made = threading.Event()
    count = 0

    def work():
        nonlocal count
        while not made.is_set():
            main()
            count += 1

    scepsy.instrument(directory=tmp_path / "one")
    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        scepsy.instrument(directory=tmp_path / "one")
        scepsy.instrument()
    for number in range(10):
        scepsy.instrument(directory=tmp_path / f"{number % 2}")
    made.set()
    thread.join()
    scepsy.uninstrument()
    assert len(list((tmp_path / "one").iterdir())) == 1
    written = sum(len(names(folder)) for folder in tmp_path.iterdir())
    # One may be on its way from the recorder to a file that is closed meanwhile.
    assert count - 10 <= written <= count


async def test_two_threads_at_once_turn_it_on_once(tmp_path, recorded):
    together = threading.Barrier(4, timeout=10)

    def turn_on():
        together.wait()
        scepsy.instrument(directory=tmp_path, provider=recorded.provider)

    scepsy.uninstrument()
    await asyncio.gather(*(asyncio.to_thread(turn_on) for _ in range(4)))

    @scepsy.workflow
    def main(): ...

    main()
    scepsy.uninstrument()
    assert names(tmp_path) == ["invoke_workflow main"]


def test_opentelemetry_instrument_finds_the_hooks(tmp_path):
    program = tmp_path / "app.py"
    program.write_text(
        textwrap.dedent(
            """
            import openai
            assert hasattr(openai.OpenAI.request, "__wrapped__")
            import langchain_core.runnables.config
            from langchain_core.callbacks import CallbackManager
            assert hasattr(CallbackManager.on_chain_start, "__wrapped__")
            import llama_index_instrumentation
            handlers = llama_index_instrumentation.get_dispatcher().span_handlers
            assert any(type(handler).__name__ == "ScepsySpanHandler" for handler in handlers)
            """
        )
    )
    command = [str(Path(sys.executable).with_name("opentelemetry-instrument")), "--traces_exporter", "none"]
    done = run([*command, "--metrics_exporter", "none", sys.executable, str(program)], tmp_path)
    assert done.returncode == 0, done.stderr


def test_instrument_imports_no_framework_and_hooks_each_when_it_is_imported(tmp_path):
    code = """
        import sys
        import scepsy
        scepsy.instrument()
        def imported():
            return [name for name in ("openai", "langchain_core", "llama_index", "numpy") if name in sys.modules]
        assert imported() == [], imported()
        import openai
        assert hasattr(openai.OpenAI.request, "__wrapped__")
        scepsy.uninstrument()
        assert not hasattr(openai.OpenAI.request, "__wrapped__")
        import langchain_core.runnables.config
        from langchain_core.callbacks import CallbackManager
        assert not hasattr(CallbackManager.on_chain_start, "__wrapped__")
    """
    done = run(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_uninstrument_restores_everything():
    import openai
    from langchain_core.callbacks import manager
    from langchain_core.tracers import context
    from llama_index.core.instrumentation import get_dispatcher

    def state():
        root = get_dispatcher()
        clients = (openai.OpenAI, openai.AsyncOpenAI)
        names = ("request", "_prepare_request", "_sleep_for_retry", "_process_response")
        return (
            [vars(client).get(name) for client in clients for name in names],
            [{**vars(kind)} for kind in vars(manager).values() if isinstance(kind, type)],
            list(context._configure_hooks),
            [type(handler) for handler in root.span_handlers],
            list(root.event_handlers),
        )

    before = state()
    scepsy.instrument(provider=TracerProvider())
    assert state() != before
    scepsy.uninstrument()
    assert state() == before


def test_a_client_of_another_kind_is_refused():
    with pytest.raises(ScepsyError, match="not a client that Scepsy can instrument"):
        scepsy.instrument(object(), provider=TracerProvider())
    scepsy.uninstrument()
