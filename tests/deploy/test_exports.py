"""Plans in the formats of others, by the shapes that their own programs accept."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from scepsy.cli import main
from scepsy.deployment import deploy
from scepsy.deployment.export_formats import DESCRIPTIONS
from scepsy.deployment.exports import export
from scepsy.files import save_plan
from scepsy_optimizer.errors import ScepsyError


@pytest.fixture
def plan(make_plan, make_part):
    return make_plan(
        make_part("Org/gen", (0, 1), (2, 3)),
        make_part("ver", 1, fraction=0.3, node="node1"),
        make_part("ver", 0, node="node1"),
        cluster="2x4xH100",
    )


URLS = tuple(f"http://gpu{number}:8000" for number in range(4))


def test_litellm_names_every_replica_with_its_weight(plan):
    listed = yaml.safe_load(export(plan, "litellm", URLS))["model_list"]
    assert [one["model_name"] for one in listed] == ["Org/gen", "Org/gen", "ver", "ver"]
    assert [one["litellm_params"]["api_base"] for one in listed] == [f"{url}/v1" for url in URLS]
    assert [one["litellm_params"]["weight"] for one in listed] == [2.0, 2.0, 0.3, 1.0]
    assert listed[0]["litellm_params"]["model"] == "hosted_vllm/Org/gen"
    assert len({one["model_info"]["id"] for one in listed}) == 4


def test_smg_gets_no_key_that_it_does_not_know(plan):
    file = json.loads(export(plan, "smg", URLS))
    assert file == {"version": 1, "workers": [{"url": url} for url in URLS]}


def test_production_stack_gets_a_model_spec_for_each_group(plan):
    engines = yaml.safe_load(export(plan, "production-stack"))["servingEngineSpec"]
    gen, small, whole = engines["modelSpec"]
    assert (gen["name"], small["name"], whole["name"]) == ("org-gen", "ver", "ver-2")
    assert (gen["replicaCount"], gen["requestGPU"], gen["vllmConfig"]["tensorParallelSize"]) == (2, 2, 2)
    assert (small["requestGPUCores"], small["requestGPUMemPercentage"]) == ("30", "30")
    assert "requestGPUCores" not in whole
    assert gen["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] == ["node0"]
    assert gen["vllmConfig"]["extraArgs"][:2] == ["--served-model-name", "Org/gen"]
    assert gen["vllmConfig"]["enablePrefixCaching"] is True
    assert engines["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    for one in (gen, small, whole):
        # Without any of these the chart renders nothing.
        assert {name: type(one[name]) for name in ("name", "repository", "tag", "modelURL", "requestMemory")} == (
            dict.fromkeys(("name", "repository", "tag", "modelURL", "requestMemory"), str)
        )
        assert {type(one[name]) for name in ("replicaCount", "requestCPU", "requestGPU")} == {int}


def fields_of(module, name):
    """The fields of a class, as its source has them: importing it needs a vLLM of its own."""
    package = Path(next(iter(importlib.util.find_spec("ray").submodule_search_locations)))
    tree = ast.parse((package / module).read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.target.id for node in found.body if isinstance(node, ast.AnnAssign)}


@pytest.mark.extras
def test_ray_serve_gets_fields_that_its_configuration_has(plan):
    module = "llm/_internal/serve/core/configs/llm_config.py"
    listed = yaml.safe_load(export(plan, "ray-serve"))
    assert len(listed) == 3
    for one in listed:
        assert set(one) <= fields_of(module, "LLMConfig")
        assert set(one["model_loading_config"]) <= fields_of(module, "ModelLoadingConfig")
    assert [one["placement_group_config"]["bundles"] for one in listed] == [
        [{"GPU": 1}] * 2,
        [{"GPU": 0.3}],
        [{"GPU": 1}],
    ]
    assert listed[0]["deployment_config"] == {"num_replicas": 2}
    assert listed[1]["engine_kwargs"]["gpu_memory_utilization"] == 0.27


def test_what_cannot_be_exported_says_what_is_missing(plan):
    with pytest.raises(ScepsyError, match="litellm needs the addresses of the plan's 4 replicas, and 1 are given"):
        export(plan, "litellm", URLS[:1])
    with pytest.raises(ScepsyError, match="use one of litellm, smg, ray-serve, production-stack"):
        export(plan, "nginx")
    assert set(DESCRIPTIONS) == {"litellm", "smg", "ray-serve", "production-stack"}


def test_the_command_takes_the_addresses_of_what_runs(home, make_plan, make_part, make_profile, tmp_path, capsys):
    small = make_plan(make_part("gen", 0, 1), cluster="2xH100")
    save_plan(small, tmp_path / "plan.yaml")
    with deploy(small, engine="emulator", profiles={"gen": make_profile("gen")}) as deployment:
        assert main(["plan", "export", str(tmp_path / "plan.yaml"), "--to", "smg", "--name", "default"]) == 0
        urls = [one.url for one in deployment.status().replicas]
    assert [one["url"] for one in json.loads(capsys.readouterr().out)["workers"]] == urls
    assert main(["plan", "export", str(tmp_path / "plan.yaml"), "--to", "smg"]) == 2
    assert "name a running deployment" in capsys.readouterr().err
