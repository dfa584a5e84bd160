"""`scepsy deploy`: start a plan's engines behind one endpoint."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Final

from scepsy.cli import kubernetes
from scepsy.cli.options import add_engine, add_json, add_profiles, parse_command, parse_models
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from rich.console import Console

_LOOK_EVERY_S: Final = 0.2
_LOCAL_ONLY: Final = ("record", "affinity", "kv_cache_bytes", "otlp", "drain", "host", "detach")

HELP = "start the engines of a plan behind one OpenAI-compatible endpoint"

EXAMPLE = """\
  scepsy deploy plan.yaml                             # vLLM on the plan's GPUs, until interrupted
  scepsy deploy plan.yaml --detach --record traces    # in the background, recording its calls
  scepsy deploy plan.yaml --engine emulator           # the same without GPUs
  scepsy deploy plan.yaml --to kubernetes --image IMAGE | kubectl apply -f -"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("plan", metavar="PLAN", help="plan file, as scepsy optimize writes it")
    add_engine(parser)
    add_profiles(parser)
    parser.add_argument("--record", metavar="FOLDER", help="write a trace of every call that the endpoint carries")
    parser.add_argument(
        "--affinity",
        metavar="KIND",
        help="send requests that belong together to one replica: session:HEADER, or prefix (of the prompt)",
    )
    parser.add_argument(
        "--endpoint",
        choices=("gateway", "haproxy"),
        default="gateway",
        help="what takes the requests: the built-in gateway (default), or HAProxy before it, on several cores",
    )
    parser.add_argument(
        "--kv-cache-bytes",
        action="store_true",
        help="give engines on GPUs the KV cache that their profiles count on, instead of a part of the memory",
    )
    parser.add_argument("--otlp", metavar="URL", help="where engines send their spans (with a path: HTTP, else gRPC)")
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="S",
        help="how long it may end its answers when stopped (default: 30)",
    )
    parser.add_argument("--detach", action="store_true", help="return when ready; end it with scepsy stop")
    parser.add_argument(
        "--to", choices=("local", "ray", "kubernetes"), default="local", help="where (default: local, this machine)"
    )
    parser.add_argument("--address", help="with --to ray: the cluster (default: RAY_ADDRESS, or one on this machine)")
    add_json(parser)
    kubernetes.add_arguments(parser.add_argument_group("with --to kubernetes"))


def run(args: argparse.Namespace, console: Console) -> int:
    """Start, wait until told to end, stop."""
    from scepsy.deployment import deploy
    from scepsy.files import load_plan
    from scepsy.inputs import resolve_plan_profiles
    from scepsy.report.progress import waiting

    if not 0 <= args.drain < float("inf"):
        raise ScepsyError(f"--drain {args.drain:g}: give a number of seconds that is not negative")
    plan = load_plan(args.plan)
    if args.endpoint != "gateway" and args.to != "local":
        raise ScepsyError(f"--endpoint {args.endpoint} is for --to local; with --to {args.to} leave it out")
    if args.to != "local" and (given := _given(args, _LOCAL_ONLY)):
        raise ScepsyError(f"{', '.join(given)}: only for engines on this machine, not with --to {args.to}")
    for target, names in (("kubernetes", kubernetes.ONLY), ("ray", ("address",))):
        if args.to != target and (given := _given(args, names)):
            raise ScepsyError(f"{', '.join(given)}: only with --to {target}")
    if args.to == "kubernetes":
        if given := _given(args, kubernetes.FIXED):
            raise ScepsyError(
                f"{', '.join(given)}: not with --to kubernetes, where pods run the image's vLLM (--image) behind a "
                "service on port 8000; leave it out"
            )
        return kubernetes.run(plan, args, console)
    profiles = None
    if args.engine == "emulator" or args.kv_cache_bytes:
        profiles = resolve_plan_profiles(plan, profiles=args.profiles, models=parse_models(args.model))
    if args.to == "ray":
        from scepsy.deployment.on_ray import deploy_on_ray

        on_ray = waiting("starting", console)(deploy_on_ray)(
            plan,
            engine=args.engine,
            profiles=profiles,
            address=args.address,
            port=args.port,
            name=args.name,
            command=parse_command(args.engine_command),
            on_event=lambda event: console.print(event, soft_wrap=True, markup=False, highlight=False),
        )
        console.print(f"ready: OPENAI_BASE_URL={on_ray.url}", soft_wrap=True)
        _tell_ready(args, on_ray.url)
        console.print(f"it runs on without this process; end it with: scepsy stop {args.name} --on ray")
        return 0
    deployment = waiting("starting", console)(deploy)(
        plan,
        engine=args.engine,
        profiles=profiles,
        host=args.host,
        port=args.port,
        name=args.name,
        command=parse_command(args.engine_command),
        detach=args.detach,
        record=args.record,
        affinity=args.affinity,
        endpoint=args.endpoint,
        kv_cache_bytes=args.kv_cache_bytes,
        otlp_endpoint=args.otlp,
        drain_s=args.drain,
        on_event=lambda event: console.print(event, soft_wrap=True, markup=False, highlight=False),
    )
    console.print(f"ready: OPENAI_BASE_URL={deployment.url}", soft_wrap=True)
    _tell_ready(args, deployment.url)
    if args.detach:
        console.print(f"end it with: scepsy stop {args.name}")
        return 0
    told = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        told.set()

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not told.wait(_LOOK_EVERY_S):
            if deployment.crashed:
                raise ScepsyError(f"deployment {args.name!r} has ended unasked; see {deployment.directory}/logs")
            if not deployment.alive:
                break
        console.print("stopping")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        deployment.stop()
    return 0


def _given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of the options that are not as they are when left out, as they are written."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    given = [name for name in names if getattr(args, name) != parser.get_default(name)]
    return [f"--{name.removeprefix('engine_').replace('_', '-')}" for name in given]


def _tell_ready(args: argparse.Namespace, url: str) -> None:
    """For programs, as soon as there is something to talk to."""
    if args.json:
        print(json.dumps({"name": args.name, "url": url}), flush=True)
