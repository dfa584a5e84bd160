"""Calls of the openai client: every way to get a whole answer, who made them, and what goes out with them."""

import asyncio

import openai
import pytest
from openai_calls import CLOCK_NS, FULL, MESSAGES, Answer, one_call, tokens

import scepsy
from scepsy import semconv

WHOLE = {
    "chat": lambda c: c.chat.completions.create(model="m", messages=MESSAGES),
    "chat parse": lambda c: c.chat.completions.parse(model="m", messages=MESSAGES, response_format=Answer),
    "responses": lambda c: c.responses.create(model="m", input="a secret question"),
    "responses parse": lambda c: c.responses.parse(model="m", input="a secret question", text_format=Answer),
    "completions": lambda c: c.completions.create(model="m", prompt="a secret question"),
    "with_options": lambda c: c.with_options(timeout=5).chat.completions.create(model="m", messages=MESSAGES),
}


@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE)
def test_every_way_to_get_a_whole_answer(recorded, server, client, ask):
    ask(client)
    call = one_call(recorded, server)
    assert tokens(call) == FULL
    assert semconv.REQUEST_STREAM not in call.attributes


@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE)
async def test_every_way_to_await_a_whole_answer(recorded, server, aclient, ask):
    await ask(aclient)
    assert tokens(one_call(recorded, server)) == FULL


def test_embeddings_and_rerankers(recorded, server, client):
    client.embeddings.create(model="e", input=["a", "b"])
    client.post("/rerank", body={"model": "r", "query": "q", "documents": []}, cast_to=object)
    embedding, reranking = recorded.calls
    assert embedding.name == "embeddings e"
    assert tokens(embedding) == (9, None, 0, None)
    assert reranking.name == "rerank r"
    assert semconv.OPERATION in reranking.attributes


def test_what_is_no_llm_call_is_left_alone(recorded, server, client):
    client.post("/files/of/mine", body={"model": "m"}, cast_to=object)
    assert recorded.spans == []
    assert "traceparent" not in server.seen[0].headers


def test_azure(recorded, server):
    with openai.AzureOpenAI(azure_endpoint=server.url, api_key="key", api_version="1") as client:
        client.chat.completions.create(model="deployed", messages=MESSAGES)
    call = one_call(recorded, server)
    assert tokens(call) == FULL
    assert call.attributes[semconv.REQUEST_MODEL] == "deployed"


async def test_azure_awaited(recorded, server):
    given = {"azure_endpoint": server.url, "api_key": "key", "api_version": "1", "azure_deployment": "deployed"}
    async with openai.AsyncAzureOpenAI(**given) as client:
        await client.chat.completions.create(model="m", messages=MESSAGES)
    assert tokens(one_call(recorded, server)) == FULL


def test_raw_responses(recorded, server, client):
    raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.parse() is raw.parse()
    assert tokens(one_call(recorded, server)) == FULL


def test_attempts_and_back_off_are_apart(recorded, server, client):
    client.chat.completions.create(model="flaky+slow", messages=MESSAGES)
    call = one_call(recorded, server)
    assert call.attributes[semconv.ATTEMPTS] == 2
    assert call.attributes[semconv.RETRY_WAIT_S] >= 0.04
    first, second = server.seen
    assert call.attributes[semconv.WASTED_S] > (first.end_ns - first.start_ns - CLOCK_NS) / 1e9
    rest_s = (call.end_time - call.start_time) / 1e9 - call.attributes[semconv.WASTED_S]
    rest_s -= call.attributes[semconv.RETRY_WAIT_S]
    assert rest_s > (second.end_ns - second.start_ns - CLOCK_NS) / 1e9
    assert call.end_time - rest_s * 1e9 > first.end_ns
    assert len({seen.headers["traceparent"] for seen in server.seen}) == 1


async def test_async_attempts(recorded, server, aclient):
    await aclient.chat.completions.create(model="flaky", messages=MESSAGES)
    assert one_call(recorded, server).attributes[semconv.ATTEMPTS] == 2


def test_a_call_that_fails(recorded, server, client):
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=1).chat.completions.create(model="broken", messages=MESSAGES)
    call = recorded.call
    assert call.attributes[semconv.ERROR_TYPE] == "InternalServerError"
    assert call.attributes[semconv.REQUEST_MODEL] == "broken"
    assert call.attributes[semconv.ATTEMPTS] == 2
    assert not call.status.is_ok


@pytest.mark.parametrize(("model", "error"), [("cut", "RemoteProtocolError"), ("malformed", "JSONDecodeError")])
def test_a_stream_that_breaks(recorded, server, client, model, error):
    pieces = []
    with pytest.raises(Exception) as caught:  # noqa: PT011 - httpx's or json's own, as without Scepsy
        pieces.extend(client.chat.completions.create(model=model, messages=MESSAGES, stream=True))
    raised = caught.value
    if isinstance(raised, openai.APIConnectionError):  # what the client makes of it since version 3
        raised = raised.__cause__
    assert type(raised).__name__ == error
    call = one_call(recorded, server)
    assert call.attributes[semconv.ERROR_TYPE] == type(caught.value).__name__
    assert call.attributes[semconv.TIME_TO_FIRST_CHUNK_S] > 0


def test_no_server_at_all(recorded):
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="key", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert recorded.call.attributes[semconv.ERROR_TYPE] == "APIConnectionError"


def test_vllms_own_timings(recorded, server, client):
    client.chat.completions.create(model="metrics", messages=MESSAGES)
    call = recorded.call
    assert call.attributes[semconv.QUEUE_S] == 0.03
    assert call.attributes[semconv.EXECUTION_S] == pytest.approx(0.12)


def test_parents_and_roles(recorded, server, client):
    def ask():
        client.chat.completions.create(model="m", messages=MESSAGES)

    @scepsy.tool
    def search():
        ask()

    @scepsy.agent
    def writer():
        ask()
        search()

    @scepsy.workflow
    def main():
        ask()
        writer()

    main()
    call = ("chat m", [])
    tool = ("execute_tool search", [call])
    assert recorded.tree == [("invoke_workflow main", [call, ("invoke_agent writer", [call, tool])])]
    assert recorded.roles == ["main", "search", "writer"]


async def test_parallel_calls_keep_their_parents(recorded, server, aclient):
    @scepsy.agent
    async def writer(index):
        await aclient.chat.completions.create(model=f"m{index}", messages=MESSAGES)

    @scepsy.workflow
    async def main():
        await asyncio.gather(*(writer(index) for index in range(5)))

    await main()
    agents = {("invoke_agent writer", (f"chat m{index}",)) for index in range(5)}
    ((_, below),) = recorded.tree
    assert {(name, tuple(child for child, _ in children)) for name, children in below} == agents


def test_a_stream_read_elsewhere_belongs_to_who_asked(recorded, server, client):
    @scepsy.agent
    def writer():
        return client.chat.completions.create(model="m", messages=MESSAGES, stream=True)

    list(writer())
    assert recorded.path(one_call(recorded, server)) == ["invoke_agent writer", "chat m"]


def test_a_traceparent_of_the_programs_own_is_kept(recorded, server, client):
    own = f"00-{'ab' * 16}-{'cd' * 8}-01"
    client.chat.completions.create(model="m", messages=MESSAGES, extra_headers={"traceparent": own})
    assert server.seen[0].headers["traceparent"] == own


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
def test_a_traceparent_of_the_clients_own_is_kept(recorded, server, name):
    own = f"00-{'1' * 32}-{'2' * 16}-01"
    with openai.OpenAI(base_url=server.url, api_key="key", default_headers={name: own}) as client:
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert [value for key, value in server.seen[0].headers.items() if key.lower() == "traceparent"] == [own]


def test_options_that_are_sent_twice_carry_each_call(recorded, server, client):
    from openai._models import FinalRequestOptions
    from openai.types.chat import ChatCompletion

    given = {"method": "post", "url": "/chat/completions", "headers": {"X-Mine": "yes"}}
    options = FinalRequestOptions.construct(**given, json_data={"model": "m", "messages": MESSAGES})
    for _ in range(2):
        client.request(ChatCompletion, options)
    assert options.headers == {"X-Mine": "yes"}
    sent = [{name.lower(): value for name, value in seen.headers.items()} for seen in server.seen]
    assert [headers["x-mine"] for headers in sent] == ["yes", "yes"]
    told = [f"{call.context.span_id:016x}" for call in recorded.calls]
    assert [headers["traceparent"].split("-")[2] for headers in sent] == told


def test_the_call_is_the_current_span_while_it_is_sent(recorded, server):
    import httpx
    from opentelemetry import trace

    current = []
    hooks = {"request": [lambda request: current.append(trace.get_current_span().get_span_context().span_id)]}
    with httpx.Client(event_hooks=hooks) as http:
        client = openai.OpenAI(base_url=server.url, api_key="key", http_client=http)
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert current == [recorded.call.context.span_id]


def test_muted_instrumentation_is_mute(recorded, server, client):
    from opentelemetry import context
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY

    token = context.attach(context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
    client.chat.completions.create(model="m", messages=MESSAGES)
    context.detach(token)
    assert recorded.calls == []


def test_one_client_only(server, recorded):
    scepsy.uninstrument()
    with (
        openai.OpenAI(base_url=server.url, api_key="key") as mine,
        openai.OpenAI(base_url=server.url, api_key="key") as other,
    ):
        untouched = dict(vars(mine))
        scepsy.instrument(mine, provider=recorded.provider)
        scepsy.instrument(mine)
        mine.chat.completions.create(model="mine", messages=MESSAGES)
        clone = mine.with_options(max_retries=3)
        clone.chat.completions.create(model="clone", messages=MESSAGES)
        other.chat.completions.create(model="other", messages=MESSAGES)
        assert [call.name for call in recorded.calls] == ["chat mine", "chat clone"]
        scepsy.uninstrument()
        mine.chat.completions.create(model="mine", messages=MESSAGES)
        clone.with_options(max_retries=2).chat.completions.create(model="clone", messages=MESSAGES)
        assert len(recorded.calls) == 2
        added = {name for name in vars(mine) if name not in untouched}
        assert not {name for name in added if "request" in name or "scepsy" in name or "copy" in name}


def test_one_client_and_everything_are_not_twice(server, recorded, client):
    scepsy.instrument(client)
    client.chat.completions.create(model="m", messages=MESSAGES)
    one_call(recorded, server)


def test_a_client_with_a_callback_of_its_own_sends_them_as_well(recorded, server):
    class Mine(openai.OpenAI):
        def _prepare_request(self, request):  # as openai documents it: to change the request
            request.headers["x-mine"] = "yes"

    with Mine(base_url=server.url, api_key="key") as client:
        client.chat.completions.create(model="m", messages=MESSAGES)
    call = one_call(recorded, server)
    assert call.attributes[semconv.ATTEMPTS] == 1
    assert {name.lower(): value for name, value in server.seen[0].headers.items()}["x-mine"] == "yes"
