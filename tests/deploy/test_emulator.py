import asyncio
import contextlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import openai
import pytest
from aiohttp import web

from scepsy.emulator.server import EmulatedServer
from scepsy.files import save_profile
from scepsy_optimizer.engine import Engine

HELLO = [{"role": "user", "content": "hello there"}]


@contextlib.asynccontextmanager
async def serve(profile, llm="m"):
    engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
    runner = web.AppRunner(EmulatedServer(profile, llm, engine, seed=3).app(), handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def clients(profile):
    async with (
        serve(profile) as url,
        aiohttp.ClientSession(base_url=url) as session,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client, session


async def counts(session):
    async with session.get("/metrics") as answer:
        text = await answer.text()
    found = re.findall(r'^(vllm:\w+)\{[^}]*model_name="m"[^}]*\} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}, text


async def test_chat_and_its_counts(make_profile):
    async with clients(make_profile()) as (client, session):
        answer = await client.chat.completions.create(model="m", messages=HELLO, max_tokens=12)
        again = await client.chat.completions.create(model="m", messages=HELLO, max_tokens=12)
        metrics, text = await counts(session)
    choice = answer.choices[0]
    assert choice.message.content == again.choices[0].message.content
    assert len(choice.message.content.split()) == answer.usage.completion_tokens <= 12
    assert choice.finish_reason == ("length" if answer.usage.completion_tokens == 12 else "stop")
    assert answer.usage.prompt_tokens == 4 + 3
    assert answer.usage.total_tokens == 7 + answer.usage.completion_tokens
    assert metrics["vllm:prompt_tokens_total"] == 14
    assert metrics["vllm:generation_tokens_total"] == 2 * answer.usage.completion_tokens
    assert metrics["vllm:e2e_request_latency_seconds_count"] == 2
    assert metrics["vllm:time_to_first_token_seconds_count"] == 2
    parts = [metrics[f"vllm:request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(metrics["vllm:e2e_request_latency_seconds_sum"], abs=1e-6)
    assert sum(parts[1:]) == pytest.approx(metrics["vllm:request_inference_time_seconds_sum"], abs=1e-6)
    assert 0 < metrics["vllm:time_to_first_token_seconds_sum"] < metrics["vllm:e2e_request_latency_seconds_sum"]
    assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0
    assert f'finished_reason="{choice.finish_reason}"' in text


async def test_a_stream_says_the_same_in_pieces(make_profile):
    async with clients(make_profile()) as (client, _):
        ask = {"model": "m", "messages": HELLO, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
        whole = await client.chat.completions.create(**ask)
        stream = await client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    assert whole.usage.completion_tokens == 30
    assert whole.choices[0].finish_reason == "length"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 30
    assert not chunks[-1].choices
    assert chunks[0].choices[0].delta.role == "assistant"


async def test_a_stream_tells_the_tokens_so_far_where_it_is_asked(make_profile):
    """A reader that is late gets several tokens in one piece: only the counts tell."""
    async with clients(make_profile()) as (client, _):
        options = {"include_usage": True, "continuous_usage_stats": True}
        ask = {"model": "m", "prompt": "a" * 8, "max_tokens": 30, "stream": True, "extra_body": {"ignore_eos": True}}
        stream = await client.completions.create(**ask, stream_options=options)
        counted = [chunk.usage.completion_tokens async for chunk in stream if chunk.choices]
        plain = await client.completions.create(**ask)
        assert {chunk.usage async for chunk in plain} == {None}
    assert counted == sorted(set(counted))
    assert (counted[0] >= 1, counted[-1]) == (True, 30)


async def test_several_choices_differ(make_profile):
    async with clients(make_profile()) as (client, _):
        answer = await client.chat.completions.create(model="m", messages=HELLO, n=3, max_tokens=20)
        stream = await client.chat.completions.create(model="m", messages=HELLO, n=3, max_tokens=20, stream=True)
        texts = ["", "", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert [choice.message.content for choice in answer.choices] == texts
    assert len(set(texts)) == 3


async def test_completions_of_several_prompts(make_profile):
    async with clients(make_profile()) as (client, _):
        answer = await client.completions.create(model="m", prompt=["a" * 8, "b" * 8], max_tokens=5, n=2)
        stream = await client.completions.create(model="m", prompt="a" * 8, max_tokens=5, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
        single = await client.completions.create(model="m", prompt="a" * 8, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 4
    assert text == single.choices[0].text


async def test_embeddings_in_both_encodings(make_profile):
    async with clients(make_profile()) as (client, session):
        packed = await client.embeddings.create(model="m", input=["one", "two"])
        plain = await client.embeddings.create(model="m", input=["one", "two"], encoding_format="float")
        metrics, _ = await counts(session)
    assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data]
    assert packed.data[0].embedding != packed.data[1].embedding
    assert packed.usage.prompt_tokens == 2
    assert metrics["vllm:generation_tokens_total"] == 0


async def test_errors_are_worded_as_vllms(make_profile):
    async with clients(make_profile()) as (client, session):
        with pytest.raises(openai.NotFoundError, match=r"The model `other` does not exist"):
            await client.chat.completions.create(model="other", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match=r"maximum context length is 4096 tokens") as caught:
            await client.chat.completions.create(model="m", messages=HELLO, max_tokens=9999)
        assert caught.value.body["type"] == "BadRequestError"
        for body, status in ((b"{", 400), (b"[]", 400), (b'{"messages": []}', 200)):
            async with session.post("/v1/chat/completions", data=body) as answer:
                assert answer.status == status
        async with session.get("/v1/nothing") as answer:
            assert (answer.status, await answer.json()) == (404, {"detail": "Not Found"})
    # More than the KV cache of this engine holds at all.
    small = make_profile(device_memory_gib=3.4, max_model_len=100_000)
    async with clients(small) as (client, _):
        with pytest.raises(openai.BadRequestError, match="exceeds the KV cache"):
            await client.chat.completions.create(model="m", messages=HELLO, max_tokens=90_000)


async def test_small_endpoints(make_profile):
    async with clients(make_profile()) as (client, session):
        models = await client.models.list()
        async with session.get("/health") as health, session.get("/version") as version:
            assert (health.status, await health.read()) == (200, b"")
            assert (await version.json())["version"].startswith("scepsy-emulator/")
    assert [(model.id, model.max_model_len) for model in models.data] == [("m", 4096)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_the_engine(make_profile, stream):
    async with clients(make_profile()) as (_, session):
        ask = {"model": "m", "messages": HELLO, "max_tokens": 4000, "stream": stream, "ignore_eos": True}
        task = asyncio.create_task(_read(session, ask))
        while not (await counts(session))[0]["vllm:num_requests_running"]:  # noqa: ASYNC110 - only HTTP tells
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        while (await counts(session))[0]["vllm:num_requests_running"]:  # noqa: ASYNC110 - only HTTP tells
            await asyncio.sleep(0.01)
        metrics, text = await counts(session)
        assert metrics["vllm:kv_cache_usage_perc"] == 0
        assert re.search(r'request_success_total\{.*finished_reason="abort".*\} 1\.0', text)
        assert metrics["vllm:generation_tokens_total"] == 0


async def _read(session, ask):
    async with session.post("/v1/chat/completions", json=ask) as answer:
        await answer.read()


async def test_sequences_share_the_engine(make_profile):
    """Eight together take the time of a batch, not of eight after one another."""
    ask = {"model": "m", "messages": HELLO, "max_tokens": 25, "extra_body": {"ignore_eos": True}}
    means = []
    for together in (1, 8):
        async with clients(make_profile()) as (client, session):
            await asyncio.gather(*(client.chat.completions.create(**ask, seed=seed) for seed in range(together)))
            metrics, _ = await counts(session)
        means.append(metrics["vllm:e2e_request_latency_seconds_sum"] / together)
    assert means[1] < 2.5 * means[0]  # after one another it would be 4.5 times


def test_the_process(make_profile, tmp_path, process_table, wait):
    """Started as the deployer does: answers the sync client from threads, names a taken port, ends when told."""
    save_profile(make_profile(), tmp_path / "m.yaml")
    command = [sys.executable, "-m", "scepsy.emulator", "--profile", str(tmp_path / "m.yaml"), "--port"]
    port = _free_port()
    with subprocess.Popen([*command, str(port), "--llm", "served"], stderr=subprocess.PIPE, text=True) as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=20)
        with client, ThreadPoolExecutor(4) as threads:
            asked = [
                threads.submit(client.chat.completions.create, model="served", messages=HELLO, max_tokens=5, seed=seed)
                for seed in range(4)
            ]
            assert all(one.result().choices[0].message.content for one in asked)
        second = subprocess.run([*command, str(port)], capture_output=True, text=True, check=False)
        assert (second.returncode, second.stderr) == (
            2,
            f"scepsy emulator: port {port} on 127.0.0.1 is in use; give another one with --port\n",
        )
        process.terminate()
        assert process.wait(5) == 0
        assert process.stderr.read() == ""
    nothing = subprocess.run([*command, "0", "--fraction", "0.01"], capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("scepsy emulator: 'm' does not fit into 0.01")
    assert "Traceback" not in nothing.stderr


def _free_port():
    from scepsy.deployment.processes import free_ports

    return free_ports(1)[0]
