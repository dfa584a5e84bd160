"""The main job with the real vLLM: trace the examples, profile the engines, plan, deploy the plan, run again."""

import os
import urllib.request
import uuid
from dataclasses import dataclass

import psutil
import pytest

from scepsy.demo.drive import drive
from scepsy.demo.schedule import Arrivals
from scepsy.deployment import deploy, list_deployments
from scepsy.planning import aggregate, optimize
from scepsy.profiling import EngineFlags, measure
from scepsy.profiling.endpoint import sum_samples
from scepsy.traces import read_executions
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.plan import LLMPlan, Plan, Slot
from scepsy_optimizer.profile import LLMProfile

pytestmark = pytest.mark.vllm

EXAMPLES = ("beam_search", "research", "retrieval")
FLAGS = EngineFlags(max_num_seqs=32, max_num_batched_tokens=2048)
MAX_MODEL_LEN = 4096
RATE_RPS = 0.05
MARK = "SCEPSY_TEST_RUN"
COUNTERS = {
    "calls": "vllm:request_success_total",
    "input_tokens": "vllm:prompt_tokens_total",
    "cached_tokens": "vllm:prompt_tokens_cached_total",
    "output_tokens": "vllm:generation_tokens_total",
    "seconds": "vllm:e2e_request_latency_seconds_sum",
}


@dataclass(frozen=True)
class Round:
    """One deployment's round: what the clients traced, and what the engines counted, by LLM and in total."""

    executions: tuple
    outcomes: list
    counted: dict
    left: list


@pytest.fixture(scope="module")
def stage(models, tmp_path_factory):
    """Directory of the module, and an environment that marks everything that is started from here."""
    folder = tmp_path_factory.mktemp("main_job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCEPSY_HOME", str(folder / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv(MARK, uuid.uuid4().hex)
        for role, llm in (("GENERATOR", "large"), ("WRITER", "large"), ("VERIFIER", "small"), ("RERANKER", "small")):
            patch.setenv(f"{role}_MODEL", llm)
        yield folder


def started_here():
    """Processes that live and carry the mark, this one apart."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]:
                found.append((process.pid, process.name()))
        except psutil.Error:
            continue
    return found


def hand_made(models):
    parts = [
        LLMPlan(
            llm=llm,
            model=str(folder),
            tensor_parallel_size=1,
            fraction=1.0,
            replicas=1,
            slots=(Slot(node="node0", devices=(device,)),),
            max_num_seqs=FLAGS.max_num_seqs,
            max_num_batched_tokens=FLAGS.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            gpu_memory_utilization=0.92,
        )
        for device, (llm, folder) in enumerate(models.items())
    ]
    return Plan(cluster=parse_cluster("2xCPU"), rate_rps=0.0, llms=tuple(parts))


def read_counters(replicas):
    found = {}
    for replica in replicas:
        with urllib.request.urlopen(f"{replica.url}/metrics", timeout=10) as answer:  # noqa: S310 - a replica of ours
            text = answer.read().decode()
        for name, metric in COUNTERS.items():
            key = (replica.llm, name)
            found[key] = found.get(key, 0.0) + sum_samples(text, metric, replica.llm)
    return found


def play(running, root, folder, *, seed):
    """Two executions of every example through the endpoint, and what the engines counted of them."""
    folder.mkdir()
    questions = (f"What limits tidal power, as seen in {1900 + seed}?", f"Why do bridges sway {seed} times?")
    schedule = {
        name: Arrivals(questions=questions, at_s=(4.0 * index, 12.0 + 4.0 * index))
        for index, name in enumerate(EXAMPLES)
    }
    replicas = running.status().replicas
    before = read_counters(replicas)
    outcomes = drive(
        {name: root / "examples" / f"{name}.py" for name in EXAMPLES},
        schedule,
        base_url=running.url,
        traces=folder / "traces",
        log=folder / "log.txt",
        on_outcome=lambda outcome: None,
    )
    after = read_counters(replicas)
    counted = {key: after[key] - before[key] for key in after}
    return read_executions([folder / "traces"]).executions, outcomes, counted


@pytest.fixture(scope="module")
def first(stage, models, vllm_command, pytestconfig):
    """The hand-made plan: profiles of both engines, and a round."""
    with deploy(
        hand_made(models),
        engine="vllm-cpu",
        command=vllm_command,
        engine_args=("--enable-prompt-tokens-details",),
        name="first",
    ) as running:
        profiles = {
            replica.llm: measure(replica.url, replica.llm, device_type="CPU", flags=FLAGS)
            for replica in running.status().replicas
        }
        executions, outcomes, counted = play(running, pytestconfig.rootpath, stage / "first", seed=1)
    return profiles, Round(executions, outcomes, counted, started_here())


@pytest.fixture(scope="module")
def second(stage, first, vllm_command, pytestconfig):
    """The plan found for the first round's traces, and a round on it."""
    profiles, _ = first
    workload = aggregate(stage / "first" / "traces")
    plan = optimize(workload, cluster="2xCPU", rate=RATE_RPS, profiles=profiles)
    with deploy(
        plan,
        engine="vllm-cpu",
        profiles=profiles,
        command=vllm_command,
        engine_args=("--enable-prompt-tokens-details",),
        name="second",
    ) as running:
        executions, outcomes, counted = play(running, pytestconfig.rootpath, stage / "second", seed=2)
    return plan, Round(executions, outcomes, counted, started_here())


@pytest.fixture(scope="module", params=["first", "second"])
def played(request, first, second):
    return first[1] if request.param == "first" else second[1]


def calls_of(played, llm):
    return [span for execution in played.executions for span in execution.calls if span.call.llm == llm]


def test_every_execution_succeeds_and_is_read(played):
    assert [outcome.error for outcome in played.outcomes] == [None] * len(played.outcomes)
    assert len(played.executions) == len(played.outcomes) >= len(EXAMPLES)
    assert {execution.workflow for execution in played.executions} == {"beam-search", "research", "retrieval"}


@pytest.mark.parametrize("llm", ["small", "large"])
def test_spans_agree_with_the_engine_count_for_count(played, llm):
    calls = calls_of(played, llm)
    assert len(calls) == played.counted[llm, "calls"] > 0
    for name in ("input_tokens", "cached_tokens", "output_tokens"):
        assert sum(getattr(span.call, name) for span in calls) == played.counted[llm, name], name


@pytest.mark.parametrize("llm", ["small", "large"])
def test_spans_last_as_long_as_the_engine_says(played, llm):
    calls = calls_of(played, llm)
    traced_s = sum(span.duration_s for span in calls)
    engine_s = played.counted[llm, "seconds"]
    # Never less than the engine took. Beyond it a client waits for the gateway, the connection, and a turn on two cores
    # that the engines fill: a second and more per call when the machine does something else as well.
    assert engine_s < traced_s < 1.5 * engine_s + 2.0 * len(calls)


def test_executions_last_as_long_as_their_callers_waited(played):
    waited_s = sorted(outcome.seconds for outcome in played.outcomes)
    traced_s = sorted(execution.makespan_s for execution in played.executions)
    assert traced_s == pytest.approx(waited_s, abs=0.1)


def test_profiles_are_measured(first, models):
    profiles, _ = first
    for llm, profile in profiles.items():
        assert isinstance(profile, LLMProfile)
        assert profile.model == str(models[llm])
        assert profile.provenance.source == "measured"
        assert profile.provenance.engine.startswith("vllm 0.")
        steps = profile.at(1)
        # Two heads of keys and of values of 64 numbers of 2 bytes in every layer, as the engine allots them.
        assert steps.kv_bytes_per_token == 2 * 2 * 64 * 2 * {"small": 4, "large": 8}[llm]
        assert steps.decode_s[-1][-1] > steps.decode_s[0][0]
        assert steps.prefill_s[-1] > 4 * steps.prefill_s[0]
    assert profiles["large"].at(1).prefill_s[-1] > profiles["small"].at(1).prefill_s[-1]


def test_the_plan_serves_both_llms_on_two_cores_and_predicts(second):
    plan, played = second
    assert {part.llm for part in plan.llms} == {"small", "large"}
    assert sum(part.device_count for part in plan.llms) <= 2
    assert plan.prediction.gap >= 0
    assert plan.prediction.max_rate_rps >= RATE_RPS
    measured_s = sum(execution.makespan_s for execution in played.executions) / len(played.executions)
    # The same order: two processes, their clients and this test share two cores.
    assert plan.prediction.latency_s / 3 < measured_s < plan.prediction.latency_s * 3


def test_nothing_is_left_running(first, second):
    assert first[1].left == []
    assert second[1].left == []
    assert list_deployments() == ()
