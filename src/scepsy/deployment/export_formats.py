"""The formats of others that a plan is exported to, and what they say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "litellm": "LiteLLM's model_list with the replicas' addresses and weights; routing is to be least-busy",
    "smg": "SMG's discovery file: the replicas' addresses; it asks them for their models",
    "ray-serve": "LLMConfigs for ray.serve.llm, one for each group of replicas; Ray Serve places them as it likes",
    "production-stack": "values of its chart: models, replicas, tensor parallelism, nodes, fractions as HAMi's",
}
