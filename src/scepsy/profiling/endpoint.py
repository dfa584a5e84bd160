"""One engine as a measurer sees it: requests of exact lengths with the time of every token, and the engine's counters.

Prompts are random token ids: their length is exact without a tokenizer, and no two share a prefix that a cache could
keep. `min_tokens` and `ignore_eos` make the answer as long as asked.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    import aiohttp

# Token ids that are plain text in every vocabulary that we know: above the reserved ones, below the end of bytes.
_FIRST_TOKEN, _LAST_TOKEN = 10, 200
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One answered request: when it was sent, and when how many tokens of its answer had come (`time.perf_counter`)."""

    sent_s: float
    tokens_s: tuple[tuple[float, int], ...]

    @property
    def first_token_s(self) -> float:
        """Time from sending to the first token."""
        return self.tokens_s[0][0] - self.sent_s

    @property
    def call_s(self) -> float:
        """Time from sending to the last token."""
        return self.tokens_s[-1][0] - self.sent_s

    @property
    def per_token_s(self) -> float:
        """Mean time per token after the first; 0 for an answer of one token."""
        (first, before), (last, count) = self.tokens_s[0], self.tokens_s[-1]
        return (last - first) / (count - before) if count > before else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Counters of vLLM's /metrics at one moment, summed over the labels of one model; 0 where the engine has none.

    `prefill_time_s` is from scheduling to the first token, summed over finished requests.
    """

    prompt_tokens: float
    requests: float
    prefill_time_s: float
    steps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine says about itself.

    `kv_tokens` and `kv_bytes_per_token` are None, `max_model_len` is 0 where it does not say.
    """

    model: str
    max_model_len: int
    version: str
    kv_tokens: int | None
    kv_bytes_per_token: float | None


@dataclass(slots=True)
class Endpoint:
    """An OpenAI-compatible endpoint and one of its models. Open one with `open_endpoint`."""

    url: str
    llm: str
    session: aiohttp.ClientSession
    random: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - prompts, not secrets

    async def complete(self, prompt_tokens: int, output_tokens: int, *, shared_tokens: int = 0) -> Timing:
        """Send one request of exact lengths and read its answer as it comes.

        The first `shared_tokens` of the prompt are the same in all requests: a prefix cache keeps them. Raises
        ScepsyError if it is refused.
        """
        own_tokens = prompt_tokens - shared_tokens
        body = {
            "model": self.llm,
            "prompt": _tokens(random.Random(0), shared_tokens) + _tokens(self.random, own_tokens),  # noqa: S311 - a prompt
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        import aiohttp

        times: list[tuple[float, int]] = []
        sent_s = time.perf_counter()
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise ScepsyError(f"{self._where()} answered {response.status}: {(await response.text())[:300]}")
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        _note(json.loads(line[6:]), times)
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise ScepsyError(f"{self._where()} broke off: {type(error).__name__}: {error}") from error
        if not times or times[-1][1] != output_tokens:
            got = times[-1][1] if times else 0
            raise ScepsyError(f"{self._where()} answered {got} tokens instead of {output_tokens}: is it a vLLM?")
        return Timing(sent_s=sent_s, tokens_s=tuple(times))

    async def facts(self) -> EngineFacts:
        """Ask what it serves. Raises ScepsyError where the model is not among it."""
        listed = await self._get("/v1/models")
        try:
            models = {entry["id"]: entry for entry in json.loads(listed)["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ScepsyError(
                f"{self.url}/v1/models answers no list of models but {listed[:80]!r}: is it an OpenAI-compatible "
                "server?"
            ) from error
        if self.llm not in models:
            raise ScepsyError(f"{self.url} does not serve {self.llm!r}; it serves {', '.join(models) or 'nothing'}")
        entry = models[self.llm]
        cache = _labels(await self._get("/metrics"), "vllm:cache_config_info")
        tokens, size = (_number(cache, key) for key in ("kv_cache_size_tokens", "kv_cache_memory_bytes"))
        if tokens is None:
            blocks, block = _number(cache, "num_gpu_blocks"), _number(cache, "block_size")
            tokens = blocks * block if blocks is not None and block is not None else None
        version = json.loads(await self._get("/version", missing='{"version": "unknown"}'))["version"]
        return EngineFacts(
            model=str(entry.get("root") or self.llm),
            max_model_len=int(entry.get("max_model_len") or 0),
            version=str(version),
            kv_tokens=None if tokens is None else int(tokens),
            kv_bytes_per_token=size / tokens if size is not None and tokens else None,
        )

    async def counters(self) -> Counters:
        """Read the counters of this model."""
        text = await self._get("/metrics")

        def total(name: str) -> float:
            return sum_samples(text, name, self.llm)

        return Counters(
            prompt_tokens=total("vllm:prompt_tokens_total"),
            requests=total("vllm:request_success_total"),
            prefill_time_s=total("vllm:request_prefill_time_seconds_sum"),
            steps=total("vllm:iteration_tokens_total_count"),
        )

    async def _get(self, path: str, *, missing: str | None = None) -> str:
        import aiohttp

        try:
            async with self.session.get(f"{self.url}{path}") as response:
                if response.status == 404 and missing is not None:
                    return missing
                if response.status != 200:
                    raise ScepsyError(f"{self.url}{path} answered {response.status}")
                return await response.text()
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise ScepsyError(f"{self.url}{path} cannot be reached: {error}; is the engine running?") from error

    def _where(self) -> str:
        return f"{self.llm!r} at {self.url}"


@asynccontextmanager
async def open_endpoint(url: str, llm: str, *, seed: int = 0) -> AsyncIterator[Endpoint]:
    """Open an endpoint; a trailing /v1 of its address is dropped. Raises ScepsyError where aiohttp is missing."""
    try:
        import aiohttp
    except ImportError as error:
        raise ScepsyError("measuring needs aiohttp; install it with: pip install 'scepsy[deploy]'") from error
    base = url.rstrip("/").removesuffix("/v1")
    # No limit on connections: a request that waits here would be timed as if the engine were slow.
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Endpoint(url=base, llm=llm, session=session, random=random.Random(seed))  # noqa: S311 - as above


def _tokens(source: random.Random, count: int) -> list[int]:
    return [source.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(count)]


def _note(chunk: Mapping[str, Any], times: list[tuple[float, int]]) -> None:
    """Note the tokens of one chunk: an engine that is read slowly joins several tokens into one."""
    if not chunk.get("choices"):
        return
    before = times[-1][1] if times else 0
    usage = chunk.get("usage") or {}
    count = int(usage.get("completion_tokens", before + 1))
    if count > before:
        times.append((time.perf_counter(), count))


_SAMPLE = re.compile(r"^(?P<name>[^\s{]+)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def sum_samples(text: str, name: str, llm: str) -> float:
    """Sum of a metric's samples in Prometheus' text format, of one model where they are labelled with it."""
    total = 0.0
    for line in text.splitlines():
        match = _SAMPLE.match(line) if line.startswith(name) else None
        if match is not None and match["name"] == name:
            labels = dict(_LABEL.findall(match["labels"] or ""))
            if labels.get("model_name", llm) == llm:
                total += float(match["value"])
    return total


def _labels(text: str, name: str) -> dict[str, str]:
    """The labels of a metric's first sample, in which vLLM keeps its configuration."""
    for line in text.splitlines():
        match = _SAMPLE.match(line) if line.startswith(name) else None
        if match is not None:
            return dict(_LABEL.findall(match["labels"] or ""))
    return {}


def _number(labels: Mapping[str, str], key: str) -> float | None:
    try:
        return float(labels[key])
    except (KeyError, ValueError):
        return None
