"""Estimates: the tables of aiconfigurator-core through our interface."""

import json
import sys

import pytest

from scepsy.files import load_profile, save_profile
from scepsy.profiling import estimate, shipped_profiles
from scepsy.profiling.kernels import accepted_config
from scepsy.profiling.shape import shape_of
from scepsy.profiling.ship import MODELS, ship
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import StepClock


@pytest.fixture(scope="module")
def generator():
    return estimate("Qwen/Qwen3-8B", "h100", llm="generator", date="2026-01-01")


def test_says_what_it_is_and_where_it_comes_from(generator):
    assert (generator.llm, generator.model, generator.device_type) == ("generator", "Qwen/Qwen3-8B", "H100")
    assert generator.provenance.source == "estimate"
    assert generator.provenance.tool.startswith("aiconfigurator-core 0.12")
    assert generator.provenance.engine == "vllm 0.24.0"
    assert generator.provenance.date == "2026-01-01"


def test_times_are_the_librarys(generator):
    # Published in its documentation's units, milliseconds, for Qwen3-8B on H100 with vLLM.
    clock = StepClock(generator, 1, 1.0)
    assert clock.prefill_s(2048) * 1000 == pytest.approx(44.5, rel=0.01)
    for batch, ms in ((1, 6.36), (32, 8.74), (128, 13.55)):
        assert clock.decode_s(batch, 1024) * 1000 == pytest.approx(ms, rel=0.02)


def test_devices_together_are_faster_but_not_in_proportion(generator):
    for slower, faster in ((1, 2), (2, 4), (4, 8)):
        one, two = StepClock(generator, slower, 1.0), StepClock(generator, faster, 1.0)
        for step in ((64, 2000.0, 0), (0, 0.0, 4096)):
            assert one.step_s(*step) / 2 < two.step_s(*step) < one.step_s(*step)


def test_memory_decides_what_fits(generator):
    assert generator.kv_tokens(1, 1.0) == pytest.approx(410_000, rel=0.02)
    assert generator.kv_tokens(1, 0.5) > 100_000
    assert generator.kv_tokens(1, 0.2) == 0
    reranker = estimate("Qwen/Qwen3-0.6B", "H100", tensor_parallel_sizes=(1,))
    assert reranker.kv_tokens(1, 0.1) > 30_000


def test_leaves_out_sizes_that_heads_cannot_be_split_into():
    profile = estimate("Qwen/Qwen3-8B", "H100", tensor_parallel_sizes=(1, 3, 64))
    assert [steps.tensor_parallel_size for steps in profile.steps] == [1]


def test_every_table_is_monotone_where_the_library_is_not():
    # Its times of this model fall from 32 to 128 sequences at 8 devices.
    steps = estimate("Qwen/Qwen3-8B", "B200", tensor_parallel_sizes=(8,)).at(8)
    columns = list(zip(*steps.decode_s, strict=True))
    assert all(list(column) == sorted(column) for column in columns)


def test_limits_of_the_caller_and_of_the_model():
    profile = estimate(
        "Qwen/Qwen3-8B", "H100", tensor_parallel_sizes=(1,), max_model_len=100_000, max_num_seqs=64, quantization="fp8"
    )
    assert profile.llm == "Qwen/Qwen3-8B"
    assert profile.max_model_len == 40960
    assert profile.at(1).batch_sizes[-1] == 64
    assert profile.at(1).weights_gib == pytest.approx(8.8, rel=0.02)


def test_a_directory_of_another_architecture_is_estimated_as_a_llama(tmp_path):
    # Mistral 7B.
    config = {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    mistral = estimate(str(tmp_path), "H100", tensor_parallel_sizes=(1,))
    llama = estimate("meta-llama/Meta-Llama-3.1-8B", "H100", tensor_parallel_sizes=(1,))
    assert mistral.at(1) == llama.at(1)


REFUSED = {
    # Architectures that the library does not know, with the weights that are published for them, in GiB of 16 bits.
    "Phi-3-mini": (
        {"architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096}
        | {"tie_word_embeddings": False, "hidden_act": "silu"},
        7.12,
    ),
    "Gemma-2-9b": (
        {"architectures": ["Gemma2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 14336, "head_dim": 256}
        | {"num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 256000}
        | {"max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh", "model_type": "gemma2"},
        17.2,
    ),
    "Qwen3-Reranker-0.6B": (
        {"architectures": ["Qwen3ForSequenceClassification"], "hidden_size": 1024, "intermediate_size": 3072}
        | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
        | {"vocab_size": 151669, "max_position_embeddings": 40960, "tie_word_embeddings": True},
        1.11,
    ),
    "bge-reranker-v2-m3": (
        {"architectures": ["XLMRobertaForSequenceClassification"], "hidden_size": 1024, "intermediate_size": 4096}
        | {"num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 250002, "max_position_embeddings": 8194}
        | {"hidden_act": "gelu"},
        1.06,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_the_library_refuses(name, tmp_path):
    config, published_gib = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    kernels, data_sheet = (estimate(str(tmp_path), device, tensor_parallel_sizes=(1,)) for device in ("H100", "L4"))
    # No attention with 8 key heads of 256, nor with 16 of 128, has been measured.
    assert ("roofline" if name.startswith("Gemma") else "aiconfigurator") in kernels.provenance.tool
    assert "roofline" in data_sheet.provenance.tool
    for profile in (kernels, data_sheet):
        assert profile.at(1).weights_gib == pytest.approx(published_gib, rel=0.03)
        assert profile.max_model_len == min(32768, config["max_position_embeddings"])
    # An encoder keeps no keys and values, so that contexts cost it nothing.
    assert (kernels.at(1).kv_bytes_per_token == 1.0) == name.startswith("bge")


def test_the_tables_reach_as_far_as_the_model(tmp_path):
    config = REFUSED["Qwen3-Reranker-0.6B"][0] | {"max_position_embeddings": 100_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for device in ("H100", "A30"):
        profile = estimate(str(tmp_path), device, tensor_parallel_sizes=(1,), max_model_len=131072)
        assert profile.max_model_len == 100_000
        assert profile.at(1).context_tokens[-2:] == (65536, 131072)
        assert profile.at(1).prefill_tokens[-2:] == (65536, 131072)
        # Attention makes a prompt of double length cost more than double.
        assert profile.at(1).prefill_s[-1] > 2.5 * profile.at(1).prefill_s[-2]


def test_an_ungated_mlp_becomes_a_narrower_gated_one():
    config = {
        "architectures": ["BertModel"],
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
    }
    shape = shape_of(config)
    accepted = shape_of(accepted_config(config, shape))
    assert accepted.mlp_parameters == shape.mlp_parameters
    assert accepted.attention_parameters == shape.attention_parameters


def test_an_unknown_architecture_with_experts_is_estimated_from_data_sheets(tmp_path):
    config = {
        "architectures": ["UnheardOfMoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    profile = estimate(str(tmp_path), "H100")
    assert "roofline" in profile.provenance.tool
    assert "data sheets" in profile.provenance.note
    assert [steps.tensor_parallel_size for steps in profile.steps] == [1, 2, 4, 8]


def test_a_device_without_measured_kernels_is_estimated_from_its_data_sheet():
    small, large = (estimate("Qwen/Qwen3-8B", device, tensor_parallel_sizes=(1,)) for device in ("L4", "H100"))
    assert "roofline" in small.provenance.tool
    assert "aiconfigurator" in large.provenance.tool
    # A tenth of the bandwidth, an eighth of the arithmetic.
    slow, fast = StepClock(small, 1, 1.0), StepClock(large, 1, 1.0)
    assert slow.decode_s(1, 256) / fast.decode_s(1, 256) == pytest.approx(3350 / 300, rel=0.15)
    assert slow.prefill_s(2048) / fast.prefill_s(2048) == pytest.approx(989 / 121, rel=0.15)


def test_a_method_that_a_device_does_not_have():
    with pytest.raises(ScepsyError, match="no kernels of L4: it has roofline"):
        estimate("Qwen/Qwen3-8B", "L4", method="kernels")


def test_answers_are_kept_on_disk_per_question(tmp_path, monkeypatch):
    monkeypatch.setenv("SCEPSY_CACHE", str(tmp_path))
    first = estimate("Qwen/Qwen3-0.6B", "H100", tensor_parallel_sizes=(1,))
    (file,) = (tmp_path / "estimates").iterdir()
    # What is read is the file's content, whatever name is asked for.
    file.write_text(file.read_text().replace("overhead_gib: ", "overhead_gib: 1"))
    again = estimate("Qwen/Qwen3-0.6B", "H100", llm="reranker", tensor_parallel_sizes=(1,))
    assert again.llm == "reranker"
    assert again.at(1).overhead_gib == pytest.approx(first.at(1).overhead_gib + 10)
    assert estimate("Qwen/Qwen3-0.6B", "H100", tensor_parallel_sizes=(1,), max_num_seqs=8).at(1).overhead_gib < 2
    file.write_text("broken")
    assert estimate("Qwen/Qwen3-0.6B", "H100", tensor_parallel_sizes=(1,)) == first


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCEPSY_CACHE", str(tmp_path / "file"))
    assert estimate("Qwen/Qwen3-0.6B", "H100", tensor_parallel_sizes=(1,)).llm == "Qwen/Qwen3-0.6B"


def test_unknown_devices_list_the_known():
    with pytest.raises(ScepsyError, match=r"'H10' cannot be estimated; known: A100, .*H200.*L4.*Did you mean H100\?"):
        estimate("Qwen/Qwen3-8B", "H10")


def test_a_missing_library_is_told_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    with pytest.raises(ScepsyError, match=r"pip install 'scepsy\[estimate\]'"):
        estimate("Qwen/Qwen3-8B", "H100")


def test_shipped_profiles_are_what_the_demonstration_calls():
    shipped = shipped_profiles("H100")
    assert {llm: profile.model for llm, profile in shipped.items()} == MODELS
    assert {"generator", "verifier", "reranker", "writer"} <= shipped.keys()
    assert shipped_profiles("L40S") == {}


def test_shipped_files_are_what_the_estimate_gives_today(tmp_path, generator):
    date = shipped_profiles("H100")["generator"].provenance.date
    paths = ship(tmp_path, date=date)
    made = {profile.llm: profile for profile in map(load_profile, paths)}
    assert made == shipped_profiles("H100")


def test_a_profile_survives_its_file(tmp_path, generator):
    save_profile(generator, tmp_path / "p.yaml")
    assert load_profile(tmp_path / "p.yaml") == generator
