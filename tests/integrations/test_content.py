import json

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

import scepsy
from scepsy import semconv

QUESTION = "a secret question"
MESSAGES = [{"role": "user", "content": QUESTION}]
WHOLE, STREAMED = '{"answer": 42}', "44444"


@pytest.fixture
def written(tmp_path):
    """What is in the trace files by now, as text."""

    def read():
        scepsy.flush()
        return "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))

    read.directory = tmp_path
    yield read
    scepsy.uninstrument()


def spans(text):
    return [
        {
            "name": span["name"],
            **{one["key"]: next(iter(one["value"].values())) for one in span.get("attributes", [])},
        }
        for line in text.splitlines()
        for resource in json.loads(line)["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def said(text):
    """Of the only call: role and texts of each message, of the prompt and of the answer."""
    (call,) = [span for span in spans(text) if span.get(semconv.KIND) == semconv.KIND_LLM]
    return [
        [(one["role"], *(_text(part) for part in one["parts"])) for one in json.loads(call[key])]
        for key in (semconv.INPUT_MESSAGES, semconv.OUTPUT_MESSAGES)
        if key in call
    ]


def _text(part):
    return part.get("content") or part.get("arguments") or part.get("response") or part["type"]


def openai_sync(server, model, stream):
    with openai.OpenAI(base_url=server.url, api_key="key") as client:
        answer = client.chat.completions.create(model=model, messages=MESSAGES, stream=stream)
        if stream:
            list(answer)


async def openai_async(server, model, stream):
    async with openai.AsyncOpenAI(base_url=server.url, api_key="key") as client:
        answer = await client.chat.completions.create(model=model, messages=MESSAGES, stream=stream)
        if stream:
            _ = [piece async for piece in answer]


def responses(server, model, stream):
    with openai.OpenAI(base_url=server.url, api_key="key") as client:
        answer = client.responses.create(model=model, input=QUESTION, stream=stream)
        if stream:
            list(answer)


def completions(server, model, stream):
    with openai.OpenAI(base_url=server.url, api_key="key") as client:
        answer = client.completions.create(model=model, prompt=QUESTION, stream=stream)
        if stream:
            list(answer)


def read_as_bytes(server, model, stream):
    with openai.OpenAI(base_url=server.url, api_key="key") as client:
        ask = client.chat.completions.with_streaming_response.create
        with ask(model=model, messages=MESSAGES, stream=stream) as answer:
            list(answer.iter_lines())


def langchain_sync(server, model, stream):
    llm = ChatOpenAI(base_url=server.url, api_key="key", model=model, **server.http_clients())
    list(llm.stream(QUESTION)) if stream else llm.invoke(QUESTION)


async def langchain_async(server, model, stream):
    llm = ChatOpenAI(base_url=server.url, api_key="key", model=model, **server.http_clients())
    if stream:
        _ = [piece async for piece in llm.astream(QUESTION)]
    else:
        await llm.ainvoke(QUESTION)


def _llama_index(server, model):
    clients = server.http_clients()
    http = {"http_client": clients["http_client"], "async_http_client": clients["http_async_client"]}
    return OpenAILike(model=model, api_base=server.url, api_key="key", is_chat_model=True, **http)


def llama_index_sync(server, model, stream):
    llm = _llama_index(server, model)
    messages = [ChatMessage(role="user", content=QUESTION)]
    list(llm.stream_chat(messages)) if stream else llm.chat(messages)


async def llama_index_async(server, model, stream):
    llm = _llama_index(server, model)
    messages = [ChatMessage(role="user", content=QUESTION)]
    if stream:
        _ = [piece async for piece in await llm.astream_chat(messages)]
    else:
        await llm.achat(messages)


WAYS = [
    openai_sync,
    openai_async,
    responses,
    completions,
    read_as_bytes,
    langchain_sync,
    langchain_async,
    llama_index_sync,
    llama_index_async,
]


async def ask(way, server, stream, model="m"):
    running = way(server, model, stream)
    if running is not None:
        await running


def answer_of(way, stream):
    if not stream:
        return "42" if way is completions else WHOLE
    return WHOLE if way is responses else STREAMED


every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
whole_or_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@every_way
@whole_or_streamed
async def test_nothing_said_is_recorded_by_default(server, written, way, stream):
    scepsy.instrument(directory=written.directory)
    await ask(way, server, stream)
    text = written()
    assert said(text) == []
    assert "secret" not in text
    assert "answer" not in text
    assert STREAMED not in text


@every_way
@whole_or_streamed
async def test_content_is_recorded_once_asked_for(server, written, way, stream):
    scepsy.instrument(directory=written.directory, record_content=True)
    await ask(way, server, stream)
    text = written()
    assert said(text) == [[("user", QUESTION)], [("assistant", answer_of(way, stream))]]
    assert text.count("secret") == 1


@every_way
@whole_or_streamed
async def test_the_redaction_sees_every_text_first(server, written, way, stream):
    seen = []

    def redact(text):
        seen.append(text)
        return text.replace("secret", "…").replace("4", "#")

    scepsy.instrument(directory=written.directory, record_content=True, redact=redact)
    await ask(way, server, stream)
    answer = answer_of(way, stream)
    assert seen == [QUESTION, answer]
    assert said(written()) == [[("user", "a … question")], [("assistant", answer.replace("4", "#"))]]


@every_way
@whole_or_streamed
async def test_a_redaction_that_fails_costs_the_content_and_nothing_else(server, written, caplog, way, stream):
    def redact(text):
        raise ValueError(f"cannot read {text}")

    scepsy.instrument(directory=written.directory, record_content=True, redact=redact)
    await ask(way, server, stream)
    text = written()
    (call,) = [span for span in spans(text) if span.get(semconv.KIND) == semconv.KIND_LLM]
    assert call[semconv.REQUEST_MODEL] == "m"
    assert semconv.ERROR_TYPE not in call
    assert said(text) == []
    assert "secret" not in text
    assert not any("secret" in record.message for record in caplog.records)


@pytest.mark.parametrize("returned", [b"bytes", 7])
def test_a_redaction_must_return_text_or_none(server, written, returned):
    scepsy.instrument(directory=written.directory, record_content=True, redact=lambda text: returned)
    openai_sync(server, "m", stream=False)
    assert said(written()) == []


def test_a_redaction_may_drop_a_text(server, written):
    scepsy.instrument(
        directory=written.directory, record_content=True, redact=lambda text: None if "secret" in text else text
    )
    openai_sync(server, "m", stream=False)
    assert said(written()) == [[("user",)], [("assistant", WHOLE)]]


@pytest.mark.parametrize(("value", "recorded"), [("true", 2), ("SPAN_ONLY", 2), ("EVENT_ONLY", 0), ("false", 0)])
def test_opentelemetrys_own_switch_is_respected(server, written, monkeypatch, value, recorded):
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", value)
    scepsy.uninstrument()  # what was chosen in code is forgotten, the environment read again
    scepsy.instrument(directory=written.directory)
    openai_sync(server, "m", stream=False)
    assert len(said(written())) == recorded
    monkeypatch.undo()


def test_a_choice_in_code_outdoes_the_switch(server, written, monkeypatch):
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    scepsy.uninstrument()
    scepsy.instrument(directory=written.directory, record_content=False)
    openai_sync(server, "m", stream=False)
    assert said(written()) == []
    monkeypatch.undo()


def test_uninstrument_forgets_the_choice(server, written):
    scepsy.instrument(directory=written.directory, record_content=True, redact=lambda text: None)
    scepsy.uninstrument()
    scepsy.instrument(directory=written.directory)
    openai_sync(server, "m", stream=False)
    assert said(written()) == []


CALL = {"id": "t", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "x"}'}}
DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:"}}],
    },
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "t", "content": "found"},
]
AS_SAID = [("system", "be brief"), ("user", "see", "image_url"), ("assistant", '{"word": "x"}'), ("tool", "found")]


@whole_or_streamed
def test_tools_and_images_of_openai(server, written, stream):
    scepsy.instrument(directory=written.directory, record_content=True)
    with openai.OpenAI(base_url=server.url, api_key="key") as client:
        answer = client.chat.completions.create(model="tools", messages=DIALOGUE, stream=stream)
        if stream:
            list(answer)
    text = written()
    assert said(text) == [AS_SAID, [("assistant", '{"word": "x"}')]]
    (call,) = [span for span in spans(text) if span.get(semconv.KIND) == semconv.KIND_LLM]
    (answer,) = json.loads(call[semconv.OUTPUT_MESSAGES])
    assert answer["parts"] == [{"type": "tool_call", "id": "t", "name": "look_up", "arguments": '{"word": "x"}'}]
    assert answer["finish_reason"] == "stop"


def test_tools_of_the_responses_api(server, written):
    scepsy.instrument(directory=written.directory, record_content=True)
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "see"}]},
        {"type": "function_call", "call_id": "t", "name": "look_up", "arguments": '{"word": "x"}'},
        {"type": "function_call_output", "call_id": "t", "output": "found"},
        {"type": "reasoning", "summary": [], "id": "r"},
    ]
    with openai.OpenAI(base_url=server.url, api_key="key") as client:
        client.responses.create(model="m", instructions="be brief", input=given)
    question, _ = said(written())
    assert question == [
        ("system", "be brief"),
        ("user", "see"),
        ("assistant", '{"word": "x"}'),
        ("tool", "found"),
        ("assistant", "reasoning"),
    ]


def test_tools_of_langchain(server, written):
    scepsy.instrument(directory=written.directory, record_content=True)
    llm = ChatOpenAI(base_url=server.url, api_key="key", model="tools", **server.http_clients())
    llm.invoke(
        [
            SystemMessage("be brief"),
            HumanMessage([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:"}}]),
            AIMessage("", tool_calls=[{"name": "look_up", "args": {"word": "x"}, "id": "t"}]),
            ToolMessage("found", tool_call_id="t"),
        ]
    )
    assert said(written()) == [AS_SAID, [("assistant", '{"word": "x"}')]]


def test_tools_of_llama_index(server, written):
    scepsy.instrument(directory=written.directory, record_content=True)
    _llama_index(server, "tools").chat(
        [
            ChatMessage(role="system", content="be brief"),
            ChatMessage(role="tool", content="found", additional_kwargs={"tool_call_id": "t"}),
        ]
    )
    question, answer = said(written())
    assert question == [("system", "be brief"), ("tool", "found")]
    assert [json.loads(text) for _, text in answer] == [{"word": "x"}]


def test_embeddings_have_no_content(server, written):
    scepsy.instrument(directory=written.directory, record_content=True)
    with openai.OpenAI(base_url=server.url, api_key="key") as client:
        client.embeddings.create(model="e", input=[QUESTION])
    assert said(written()) == []
