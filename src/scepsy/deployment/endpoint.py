"""The endpoint alone, in front of engines that somebody else keeps: `python -m scepsy.deployment.endpoint CONFIG`.

CONFIG is a JSON file with the list `backends`: of each its `id`, `llm`, `model`, `url` and `weight`. An engine gets
requests while its /health answers and its /v1/models names the LLM. SIGTERM lets what is being answered end. With
SCEPSY_API_KEY in its environment it answers only those who have that key.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from pydantic import TypeAdapter, ValidationError

from scepsy.deployment.affinity import Affinity
from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.connections import connections
from scepsy.deployment.forward import client
from scepsy.deployment.gateway import Gateway, listed_model
from scepsy.deployment.serving import listening, served
from scepsy.deployment.state import API_KEY
from scepsy_optimizer.errors import ScepsyError

_LOOK_EVERY_S: Final = 2.0
_LOOK_TIMEOUT_S: Final = 5.0
_DRAIN_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An engine: its LLM, what that is loaded from, where it answers, and what it can do beside others."""

    id: str
    llm: str
    model: str
    url: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All engines behind the endpoint, and by what requests belong together (see `Affinity`)."""

    backends: tuple[Target, ...]
    affinity: str | None = None


def read_config(path: Path) -> Config:
    """Raises ScepsyError for a file that is not there, or is not a configuration."""
    try:
        config = TypeAdapter(Config).validate_json(path.read_bytes())
    except OSError as error:
        raise ScepsyError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ScepsyError(f"{path}: {where}: {first['msg']}") from error
    if not config.backends:
        raise ScepsyError(f"{path}: there are no backends")
    return config


async def serve(config: Config, host: str, port: int, told: asyncio.Event) -> None:
    """Answer until told to end, then let answers end. Raises ScepsyError where the port is taken."""
    pools: dict[str, Pool] = {}
    models: dict[str, Mapping[str, Any]] = {}
    begun_s = time.time()
    for target in config.backends:
        backend = Backend(id=target.id, llm=target.llm, url=target.url, weight=target.weight)
        pools.setdefault(target.llm, Pool([])).add(backend)
        models[target.llm] = listed_model(target.llm, target.model, begun_s)

    def status() -> Mapping[str, Any]:
        every = [backend for pool in pools.values() for backend in pool.backends]
        fields = ("id", "llm", "url", "weight", "ready", "outstanding", "served")
        return {"backends": [{field: getattr(backend, field) for field in fields} for backend in every]}

    async with client() as session, connections() as engines:
        affinity = Affinity.parsed(config.affinity) if config.affinity is not None else None
        api_key = os.environ.get(API_KEY) or None
        gateway = Gateway(pools, engines, models=models, status=status, affinity=affinity, api_key=api_key)
        looking = [
            asyncio.create_task(_look_after(pool, backend, session))
            for pool in pools.values()
            for backend in pool.backends
        ]
        try:
            with listening(host, port) as listener:
                async with served(gateway, listener):
                    await told.wait()
                    await gateway.drain(_DRAIN_S)
        finally:
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)


async def _look_after(pool: Pool, backend: Backend, session: aiohttp.ClientSession) -> None:
    while True:
        is_ready = await _serves(backend, session)
        if is_ready != backend.ready:
            backend.ready = is_ready
            pool.changed()
            print(f"{backend.id} {'is ready' if is_ready else 'does not answer'}", file=sys.stderr, flush=True)  # noqa: T201 - the log
        await asyncio.sleep(_LOOK_EVERY_S)


async def _serves(backend: Backend, session: aiohttp.ClientSession) -> bool:
    timeout = aiohttp.ClientTimeout(total=_LOOK_TIMEOUT_S)
    try:
        if not backend.ready:
            # Another server may have come to that address.
            async with session.get(f"{backend.url}/v1/models", timeout=timeout) as answer:
                listed = await answer.json(content_type=None)
            if backend.llm not in [model["id"] for model in listed["data"]]:
                return False
        # An agent's endpoint is not healthy as a whole while another of its LLMs has no replica: this LLM may have.
        async with session.get(f"{backend.url}/health", timeout=timeout) as answer:
            if answer.status == 200:
                return True
            missing = (await answer.json(content_type=None)).get("without_replica", [backend.llm])
            return backend.llm not in missing
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


async def _main(config: Config, host: str, port: int) -> None:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await serve(config, host, port, told)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scepsy.deployment.endpoint", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("config", type=Path, help="JSON file with the backends")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    args = parser.parse_args(argv)
    try:
        asyncio.run(_main(read_config(args.config), args.host, args.port))
    except ScepsyError as error:
        print(f"endpoint: {error}", file=sys.stderr)  # noqa: T201 - the log
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
