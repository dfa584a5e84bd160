"""`python -m scepsy.emulator`: one emulated replica."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import signal
import sys
from collections.abc import Callable, Sequence

from aiohttp import web

from scepsy.emulator.server import EmulatedServer
from scepsy.files import load_profile
from scepsy_optimizer.engine import Engine
from scepsy_optimizer.errors import ScepsyError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scepsy.emulator", description=__doc__)
    parser.add_argument("--profile", required=True, metavar="FILE", help="profile file that gives the timing")
    parser.add_argument("--llm", metavar="NAME", help="served model name (default: the profile's)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--fraction", type=float, default=1.0, help="part of each device, at most 1 (default: 1)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0, help="of the answers' lengths and words (default: 0)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(args))
    except ScepsyError as error:
        print(f"scepsy emulator: {error}", file=sys.stderr)  # noqa: T201 - the end of a command line program
        return 2
    return 0


async def _serve(args: argparse.Namespace) -> None:
    profile = load_profile(args.profile)
    engine = Engine(profile, tensor_parallel_size=args.tensor_parallel_size, fraction=args.fraction)
    server = EmulatedServer(profile, args.llm or profile.llm, engine, seed=args.seed)
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, args.host, args.port, backlog=1024).start()
        await told.wait()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise ScepsyError(f"port {args.port} on {args.host} is in use; give another one with --port") from error
    finally:
        await runner.cleanup()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    sys.exit(main())
