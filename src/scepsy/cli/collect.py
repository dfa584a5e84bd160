"""`scepsy collect`: traces without touching the agents' code."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from scepsy.cli.options import add_json, port

if TYPE_CHECKING:
    from rich.console import Console

HELP = "receive OTLP spans, and record the calls of a proxied endpoint, into trace files"

EXAMPLE = """\
  scepsy collect                                      # agents: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, as it prints
  scepsy collect --upstream http://localhost:8000     # agents: OPENAI_BASE_URL, as it prints; no code changes"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("-o", "--output", default="scepsy-traces", metavar="FOLDER", help="default: scepsy-traces")
    parser.add_argument("--upstream", metavar="URL", help="pass other requests on to this server and record its calls")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=4318, help="port to listen on (default: 4318, that of OTLP)")
    parser.add_argument(
        "--keep-content", action="store_true", help="keep prompts and answers that received spans hold; default: drop"
    )
    add_json(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Collect until told to end, then say what came."""
    from scepsy.collect import collect

    def ready(url: str) -> None:
        if args.json:
            print(
                json.dumps({"traces": f"{url}/v1/traces", "openai": f"{url}/v1" if args.upstream else None}), flush=True
            )
        console.print(f"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT={url}/v1/traces", soft_wrap=True, highlight=False)
        if args.upstream:
            console.print(f"OPENAI_BASE_URL={url}/v1  (passed on to {args.upstream})", soft_wrap=True, highlight=False)

    counts = collect(
        args.output,
        args.host,
        args.port,
        args.upstream,
        keep_content=args.keep_content,
        on_ready=ready,
    )
    console.print(f"{counts.spans} spans and {counts.calls} calls in {args.output}", soft_wrap=True)
    if args.json:
        print(json.dumps({"spans": counts.spans, "calls": counts.calls, "output": args.output}))
    return 0
