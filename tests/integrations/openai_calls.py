"""What the tests of the openai client share: what a call must look like beside what the server saw."""

import pydantic

from scepsy import semconv

MESSAGES = [{"role": "user", "content": "a secret question"}]
CLOCK_NS = 2e6  # the server's clock is read in another thread
FULL = (9, 4, 5, 2)


class Answer(pydantic.BaseModel):
    answer: int


def one_call(recorded, server):
    """The one call that was captured: it is what the server saw, and its parent is not another call."""
    call = recorded.call
    (seen,) = server.good
    _, trace_id, span_id, _ = seen.headers["traceparent"].split("-")
    assert int(trace_id, 16) == call.context.trace_id
    assert int(span_id, 16) == call.context.span_id
    assert call.attributes[semconv.REQUEST_MODEL] == seen.model
    assert call.attributes[semconv.SERVER_ADDRESS] == "127.0.0.1"
    assert call.attributes[semconv.SERVER_PORT] == server.port
    assert call.attributes[semconv.ATTEMPTS] == len(server.seen)
    assert "secret" not in call.to_json()
    return call


def tokens(call):
    names = (semconv.INPUT_TOKENS, semconv.CACHED_TOKENS, semconv.OUTPUT_TOKENS, semconv.REASONING_TOKENS)
    return tuple(call.attributes.get(name) for name in names)
