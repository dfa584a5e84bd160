"""What a model's config.json says about its size: the numbers that decide its weights, its KV cache and its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scepsy_optimizer.errors import ScepsyError

# Bytes per parameter of quantised matrices, scales included: one scale per 32 (mxfp4), 16 (nvfp4) or 128 (int4) values.
_BYTES = {"fp8": 1.0, "int8": 1.0, "mxfp4": 0.53, "nvfp4": 0.57, "int4": 0.53}
_BF16_BYTES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a transformer with grouped-query attention, dense or with experts.

    `attention_layers` of the layers keep keys and values (all, if None; the others are recurrent), `latent` numbers of
    each token if attention is latent (MLA), shared by all heads. `gated` MLPs have three matrices, others two.
    `experts` is 0 for a dense model; `dense_layers` of a model with experts have a dense MLP instead. `linear_bytes`
    and `expert_bytes` are the bytes of one parameter of the attention and MLP matrices; embeddings are 16-bit always.
    `causal` is False for encoders, which keep no KV cache.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool
    max_position: int
    attention_layers: int | None = None
    latent: int = 0
    gated: bool = True
    causal: bool = True
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    dense_layers: int = 0
    linear_bytes: float = _BF16_BYTES
    expert_bytes: float = _BF16_BYTES
    kv_bytes: float = _BF16_BYTES

    @property
    def attention_parameters(self) -> int:
        """Of the query, key, value and output matrices of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Of one layer's dense MLP."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def expert_parameters(self) -> int:
        """Of one expert of one layer."""
        return 3 * self.hidden * self.expert_intermediate

    @property
    def embedding_parameters(self) -> int:
        """Of the token embedding and the output matrix, counted once where they are tied; an encoder has no output."""
        tables = 1 if self.tied_embeddings or not self.causal else 2
        return tables * self.vocab * self.hidden

    @property
    def expert_layers(self) -> int:
        """Layers whose MLP is a set of experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def parameters(self) -> int:
        """All of them, norms and biases apart."""
        return (
            self.embedding_parameters
            + self.layers * self.attention_parameters
            + (self.layers - self.expert_layers) * self.mlp_parameters
            + self.expert_layers * self.experts * (self.expert_parameters + self.hidden)
        )


def shape_of(config: Mapping[str, Any], *, quantization: str | None = None) -> ModelShape:
    """The shape that a config.json describes; `quantization` overrides the checkpoint's ("fp8", "int4", ...).

    Raises ScepsyError where sizes are missing, and for models whose layers are not of one size.
    """
    text = {**config, **config.get("text_config", {})}
    architecture = next(iter(config.get("architectures") or text.get("architectures") or ["unknown"]))
    if any(text.get(name) for name in _UNEVEN):
        raise ScepsyError(f"the layers of a {architecture} differ in size, which is not estimated; measure its profile")

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(text.get(name), int):
                return int(text[name])
        if default is None:
            raise ScepsyError(f"config.json of a {architecture}: {names[0]} is missing; it is needed for its size")
        return default

    hidden = size("hidden_size", "n_embd", "d_model", "dim")
    heads = size("num_attention_heads", "n_head", "n_heads")
    experts = size("num_experts", "num_local_experts", "n_routed_experts", default=0)
    intermediate = size("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", default=4 * hidden)
    layers = size("num_hidden_layers", "n_layer", "n_layers")
    linear_bytes, expert_bytes = _weight_bytes(text, quantization)
    return ModelShape(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // heads),
        intermediate=intermediate,
        vocab=size("vocab_size"),
        # Hugging Face leaves the key out where it is true, which is the default of every configuration class.
        tied_embeddings=bool(text.get("tie_word_embeddings", True)),
        max_position=size("max_position_embeddings", "n_positions", default=32768),
        attention_layers=_attention_layers(text),
        latent=size("kv_lora_rank", default=0) and size("kv_lora_rank") + size("qk_rope_head_dim", default=64),
        gated=is_gated(text),
        causal=not architecture.startswith(ENCODERS),
        experts=experts,
        experts_per_token=size("num_experts_per_tok", "experts_per_token", default=1) if experts else 0,
        expert_intermediate=size("moe_intermediate_size", default=intermediate) if experts else 0,
        dense_layers=_dense_layers(text, layers) if experts else 0,
        linear_bytes=linear_bytes,
        expert_bytes=expert_bytes,
    )


ENCODERS = (
    *("Bert", "Roberta", "XLMRoberta", "ModernBert", "DistilBert", "NewModel", "NomicBert"),
    *("Albert", "Deberta", "Electra", "Gte", "JinaRoberta"),
)
"""How the architectures of bidirectional encoders (embedders, rerankers) begin."""


def is_gated(text: Mapping[str, Any]) -> bool:
    """Whether the MLP has a gate: it has in all decoders of today; GPT-2-like ones and encoders name a plain GELU."""
    activation = str(text.get("hidden_act", text.get("activation_function", "silu")))
    plain = activation in {"gelu", "gelu_new", "relu", "gelu_fast", "gelu_python"}
    return not plain or str(text.get("model_type", "")).startswith(("gemma", "modernbert"))


_UNEVEN = ("block_configs", "hybrid_override_pattern", "layers_block_type", "routed_expert_hidden_size")
"""Keys of configurations whose layers are told one by one, or whose experts work in a space of another width."""


def _dense_layers(text: Mapping[str, Any], layers: int) -> int:
    """Layers without experts in a model that has some: the first few, or all but every n-th."""
    step = int(text.get("interleave_moe_layer_step") or 1)
    return int(text.get("first_k_dense_replace") or layers - layers // step)


def _attention_layers(text: Mapping[str, Any]) -> int | None:
    """Layers that keep keys and values in a model that mixes them with recurrent ones; None where all do."""
    kinds = text.get("layer_types")
    if not isinstance(kinds, list):
        return None
    return sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)


def _weight_bytes(text: Mapping[str, Any], quantization: str | None) -> tuple[float, float]:
    """Bytes per parameter of the linear and of the expert matrices."""
    found = quantization or _quantization(text.get("quantization_config") or {})
    if found is None:
        return _BF16_BYTES, _BF16_BYTES
    if found not in _BYTES:
        raise ScepsyError(f"quantization {found!r} is not known; known: {', '.join(sorted(_BYTES))}")
    # MXFP4 checkpoints (gpt-oss) quantise the experts alone.
    return (_BF16_BYTES if found == "mxfp4" else _BYTES[found]), _BYTES[found]


def _quantization(config: Mapping[str, Any]) -> str | None:
    method = str(config.get("quant_method", "")).lower()
    algorithm = str(config.get("quant_algo", "")).lower()
    if method in {"awq", "gptq", "awq_marlin", "gptq_marlin"}:
        return "int4" if int(config.get("bits", 4)) == 4 else "int8"
    if method == "compressed-tensors":
        groups = list((config.get("config_groups") or {}).values())
        weights = (groups[0].get("weights") or {}) if groups else {}
        bits, kind = int(weights.get("num_bits", 8)), str(weights.get("type", "float"))
        if bits == 4:
            return "nvfp4" if kind == "float" else "int4"
        return "fp8" if kind == "float" else "int8"
    for name in ("nvfp4", "mxfp4", "fp8"):
        if name in (method, algorithm):
            return name
    return None
