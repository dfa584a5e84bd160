"""vLLM's HTTP API in front of a paced engine model."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

import scepsy
from scepsy.emulator.answers import embedding, output_tokens, request_random, words
from scepsy.emulator.metrics import Metrics
from scepsy.emulator.pace import Generation, Pacer
from scepsy.emulator.requests import Generate, RequestError, parse_chat, parse_completion, parse_embeddings
from scepsy.emulator.shapes import CHAT, COMPLETION, Shape
from scepsy_optimizer.engine import Engine
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile

_MAX_BODY_BYTES = 256 << 20
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class EmulatedServer:
    """One emulated vLLM replica: its engine, its counts and its handlers."""

    def __init__(self, profile: LLMProfile, llm: str, engine: Engine, *, seed: int) -> None:
        """Must be made inside a running event loop."""
        self._profile = profile
        self._llm = llm
        self._seed = seed
        self._pacer = Pacer(engine)
        self._metrics = Metrics(llm, engine)
        self._started = int(time.time())

    def app(self) -> web.Application:
        """The application that answers."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_answer_errors])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/ping", self._health),
                web.get("/version", self._version),
                web.get("/metrics", self._show_metrics),
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completion),
                web.post("/v1/embeddings", self._embeddings),
            ]
        )
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": f"scepsy-emulator/{scepsy.__version__}"})

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _models(self, _request: web.Request) -> web.Response:
        model = {
            "id": self._llm,
            "object": "model",
            "created": self._started,
            "owned_by": "scepsy-emulator",
            "root": self._profile.model,
            "parent": None,
            "max_model_len": self._profile.max_model_len,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        asked = parse_chat(body, self._profile.max_model_len)
        return await self._answer(request, body, asked, CHAT)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        asked = parse_completion(body, self._profile.max_model_len)
        return await self._answer(request, body, asked, COMPLETION)

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        arrived_s = asyncio.get_running_loop().time()
        prompts = parse_embeddings(body, self._profile.max_model_len)
        await asyncio.sleep(self._profile.outside_s)
        generations = self._submit(prompts, arrived_s)
        await self._wait(generations, ["stop"] * len(generations))
        data = []
        for index in range(len(generations)):
            vector = embedding(request_random(self._seed, body, index))
            packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            value = packed if body.get("encoding_format") == "base64" else vector
            data.append({"index": index, "object": "embedding", "embedding": value})
        tokens = sum(generation.prompt_tokens for generation in generations)
        return web.json_response(
            {
                "id": f"embd-{_request_id(request)}",
                "object": "list",
                "created": int(time.time()),
                "model": self._llm,
                "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
            }
        )

    async def _body(self, request: web.Request) -> Mapping[str, Any]:
        try:
            body = json.loads(await request.read())
        except ValueError as error:
            raise RequestError(f"JSON decode error: {error}") from error
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        model = body.get("model")
        if model is not None and model != self._llm:
            raise RequestError(
                f"The model `{model}` does not exist. Valid aliases: {self._llm}.", status=404, param="model"
            )
        return body

    async def _answer(
        self, request: web.Request, body: Mapping[str, Any], asked: Generate, shape: Shape
    ) -> web.StreamResponse:
        arrived_s = asyncio.get_running_loop().time()
        answers = []
        for index in range(len(asked.prompts) * asked.choices):
            random = request_random(self._seed, body, index)
            length = output_tokens(
                random, max_tokens=asked.max_tokens, min_tokens=asked.min_tokens, ignore_eos=asked.ignore_eos
            )
            answers.append(words(random, length))
        prompts = tuple(prompt for prompt in asked.prompts for _ in range(asked.choices))
        lengths = tuple(len(answer) for answer in answers)
        await asyncio.sleep(self._profile.outside_s)
        generations = self._submit(prompts, arrived_s, lengths, streamed=asked.stream)
        reasons = ["length" if length == asked.max_tokens else "stop" for length in lengths]
        head = {
            "id": f"{shape.prefix}-{_request_id(request)}",
            "object": shape.kind,
            "created": int(time.time()),
            "model": self._llm,
        }
        usage = {
            "prompt_tokens": sum(asked.prompts),
            "total_tokens": sum(asked.prompts) + sum(lengths),
            "completion_tokens": sum(lengths),
            "prompt_tokens_details": None,
        }
        if asked.stream:
            return await self._stream(request, head, shape, answers, generations, reasons, asked, usage)
        await self._wait(generations, reasons)
        choices = [
            shape.choice(index, "".join(answer), reason)
            for index, (answer, reason) in enumerate(zip(answers, reasons, strict=True))
        ]
        return web.json_response({**head, "choices": choices, "usage": usage})

    def _submit(
        self,
        prompts: tuple[int, ...],
        arrived_s: float,
        lengths: tuple[int, ...] | None = None,
        *,
        streamed: bool = False,
    ) -> list[Generation]:
        generations: list[Generation] = []
        try:
            for prompt, length in zip(prompts, lengths or (0,) * len(prompts), strict=True):
                generations.append(
                    self._pacer.submit(
                        prompt_tokens=prompt, output_tokens=length, arrived_s=arrived_s, streamed=streamed
                    )
                )
        except ScepsyError as error:
            for generation in generations:
                self._pacer.abort(generation)
            raise RequestError(str(error)) from error
        return generations

    async def _wait(self, generations: list[Generation], reasons: list[str]) -> None:
        try:
            # Not awaited one by one: a handler that is cancelled would cancel the future it waits for.
            await asyncio.wait([generation.done for generation in generations])
        finally:
            self._close(generations, reasons)

    def _close(self, generations: list[Generation], reasons: list[str]) -> None:
        """Count all; those that are not finished, their client having gone, are aborted."""
        for generation, reason in zip(generations, reasons, strict=True):
            whole = generation.finished_s is not None
            self._pacer.abort(generation)
            self._metrics.finished(generation, reason if whole else "abort")

    async def _stream(
        self,
        request: web.Request,
        head: Mapping[str, Any],
        shape: Shape,
        answers: list[list[str]],
        generations: list[Generation],
        reasons: list[str],
        asked: Generate,
        usage: Mapping[str, Any],
    ) -> web.StreamResponse:
        head = {**head, "object": shape.chunk_kind}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})

        async def send(choices: list[dict[str, Any]], extra: Mapping[str, Any]) -> None:
            event = json.dumps({**head, "choices": choices, **extra}, ensure_ascii=False, separators=(",", ":"))
            await response.write(f"data: {event}\n\n".encode())

        def so_far(prompt_tokens: int, sent: int) -> Mapping[str, Any]:
            if not asked.continuous_usage:
                return {}
            counts = {"prompt_tokens": prompt_tokens, "completion_tokens": sent, "total_tokens": prompt_tokens + sent}
            return {"usage": counts}

        async def follow(index: int) -> None:
            answer, generation = answers[index], generations[index]
            assert generation.streamed is not None  # noqa: S101 - it was submitted as streamed
            sent = 0
            while sent < len(answer):
                await generation.streamed.wait()
                generation.streamed.clear()
                # Tokens that came while the last ones were being sent go together, as from vLLM.
                text, sent = "".join(answer[sent : generation.tokens]), generation.tokens
                reason = reasons[index] if sent == len(answer) else None
                await send([shape.delta(index, text, reason)], so_far(generation.prompt_tokens, sent))

        try:
            await response.prepare(request)
            if shape.is_chat:
                for index in range(len(answers)):
                    await send([shape.opening(index)], {})
            await asyncio.gather(*(follow(index) for index in range(len(answers))))
            if asked.include_usage:
                await send([], {"usage": usage})
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
        except ConnectionError:
            pass  # the client has gone: nobody is left to be told
        finally:
            self._close(generations, reasons)
        return response


@web.middleware
async def _answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return web.json_response(error.body(), status=error.status)
    except web.HTTPException as error:
        return web.json_response({"detail": error.reason}, status=error.status)


def _request_id(request: web.Request) -> str:
    return request.headers.get("X-Request-Id") or uuid.uuid4().hex
