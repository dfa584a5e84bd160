"""The main job as calls: what a program does instead of typing commands."""

from dataclasses import replace

import openai
import pytest

from scepsy.files import load_requirements, save_cluster, save_profile
from scepsy.inputs import resolve_cluster, resolve_cluster_profiles, resolve_profiles
from scepsy.planning import aggregate, frontier, optimize, optimize_and_deploy
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import PROPORTIONAL
from scepsy_optimizer.requirements import LLMRequirements, Requirements, check_requirements, kept


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


def test_several_device_types_need_a_profile_on_one_of_them(tmp_path):
    shipped = resolve_profiles(["writer", "generator"], "H100")
    small = {llm: replace(profile, device_type="L40S") for llm, profile in shipped.items() if llm == "generator"}
    for llm, profile in {**small, "other": shipped["writer"]}.items():
        save_profile(profile, tmp_path / f"{llm}.yaml")
    found = resolve_cluster_profiles(["writer", "generator"], parse_cluster("2xH100+2xL40S"), profiles=tmp_path)
    types = {llm: [profile.device_type for profile in several] for llm, several in found.items()}
    assert types == {"writer": ["H100"], "generator": ["H100", "L40S"]}
    with pytest.raises(ScepsyError, match=r"no profile of poet on H100\+L40S"):
        resolve_cluster_profiles(["poet"], parse_cluster("2xH100+2xL40S"))


def test_a_plan_keeps_what_is_required(traces, tmp_path):
    old = optimize(traces, cluster="4xH100", rate=1.0)
    path = tmp_path / "requirements.yaml"
    path.write_text(
        "format: scepsy-requirements/1\n"
        "llms:\n"
        "  writer: {min_replicas: 3}\n"
        "  generator: {fixed: [{tensor_parallel_size: 1, fraction: 0.5, replicas: 2}]}\n"
    )
    plan = optimize(traces, cluster="4xH100", rate=1.0, requirements=path)
    assert sum(part.replicas for part in plan.parts("writer")) >= 3
    (part,) = plan.parts("generator")
    assert (part.tensor_parallel_size, part.fraction, part.replicas) == (1, 0.5, 2)
    assert check_requirements(plan, load_requirements(path)) == []
    moved = optimize(
        traces, cluster="6xH100", rate=4.0, requirements=Requirements(llms={"writer": kept(old, "writer")})
    )
    assert kept(moved, "writer") == kept(old, "writer")
    with pytest.raises(ScepsyError, match="no LLM poet; there is generator, writer"):
        optimize(traces, cluster="4xH100", rate=1.0, requirements=Requirements(llms={"poet": LLMRequirements()}))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("llms: {writer: {min_replica: 3}}", r"at llms.writer.min_replica: unknown key"),
        ("llms: {writer: {max_devices: many}}", r"at llms.writer.max_devices: Input should be a valid number"),
        ("llms: {writer: {min_replicas: 0}}", "min_replicas 0 must be at least 1"),
        ("workflows: {essay: {weight: 0}}", "weight of 0 must be a positive number"),
    ],
)
def test_requirements_that_do_not_fit_are_told_with_their_place(tmp_path, text, told):
    path = tmp_path / "requirements.yaml"
    path.write_text(f"format: scepsy-requirements/1\n{text}\n")
    with pytest.raises(ScepsyError, match=told) as raised:
        load_requirements(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_the_highest_rate_and_the_frontier(traces):
    workload = aggregate(traces)
    plan = optimize(workload, cluster="2xH100", rate="max")
    with pytest.raises(ScepsyError, match="is out of reach"):
        optimize(workload, cluster="2xH100", rate=plan.rate_rps * 1.01)
    points = frontier(workload, cluster="2xH100")
    assert max(point.rate_rps for point in points) == pytest.approx(plan.rate_rps, rel=0.01)
    assert {point.devices for point in points} <= {1, 2}


def test_a_robust_plan_says_so(traces):
    plan = optimize(traces, cluster="4xH100", rate=2.0, robust=0.9)
    assert plan.provenance["robust"] == "loads at the 0.9 quantile"
    assert plan.prediction is not None
    assert plan.prediction.replayed is not None
    with pytest.raises(ScepsyError, match="leave out the percentile"):
        optimize(traces, cluster="4xH100", rate=2.0, robust=0.9, max_latency_s=9, percentile=95)
    with pytest.raises(ScepsyError, match="at least 0.5 and below 1"):
        optimize(traces, cluster="4xH100", rate=2.0, robust=90)
