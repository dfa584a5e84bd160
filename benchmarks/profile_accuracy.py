"""Estimated profiles against the measured serving points that ship with aiconfigurator-core, beside its own forecast.

The points are of vLLM under closed loops: a number of clients, mean lengths, and the mean time to first token (TTFT)
and per output token (TPOT) that they saw; end to end is TTFT + (output tokens - 1) TPOT. Dense models and gpt-oss,
aggregated serving. Then, from two points of each installation (model, GPU, tensor parallelism, engine version), one of
light and one of heavy load, the profile is calibrated and judged on the others of it.

Three constants of the estimate were read off these points: the host's time per step, before and after vLLM overlapped
it, and the time per request. Nothing else was fitted to them.
"""

from __future__ import annotations

import csv
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aiconfigurator_core
import numpy as np

from benchmarks.outcome import Bound, finish
from scepsy.profiling import estimate
from scepsy.profiling.calibrating import ServingPoint, calibrate
from scepsy.profiling.estimating import HOST_S
from scepsy.profiling.kernels import SYSTEMS
from scepsy.profiling.serving import Load, Response, predict_response
from scepsy_optimizer.profile import LLMProfile

MODELS = {
    "Qwen/Qwen3-32B": "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
    "openai/gpt-oss-120b": "openai/gpt-oss-120b",
}
"""Models of the table, and the id whose configuration is bundled."""

HOST_BEFORE_OVERLAP_S = 0.0022
"""Host time per step of engines before vLLM 0.14, which schedule between the steps of the device."""

DRAWS, SEED = 5, 1
METRICS = ("end to end", "TPOT", "TTFT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured point of an installation."""

    model: str
    device_type: str
    tensor_parallel_size: int
    quantization: str | None
    version: str
    load: Load
    measured: Response

    @property
    def installation(self) -> tuple[Any, ...]:
        """What one profile stands for."""
        return self.model, self.device_type, self.tensor_parallel_size, self.quantization, self.version

    @property
    def point(self) -> ServingPoint:
        """The row as something to calibrate by."""
        return ServingPoint(tensor_parallel_size=self.tensor_parallel_size, load=self.load, measured=self.measured)


def main() -> int:
    """Predict, calibrate, compare, judge."""
    logging.disable(logging.WARNING)
    rows, left_out = read_rows()
    print(f"{len(rows)} points of {len({row.installation for row in rows})} installations; left out:")
    for reason, count in sorted(left_out.items()):
        print(f"  {count:>4}  {reason}")
    ours = [predict_response(profile_of(row.installation), row.tensor_parallel_size, row.load) for row in rows]
    theirs = [library_response(row) for row in rows]
    tables = {
        "estimate": errors(rows, ours),
        "aiconfigurator run_agg": errors(rows, theirs),
        "two points fitted, light + heavy": calibrated_errors(rows, light_and_heavy),
        "two points fitted, any": calibrated_errors(rows, any_two),
    }
    print_tables(tables)
    print_by("GPU", rows, ours, lambda row: row.device_type)
    print_by("model", rows, ours, lambda row: row.model)
    print_by("engine", rows, ours, lambda row: row.version or "not named")
    median = {
        name: {metric: float(np.median(np.abs(found[metric]))) for metric in METRICS} for name, found in tables.items()
    }
    bounds = [
        Bound(name="end-to-end error, median", value=median["estimate"]["end to end"], at_most=0.08),
        Bound(
            name="end-to-end error, median, over the library's",
            value=median["estimate"]["end to end"] / median["aiconfigurator run_agg"]["end to end"],
            at_most=1.0,
        ),
        Bound(
            name="end-to-end error, median, two points fitted",
            value=median["two points fitted, light + heavy"]["end to end"],
            at_most=0.05,
        ),
    ]
    return finish("profile_accuracy", bounds, {"points": len(rows), "median": median})


def read_rows() -> tuple[list[Row], dict[str, int]]:
    """The points that count, and why how many others do not."""
    systems = {system: device for device, system in SYSTEMS.items()}
    path = Path(aiconfigurator_core.__file__).parent / "systems" / "silicon_sample.csv"
    rows: list[Row] = []
    left_out: dict[str, int] = defaultdict(int)
    seen: set[Row] = set()
    with path.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["backend"] != "vllm" or line["mode"] != "agg":
                continue
            reason = unusable(line)
            if reason is not None:
                left_out[reason] += 1
                continue
            row = _row(line, systems[line["system"]])
            if row in seen:
                left_out["listed twice, from two copies of one source"] += 1
                continue
            seen.add(row)
            rows.append(row)
    return rows, left_out


def _row(line: Mapping[str, str], device_type: str) -> Row:
    """A line of the table; its copies differ in the last digits."""
    # gpt-oss is quantised by its checkpoint.
    quantization = None if "gpt-oss" in line["model_path"] else line["gemm_quant_mode"] or None
    return Row(
        model=MODELS[line["model_path"]],
        device_type=device_type,
        tensor_parallel_size=int(line["tp_size"]),
        quantization=quantization,
        version=line["backend_version"],
        load=Load(input_tokens=int(line["isl"]), output_tokens=int(line["osl"]), concurrency=int(line["batch_size"])),
        measured=Response(
            first_token_s=round(float(line["silicon_ttft_ms"]) / 1000, 9),
            per_token_s=round(float(line["silicon_tpot_ms"]) / 1000, 9),
        ),
    )


def unusable(line: Mapping[str, str]) -> str | None:
    """Why a line of the table is not a point of ours; None if it is."""
    if line["model_path"] not in MODELS:
        return f"{line['model_path']}: not dense and not gpt-oss"
    if line["model_path"] == "nvidia/Llama-3.1-8B-Instruct-FP8":
        return f"{line['model_path']}: faster than the GPU's peak can compute the prompts, so they were cached"
    if line["model_path"] == "Qwen/Qwen3-32B" and line["gemm_quant_mode"] == "fp8":
        return f"{line['model_path']} in FP8: of the same source and the same fault"
    return None


@cache
def profile_of(installation: tuple[Any, ...]) -> LLMProfile:
    """The estimate; nothing of the measured points goes into it but the engine's version."""
    model, device_type, size, quantization, version = installation
    return estimate(
        model,
        device_type,
        tensor_parallel_sizes=(size,),
        quantization=quantization,
        max_num_seqs=1024,
        host_s=HOST_BEFORE_OVERLAP_S if version.startswith(("0.11.", "0.12.")) else HOST_S,
    )


@cache
def library_model(model: str, size: int, device_type: str, quantization: str | None) -> tuple[Any, Any, Any]:
    """The library's objects of one installation: its backend caches by lengths alone, so each has its own."""
    from aiconfigurator_core.sdk import models, perf_database
    from aiconfigurator_core.sdk.backends.factory import get_backend
    from aiconfigurator_core.sdk.config_builders import build_model_config

    config = build_model_config(
        tp_size=size,
        pp_size=1,
        attention_dp_size=1,
        moe_tp_size=size if "gpt-oss" in model else 1,
        moe_ep_size=1,
        gemm_quant_mode=quantization,
        kvcache_quant_mode=None,
        fmha_quant_mode=None,
        moe_quant_mode=quantization,
        comm_quant_mode=None,
        forward_model=None,
        attention_backend=None,
    )
    database = perf_database.get_database(SYSTEMS[device_type], "vllm", "current")
    return models.get_model(model, config, "vllm"), database, get_backend("vllm")


def library_response(row: Row) -> Response:
    """What aiconfigurator's own forecast of aggregated serving says."""
    from aiconfigurator_core.sdk.config import RuntimeConfig

    model, database, backend = library_model(row.model, row.tensor_parallel_size, row.device_type, row.quantization)
    tokens = int(row.load.input_tokens)
    asked = RuntimeConfig(batch_size=row.load.concurrency, isl=tokens, osl=int(row.load.output_tokens))
    found = backend.run_agg(model, database, asked, ctx_tokens=tokens).get_summary_df().iloc[0]
    return Response(first_token_s=float(found.ttft) / 1000, per_token_s=float(found.tpot) / 1000)


def errors(rows: Sequence[Row], predicted: Iterable[Response]) -> dict[str, list[float]]:
    """Relative errors, signed, by metric."""
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for row, guess in zip(rows, predicted, strict=True):
        tokens, seen = row.load.output_tokens, row.measured
        found["end to end"].append(guess.call_s(tokens) / seen.call_s(tokens) - 1)
        found["TPOT"].append(guess.per_token_s / seen.per_token_s - 1)
        found["TTFT"].append(guess.first_token_s / seen.first_token_s - 1)
    return found


def calibrated_errors(
    rows: Sequence[Row], choose: Callable[[Sequence[Row], random.Random], Sequence[int]]
) -> dict[str, list[float]]:
    """Errors on the points of each installation that its calibration did not see, over several choices of those."""
    rng = random.Random(SEED)
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.installation].append(row)
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for installation, group in groups.items():
        for _ in range(DRAWS if len(group) > 2 else 0):
            chosen = choose(group, rng)
            profile = calibrate(profile_of(installation), [group[index].point for index in chosen])
            rest = [row for index, row in enumerate(group) if index not in chosen]
            guesses = [predict_response(profile, row.tensor_parallel_size, row.load) for row in rest]
            for metric, values in errors(rest, guesses).items():
                found[metric] += values
    return found


def any_two(group: Sequence[Row], rng: random.Random) -> Sequence[int]:
    """Two points at random."""
    return rng.sample(range(len(group)), 2)


def light_and_heavy(group: Sequence[Row], rng: random.Random) -> Sequence[int]:
    """One point at random of the lower half of the concurrencies, one of the upper half."""
    ordered = sorted(range(len(group)), key=lambda index: (group[index].load.concurrency or 0, rng.random()))
    middle = len(ordered) // 2
    return rng.choice(ordered[:middle]), rng.choice(ordered[middle:])


def print_tables(tables: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Each forecast's errors."""
    head = f"{'metric':>11} {'points':>7} {'median':>7} {'mean':>7} {'p90':>7} {'bias':>7}"
    print(f"\n{'absolute relative error':32} {head}")
    for name, found in tables.items():
        for metric in METRICS:
            print(f"{name:32} {metric:>11} {figures(found[metric])}")


def print_by(what: str, rows: Sequence[Row], predicted: Sequence[Response], key: Any) -> None:
    """The estimate's end-to-end errors by a property of the points."""
    print(f"\nestimate, end to end, by {what}")
    for value in sorted({key(row) for row in rows}):
        chosen = [(row, guess) for row, guess in zip(rows, predicted, strict=True) if key(row) == value]
        found = errors([row for row, _ in chosen], [guess for _, guess in chosen])
        print(f"{value:44} {figures(found['end to end'])}")


def figures(values: Sequence[float]) -> str:
    """Number, median, mean, 90th percentile of the absolute values, and median of the signed ones."""
    size = np.abs(values)
    return (
        f"{len(values):>7} {np.median(size):>7.1%} {size.mean():>7.1%} {np.quantile(size, 0.9):>7.1%} "
        f"{np.median(values):>+7.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())
