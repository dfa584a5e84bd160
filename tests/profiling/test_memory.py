"""The memory model against what vLLM was seen to take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scepsy.profiling.checkpoint import find_checkpoint
from scepsy.profiling.memory import kv_bytes_per_token, overhead_gib, weights_gib
from scepsy.profiling.shape import ModelShape, shape_of

# Weights in GiB per device as vLLM logged them on H100 (llm-d's table of measured memory), and the KV cache per token.
MEASURED = [
    ("Qwen/Qwen3-0.6B", 1, 1.12, 0.02),
    ("meta-llama/Meta-Llama-3.1-8B", 1, 14.99, 0.02),
    ("nvidia/Llama-3.1-70B-Instruct-FP8", 2, 33.88, 0.02),
    # Its experts are padded to a multiple of the kernels' tile.
    ("openai/gpt-oss-20b", 1, 13.47, 0.06),
    ("openai/gpt-oss-120b", 1, 64.38, 0.07),
]


@pytest.mark.parametrize(("model", "size", "gib", "tolerance"), MEASURED)
def test_weights_as_vllm_logged_them(model, size, gib, tolerance):
    shape = shape_of(find_checkpoint(model).config)
    assert weights_gib(shape, size) == pytest.approx(gib, rel=tolerance)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-8B", 8.19),
        ("Qwen/Qwen3-32B", 32.8),
        ("meta-llama/Meta-Llama-3.1-70B", 70.6),
        ("Qwen/Qwen3-30B-A3B", 30.5),
        ("mistralai/Mixtral-8x7B-v0.1", 46.7),
        ("deepseek-ai/DeepSeek-V3", 671),
        ("moonshotai/Kimi-K2-Instruct", 1030),
        ("Qwen/Qwen3-Coder-480B-A35B-Instruct", 480),
    ],
)
def test_parameters_as_published(model, billions):
    assert shape_of(find_checkpoint(model).config).parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_kv_cache_of_a_token_in_closed_form():
    shape = shape_of(find_checkpoint("Qwen/Qwen3-8B").config)
    assert kv_bytes_per_token(shape, 1) == 2 * 36 * 8 * 128 * 2
    assert kv_bytes_per_token(shape, 8) == kv_bytes_per_token(shape, 1) / 8
    # There are 8 heads: beyond that they are copied.
    assert kv_bytes_per_token(shape, 16) == kv_bytes_per_token(shape, 8)


def test_latent_attention_keeps_one_vector_per_layer_on_every_device():
    shape = shape_of(find_checkpoint("deepseek-ai/DeepSeek-V3").config)
    assert kv_bytes_per_token(shape, 1) == kv_bytes_per_token(shape, 8) == 61 * (512 + 64) * 2


def test_recurrent_layers_keep_no_keys():
    shape = shape_of(find_checkpoint("Qwen/Qwen3.5-27B").config)
    assert (shape.layers, shape.attention_layers) == (64, 16)
    assert kv_bytes_per_token(shape, 1) == 2 * 16 * 4 * 256 * 2


# Peak activations in GiB that the llm-d planner lists for vLLM 0.19 on H100, where 1,024 sequences are the default.
@pytest.mark.parametrize(
    ("vocab", "gib"),
    [(128256, 1.89), (151936, 2.21), (49159, 0.85), (256000, 3.65)],
    ids=["llama", "qwen", "granite", "gemma"],
)
def test_overhead_follows_the_vocabulary(vocab, gib):
    shape = make_shape(vocab=vocab)
    taken = overhead_gib(shape, 1, max_num_seqs=1024, max_num_batched_tokens=8192)
    outside = 0.27 + 0.3
    assert taken - outside == pytest.approx(gib, rel=0.05)


def make_shape(**changes):
    sizes = {
        "architecture": "LlamaForCausalLM",
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "intermediate": 12288,
        "vocab": 128256,
        "tied_embeddings": False,
        "max_position": 8192,
    }
    return ModelShape(**(sizes | changes))


def test_tied_embeddings_count_once():
    apart, tied = make_shape(), make_shape(tied_embeddings=True)
    assert apart.parameters - tied.parameters == 128256 * 4096


def test_an_encoder_keeps_no_keys():
    shape = make_shape(causal=False)
    assert kv_bytes_per_token(shape, 1) == 1
    assert overhead_gib(shape, 1, max_num_seqs=256, max_num_batched_tokens=8192) < 2


@given(
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    layers=st.integers(1, 80),
    experts=st.sampled_from([0, 8, 128]),
    size=st.sampled_from([1, 2, 4, 8]),
)
def test_devices_never_hold_less_together_than_one_alone(kv_heads, layers, experts, size):
    shape = make_shape(kv_heads=kv_heads, layers=layers, experts=experts, expert_intermediate=768 if experts else 0)
    assert size * weights_gib(shape, size) >= weights_gib(shape, 1) * (1 - 1e-9)
    assert weights_gib(shape, size) <= weights_gib(shape, 1)
    assert size * kv_bytes_per_token(shape, size) >= kv_bytes_per_token(shape, 1)
