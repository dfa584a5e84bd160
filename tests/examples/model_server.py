"""A loopback OpenAI-compatible server with deterministic answers that remembers what it was asked."""

import asyncio
import hashlib
import random
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

WORDS = ("wind", "water", "light", "stone", "river", "glass", "cable", "winter", "letter", "garden", "signal")


@dataclass
class Asked:
    trace: str
    model: str
    prompt: str
    input_tokens: int
    output_tokens: int


@dataclass
class ModelServer:
    url: str = ""
    asked: list[Asked] = field(default_factory=list)

    async def chat(self, request):
        body = await request.json()
        prompt = "\n".join(message["content"] for message in body["messages"])
        seed = int.from_bytes(hashlib.blake2b(f"{body['model']} {prompt}".encode(), digest_size=8).digest())
        draw = random.Random(seed)
        limit = body.get("max_completion_tokens") or body["max_tokens"]
        words = [str(draw.randint(0, 10)), *draw.choices(WORDS, k=draw.randint(1, limit) - 1)]
        await asyncio.sleep(0.002 + 0.0001 * len(words))
        trace = request.headers.get("traceparent", "--").split("-")[1]
        self.asked.append(Asked(trace, body["model"], prompt, len(prompt.split()), len(words)))
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
        return web.json_response(
            {
                "id": f"chatcmpl-{len(self.asked)}",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": " ".join(words)},
                    }
                ],
                "usage": usage | {"total_tokens": sum(usage.values())},
            }
        )


@contextmanager
def serve():
    """The server, on a thread of its own."""
    server = ModelServer()
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    runners = []

    async def start():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        runners.append(runner)
        ready.set()

    def work():
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runners[0].cleanup())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
