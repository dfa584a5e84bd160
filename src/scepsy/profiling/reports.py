"""Measured points from the reports of load generators: `vllm bench serve`, guidellm and aiperf.

All three give means of prompt and answer lengths, time to first token and time per token after it, and how the load was
made. A load that was sent at a rate becomes an open loop at the rate that was reached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scepsy.profiling.calibrating import ServingPoint
from scepsy.profiling.serving import Load, Response
from scepsy_optimizer.errors import ScepsyError


def read_points(path: str | Path, *, tensor_parallel_size: int) -> list[ServingPoint]:
    """The points of a report about one replica of that tensor parallelism, to calibrate a profile by.

    Reads the JSON of `vllm bench serve --save-result`, of guidellm (benchmarks.json) and of aiperf
    (profile_export_aiperf.json). Runs without a clear load (all at once, a trace) are passed over. Raises ScepsyError
    for another file, and for one without any point.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScepsyError(f"{path}: cannot be read as JSON: {error}") from error
    try:
        points = list(_points(content))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ScepsyError(f"{path}: not a report that can be read: {type(error).__name__}: {error}") from error
    if not points:
        raise ScepsyError(
            f"{path}: no run with a rate or a concurrency in it; expected the JSON of "
            "`vllm bench serve --save-result`, guidellm or aiperf"
        )
    return [
        ServingPoint(tensor_parallel_size=tensor_parallel_size, load=load, measured=measured)
        for load, measured in points
    ]


def _points(content: Any) -> Iterator[tuple[Load, Response]]:
    if not isinstance(content, Mapping):
        return
    if "mean_ttft_ms" in content:
        found = [_vllm_bench(content)]
    elif isinstance(content.get("benchmarks"), list):
        found = [_guidellm(run) for run in content["benchmarks"]]
    elif "time_to_first_token" in content:
        found = [_aiperf(content)]
    else:
        return
    yield from (point for point in found if point is not None)


def _vllm_bench(run: Mapping[str, Any]) -> tuple[Load, Response] | None:
    requests = run["completed"]
    rate, clients = run.get("request_rate"), run.get("max_concurrency")
    paced = rate not in (None, "inf")
    load = _load(
        run["total_input_tokens"] / requests,
        run["total_output_tokens"] / requests,
        rate_rps=run["request_throughput"] if paced else None,
        concurrency=None if paced else clients,
        requests=requests,
    )
    return None if load is None else (load, _response(run["mean_ttft_ms"], run["mean_tpot_ms"]))


def _guidellm(run: Mapping[str, Any]) -> tuple[Load, Response] | None:
    metrics, strategy = run["metrics"], run["config"]["strategy"]

    def mean(name: str) -> float:
        return float(metrics[name]["successful"]["mean"])

    kind = strategy["type_"]
    load = _load(
        mean("prompt_token_count"),
        mean("output_token_count"),
        rate_rps=mean("requests_per_second") if kind in {"constant", "poisson"} else None,
        concurrency={"synchronous": 1, "concurrent": strategy.get("streams")}.get(kind),
        requests=metrics["request_totals"]["successful"],
    )
    return None if load is None else (load, _response(mean("time_to_first_token_ms"), mean("inter_token_latency_ms")))


def _aiperf(run: Mapping[str, Any]) -> tuple[Load, Response] | None:
    def mean(name: str, unit: str) -> float:
        metric = run[name]
        if metric["unit"] != unit:
            raise ValueError(f"{name} is in {metric['unit']}, not in {unit}")
        return float(metric["avg"])

    phases = run.get("input_config") or {}
    paced = _find(phases, ("rate", "request_rate")) is not None
    load = _load(
        mean("input_sequence_length", "tokens"),
        mean("output_sequence_length", "tokens"),
        rate_rps=mean("request_throughput", "requests/sec") if paced else None,
        concurrency=None if paced else _find(phases, ("concurrency",)),
        requests=run["request_count"]["avg"],
    )
    return (
        None
        if load is None
        else (load, _response(mean("time_to_first_token", "ms"), mean("inter_token_latency", "ms")))
    )


def _load(
    input_tokens: float, output_tokens: float, *, rate_rps: float | None, concurrency: Any, requests: float
) -> Load | None:
    if rate_rps is not None:
        return Load(input_tokens=input_tokens, output_tokens=output_tokens, rate_rps=rate_rps)
    if not concurrency:
        return None
    return Load(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=int(concurrency),
        waves=max(1.0, requests / int(concurrency)),
    )


def _response(first_token_ms: float, per_token_ms: float) -> Response:
    return Response(first_token_s=first_token_ms / 1000, per_token_s=per_token_ms / 1000)


def _find(value: Any, names: tuple[str, ...]) -> Any:
    """The first number under one of the names, anywhere in nested values."""
    if isinstance(value, Mapping):
        for name in names:
            if isinstance(value.get(name), int | float) and value[name]:
                return value[name]
        children: Any = value.values()
    elif isinstance(value, list):
        children = value
    else:
        return None
    return next((found for child in children if (found := _find(child, names)) is not None), None)
