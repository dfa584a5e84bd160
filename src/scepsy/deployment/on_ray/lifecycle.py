"""Start a plan on a Ray cluster, find it from any machine that reaches the cluster, end it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, Final, Self

from pydantic import TypeAdapter

from scepsy.deployment import processes
from scepsy.deployment.lifecycle import Status
from scepsy.deployment.on_ray.order import (
    NAMESPACE,
    RayOrder,
    RayReplica,
    head_name,
    keeper_name,
    node_ids,
    replicas_of,
)
from scepsy.deployment.prepare import profile_texts
from scepsy.deployment.specs import DEFAULT_COMMAND, START_TIMEOUT_S, Engine
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import Profiles

_PLACE_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.2


class RayDeployment:
    """A deployment on Ray. As a context manager it stops at the end of the block."""

    def __init__(self, name: str, head: Any) -> None:
        """`head` is the handle of its head actor."""
        self.name = name
        self._head = head

    @property
    def url(self) -> str:
        """The base URL for OpenAI clients. Raises ScepsyError if the deployment has ended."""
        return f"{self._asked()['address']}/v1"

    def status(self) -> Status:
        """What runs now. Raises ScepsyError if the deployment has ended."""
        found = self._asked()
        return TypeAdapter(Status).validate_python({key: found[key] for key in Status.__dataclass_fields__})

    def stop(self) -> None:
        """End the deployment and everything that it started. Stopping what has ended is no error."""
        _remove(self.name)

    def _asked(self) -> dict[str, Any]:
        ray = _ray()
        try:
            found: dict[str, Any] = ray.get(self._head.status.remote(), timeout=60)
        except ray.exceptions.RayError as error:
            raise ScepsyError(f"deployment {self.name!r} on Ray does not answer: {type(error).__name__}") from error
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def deploy_on_ray(
    plan: Plan,
    *,
    engine: Engine = "vllm",
    profiles: Profiles | None = None,
    address: str | None = None,
    host: str = "0.0.0.0",  # noqa: S104 - whoever calls is on another machine
    port: int = 0,
    name: str = "default",
    command: Sequence[str] | None = None,
    engine_args: Sequence[str] = (),
    seed: int = 0,
    start_timeout_s: float | None = None,
    on_event: Callable[[str], None] | None = None,
) -> RayDeployment:
    """Start every replica of the plan where Ray has the plan's nodes; returns when all are ready.

    `address` is the Ray cluster's (default: RAY_ADDRESS, or one on this machine). Each replica has a placement group on
    its node with the GPUs, or the part of one, that it takes; which of the node's GPUs, Ray decides. The endpoint is on
    the head node, at `port` or a free one. The deployment outlives this process; end it with `stop`. Raises ScepsyError
    with what is missing where the cluster has no room, or a replica does not start; nothing is then left.
    """
    told = on_event or (lambda _event: None)
    ray = connect(address)
    from scepsy.deployment.on_ray.actors import Head  # what runs on Ray needs an extra; asking does not

    if _names(name):
        raise ScepsyError(f"a deployment {name!r} is on that Ray cluster; end it first, or give another name (--name)")
    ids = node_ids(plan, ray.nodes())
    texts = profile_texts(plan, profiles or {}) if engine == "emulator" else ()
    order = RayOrder(
        name=name,
        engine=engine,
        host=host,
        # Chosen once: a head that is made anew has to answer where the old one did.
        port=port or processes.free_ports(1)[0],
        replicas=replicas_of(
            plan,
            engine,
            ids,
            profiles=dict(enumerate(texts)),
            command=tuple(command or DEFAULT_COMMAND),
            engine_args=tuple(engine_args),
            seed=seed,
        ),
        start_timeout_s=start_timeout_s or START_TIMEOUT_S[engine],
    )
    try:
        _place(order, told)
        llms = {one.spec.llm for one in order.replicas}
        told(f"starting {len(order.replicas)} replicas of {len(llms)} LLMs ({engine})")
        head = (
            ray.remote(Head)
            .options(
                name=head_name(name),
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=8,
                num_cpus=0,
                resources={"node:__internal_head__": 0.001},
            )
            .remote(order)
        )
        deployment = RayDeployment(name, head)
        _until_ready(deployment, order, told)
    except BaseException:
        _remove(name)
        raise
    return deployment


def find_on_ray(name: str = "default", *, address: str | None = None) -> RayDeployment:
    """The running deployment of that name on a Ray cluster. Raises ScepsyError if there is none."""
    ray = connect(address)
    try:
        return RayDeployment(name, ray.get_actor(head_name(name), namespace=NAMESPACE))
    except ValueError:
        if _names(name):
            _remove(name)
            raise ScepsyError(
                f"deployment {name!r} had lost its head; what it left on the cluster is ended now"
            ) from None
        raise ScepsyError(f"no deployment {name!r} is on that Ray cluster") from None


def connect(address: str | None = None) -> Any:
    """Ray, connected. Raises ScepsyError without Ray, or without a cluster."""
    ray = _ray()
    if ray.is_initialized():
        return ray
    try:
        ray.init(address=address or "auto", namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise ScepsyError(f"no Ray cluster answers: {said}; start one, or set RAY_ADDRESS") from error
    return ray


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise ScepsyError("deploying on Ray needs Ray; install it (pip install 'scepsy[ray]')") from error


def _place(order: RayOrder, told: Callable[[str], None]) -> None:
    """A placement group for each replica. Raises ScepsyError with what is missing for those that stay pending."""
    ray = _ray()
    groups = [
        ray.util.placement_group(
            [dict(one.resources)],
            strategy="STRICT_PACK",
            name=keeper_name(order.name, one.spec.id),
            lifetime="detached",
            bundle_label_selector=[{"ray.io/node-id": one.node_id}],
        )
        for one in order.replicas
    ]
    deadline_s = time.monotonic() + _PLACE_TIMEOUT_S
    lacking = [
        one
        for one, group in zip(order.replicas, groups, strict=True)
        if not group.wait(max(0.1, min(_place_wait_s(one), deadline_s - time.monotonic())))
    ]
    if lacking:
        raise ScepsyError(
            f"the Ray cluster has no room for {len(lacking)} of {len(groups)} replicas: "
            + "; ".join(_missing(one) for one in lacking)
            + ". Free it, or plan for what is there: --cluster ray"
        )
    told(f"placed {len(groups)} replicas on {len({one.node_id for one in order.replicas})} nodes")


def _place_wait_s(one: RayReplica) -> float:
    """What the node has in all decides whether waiting is of use: room may come free, resources do not."""
    return 10.0 if _fits(one, _node(one)["Resources"]) else 0.1


def _fits(one: RayReplica, resources: Any) -> bool:
    return all(resources.get(kind, 0) >= amount for kind, amount in one.resources.items())


def _node(one: RayReplica) -> Any:
    return next(node for node in _ray().nodes() if node["NodeID"] == one.node_id)


def _missing(one: RayReplica) -> str:
    available = import_module("ray._private.state").available_resources_per_node().get(one.node_id, {})
    total = _node(one)["Resources"]
    wants = ", ".join(
        f"{amount:g} {kind} (it has {total.get(kind, 0):g}, of which {available.get(kind, 0):g} free)"
        for kind, amount in one.resources.items()
    )
    return f"{one.spec.id} wants on {one.spec.node!r} {wants}"


def _until_ready(deployment: RayDeployment, order: RayOrder, told: Callable[[str], None]) -> None:
    deadline_s = time.monotonic() + order.start_timeout_s + _PLACE_TIMEOUT_S
    ready: set[str] = set()
    while True:
        found = deployment._asked()  # noqa: SLF001 - of the same module
        if found["failure"]:
            raise ScepsyError(found["failure"])
        for one in found["replicas"]:
            if one["phase"] == "ready" and one["id"] not in ready:
                ready.add(one["id"])
                told(f"{one['id']} ready ({one['place']})")
            elif one["id"] not in ready and one["last_error"] and one["phase"] != "restarting":
                raise ScepsyError(f"{one['id']} on Ray did not start: {one['last_error']}")
        if found["ready"]:
            return
        if time.monotonic() > deadline_s:
            waiting = ", ".join(one["id"] for one in found["replicas"] if one["id"] not in ready)
            raise ScepsyError(f"on Ray {waiting} did not get ready in {order.start_timeout_s:g} s")
        time.sleep(_POLL_S)


def _names(name: str) -> tuple[str, ...]:
    """All actors of a deployment, head and keepers."""
    listed = _ray().util.list_named_actors(all_namespaces=True)
    return tuple(one["name"] for one in listed if one["namespace"] == NAMESPACE and one["name"].startswith(f"{name}/"))


def _remove(name: str) -> None:
    """First the answers, then the engines; then what Ray keeps for them."""
    ray = _ray()
    if not ray.is_initialized():
        connect()
    names = sorted(_names(name), key=lambda one: one != head_name(name))
    for group in (names[:1], names[1:]):
        actors = []
        for one in group:
            with contextlib.suppress(ValueError):
                actors.append(ray.get_actor(one, namespace=NAMESPACE))
        stopped = [actor.stop.remote() for actor in actors]
        ray.wait(stopped, num_returns=len(stopped), timeout=_STOP_TIMEOUT_S) if stopped else None
        for actor in actors:
            ray.kill(actor)
    for entry in ray.util.placement_group_table().values():
        if entry["name"].startswith(f"{name}/") and entry["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(entry["name"]))
