"""Run one example workflow many times at given moments, as a program of its own: an agent under load.

`python -m scepsy.demo.load EXAMPLE.py` reads a JSON object from standard input: `questions`, a list of strings, and
`at_s`, the moment of each one's arrival in seconds after the first line is printed. It prints "ready" when the example
is loaded, waits for a line "go", and prints one JSON object per finished execution: its index, seconds and error. It
ends at once when standard input does.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import scepsy


def main() -> int:
    """Entry point of the child process."""
    order = json.loads(sys.stdin.readline())
    scepsy.instrument()
    module = _load(Path(sys.argv[1]))
    print("ready", flush=True)
    if not sys.stdin.readline():
        return 1
    threading.Thread(target=_end_with_parent, daemon=True).start()
    arrivals = list(zip(order["at_s"], order["questions"], strict=True))
    if inspect.iscoroutinefunction(module.run):
        asyncio.run(_drive_async(module.run, arrivals))
    else:
        _drive_threads(module.run, arrivals)
    return 0


def _end_with_parent() -> None:
    """The parent holds the other end of standard input; however it ends, so does this process."""
    # Not through sys.stdin: a thread that waits in its buffer keeps the interpreter from ending in order.
    while os.read(0, 4096):
        pass
    os._exit(1)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


async def _drive_async(run: Callable[[str], Any], arrivals: list[tuple[float, str]]) -> None:
    begin_s = time.monotonic()

    async def one(index: int, question: str) -> None:
        started_s = time.monotonic()
        error = None
        try:
            await run(question)
        except Exception as failure:  # noqa: BLE001 - whatever the agent raises is its result here
            error = f"{type(failure).__name__}: {failure}"
        _tell(index, time.monotonic() - started_s, error)

    async with asyncio.TaskGroup() as group:
        for index, (at_s, question) in enumerate(arrivals):
            await asyncio.sleep(max(0.0, begin_s + at_s - time.monotonic()))
            group.create_task(one(index, question))


def _drive_threads(run: Callable[[str], Any], arrivals: list[tuple[float, str]]) -> None:
    begin_s = time.monotonic()

    def one(index: int, question: str) -> None:
        started_s = time.monotonic()
        error = None
        try:
            contextvars.Context().run(run, question)
        except Exception as failure:  # noqa: BLE001 - whatever the agent raises is its result here
            error = f"{type(failure).__name__}: {failure}"
        _tell(index, time.monotonic() - started_s, error)

    threads = []
    for index, (at_s, question) in enumerate(arrivals):
        time.sleep(max(0.0, begin_s + at_s - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(index, question)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def _tell(index: int, seconds: float, error: str | None) -> None:
    print(json.dumps({"index": index, "seconds": seconds, "error": error}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
