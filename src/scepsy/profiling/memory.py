"""How much device memory a replica needs: weights, KV cache per token, and what the engine takes besides.

The constants of the overhead reproduce the peak-activation and non-torch memory that the llm-d planner publishes for
vLLM 0.19 on H100 (Llama 1.89 GiB, Qwen3 2.21, Granite 0.85, Gemma 2 3.65, at 1024 sequences): what grows in that table
is the vocabulary, because the largest allocation of vLLM's memory profiling is the sampler's, about 14 bytes per
sequence and vocabulary entry. It scales with `max_num_seqs`, so it must not be taken as a constant.
"""

from __future__ import annotations

from scepsy.profiling.shape import ModelShape
from scepsy_optimizer.profile import GIB

_SAMPLER_BYTES = 14
_ACTIVATION_BASE_GIB = 0.2
_CUDA_GRAPHS_GIB = 0.3
# CUDA context and library workspaces; with tensor parallelism also the buffers of NCCL and of custom all-reduce.
_NON_TORCH_GIB = 0.27
_NON_TORCH_PARALLEL_GIB = 2.1


def weights_gib(shape: ModelShape, tensor_parallel_size: int) -> float:
    """Weights on one device. Key and value heads are replicated where there are fewer of them than devices."""
    shared = max(1.0, tensor_parallel_size / shape.kv_heads)
    keys_and_values = 2 * shape.hidden * shape.head_dim * shape.kv_heads
    attention = shape.attention_parameters + (shared - 1) * keys_and_values
    linear = shape.layers * attention + (shape.layers - shape.expert_layers) * shape.mlp_parameters
    experts = shape.expert_layers * shape.experts * shape.expert_parameters
    split = linear * shape.linear_bytes + experts * shape.expert_bytes + shape.embedding_parameters * 2.0
    routers = shape.expert_layers * shape.experts * shape.hidden * 2.0
    return (split / tensor_parallel_size + routers) / GIB


def kv_bytes_per_token(shape: ModelShape, tensor_parallel_size: int) -> float:
    """Keys and values of one token on one device; a device holds at least one head, or all of a latent.

    An encoder keeps none: it is given one byte, so that its memory never limits its batch.
    """
    if not shape.causal:
        return 1.0
    layers = shape.layers if shape.attention_layers is None else max(1, shape.attention_layers)
    if shape.latent:
        return layers * shape.latent * shape.kv_bytes
    heads = max(1.0, shape.kv_heads / tensor_parallel_size)
    return 2 * layers * heads * shape.head_dim * shape.kv_bytes


def overhead_gib(
    shape: ModelShape, tensor_parallel_size: int, *, max_num_seqs: int, max_num_batched_tokens: int
) -> float:
    """What vLLM takes on one device beside weights and KV cache.

    The larger of the sampler's and of an MLP's working memory, as its memory profiling finds it, plus CUDA graphs, the
    CUDA context, and NCCL's buffers where devices work together.
    """
    sampler = _SAMPLER_BYTES * max_num_seqs * shape.vocab if shape.causal else 0
    width = max(shape.intermediate, shape.experts_per_token * shape.expert_intermediate)
    mlp = max_num_batched_tokens * (3 * width / tensor_parallel_size + 2 * shape.hidden) * 2
    non_torch = _NON_TORCH_GIB if tensor_parallel_size == 1 else _NON_TORCH_PARALLEL_GIB
    return max(sampler, mlp) / GIB + _ACTIVATION_BASE_GIB + _CUDA_GRAPHS_GIB + non_torch
