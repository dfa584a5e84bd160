"""Send a schedule through example workflows: one process per example, as separate agents would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scepsy.demo.schedule import Arrivals
from scepsy_optimizer.errors import ScepsyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One finished execution as its caller saw it."""

    example: str
    index: int
    seconds: float
    error: str | None


def drive(
    examples: Mapping[str, Path],
    schedule: Mapping[str, Arrivals],
    *,
    base_url: str,
    traces: Path,
    log: Path,
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Run every example's arrivals against the endpoint; the examples write their traces into `traces`.

    All examples start their clocks together, once each of them is loaded. Raises ScepsyError where one cannot be
    loaded or ends early.
    """
    environment = os.environ | {
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": "none",
        "SCEPSY_TRACES": str(traces),
        "PYTHONUNBUFFERED": "1",
    }
    outcomes: list[Outcome] = []
    lock = threading.Lock()
    children: dict[str, subprocess.Popen[str]] = {}
    with log.open("a", encoding="utf-8") as errors:
        try:
            for name, path in examples.items():
                children[name] = _start(path, environment, errors)
                arrivals = schedule[name]
                _write(children[name], json.dumps({"questions": arrivals.questions, "at_s": arrivals.at_s}))
            for name, child in children.items():
                if _read(child) != "ready":
                    raise ScepsyError(f"example {name!r} did not start; its output is in {log}")
            for child in children.values():
                _write(child, "go")

            def follow(name: str, child: subprocess.Popen[str]) -> None:
                while line := _read(child):
                    outcome = Outcome(example=name, **json.loads(line))
                    with lock:
                        outcomes.append(outcome)
                        on_outcome(outcome)

            followers = [threading.Thread(target=follow, args=item) for item in children.items()]
            for follower in followers:
                follower.start()
            for follower in followers:
                follower.join()
            for name, child in children.items():
                if child.wait(timeout=30) != 0:
                    raise ScepsyError(f"example {name!r} ended with {child.returncode}; its output is in {log}")
        finally:
            for child in children.values():
                child.kill()
                child.wait()
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        pipe.close()
    return outcomes


def _start(path: Path, environment: Mapping[str, str], errors: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scepsy.demo.load", str(path)],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


def _write(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None  # noqa: S101 - it was started with a pipe
    try:
        child.stdin.write(line + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        return  # it has ended: what follows reads that


def _read(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None  # noqa: S101 - it was started with a pipe
    return child.stdout.readline().strip()
