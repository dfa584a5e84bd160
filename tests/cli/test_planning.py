"""The main job as calls: what a program does instead of typing commands."""

import openai
import pytest

from scepsy.files import save_cluster, save_profile
from scepsy.inputs import resolve_cluster, resolve_profiles
from scepsy.planning import aggregate, optimize, optimize_and_deploy
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import PROPORTIONAL


def test_optimize_and_deploy_ends_with_an_endpoint(traces, tmp_path, monkeypatch):
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    with optimize_and_deploy(traces, cluster="2xH100", rate=1.0, engine="emulator", name="api") as deployment:
        with openai.OpenAI(base_url=deployment.url, api_key="none") as client:
            answer = client.chat.completions.create(
                model="writer", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
            )
        assert answer.model == "writer"
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 4
        status = deployment.status()
        assert {replica.llm for replica in status.replicas} == {"generator", "writer"}
    with pytest.raises(ScepsyError, match="has ended"):
        deployment.status()


def test_a_workload_can_be_planned_for_several_times(traces):
    workload = aggregate(traces)
    assert workload.executions == 20
    slow = optimize(workload, cluster=parse_cluster("2xH100"), rate=1.0)
    fast = optimize(workload, cluster="8xH100", rate=1.0)
    assert slow.prediction is not None
    assert fast.prediction is not None
    assert fast.prediction.latency_s < slow.prediction.latency_s
    with pytest.raises(ScepsyError, match="give them to aggregate"):
        optimize(workload, cluster="8xH100", rate={"essay": 1.0})
    assert optimize([traces], cluster="8xH100", rate={"essay": 1.0}).rate_rps == 1.0


def test_profiles_given_come_before_those_shipped(traces, tmp_path):
    shipped = resolve_profiles(["writer", "generator"], "H100")
    pessimistic = {llm: profile.with_slowdown(PROPORTIONAL) for llm, profile in shipped.items()}
    assert resolve_profiles(["writer"], "H100", profiles=pessimistic)["writer"] is pessimistic["writer"]
    save_profile(pessimistic["writer"], tmp_path / "profiles" / "writer.yaml")
    found = resolve_profiles(["writer", "generator"], "H100", profiles=tmp_path / "profiles")
    assert found == {"writer": pessimistic["writer"], "generator": shipped["generator"]}
    save_cluster(parse_cluster("2x4xH100"), tmp_path / "cluster.yaml")
    assert resolve_cluster(tmp_path / "cluster.yaml") == resolve_cluster("2x4xH100")
    with pytest.raises(ScepsyError, match=r"no profile of poet on H100 .* --model poet="):
        resolve_profiles(["poet"], "H100")
