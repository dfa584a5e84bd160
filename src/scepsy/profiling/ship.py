"""Make the shipped profiles anew: `python -m scepsy.profiling.ship DATE`, with the extra `estimate` installed."""

from __future__ import annotations

import sys
from pathlib import Path

from scepsy.files import save_profile
from scepsy.profiling.estimating import estimate

MODELS = {
    "generator": "Qwen/Qwen3-8B",
    "verifier": "Qwen/Qwen3-1.7B",
    "reranker": "Qwen/Qwen3-0.6B",
    "writer": "Qwen/Qwen3-32B",
    "llama-3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Meta-Llama-3.1-70B",
}
"""Served names, and the models that stand behind them. The first four are what the demonstration calls."""

DEVICE_TYPES = ("H100",)


def ship(folder: Path, *, date: str) -> list[Path]:
    """Estimate every model on every device type into files of the folder; `date` is their provenance's."""
    paths = []
    for device_type in DEVICE_TYPES:
        for llm, model in MODELS.items():
            path = folder / f"{llm}_{device_type.lower()}.yaml"
            save_profile(estimate(model, device_type, llm=llm, date=date), path)
            paths.append(path)
    return paths


if __name__ == "__main__":
    ship(Path(__file__).parent / "profiles", date=sys.argv[1])
