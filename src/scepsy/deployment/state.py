"""What is on disk about a deployment, so that another process can find, show and end it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter, ValidationError

from scepsy.deployment.home import deployments_folder
from scepsy.deployment.processes import Identity, end, end_rest
from scepsy.deployment.specs import Engine, ReplicaSpec
from scepsy_optimizer.errors import ScepsyError

ORDER: Final = "order.json"
"""The order's file in a deployment's folder."""

DETACH: Final = b"detach\n"
"""What the starter writes to the controller's standard input so that the controller outlives it."""

API_KEY: Final = "SCEPSY_API_KEY"
"""The environment variable with the key that clients of the endpoint must have; engines are not given it."""

EndpointKind = Literal["gateway", "haproxy"]
"""What stands in front of the replicas: the gateway alone, or HAProxy before it."""

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """When an engine counts as broken, and how patiently it is started again. Times in seconds.

    It is asked for its health every `health_every_s`; after `health_misses` answers in a row that did not come within
    `health_timeout_s` it is ended. Before each start there is a pause, the first and the longest of `back_off_s`; after
    `failed_starts` in a row that did not become ready it is given up.
    """

    health_every_s: float = 5.0
    health_timeout_s: float = 10.0
    health_misses: int = 6
    back_off_s: tuple[float, float] = (1.0, 60.0)
    failed_starts: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a controller is to start. Times in seconds.

    `mps_directory` is where an MPS daemon is to be started, `record` where calls are to be recorded. `command`,
    `engine_args`, `seed`, `kv_cache_bytes` and `otlp_endpoint` are what `specs` were made with, for those that come
    later. `affinity` is as in `Affinity`, `endpoint` what takes the requests.
    """

    name: str
    engine: Engine
    host: str
    port: int
    specs: tuple[ReplicaSpec, ...]
    start_timeout_s: float
    grace_s: float
    drain_s: float
    mps_directory: str | None = None
    record: str | None = None
    command: tuple[str, ...] | None = None
    engine_args: tuple[str, ...] = ()
    seed: int = 0
    kv_cache_bytes: bool = False
    otlp_endpoint: str | None = None
    affinity: str | None = None
    endpoint: EndpointKind = "gateway"
    upkeep: Upkeep = Upkeep()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A process that a shim keeps: the shim, the engine that leads a session, and its scratch folder."""

    id: str
    shim: Identity
    engine: Identity | None
    scratch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Which processes make up a deployment, and where it answers."""

    name: str
    boot: str
    controller: Identity
    engine: Engine
    host: str
    port: int
    kept: tuple[Kept, ...] = ()


_ORDER = TypeAdapter(Order)
_STATE = TypeAdapter(State)


def folder(name: str) -> Path:
    """The folder of the deployment of that name. Raises ScepsyError for a name that cannot be one."""
    if not _NAME.match(name):
        raise ScepsyError(f"deployment name {name!r}: use letters, digits, '.', '_' and '-', at most 64")
    return deployments_folder() / name


def names() -> Iterator[str]:
    """Names of all deployments that are noted."""
    root = deployments_folder()
    if root.is_dir():
        yield from sorted(path.name for path in root.iterdir() if (path / "state.json").exists())


def write_order(directory: Path, order: Order) -> None:
    """Leave the order where the controller finds it, replaced as a whole."""
    replace_files({directory / ORDER: order_bytes(order)})


def order_bytes(order: Order) -> bytes:
    """The order as its file has it."""
    return _ORDER.dump_json(order)


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Put contents into files so that a reader never sees half of one, and a full disk leaves all as they were.

    Raises OSError.
    """
    parts = {path: path.with_name(f"{path.name}.part") for path in contents}
    try:
        for path, content in contents.items():
            parts[path].write_bytes(content)
    except OSError:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise
    for path, part in parts.items():
        part.replace(path)


def read_order(directory: Path) -> Order:
    """The order in that folder."""
    return _ORDER.validate_json((directory / ORDER).read_bytes())


def write_state(directory: Path, state: State) -> None:
    """Replace the note. Raises OSError."""
    replace_files({directory / "state.json": _STATE.dump_json(state)})


def read_state(directory: Path) -> State | None:
    """The note in that folder; None if there is none. Raises ScepsyError if it cannot be understood."""
    path = directory / "state.json"
    try:
        return _STATE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ScepsyError(f"{path}: not the note of a deployment; remove it if nothing of it runs") from error


def forget(directory: Path) -> None:
    """Remove the notes; logs and plan stay until the name is used again."""
    for name in ("state.json", ORDER):
        (directory / name).unlink(missing_ok=True)


def end_kept(kept: Kept) -> None:
    """End what a shim kept, the shim included, however much of it has been killed already."""
    end(kept.shim, 20.0)
    end_rest(kept.engine, kept.scratch)
    shutil.rmtree(kept.scratch, ignore_errors=True)
