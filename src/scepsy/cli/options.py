"""Options that several commands share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Literal

from scepsy_optimizer.errors import ScepsyError


def add_traces(parser: argparse.ArgumentParser) -> None:
    """The traces to read."""
    parser.add_argument("traces", nargs="+", metavar="TRACES", help="trace files, or directories of them")


def add_json(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """For programs: one JSON object on standard output, or one per line; what is for people goes to standard error."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead of tables")


def add_profiles(parser: argparse.ArgumentParser) -> None:
    """Where profiles come from."""
    parser.add_argument("--profiles", nargs="+", metavar="PATH", help="profile files, or directories of them")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="LLM=MODEL",
        help="estimate LLM's profile from MODEL, a Hugging Face id or directory (needs scepsy[estimate])",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What to start, and where."""
    parser.add_argument("--engine", choices=("vllm", "vllm-cpu", "emulator"), default="vllm", help="default: vllm")
    parser.add_argument(
        "--command",
        dest="engine_command",
        metavar="WORDS",
        help='how to start one engine, such as "python -m vllm.entrypoints.openai.api_server"',
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of the endpoint (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=8000, help="port of the endpoint (default: 8000)")
    parser.add_argument("--name", default="default", help="name of the deployment (default: default)")


def parse_models(pairs: Sequence[str]) -> Mapping[str, str]:
    """LLM=MODEL pairs as a mapping. Raises ScepsyError."""
    models = {}
    for pair in pairs:
        llm, equals, model = pair.partition("=")
        if not (llm and equals and model):
            raise ScepsyError(f"--model {pair!r}: write LLM=MODEL, such as generator=Qwen/Qwen3-8B")
        models[llm] = model
    return models


def parse_command(words: str | None) -> list[str] | None:
    """An engine command as a list of words. Raises ScepsyError."""
    if words is None:
        return None
    try:
        command = shlex.split(words)
    except ValueError as error:
        raise ScepsyError(f"--command {words!r}: {error}; write it as in a shell, such as 'vllm serve'") from error
    if not command:
        raise ScepsyError("--command: is empty; name a program, such as 'vllm serve', or leave it out")
    return command


def port(text: str) -> int:
    """A TCP port, as the type of an argument; 0 takes a free one."""
    if not (text.isdecimal() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 1 to 65535, or 0 for a free one")
    return int(text)


def parse_rates(texts: Sequence[str]) -> float | Literal["max"] | Mapping[str, float]:
    """One rate for all workflows as traced, WORKFLOW=RATE for each, or "max". Raises ScepsyError."""
    if list(texts) == ["max"]:
        return "max"
    rates = {}
    for text in texts:
        workflow, _, number = text.rpartition("=")
        try:
            rates[workflow] = float(number)
        except ValueError as error:
            raise ScepsyError(f"--rate {text!r}: write a number, WORKFLOW=NUMBER for each, or max") from error
    if len(rates) != len(texts) or ("" in rates and len(rates) > 1):
        raise ScepsyError(f"--rate {' '.join(texts)}: give one rate for all, or one for each workflow")
    return rates.get("", rates)


def parse_numbers(option: str, pairs: Sequence[str]) -> dict[str, float]:
    """NAME=NUMBER pairs of an option as a mapping. Raises ScepsyError."""
    numbers = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        try:
            numbers[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise ScepsyError(f"{option} {pair!r}: write WORKFLOW=NUMBER")
    return numbers
