import json

import pytest

from scepsy.profiling.checkpoint import bundled_models, find_checkpoint
from scepsy.profiling.shape import shape_of
from scepsy_optimizer.errors import ScepsyError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def test_reads_a_dense_model():
    shape = shape_of(LLAMA)
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.head_dim) == (16, 2048, 8, 64)
    assert shape.gated
    assert shape.causal
    assert shape.linear_bytes == 2
    assert shape.parameters / 1e9 == pytest.approx(1.236, rel=0.001)


def test_reads_the_text_part_of_a_multimodal_model():
    nested = {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": LLAMA}
    assert shape_of(nested).layers == 16


def test_reads_an_encoder():
    bert = {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 250002,
        "max_position_embeddings": 8194,
        "hidden_act": "gelu",
    }
    shape = shape_of(bert)
    assert not shape.causal
    assert not shape.gated
    # Published: 568 million with positions and norms.
    assert shape.parameters / 1e6 == pytest.approx(558, rel=0.01)


@pytest.mark.parametrize(
    ("quantization_config", "linear", "expert"),
    [
        ({"quant_method": "fp8"}, 1.0, 1.0),
        ({"quant_method": "awq", "bits": 4}, 0.53, 0.53),
        ({"quant_method": "gptq", "bits": 8}, 1.0, 1.0),
        ({"quant_method": "mxfp4"}, 2.0, 0.53),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 0.57, 0.57),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            0.53,
            0.53,
        ),
        (None, 2.0, 2.0),
    ],
)
def test_bytes_of_quantised_weights(quantization_config, linear, expert):
    shape = shape_of({**LLAMA, "quantization_config": quantization_config})
    assert (shape.linear_bytes, shape.expert_bytes) == (linear, expert)


def test_the_callers_quantization_goes_first():
    assert shape_of(LLAMA, quantization="fp8").linear_bytes == 1.0
    with pytest.raises(ScepsyError, match="known: fp8, int4"):
        shape_of(LLAMA, quantization="fp7")


def test_a_configuration_without_sizes_names_what_is_missing():
    with pytest.raises(ScepsyError, match="num_hidden_layers is missing"):
        shape_of({key: value for key, value in LLAMA.items() if key != "num_hidden_layers"})


@pytest.mark.parametrize("model", ["nvidia/Llama-3_3-Nemotron-Super-49B-v1", "nvidia/Nemotron-H-56B-Base-8K"])
def test_layers_of_different_sizes_are_refused(model):
    with pytest.raises(ScepsyError, match="layers of a .* differ in size.*measure its profile"):
        shape_of(find_checkpoint(model).config)


def test_finds_a_directory_with_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 50)
    found = find_checkpoint(str(tmp_path))
    assert found.config == LLAMA
    assert found.weights_bytes == 150


def test_merges_modelopts_own_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert shape_of(find_checkpoint(str(tmp_path)).config).linear_bytes == 1.0


def test_finds_the_newest_snapshot_of_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    assert find_checkpoint("someone/model").config == LLAMA


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such/model", "no such directory"),
        ("Qwen/Qwen3-8b", "HF_HUB_OFFLINE is set.*Qwen/Qwen3-8B"),
    ],
)
def test_an_unknown_model_is_one_clear_error(model, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ScepsyError, match=message):
        find_checkpoint(model)


def test_a_broken_configuration_names_its_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ScepsyError, match=r"config\.json: cannot be read as JSON"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ScepsyError, match=r"has no config\.json"):
        find_checkpoint(str(tmp_path))


def test_the_bundle_has_what_is_shipped():
    assert {"Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3.1-70B", "openai/gpt-oss-20b"} <= bundled_models().keys()
