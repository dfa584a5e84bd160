"""Each example as its user runs it, against a server that remembers what it was asked."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scepsy.traces import read_executions
from scepsy_optimizer.timeline import call_graph, compile_timeline

EXAMPLES = Path(__file__).parents[2] / "examples"
WORKFLOWS = {
    "agents_sdk": "agents-sdk",
    "beam_search": "beam-search",
    "plain_asyncio": "best-of-three",
    "reranked_search": "RerankedSearch",
    "research": "research",
    "retrieval": "retrieval",
    "supervisor": "supervisor",
}
ROLES = {
    "agents_sdk": {"generator": {"plan", "note"}, "writer": {"write"}},
    "plain_asyncio": {"writer": {"write"}, "verifier": {"grade"}},
    "reranked_search": {"reranker": {"rerank"}, "writer": {"widen", "answer"}},
    "supervisor": {"generator": {"supervise"}, "writer": {"facts", "draft", "critic"}},
    "beam_search": {"generator": {"propose"}, "verifier": {"judge"}},
    "retrieval": {"reranker": {"rerank"}, "writer": {"rephrase", "CompactAndRefine"}},
    "research": {"generator": {"split", "take_notes"}, "writer": {"write"}},
}
ONE_AFTER_ANOTHER = {"supervisor"}
QUESTIONS = ("What limits tidal power?", "How did bridges change trade?", "Why do experts disagree about sleep?")


def environment(models, directory):
    endpoint = {"OPENAI_BASE_URL": models.url, "OPENAI_API_KEY": "none"}
    return os.environ | endpoint | {"SCEPSY_TRACES": str(directory / "traces")}


def check(example, models, directory):
    """The traces in `directory` tell exactly what the server saw; returns the executions."""
    reading = read_executions([directory])
    assert reading.dropped == {}
    assert reading.repaired == {}
    asked = Counter((each.trace, each.model, each.input_tokens, each.output_tokens) for each in models.asked)
    told = Counter(
        (execution.id, span.call.llm, span.call.input_tokens, span.call.output_tokens)
        for execution in reading.executions
        for span in execution.calls
    )
    assert told == asked
    for execution in reading.executions:
        assert execution.workflow == WORKFLOWS[example]
        assert execution.spans[0].kind == "workflow"
        for span in execution.calls:
            assert span.call.role in ROLES[example][span.call.llm]
            assert 0 <= span.start_s < span.end_s <= execution.makespan_s
        timeline = compile_timeline(execution)
        assert timeline.makespan_s(timeline.traced_s) == pytest.approx(execution.makespan_s, abs=1e-9)
    return reading.executions


@pytest.mark.parametrize("example", sorted(WORKFLOWS))
def test_from_the_command_line(example, models, tmp_path):
    shown = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{example}.py"), *QUESTIONS[0].split()],
        capture_output=True,
        text=True,
        env=environment(models, tmp_path),
        cwd=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip()
    assert "Traceback" not in shown.stderr
    (execution,) = check(example, models, tmp_path / "traces")
    assert 3 <= len(execution.calls) <= 60


@pytest.mark.parametrize("example", sorted(WORKFLOWS))
def test_many_at_once_stay_apart(example, models, tmp_path):
    """Concurrent executions in one process: each call is in the trace of its own, and answers steer the flow."""
    questions = [*QUESTIONS, QUESTIONS[0]]
    order = json.dumps({"questions": questions, "at_s": [0.0] * len(questions)})
    log = tmp_path / "errors.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "scepsy.demo.load", str(EXAMPLES / f"{example}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(models, tmp_path),
            cwd=tmp_path,
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{order}\ngo\n")
        child.stdin.flush()
        shown = child.stdout.read()
        assert child.wait() == 0, log.read_text()
    outcomes = [json.loads(line) for line in shown.splitlines() if line != "ready"]
    assert [each["error"] for each in outcomes] == [None] * len(questions)
    executions = check(example, models, tmp_path / "traces")
    assert len(executions) == 4
    # The same question goes the same way on a server that answers the same; another one goes another way.
    ways = Counter(tuple(sorted(span.call.output_tokens for span in each.calls)) for each in executions)
    assert sorted(ways.values()) == [1, 1, 2]
    # Calls fan out, and the graph of waits joins them again.
    widest = max(executions, key=lambda each: len(each.calls))
    graph = call_graph(widest)
    assert graph.number_of_nodes() == len(widest.calls)
    starts = [span for span in graph if graph.in_degree(span) == 0]
    assert len(starts) < len(widest.calls)
    running = [
        sum(other.start_s < span.end_s and span.start_s < other.end_s for other in widest.calls)
        for span in widest.calls
    ]
    assert (max(running) > 1) is (example not in ONE_AFTER_ANOTHER)
