"""`scepsy deploy`: start a plan's engines behind one endpoint."""

from __future__ import annotations

import argparse
import signal
import threading
from types import FrameType

from rich.console import Console

from scepsy.cli import kubernetes
from scepsy.cli.options import add_engine, add_profiles, parse_command, parse_models
from scepsy.deployment import deploy
from scepsy.deployment.on_ray import deploy_on_ray
from scepsy.files import load_plan
from scepsy.inputs import resolve_cluster_profiles
from scepsy_optimizer.errors import ScepsyError

HELP = "start the engines of a plan behind one OpenAI-compatible endpoint"


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
    parser.add_argument("--detach", action="store_true", help="return when ready; end it with scepsy stop")
    parser.add_argument(
        "--to", choices=("local", "ray", "kubernetes"), default="local", help="where (default: local, this machine)"
    )
    parser.add_argument("--address", help="with --to ray: the cluster (default: RAY_ADDRESS, or one on this machine)")
    kubernetes.add_arguments(parser.add_argument_group("with --to kubernetes"))


def run(args: argparse.Namespace, console: Console) -> int:
    """Start, wait until told to end, stop."""
    plan = load_plan(args.plan)
    if args.endpoint != "gateway" and args.to != "local":
        raise ScepsyError(f"--endpoint {args.endpoint} is for --to local; with --to {args.to} leave it out")
    if args.to == "kubernetes":
        return kubernetes.run(plan, args, console)
    profiles = None
    if args.engine == "emulator":
        llms = list(dict.fromkeys(part.llm for part in plan.llms))
        models = parse_models(args.model)
        profiles = resolve_cluster_profiles(llms, plan.cluster, profiles=args.profiles, models=models)
    if args.to == "ray":
        on_ray = deploy_on_ray(
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
        console.print(f"it runs on without this process; end it with: scepsy stop {args.name} --on ray")
        return 0
    deployment = deploy(
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
        on_event=lambda event: console.print(event, soft_wrap=True, markup=False, highlight=False),
    )
    console.print(f"ready: OPENAI_BASE_URL={deployment.url}", soft_wrap=True)
    if args.detach:
        console.print(f"end it with: scepsy stop {args.name}")
        return 0
    told = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        told.set()

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        told.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        console.print("stopping")
        deployment.stop()
    return 0
