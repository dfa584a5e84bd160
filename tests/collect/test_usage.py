import gzip
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy.collect.usage import AnswerReader, Usage

CHAT = {"id": "c1", "model": "m", "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}

CACHED = {"input_tokens_details": {"cached_tokens": 1}}


def read(body, content_type="application/json", encoding="", cuts=()):
    reader = AnswerReader(content_type, encoding)
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in itertools.pairwise(edges):
        if start < end:
            reader.feed(body[start:end])
    return reader.usage()


def events(*contents, end="\n\n", done=True):
    lines = [f"data: {json.dumps(content)}" for content in contents]
    return "".join(f"{line}{end}" for line in [*lines, *(["data: [DONE]"] if done else [])]).encode()


def piece(text, **more):
    return {"id": "c1", "model": "m", "choices": [{"index": 0, "delta": {"content": text}}], **more}


OPENING = {"id": "c1", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
LAST = {
    "id": "c1",
    "model": "m",
    "choices": [],
    "usage": {**CHAT["usage"], "prompt_tokens_details": {"cached_tokens": 5}},
}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (CHAT, Usage(id="c1", model="m", input_tokens=9, output_tokens=4)),
        (
            {"id": "r", "model": "m", "usage": {"input_tokens": 3, "output_tokens": 2, **CACHED}},
            Usage(id="r", model="m", input_tokens=3, output_tokens=2, cached_tokens=1),
        ),
        ({"model": "e", "usage": {"prompt_tokens": 7, "total_tokens": 7}}, Usage(model="e", input_tokens=7)),
        ({"id": 3, "model": None, "usage": {"prompt_tokens": True, "completion_tokens": -1}}, Usage()),
        ({"usage": "much"}, Usage()),
        ([1], Usage()),
    ],
)
def test_whole_answers(content, expected):
    assert read(json.dumps(content).encode()) == expected
    assert read(gzip.compress(json.dumps(content).encode()), encoding="gzip") == expected
    assert read(json.dumps(content).encode(), encoding="br") == Usage()


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from(["\n\n", "\r\n\r\n"]))
def test_streams_however_they_are_cut(cuts, end):
    body = events(OPENING, piece("a"), piece("b\n\nc"), piece("d"), LAST, end=end)
    told = read(body, "text/event-stream", cuts=cuts)
    assert told == Usage(id="c1", model="m", input_tokens=9, output_tokens=4, cached_tokens=5, pieces=3)


def test_a_stream_without_usage_counts_its_pieces():
    body = events(OPENING, piece("a"), piece("b"))
    assert read(body, "text/event-stream") == Usage(id="c1", model="m", pieces=2)
    completion = {"id": "p", "model": "m", "choices": [{"text": "a"}]}
    assert read(events(completion, completion), "text/event-stream") == Usage(id="p", model="m", pieces=2)
    cut_off = read(events(OPENING, piece("a"), done=False), "text/event-stream")
    assert cut_off == Usage(id="c1", model="m", pieces=1)
    assert read(b"", "text/event-stream") == Usage(pieces=0)


def test_streams_of_other_kinds():
    responses = events(
        {"type": "response.created", "response": {"id": "r1", "model": "m"}},
        {"type": "response.output_text.delta", "delta": "x"},
        {
            "type": "response.completed",
            "response": {"id": "r1", "model": "m", "usage": {"input_tokens": 5, "output_tokens": 6}},
        },
        done=False,
    )
    told = read(responses, "text/event-stream")
    assert (told.id, told.model, told.input_tokens, told.output_tokens) == ("r1", "m", 5, 6)
    messages = events(
        {"type": "message_start", "message": {"id": "m1", "usage": {"input_tokens": 5, "output_tokens": 1}}},
        {"type": "content_block_delta", "delta": {"text": "x"}},
        {"type": "message_delta", "usage": {"output_tokens": 8}},
        {"type": "message_stop"},
        done=False,
    )
    told = read(messages, "text/event-stream")
    assert (told.id, told.input_tokens, told.output_tokens) == ("m1", 5, 8)


@pytest.mark.parametrize(
    ("body", "ended"),
    [
        (events(OPENING, piece("x"), LAST), True),
        (events(OPENING, piece("x"), LAST, done=False), False),
        (events(OPENING, piece("x"), end="\r\n\r\n"), True),
        (events(piece("x")) + b"data: {", False),
        (events({"type": "response.completed", "response": {"id": "r1"}}, done=False), True),
        (events({"type": "message_delta"}, {"type": "message_stop"}, done=False), True),
        (b"data: [DONE]", False),
        (b"", False),
    ],
)
def test_the_last_event_of_a_stream_is_known(body, ended):
    reader = AnswerReader("text/event-stream", "")
    reader.feed(body)
    assert reader.has_ended == ended
    plain = AnswerReader("application/json", "")
    plain.feed(body)
    assert not plain.has_ended


def test_an_answer_too_large_to_keep_tells_its_counts_at_its_end():
    vectors = {"object": "list", "data": [{"embedding": "A" * 100_000} for _ in range(30)], "model": "e"}
    body = json.dumps({**vectors, "usage": {"prompt_tokens": 11, "details": {"a": 1}}}).encode()
    reader = AnswerReader("application/json", "")
    for start in range(0, len(body), 65536):
        reader.feed(body[start : start + 65536])
        assert len(reader._tail) <= (1 << 20) + 65536
    assert reader.usage() == Usage(input_tokens=11)


def test_a_text_that_looks_like_usage_is_not():
    text = '"usage": {"prompt_tokens": 1}'
    body = json.dumps({"choices": [{"text": text}], "usage": {"prompt_tokens": 2}, "pad": "x" * (1 << 20)})
    late = json.dumps({"pad": "x" * (2 << 20), "usage": {"prompt_tokens": 2}, "text": text})
    assert read(body.encode()) == Usage()  # its counts are not at the end
    assert read(late.encode()).input_tokens == 2
