"""Start a plan, find what runs, end it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from pydantic import TypeAdapter

from scepsy.deployment import change, processes, state
from scepsy.deployment.affinity import Affinity
from scepsy.deployment.apply import apply
from scepsy.deployment.haproxy import find_binary
from scepsy.deployment.names import claim, sweep
from scepsy.deployment.prepare import prepare
from scepsy.deployment.processes import Identity
from scepsy.deployment.specs import ENGINES, START_TIMEOUT_S, Engine
from scepsy.files import save_plan
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.placement import require_placed
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import Profiles

_GRACE_S: Final = 15.0
_UPKEEP: Final = state.Upkeep()
NEEDED: Final = ("aiohttp", "httptools", "orjson", "prometheus_client", "psutil")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica now. `phase` is waiting, starting, ready, restarting, failed or stopped."""

    id: str
    llm: str
    phase: str
    place: str
    url: str
    pid: int | None
    outstanding: int
    served: int
    restarts: int
    last_error: str
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A deployment now. `ready` is whether its start is done; `in_flight` the requests being answered."""

    name: str
    engine: str
    ready: bool
    pid: int
    up_s: float
    in_flight: int
    replicas: tuple[ReplicaStatus, ...]


class Deployment:
    """A running deployment. As a context manager it stops at the end of the block."""

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        controller: Identity,
        process: subprocess.Popen[bytes] | None = None,
        events: threading.Thread | None = None,
    ) -> None:
        """`process` and `events`, which reads its output, are there in the process that started it."""
        self.name = name
        self.directory = state.folder(name)
        self._host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - compared, not bound
        self._port = port
        self._controller = controller
        self._process = process
        self._events = events

    @property
    def url(self) -> str:
        """The base URL for OpenAI clients."""
        return f"http://{self._host}:{self._port}/v1"

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._controller.alive

    @property
    def crashed(self) -> bool:
        """Whether it has ended without having been told to: then its note is still there."""
        if self.alive:
            return False
        note = state.read_state(self.directory)
        return note is not None and note.controller == self._controller

    def status(self) -> Status:
        """What runs now. Raises ScepsyError if the deployment has ended."""
        try:
            with urllib.request.urlopen(f"http://{self._host}:{self._port}/scepsy/status", timeout=10) as answer:
                return TypeAdapter(Status).validate_json(answer.read())
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if not self._controller.alive:
                raise ScepsyError(f"deployment {self.name!r} has ended; see {self.directory / 'logs'}") from error
            raise ScepsyError(f"deployment {self.name!r} does not answer at {self.url}") from error

    def apply(
        self,
        plan: Plan,
        *,
        profiles: Profiles | None = None,
        drain_s: float = 600.0,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        """Change what runs to another plan: only what differs is started and stopped, and no LLM goes without a replica
        if there is an order in which none does.

        A replica that stops first answers what it has, for `drain_s` at most. Where a new one does not come up, all
        steps are undone. One that was given up is tried again. `profiles` are for emulators, and for KV caches in
        bytes. Raises ScepsyError where the change is impossible, failed, or another one is under way; what ran before
        then runs.
        """
        if not self.status().ready:
            raise ScepsyError(f"deployment {self.name!r} is still starting; wait until it is ready")
        apply(self.directory, self._controller, plan, profiles or {}, drain_s, on_event or (lambda _event: None))

    def stop(self) -> None:
        """End the deployment and everything that it started, once it has answered what it was asked, or the time for
        that is up. Stopping what has ended is no error."""
        note = state.read_state(self.directory)
        drain_s = 0.0
        with contextlib.suppress(FileNotFoundError):
            drain_s = state.read_order(self.directory).drain_s
        processes.end(self._controller, drain_s + _GRACE_S + 20)
        if self._process is not None:
            _close(self._process, self._events)
        # An orderly end leaves nothing; a controller that was killed leaves its note.
        if note is not None and note.controller == self._controller:
            sweep(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def deploy(
    plan: Plan,
    *,
    engine: Engine = "vllm",
    profiles: Profiles | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    name: str = "default",
    command: Sequence[str] | None = None,
    engine_args: Sequence[str] = (),
    seed: int = 0,
    detach: bool = False,
    start_timeout_s: float | None = None,
    record: str | Path | None = None,
    affinity: str | None = None,
    api_key: str | None = None,
    endpoint: state.EndpointKind = "gateway",
    kv_cache_bytes: bool = False,
    otlp_endpoint: str | None = None,
    drain_s: float = 30.0,
    on_event: Callable[[str], None] | None = None,
) -> Deployment:
    """Start every replica of the plan on this machine behind one endpoint; returns when all are ready.

    `engine` is "vllm" (GPUs), "vllm-cpu" (each device a core) or "emulator" (no model, the timing of `profiles`, which
    it needs). `command` is how one engine is started (default: vllm serve), `engine_args` are added to it, `seed` is
    the emulators'. With `port` 0 a free one is taken. Unless `detach`, the deployment ends with this process. With
    `record`, a directory, the endpoint records every call that it carries as trace files there.
    `affinity` sends requests that belong together to one replica: "session:HEADER" those with the same value of a
    header, "prefix" those whose prompts begin alike. With `api_key`, or else the environment's SCEPSY_API_KEY, the
    endpoint answers only those who have it. With `endpoint` "haproxy" HAProxy stands before the gateway and uses
    several cores; it records nothing and knows no affinity by prefix. With `kv_cache_bytes` engines on GPUs are given
    the KV cache that the plan counts on by `profiles`, in bytes, instead of a part of the memory, which vLLM measures
    while it starts. At `otlp_endpoint` engines send their spans: an address with a path by HTTP, without one by gRPC.
    Once stopped it takes no more requests, and ends what it answers, for `drain_s` at most. `on_event` is told of
    progress, from another thread once all are ready. Raises ScepsyError; nothing is then left running.
    """
    _require_extra()
    if engine not in ENGINES:
        raise ScepsyError(f"engine {engine!r}: use one of {', '.join(ENGINES)}")
    require_placed(plan)
    parsed = Affinity.parsed(affinity) if affinity is not None else None
    if endpoint == "haproxy":
        _check_haproxy(parsed, record)
    elif endpoint != "gateway":
        raise ScepsyError(f"endpoint {endpoint!r}: use gateway or haproxy")
    told = on_event or (lambda _event: None)
    directory = state.folder(name)
    with claim(name, directory) as lock:
        for old in ("logs", "profiles", change.CHANGES):
            shutil.rmtree(directory / old, ignore_errors=True)
        (directory / "logs").mkdir()
        save_plan(plan, directory / "plan.yaml")
        specs, mps = prepare(
            plan,
            engine,
            profiles=profiles or {},
            directory=directory,
            command=command,
            engine_args=engine_args,
            seed=seed,
            on_event=told,
            kv_cache_bytes=kv_cache_bytes,
            otlp_endpoint=otlp_endpoint,
        )
        order = state.Order(
            name=name,
            engine=engine,
            host=host,
            port=port,
            specs=specs,
            start_timeout_s=start_timeout_s or START_TIMEOUT_S[engine],
            grace_s=_GRACE_S,
            drain_s=drain_s,
            mps_directory=mps,
            record=str(Path(record).resolve()) if record is not None else None,
            command=tuple(command) if command is not None else None,
            engine_args=tuple(engine_args),
            seed=seed,
            affinity=affinity,
            endpoint=endpoint,
            kv_cache_bytes=kv_cache_bytes,
            otlp_endpoint=otlp_endpoint,
            upkeep=_UPKEEP,
        )
        state.write_order(directory, order)
        told(f"starting {len(specs)} replicas of {len({spec.llm for spec in specs})} LLMs ({engine})")
        return _launch(order, directory, lock, told, detach=detach, api_key=api_key)


def find(name: str = "default") -> Deployment:
    """The running deployment of that name. Raises ScepsyError if there is none.

    What a killed deployment has left is ended first.
    """
    directory = state.folder(name)
    note = state.read_state(directory)
    if note is None:
        known = ", ".join(state.names())
        advice = f"running: {known}" if known else "none is; start a plan with: scepsy deploy PLAN"
        raise ScepsyError(f"no deployment {name!r} is running ({advice})")
    if note.boot != processes.boot_id() or not note.controller.alive:
        sweep(directory)
        raise ScepsyError(_ended_unasked(name))
    return Deployment(name, note.host, note.port, note.controller)


def stop(name: str = "default") -> None:
    """End the deployment of that name and everything that it started. Raises ScepsyError if there is none."""
    if sweep(state.folder(name)):
        return
    find(name).stop()


def list_deployments(on_event: Callable[[str], None] | None = None) -> tuple[Deployment, ...]:
    """All running deployments, by name; what killed ones have left is ended, of which `on_event` is told."""
    found = []
    for name in state.names():
        if sweep(state.folder(name)):
            if on_event is not None:
                on_event(_ended_unasked(name))
        else:
            with contextlib.suppress(ScepsyError):  # it may end meanwhile
                found.append(find(name))
    return tuple(found)


def _ended_unasked(name: str) -> str:
    return f"deployment {name!r} had ended unasked; what it left is ended now. Its logs: {state.folder(name)}/logs"


def _launch(
    order: state.Order,
    directory: Path,
    lock: IO[bytes],
    on_event: Callable[[str], None],
    *,
    detach: bool,
    api_key: str | None,
) -> Deployment:
    environment = os.environ | ({state.API_KEY: api_key} if api_key else {})
    with (directory / "logs" / "controller.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "scepsy.deployment.controller", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    assert process.stdout is not None  # noqa: S101 - it was started with pipes
    assert process.stdin is not None  # noqa: S101
    controller = processes.identify(process.pid)
    try:
        port = _until_ready(process.stdout, on_event, directory)
    except BaseException:
        processes.end(controller, _GRACE_S + 20)
        _close(process)
        sweep(directory)
        raise
    if detach:
        process.stdin.write(state.DETACH)
        process.stdin.flush()
        process.stdin.close()
        process.stdout.close()
        # It is meant to outlive this process, which need not wait for it.
        process.returncode = 0
        return Deployment(order.name, order.host, port, controller)
    events = threading.Thread(target=_pass_events, args=(process.stdout, on_event), daemon=True)
    events.start()
    return Deployment(order.name, order.host, port, controller, process, events)


def _until_ready(events: IO[bytes], on_event: Callable[[str], None], directory: Path) -> int:
    for line in events:
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            on_event(message["event"])
        elif "error" in message:
            raise ScepsyError(message["error"])
        else:
            return int(message["ready"])
    log = directory / "logs" / "controller.log"
    raise ScepsyError(f"the deployment ended while it was starting; see {log}")


def _pass_events(events: IO[bytes], on_event: Callable[[str], None]) -> None:
    for line in events:
        message = json.loads(line)
        if "event" in message:
            on_event(message["event"])


def _close(process: subprocess.Popen[bytes], events: threading.Thread | None = None) -> None:
    process.wait()
    if events is not None and events is not threading.current_thread():
        events.join()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _check_haproxy(affinity: Affinity | None, record: str | Path | None) -> None:
    if record is not None:
        raise ScepsyError("endpoint 'haproxy' records no calls: leave out what records, or use endpoint 'gateway'")
    if affinity is not None and affinity.by == "prefix":
        raise ScepsyError("endpoint 'haproxy' knows no affinity by prefix: use session:HEADER, or endpoint 'gateway'")
    find_binary()


def _require_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ScepsyError(f"deploying needs {', '.join(missing)}: pip install 'scepsy[deploy]'")
