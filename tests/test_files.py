"""Files come back as they were written; a file that does not fit is one error that names the place."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

import scepsy.profiling
from scepsy.files import load_cluster, load_plan, load_profile, save_cluster, save_plan, save_profile
from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.profile import LLMProfile, Provenance, StepTimes


@pytest.fixture
def profile():
    steps = StepTimes(
        tensor_parallel_size=1,
        batch_sizes=(1, 32),
        context_tokens=(256, 1024),
        decode_s=((0.006, 0.0063), (0.008, 0.0087)),
        prefill_tokens=(16, 2048),
        prefill_s=(0.006, 0.0445),
        weights_gib=15.3,
        overhead_gib=1.5,
        kv_bytes_per_token=147456.0,
    )
    return LLMProfile(
        llm="generator",
        model="Qwen/Qwen3-8B",
        device_type="H100",
        device_memory_gib=79.6,
        steps=(steps,),
        provenance=Provenance(source="estimate", tool="a tool 1.0", engine="vLLM 0.24", date="2026-01-01"),
    )


@pytest.fixture
def plan(profile):
    choices = {"generator": (Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=3),)}
    return hand_made_plan(choices, {"generator": profile}, parse_cluster("2x2xH100"))


def test_every_kind_of_file_comes_back(tmp_path, profile, plan):
    save_profile(profile, tmp_path / "deeper" / "profile.yaml")
    save_cluster(plan.cluster, tmp_path / "cluster.yaml")
    save_plan(plan, tmp_path / "plan.yaml")
    assert load_profile(tmp_path / "deeper" / "profile.yaml") == profile
    assert load_cluster(tmp_path / "cluster.yaml") == plan.cluster
    assert load_plan(tmp_path / "plan.yaml") == plan


def test_rows_of_tables_stay_rows(tmp_path, profile):
    save_profile(profile, tmp_path / "profile.yaml")
    assert "  - [0.006, 0.0063]\n" in (tmp_path / "profile.yaml").read_text()


def test_json_is_read_as_well(tmp_path, plan):
    save_plan(plan, tmp_path / "plan.yaml")
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("llm: generator", "lmm: generator", "at llm: Field required"),
        ("host_s:", "hots_s:", "at hots_s: unknown key"),
        ("weights_gib: 15.3", "weights_gib: heavy", "at steps.0.weights_gib: Input should be a valid number"),
        ("batch_sizes: [1, 32]", "batch_sizes: [32, 1]", "batch_sizes must be ascending"),
        ("[0.006, 0.0063]", "[0.0063, 0.006]", "never fall with batch"),
        ("kv_bytes_per_token: ", "kv_bytes_per_token: 0.0 # ", "kv_bytes_per_token must be positive"),
        ("[0.006, 0.0063]", "[0.006, .nan]", "step times at tensor_parallel_size 1: decode_s has nan"),
        ("overhead_gib: ", "overhead_gib: .nan # ", "overhead_gib must be finite and at least 0, got nan"),
        (
            "device_memory_gib: ",
            "device_memory_gib: .inf # ",
            "'generator' on H100: device_memory_gib must be positive",
        ),
        ("max_num_seqs: ", "max_num_seqs: 0 # ", "profile of 'generator' on H100: max_num_seqs must be at least 1"),
        ("prefill_beta: ", "prefill_beta: -1 # ", "a fraction of a device is never faster"),
        ("large_batch: ", "large_batch: 8 # ", "small_batch 32 must be below large_batch 8"),
        ("scepsy-profile/1", "scepsy-plan/1", "is a plan file; expected a profile file, as scepsy profile writes it"),
        ("provenance:", "provenance: {", "line 20: not valid YAML"),
    ],
)
def test_the_place_of_an_error_is_named(tmp_path, profile, old, new, told):
    path = tmp_path / "profile.yaml"
    save_profile(profile, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ScepsyError) as caught:
        load_profile(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ScepsyError, match="no such file; expected a plan file"):
        load_plan(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ScepsyError, match="has a list at its top; expected a plan file, as scepsy optimize writes it"):
        load_plan(tmp_path / "list.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ScepsyError, match="is not text; expected a plan file"):
        load_plan(tmp_path / "bytes.yaml")
    with pytest.raises(ScepsyError, match="cannot be read"):
        load_cluster(tmp_path)


def test_what_a_plan_promises_is_checked_on_load(tmp_path, plan):
    save_plan(plan, tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace("replicas: 3", "replicas: 2"))
    with pytest.raises(ScepsyError, match=r"plan.yaml: plan: 'generator' has 2 replicas but 3 slots"):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "- node: node0",
            "- node: other",
            "'generator' replica 0: the cluster has no node 'other', it has node0, node1",
        ),
        ("devices: [0]", "devices: [7]", "replica 0: node 'node0' has 2 devices from 0 on, no number 7"),
        ("gpu_memory_utilization: ", "gpu_memory_utilization: .nan # ", "'generator' has gpu_memory_utilization nan"),
        ("replica_rps: ", "replica_rps: .nan # ", "plan: 'generator' has replica_rps nan; it must be finite"),
    ],
)
def test_a_plan_file_names_devices_that_there_are(tmp_path, plan, old, new, told):
    save_plan(plan, tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert old in text
    (tmp_path / "plan.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ScepsyError) as caught:
        load_plan(tmp_path / "plan.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'plan.yaml'}: plan: ")
    assert told in str(caught.value)


def test_every_shipped_profile_is_read():
    files = sorted((Path(scepsy.profiling.__file__).parent / "profiles").glob("*.yaml"))
    assert [load_profile(file).llm for file in files] == [file.stem.removesuffix("_h100") for file in files] != []
