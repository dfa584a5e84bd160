import json

import pytest

from scepsy.cli import main

SECOND = 1_000_000_000


def span(trace, number, parent, name, start_s, end_s, **attributes):
    """One span as OTLP/JSON writes it; underscores of attribute names stand for dots."""
    return {
        "traceId": f"{trace:032x}",
        "spanId": f"{number:016x}",
        "parentSpanId": f"{parent:016x}" if parent else "",
        "name": name,
        "kind": 3 if "gen_ai.request.model" in attributes else 1,
        "startTimeUnixNano": str(1_700_000_000 * SECOND + round(start_s * SECOND)),
        "endTimeUnixNano": str(1_700_000_000 * SECOND + round(end_s * SECOND)),
        "attributes": [
            {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
            for key, value in attributes.items()
        ],
        "status": {},
    }


def llm(trace, number, model, start_s, end_s, tokens_in, tokens_out):
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": tokens_in,
        "gen_ai.usage.output_tokens": tokens_out,
    }
    return span(trace, number, 1, f"chat {model}", start_s, end_s, **attributes)


def line(spans):
    return json.dumps(
        {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {"name": "test"}, "spans": spans}]}]}
    )


@pytest.fixture
def traces(tmp_path):
    """Twenty executions: two generator calls at once, then the writer; with the plain OpenTelemetry names only."""
    folder = tmp_path / "traces"
    folder.mkdir()
    lines = []
    for trace in range(1, 21):
        slow = 1 + trace % 4
        root = {"gen_ai.operation.name": "invoke_workflow", "gen_ai.workflow.name": "essay"}
        lines.append(
            line(
                [
                    span(trace, 1, 0, "essay", 0, slow + 3.5, **root),
                    llm(trace, 2, "generator", 0.1, 0.1 + slow, 300 + trace, 50 * slow),
                    llm(trace, 3, "generator", 0.1, 1.1, 300, 50),
                    llm(trace, 4, "writer", slow + 0.2, slow + 3.2, 600, 200),
                ]
            )
        )
    (folder / "spans.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def two_workflows(tmp_path):
    """Ten essays and ten poems: both need the writer, essays a generator as well."""
    folder = tmp_path / "two"
    folder.mkdir()
    lines = []
    for trace in range(1, 21):
        workflow = "essay" if trace % 2 else "poem"
        root = {"gen_ai.operation.name": "invoke_workflow", "gen_ai.workflow.name": workflow}
        seconds = 1 + trace % 4
        spans = [span(trace, 1, 0, workflow, 0, seconds + 3.5, **root)]
        if workflow == "essay":
            spans.append(llm(trace, 2, "generator", 0.1, 0.1 + seconds, 300, 50 * seconds))
            spans.append(llm(trace, 3, "writer", seconds + 0.2, seconds + 3.2, 600, 200))
        else:
            spans.append(llm(trace, 2, "writer", 0.1, 0.1 + seconds, 900, 100 * seconds))
        lines.append(line(spans))
    (folder / "spans.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def scepsy(capsys):
    """Run a command line in this process: exit code, output, errors."""

    def run(*words):
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
