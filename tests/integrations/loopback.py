"""A server on this machine that speaks enough of OpenAI's API, misbehaves when asked to, and remembers what it saw.

The model's name is the request's wish: words joined by `+`, such as `flaky+slow`.

* `flaky`: 429 first, good the second time; `broken`: 500 always
* `slow`: answers after 150 ms; `stuck`: never answers; `pieces`: streams 5 pieces, 10 ms apart; `long`: streams 200;
  `endless`: streams until nobody listens
* `cut`: closes the connection in the middle of a stream; `malformed`: sends a piece that is not JSON
* `tools`: wishes to call a tool instead of answering
* `bare`: tells no usage; `metrics`: tells vLLM's per-request metrics
"""

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field

import httpx
from aiohttp import web

INPUT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS, REASONING_TOKENS = 9, 4, 5, 2
METRICS = {"queue_time_ms": 30.0, "time_to_first_token_ms": 20.0, "generation_time_ms": 100.0}

_TOOL_CALL = {"id": "t", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "x"}'}}


def _piece_of_tool_call(index):
    """The first of five pieces names the tool, the others bring its arguments."""
    if index == 0:
        return {**_TOOL_CALL, "index": 0, "function": {"name": "look_up", "arguments": ""}}
    arguments = _TOOL_CALL["function"]["arguments"]
    return {"index": 0, "function": {"arguments": arguments[(index - 1) * 4 : index * 4]}}


@dataclass
class Seen:
    path: str
    model: str
    headers: dict[str, str]
    start_ns: int
    status: int = 0
    end_ns: int = 0
    first_piece_ns: int = 0
    last_piece_ns: int = 0
    streamed: bool = False
    disconnected: bool = False


@dataclass
class Loopback:
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    _clients: list = field(default_factory=list)

    def http_clients(self):
        """Connections for one client of a framework, which would otherwise never close its own."""
        made = {"http_client": httpx.Client(), "http_async_client": httpx.AsyncClient()}
        self._clients += made.values()
        return made

    async def close_clients(self):
        for client in self._clients:
            if isinstance(client, httpx.Client):
                client.close()
            else:
                await client.aclose()
        self._clients.clear()

    @property
    def good(self):
        return [one for one in self.seen if one.status == 200]

    def start(self):
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def stop(self):
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self, ready):
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(ready))
        self._loop.close()

    async def _serve(self, ready):
        self._stopping = asyncio.Event()
        self._flaky = {}
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.2, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        ready.set()
        await self._stopping.wait()
        await runner.cleanup()

    async def _answer(self, request):
        seen = Seen(request.path, "", dict(request.headers), time.time_ns())
        self.seen.append(seen)
        body = await request.json()
        seen.model = body.get("model", "")
        wishes = set(seen.model.split("+"))
        seen.streamed = bool(body.get("stream"))
        try:
            if "slow" in wishes:
                await asyncio.sleep(0.15)
            if "stuck" in wishes:
                await asyncio.sleep(3600)
            if "broken" in wishes:
                return self._refuse(seen, 500)
            if "flaky" in wishes and self._flaky.setdefault(seen.model, 0) == 0:
                self._flaky[seen.model] += 1
                return self._refuse(seen, 429)
            self._flaky.pop(seen.model, None)
            seen.status = 200
            if seen.streamed:
                return await self._stream(request, seen, body, wishes)
            return web.json_response(self._whole(seen, body, wishes))
        except (asyncio.CancelledError, ConnectionResetError):
            seen.disconnected = True
            raise
        finally:
            seen.end_ns = time.time_ns()

    def _refuse(self, seen, status):
        seen.status = status
        return web.json_response({"error": {"message": "no"}}, status=status, headers={"retry-after-ms": "40"})

    def _usage(self, path):
        if path.endswith("/responses"):
            return {
                "input_tokens": INPUT_TOKENS,
                "input_tokens_details": {"cached_tokens": CACHED_TOKENS, "cache_write_tokens": 0},
                "output_tokens": OUTPUT_TOKENS,
                "output_tokens_details": {"reasoning_tokens": REASONING_TOKENS},
                "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
            }
        if path.endswith("/embeddings"):
            return {"prompt_tokens": INPUT_TOKENS, "total_tokens": INPUT_TOKENS}
        return {
            "prompt_tokens": INPUT_TOKENS,
            "completion_tokens": OUTPUT_TOKENS,
            "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
            "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
            "completion_tokens_details": {"reasoning_tokens": REASONING_TOKENS},
        }

    def _whole(self, seen, body, wishes):
        path = seen.path
        answer = {"id": f"id-{len(self.seen)}", "model": seen.model, "created": 1}
        if "bare" not in wishes:
            answer["usage"] = self._usage(path)
        if "metrics" in wishes:
            answer["metrics"] = METRICS
        if path.endswith("/chat/completions"):
            message = {"role": "assistant", "content": '{"answer": 42}'}
            if "tools" in wishes:
                message = {"role": "assistant", "content": None, "tool_calls": [_TOOL_CALL]}
            choices = [{"index": 0, "finish_reason": "stop", "message": message}]
            return answer | {"object": "chat.completion", "choices": choices}
        if path.endswith("/completions"):
            choices = [{"index": 0, "finish_reason": "stop", "text": "42", "logprobs": None}]
            return answer | {"object": "text_completion", "choices": choices}
        if path.endswith("/embeddings"):
            inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
            data = [{"object": "embedding", "index": i, "embedding": [0.1, 0.2]} for i in range(len(inputs))]
            return answer | {"object": "list", "data": data}
        if path.endswith("/responses"):
            return self._response(answer)
        return answer | {"results": []}

    def _response(self, answer):
        text = {"type": "output_text", "text": '{"answer": 42}', "annotations": []}
        message = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [text]}
        rest = {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
        return answer | rest | {"object": "response", "created_at": 1, "status": "completed", "output": [message]}

    async def _stream(self, request, seen, body, wishes):
        out = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await out.prepare(request)
        count = 10**6 if "endless" in wishes else 200 if "long" in wishes else 5
        for index in range(count):
            for event in self._pieces(seen, index, count):
                await self._send(out, event)
            seen.last_piece_ns = time.time_ns()
            seen.first_piece_ns = seen.first_piece_ns or seen.last_piece_ns
            if "cut" in wishes and index == 1:
                request.transport.abort()
                return out
            if "malformed" in wishes and index == 1:
                await out.write(b"data: {not json\n\n")
            if wishes & {"pieces", "endless", "cut"}:
                await asyncio.sleep(0.01)
        await self._finish(out, seen, body, wishes)
        return out

    def _pieces(self, seen, index, count):
        if seen.path.endswith("/responses"):
            if index == 0:
                started = self._response({"id": "r", "model": seen.model, "usage": None})
                yield {
                    "type": "response.created",
                    "sequence_number": 0,
                    "response": started | {"status": "in_progress"},
                }
            about = {
                "item_id": "m",
                "output_index": 0,
                "content_index": 0,
                "logprobs": [],
                "sequence_number": index + 1,
            }
            yield about | {"type": "response.output_text.delta", "delta": "4"}
            return
        finish = "stop" if index == count - 1 else None
        base = {"id": "s", "model": seen.model, "created": 1}
        if seen.path.endswith("/chat/completions"):
            if index == 0:
                first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield base | {"object": "chat.completion.chunk", "choices": [first]}
            delta = {"content": "4"}
            if "tools" in seen.model.split("+"):
                delta = {"tool_calls": [_piece_of_tool_call(index)]}
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            yield base | {"object": "chat.completion.chunk", "choices": [choice]}
        else:
            choice = {"index": 0, "text": "4", "finish_reason": finish, "logprobs": None}
            yield base | {"object": "text_completion", "choices": [choice]}

    async def _finish(self, out, seen, body, wishes):
        if seen.path.endswith("/responses"):
            whole = self._response({"id": "r", "model": seen.model, "usage": self._usage(seen.path)})
            await self._send(out, {"type": "response.completed", "sequence_number": 99, "response": whole})
        elif (body.get("stream_options") or {}).get("include_usage") and "bare" not in wishes:
            kind = "chat.completion.chunk" if seen.path.endswith("/chat/completions") else "text_completion"
            last = {"id": "s", "model": seen.model, "created": 1, "object": kind, "choices": []}
            last["usage"] = self._usage(seen.path)
            if "metrics" in wishes:
                last["metrics"] = METRICS
            await self._send(out, last)
        await out.write(b"data: [DONE]\n\n")

    async def _send(self, out, event):
        name = f"event: {event['type']}\n" if "type" in event else ""
        await out.write(f"{name}data: {json.dumps(event)}\n\n".encode())
