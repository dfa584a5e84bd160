"""What each dialect says in a way of its own; what they have in common is in the golden files."""

import pytest

from scepsy.traces.assemble import CACHED_CALL, RETRIED, STOPPED_CALL, STOPPED_ROOT, UNCOUNTED
from scepsy.traces.dialects import DIALECTS, WANTED, normalise
from scepsy.traces.dialects.openinference import EARLY_END
from scepsy.traces.records import RawSpan


def engine(otlp, own, parent, start, end, *, flags=0x300, **more):
    """As vLLM makes them: no model, durations on the engine's clock, its own id of the request."""
    return otlp.span(
        own, parent, "llm_request", start, end, flags=flags,
        gen_ai__latency__time_in_queue=0.25, gen_ai__latency__time_to_first_token=0.5, gen_ai__latency__e2e=end - start,
        gen_ai__usage__prompt_tokens=70, gen_ai__usage__completion_tokens=30, **more,
    )  # fmt: skip


def only_call(reading):
    ((span,),) = (execution.calls for execution in reading.executions)
    return span


def test_an_engine_span_lends_to_its_client_whatever_its_clock(otlp, read):
    reading = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("c", "a", 1, 4, model="m", tokens=None),
        engine(otlp, "e", "c", 500, 502),
    )
    span = only_call(reading)
    assert (span.start_s, span.end_s) == (1, 4)
    call = span.call
    assert (call.llm, call.queue_s, call.time_to_first_token_s) == ("m", 0.25, 0.5)
    assert (call.input_tokens, call.output_tokens) == (70, 30)
    assert reading.repaired == {}


def test_an_engine_span_is_found_by_the_id_of_the_response(otlp, read):
    """Engines that get no trace context start traces of their own."""
    (execution,) = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("c", "a", 1, 4, tokens=None, gen_ai__response__id="cmpl-7"),
        engine(otlp, "e", "", 500, 502, trace="engine's", gen_ai__request__id="cmpl-7-0"),
    ).executions
    assert execution.calls[0].call.queue_s == 0.25


def test_an_engine_alone_goes_by_the_name_of_its_service(otlp, tmp_path):
    from scepsy.traces import read_executions

    lines = otlp.request(engine(otlp, "e", "", 1, 3), resource={"service.name": "llama"})
    span = only_call(read_executions([otlp.write(tmp_path / "spans.jsonl", lines)]))
    assert (span.call.llm, span.call.queue_s, span.duration_s) == ("llama", 0.25, 2)


def openinference(otlp, own, parent, name, start, end, kind, *, model="m", tokens=(10, 5), **more):
    given = {"openinference__span__kind": kind}
    if kind == "LLM":
        given["llm__model_name"] = model
        if tokens:
            given |= {"llm__token_count__prompt": tokens[0], "llm__token_count__completion": tokens[1]}
    return otlp.span(own, parent, name, start, end, **given, **more)


def test_a_request_in_a_trace_of_its_own_returns_to_its_call(otlp, read):
    """The client's span has the right interval; another request of the same model at another time stays apart."""
    reading = read(
        openinference(otlp, "a", "", "flow", 0, 10, "CHAIN"),
        openinference(otlp, "b", "a", "ChatOpenAI", 1, 5, "LLM"),
        openinference(otlp, "x", "", "ChatCompletion", 1.5, 4, "LLM", trace="lost"),
        openinference(otlp, "y", "", "ChatCompletion", 6, 7, "LLM", trace="alone"),
        openinference(otlp, "z", "", "ChatCompletion", 1.5, 4, "LLM", trace="other", tokens=(11, 5)),
    )
    found = {execution.id: execution for execution in reading.executions}
    assert found.keys() == {"t1", "alone", "other"}
    (span,) = found["t1"].calls
    assert (span.id, span.start_s, span.end_s, span.call.role) == ("x", 1.5, 4, "flow")


def test_a_streamed_call_that_ended_too_early_takes_its_clients_end(otlp, read):
    flawed = openinference(
        otlp, "b", "a", "OpenAILike.stream_chat", 1, 1.001, "LLM", events=[("First Token Stream Event", 1.5)]
    )
    root = openinference(otlp, "a", "", "flow", 0, 10, "CHAIN")
    alone = read(root, flawed)
    assert alone.repaired == {EARLY_END: 1}
    assert only_call(alone).end_s == 1.5
    beside = read(root, flawed, openinference(otlp, "c", "a", "ChatCompletion", 1.2, 4, "LLM"))
    assert beside.repaired == {}
    span = only_call(beside)
    assert (span.id, span.start_s, span.end_s) == ("c", 1.2, 4)
    assert span.call.time_to_first_token_s == 0.5


def test_rerankers_and_embeddings_are_calls_where_a_model_does_them(otlp, read):
    (execution,) = read(
        otlp.span("a", "", "flow", 0, 9, openinference__span__kind="CHAIN"),
        otlp.span("b", "a", "rank", 0, 1, openinference__span__kind="RERANKER", reranker__model_name="ranker"),
        otlp.span("c", "a", "embed", 1, 2, openinference__span__kind="EMBEDDING", embedding__model_name="embedder"),
        otlp.span("d", "a", "LLMRerank", 2, 4, openinference__span__kind="RERANKER"),
        openinference(otlp, "e", "d", "ChatOpenAI", 2, 3, "LLM"),
    ).executions
    assert [(span.call.llm, span.call.role) for span in execution.calls] == [
        ("ranker", "flow"), ("embedder", "flow"), ("m", "LLMRerank"),
    ]  # fmt: skip


def test_the_older_names_of_openllmetry(otlp, read):
    span = only_call(
        read(
            otlp.span("a", "", "w.workflow", 0, 9, traceloop__span__kind="workflow", traceloop__entity__name="w"),
            otlp.span(
                "b", "a", "openai.chat", 1, 3, llm__request__type="chat", gen_ai__request__model="m",
                gen_ai__usage__prompt_tokens=3, gen_ai__usage__completion_tokens=4,
                events=[("llm.content.completion.chunk", 1.25), ("llm.content.completion.chunk", 2)],
            ),
        )
    )  # fmt: skip
    call = span.call
    assert (call.input_tokens, call.output_tokens, call.role, call.time_to_first_token_s) == (3, 4, "w", 0.25)


def test_the_first_of_many_chunks_may_be_gone(otlp, read):
    """The SDK keeps the newest 128 events: what is left tells no time to the first token."""
    chunks = [("gen_ai.content.completion.chunk", 1 + number / 100) for number in range(128)]
    span = only_call(
        read(
            otlp.span(
                "b", "", "openai.chat", 0, 3, llm__request__type="chat", gen_ai__request__model="m", events=chunks
            )
        )
    )
    assert span.call.time_to_first_token_s is None


@pytest.mark.parametrize(
    ("attributes", "dropped"),
    [
        ({"scepsy__cache_hit": True}, {CACHED_CALL: 1}),
        ({"scepsy__outcome": "abandoned", "tokens": None}, {STOPPED_CALL: 1}),
        ({"scepsy__outcome": "abandoned", "scepsy__output_chunks": 9, "tokens": None}, {}),
    ],
)
def test_our_own_outcomes(otlp, read, attributes, dropped):
    """An abandoned stream was a call up to where it was read, if anything of it was counted."""
    reading = read(otlp.workflow("a", "", "w", 0, 10), otlp.chat("c", "a", 1, 9, **attributes))
    assert reading.dropped == dropped
    (execution,) = reading.executions
    assert [span.call.output_tokens for span in execution.calls] == ([] if dropped else [9])
    assert reading.repaired == ({} if dropped else {UNCOUNTED: 1})


def test_attempts_that_failed_are_not_part_of_the_call(otlp, read):
    reading = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("c", "a", 1, 9, scepsy__wasted_s=2.0, scepsy__retry_wait_s=1.0, scepsy__attempts=3),
    )
    span = only_call(reading)
    assert (span.start_s, span.end_s) == (4, 9)
    assert reading.repaired == {RETRIED: 1}


def test_an_interrupted_workflow_is_left_out(otlp, read):
    reading = read(
        otlp.workflow("a", "", "w", 0, 10, scepsy__outcome="interrupted"), otlp.workflow("b", "", "w", 0, 1, trace="t2")
    )
    assert reading.dropped == {STOPPED_ROOT: 1}


def test_every_dialect_is_reached_and_the_last_takes_all():
    assert all(dialect.marks for dialect in DIALECTS[:-1])
    assert not DIALECTS[-1].marks
    assert all(dialect.wanted <= WANTED for dialect in DIALECTS)
    plain = normalise(RawSpan("t", "s", "", "GET /", 1, 2, "http", {}, {}))
    assert (plain.kind, plain.label) == ("step", "GET /")
