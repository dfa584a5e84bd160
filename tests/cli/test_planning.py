"""The main job as calls: what a program does instead of typing commands."""

import json
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest

from scepsy.cli import main
from scepsy.files import load_requirements, save_cluster, save_profile
from scepsy.inputs import resolve_cluster, resolve_cluster_profiles, resolve_plan_profiles, resolve_profiles
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


def test_a_named_profile_that_is_for_nothing_here_is_told(traces, tmp_path):
    writer = resolve_profiles(["writer"], "H100")["writer"]
    lower = tmp_path / "lower.yaml"
    save_profile(replace(writer, device_type="h100"), lower)
    other = tmp_path / "other.yaml"
    save_profile(replace(writer, llm="poet"), other)
    for path, told in ((lower, "'writer' on h100"), (other, "'poet' on H100")):
        with pytest.raises(ScepsyError, match=rf"{path}: is for {told}, and needed are generator, writer on H100: "):
            optimize(traces, cluster="4xH100", rate=1.0, profiles=[path])
    # A directory may hold profiles for anything.
    found = resolve_profiles(["writer"], "H100", profiles=tmp_path)
    assert found == {"writer": writer}


def test_a_model_of_no_llm_is_told(traces):
    with pytest.raises(ScepsyError, match=r"--model nobody=Qwen/Qwen3-8B: .* only generator, writer"):
        optimize(traces, cluster="4xH100", rate=1.0, models={"nobody": "Qwen/Qwen3-8B"})
    plan = optimize(traces, cluster="4xH100", rate=1.0)
    with pytest.raises(ScepsyError, match="no LLM 'nobody' here"):
        resolve_plan_profiles(plan, models={"nobody": "Qwen/Qwen3-8B"})


def test_profiles_of_a_plan_have_its_engine_options(traces):
    plan = optimize(traces, cluster="4xH100", rate=1.0)
    shipped = resolve_profiles(["writer", "generator"], "H100")
    assert resolve_plan_profiles(plan) == shipped
    one = replace(plan, llms=tuple(replace(part, max_num_seqs=1) for part in plan.llms))
    assert resolve_plan_profiles(one) == {name: replace(each, max_num_seqs=1) for name, each in shipped.items()}
    # Groups that differ: neither is all of them.
    large = [
        replace(part, tensor_parallel_size=4, slots=tuple(replace(slot, devices=(0, 1, 2, 3)) for slot in part.slots))
        for part in one.llms
    ]
    mixed = replace(plan, llms=(*plan.llms, *large))
    assert resolve_plan_profiles(mixed) == shipped


def _without_counts(traces, target, lines):
    """The traces, those lines of them without token counts."""
    told = (traces / "spans.jsonl").read_text().splitlines()
    for number in lines:
        told[number] = told[number].replace("gen_ai.usage.", "other.")
    target.write_text("\n".join(told) + "\n")
    return target


def test_calls_without_token_counts_are_planned_as_the_others(traces, tmp_path):
    whole = aggregate(traces)
    half = aggregate(_without_counts(traces, tmp_path / "half.jsonl", range(0, 20, 2)))
    for demand, other in zip(whole.demands, half.demands, strict=True):
        assert demand.llm == other.llm
        assert other.input_tokens == pytest.approx(demand.input_tokens, rel=0.01)
        assert other.output_tokens == pytest.approx(demand.output_tokens, rel=0.25)
    none = _without_counts(traces, tmp_path / "none.jsonl", range(20))
    with pytest.raises(ScepsyError, match=rf"{none}: no call of generator, writer tells its .*include_usage=True"):
        aggregate(none)


def test_traces_whose_calls_all_failed_are_told_apart(traces, tmp_path):
    path = tmp_path / "failed.jsonl"
    lines = [json.loads(line) for line in (traces / "spans.jsonl").read_text().splitlines()]
    for line in lines:
        for span in line["resourceSpans"][0]["scopeSpans"][0]["spans"][1:]:
            span["status"] = {"code": 2}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ScepsyError, match=rf"{path}: the 20 executions have no LLM call .*: 60 calls that failed"):
        optimize(path, cluster="4xH100", rate=1.0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("watch", "--least", "-5"), "--least -5: give a number of executions of at least 1"),
        (("watch", "--band", "nan"), "--band nan: give a number"),
        (("watch", "--dead-band", "-1"), "--dead-band -1: give a number"),
        (("deploy", "plan.yaml", "--drain=-1"), "--drain -1: give a number of seconds"),
        (("deploy", "plan.yaml", "--drain", "nan"), "--drain nan: give a number of seconds"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(scepsy, words, told):
    code, out, err = scepsy(*words)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_a_folder_that_is_not_there_yet_is_waited_for_aloud(monkeypatch, tmp_path, capsys):
    deployment = SimpleNamespace(alive=True, directory=tmp_path)
    monkeypatch.setattr("scepsy.deployment.find", lambda _name: deployment)
    assert main(["watch", "--once", "--traces", str(tmp_path / "nope")]) == 0
    assert f"{tmp_path / 'nope'}: no such folder yet: waiting for it" in capsys.readouterr().out
