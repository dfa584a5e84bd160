"""Step times from measured kernels: aiconfigurator-core's tables of GEMM, attention and communication times.

Only its public facade is used: `EngineHandle` gives the time of one forward pass of a model on a GPU. What the library
is known to get wrong is not taken from it: memory (see memory.py) and the engine's host time.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from scepsy.profiling.checkpoint import Checkpoint, bundled_models
from scepsy.profiling.monotone import monotone
from scepsy.profiling.shape import ModelShape
from scepsy_optimizer.errors import ScepsyError

SYSTEMS: Mapping[str, str] = {
    "A100": "a100_sxm",
    "B200": "b200_sxm",
    "B300": "b300_sxm",
    "GB200": "gb200",
    "H100": "h100_sxm",
    "H200": "h200_sxm",
    "L40S": "l40s",
    "RTX_PRO_6000": "rtx_pro_6000_server",
}
"""aiconfigurator's name of each device type that it has measured with vLLM."""

INSTALL = "pip install 'scepsy[estimate]'"

_HEAD_DIMS = (64, 128)
"""Attention has been measured at these on every device."""

_BACKEND = "vllm"
_BACKEND_VERSION = "current"


class NotMeasuredError(ScepsyError):
    """The library has no measured kernels of a model on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Times of one forward pass at one tensor parallelism, in seconds: `decode_s[batch][context]`, `prefill_s`."""

    decode_s: tuple[tuple[float, ...], ...]
    prefill_s: tuple[float, ...]


def provenance_of(device_type: str) -> tuple[str, str]:
    """The library with its version, and the engine whose kernels it measured on the device.

    Raises ScepsyError where the library is missing.
    """
    installed = _import()
    versions = yaml.safe_load((_package() / "systems" / "query_versions.yaml").read_text(encoding="utf-8"))
    measured = {**versions["defaults"], **versions["overrides"].get(SYSTEMS[device_type], {})}
    return f"aiconfigurator-core {installed}", f"{_BACKEND} {measured[_BACKEND][_BACKEND_VERSION]}"


def measured_kernels(
    checkpoint: Checkpoint,
    shape: ModelShape,
    device_type: str,
    *,
    tensor_parallel_sizes: Sequence[int],
    batch_sizes: Sequence[int],
    context_tokens: Sequence[int],
    prefill_tokens: Sequence[int],
    quantization: str | None = None,
) -> dict[int, Kernels]:
    """Forward times by tensor parallelism; sizes that the model cannot be split into are left out.

    Raises ScepsyError where the library is missing, NotMeasuredError where it refuses the model at every size.
    """
    _import()
    found: dict[int, Kernels] = {}
    refusals: dict[int, str] = {}
    with _engine_model(checkpoint, shape) as model:
        for size in tensor_parallel_sizes:
            try:
                found[size] = _query(
                    model,
                    SYSTEMS[device_type],
                    shape,
                    size,
                    batch_sizes,
                    context_tokens,
                    prefill_tokens,
                    quantization,
                )
            except Exception as error:  # noqa: BLE001 - the library raises a dozen types for "not with this model"
                refusals[size] = f"{type(error).__name__}: {error}".splitlines()[0]
    if not found:
        size, reason = next(iter(refusals.items()))
        raise NotMeasuredError(
            f"aiconfigurator-core has no step times of {checkpoint.model!r} ({shape.architecture}) on {device_type} "
            f"at tensor_parallel_size {size}: {reason}"
        )
    return found


def _import() -> str:
    try:
        import aiconfigurator_core  # noqa: F401 - whether it can be imported is the question
    except ImportError as error:
        raise ScepsyError(f"estimating a profile needs aiconfigurator-core; install it with: {INSTALL}") from error
    return version("aiconfigurator-core")


def _package() -> Path:
    import aiconfigurator_core

    return Path(aiconfigurator_core.__file__).parent


def _query(
    model: str,
    system: str,
    shape: ModelShape,
    size: int,
    batch_sizes: Sequence[int],
    context_tokens: Sequence[int],
    prefill_tokens: Sequence[int],
    quantization: str | None,
) -> Kernels:
    from aiconfigurator_core.sdk import EngineHandle

    options: dict[str, Any] = {"tp_size": size, "gemm_quant_mode": quantization, "moe_quant_mode": quantization}
    if shape.experts:
        # vLLM splits every expert over the tensor-parallel group unless expert parallelism is asked for.
        options |= {"moe_tp_size": size, "moe_ep_size": 1}
    with _quiet():
        engine = EngineHandle.compile(model, system, _BACKEND, backend_version=_BACKEND_VERSION, **options)
        decode = [
            [engine.decode_step_latency(batch, context, 2) for context in context_tokens] for batch in batch_sizes
        ]
        prefill = [engine.predict_prefill_latency(1, tokens, 0) for tokens in prefill_tokens]
    return Kernels(
        decode_s=tuple(tuple(float(value) for value in row) for row in monotone(decode) / 1000),
        prefill_s=tuple(float(value) for value in monotone(prefill) / 1000),
    )


@contextmanager
def _engine_model(checkpoint: Checkpoint, shape: ModelShape) -> Iterator[str]:
    """The model as aiconfigurator takes it: the bundled id, or a directory with a configuration that it accepts."""
    if checkpoint.model in bundled_models():
        yield checkpoint.model
        return
    with tempfile.TemporaryDirectory(prefix="scepsy-") as folder:
        config = accepted_config(checkpoint.config, shape)
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


def maps_to_known(shape: ModelShape) -> bool:
    """Whether aiconfigurator knows the architecture, or another one that costs the same: every dense one has one.

    Raises ScepsyError where the library is missing.
    """
    _import()
    from aiconfigurator_core.sdk.common import ARCHITECTURE_TO_MODEL_FAMILY

    return not shape.experts or shape.architecture in ARCHITECTURE_TO_MODEL_FAMILY


def accepted_config(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """A configuration that aiconfigurator accepts and that costs the same, for a shape that `maps_to_known`.

    An architecture that it knows is kept. Any other dense one becomes a Llama of the same sizes: attention and MLP
    matrices, vocabulary and heads decide a step's time, not norms, rotary embeddings or activations. An MLP without
    gate has two matrices instead of three: its width shrinks by that third.
    """
    from aiconfigurator_core.sdk.common import ARCHITECTURE_TO_MODEL_FAMILY

    if shape.architecture in ARCHITECTURE_TO_MODEL_FAMILY:
        return dict(config)
    width = _head_dim(shape)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate if shape.gated else round(shape.intermediate * 2 / 3),
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads * shape.head_dim // width,
        "num_key_value_heads": shape.kv_heads * shape.head_dim // width,
        "head_dim": width,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_position,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": "bfloat16",
        **{key: config[key] for key in ("quantization_config",) if config.get(key)},
    }


def _head_dim(shape: ModelShape) -> int:
    """The shape's head dimension, or the nearest measured one that its heads can be cut into.

    Two heads of 128 cost what one of 256 does: the matrices, the keys and values and their products stay the same.
    """
    for width in (shape.head_dim, *sorted(_HEAD_DIMS, key=lambda width: abs(width - shape.head_dim))):
        cut = (shape.heads * shape.head_dim) % width == (shape.kv_heads * shape.head_dim) % width == 0
        if width in _HEAD_DIMS and cut:
            return width
    return shape.head_dim


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's notes on tables of other model families that it loads beside ours."""
    loggers = [logging.getLogger(name) for name in ("aiconfigurator_core", "aiconfigurator")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
