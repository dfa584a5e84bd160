import base64
import math
import statistics
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy.emulator.answers import embedding, output_tokens, request_random, words
from scepsy.emulator.requests import RequestError, parse_chat, parse_completion, parse_embeddings


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 4000), st.integers(0, 4000), st.booleans())
def test_lengths_keep_their_bounds(index, max_tokens, min_tokens, exact):
    least = min(min_tokens, max_tokens)
    length = output_tokens(
        request_random(1, {"prompt": "x"}, index), max_tokens=max_tokens, min_tokens=least, ignore_eos=exact
    )
    assert max(1, least) <= length <= max_tokens
    assert length == max_tokens or not exact


def test_lengths_vary_around_their_median():
    lengths = [
        output_tokens(request_random(0, {"n": n}, 0), max_tokens=1000, min_tokens=0, ignore_eos=False)
        for n in range(2000)
    ]
    assert statistics.median(lengths) == pytest.approx(600, rel=0.05)
    assert 0.03 < sum(length == 1000 for length in lengths) / 2000 < 0.12


def test_an_answer_is_a_function_of_seed_and_request():
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    text = [words(request_random(7, body, 0), 20) for _ in range(2)]
    assert text[0] == text[1]
    assert text[0] == words(
        request_random(7, {**body, "stream": True, "stream_options": {"include_usage": True}}, 0), 20
    )
    for other in (request_random(8, body, 0), request_random(7, body, 1), request_random(7, {**body, "seed": 1}, 0)):
        assert words(other, 20) != text[0]


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 300))
def test_an_answer_begins_with_a_score_and_has_a_word_per_token(index, tokens):
    answer = words(request_random(0, {}, index), tokens)
    assert len(answer) == tokens
    assert 0 <= int(answer[0]) <= 10
    assert len("".join(answer).split()) == tokens


def test_an_embedding_is_exact_in_both_encodings():
    vector = embedding(request_random(0, {}, 0))
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-6)
    packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector))
    assert list(struct.unpack(f"<{len(vector)}f", base64.b64decode(packed))) == vector


def test_prompt_tokens_count_all_texts():
    parts = [{"type": "text", "text": "x" * 40}, {"type": "image_url", "image_url": {"url": "data:..."}}]
    messages = [{"role": "system", "content": "y" * 8}, {"role": "user", "content": parts}]
    assert parse_chat({"messages": messages}, 1000).prompts == (4 + 2 + 4 + 10,)
    assert parse_chat({"messages": [{"role": "assistant", "content": None}]}, 1000).prompts == (4,)
    assert parse_completion({"prompt": ["x" * 8, "y" * 9]}, 1000).prompts == (2, 3)
    assert parse_completion({"prompt": [1, 2, 3]}, 1000).prompts == (3,)
    assert parse_embeddings({"input": [[1, 2], [3]]}, 1000) == (2, 1)


def test_limits_of_length():
    chat = [{"role": "user", "content": "x" * 400}]
    assert parse_chat({"messages": chat}, 4096).max_tokens == 256
    assert parse_chat({"messages": chat}, 200).max_tokens == 200 - 104
    assert parse_chat({"messages": chat, "max_tokens": 9, "max_completion_tokens": 7}, 4096).max_tokens == 7


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: a list"),
        ({"messages": "hi"}, "messages: a list"),
        ({"messages": ["hi"]}, "messages: a list"),
        ({"messages": [], "max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        ({"messages": [], "max_tokens": "9"}, "max_tokens must be an integer"),
        ({"messages": [], "n": True}, "n must be an integer"),
        ({"messages": [], "max_tokens": 3, "min_tokens": 4}, "min_tokens must be less than or equal to max_tokens=3"),
        ({"messages": [], "max_tokens": 5000}, "maximum context length is 4096 tokens"),
        ({"messages": [{"content": "x" * 40_000}]}, "maximum context length is 4096 tokens"),
    ],
)
def test_bad_requests_are_refused(body, message):
    with pytest.raises(RequestError, match=message):
        parse_chat(body, 4096)


@pytest.mark.parametrize("prompt", [None, [], [[]], [1, "x"], {"text": "x"}])
def test_bad_prompts_are_refused(prompt):
    with pytest.raises(RequestError, match="prompt: a text, token ids"):
        parse_completion({"prompt": prompt}, 4096)
