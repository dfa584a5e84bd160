"""Hand-made OTLP/JSON spans for the tests of reading."""

import json
from types import SimpleNamespace

import pytest

from scepsy.traces import read_executions

SECOND = 1_000_000_000
BASE = 1_790_000_000 * SECOND


def attribute(value):
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"stringValue": value}


def span(own, parent, name, start_s, end_s, *, trace="t1", status=None, flags=None, events=None, **attributes):
    """A span in OTLP/JSON; double underscores in attribute names stand for dots; `end_s` None leaves it unended."""
    made = {
        "traceId": trace,
        "spanId": own,
        "parentSpanId": parent,
        "name": name,
        "startTimeUnixNano": str(BASE + round(start_s * SECOND)),
        "attributes": [{"key": key.replace("__", "."), "value": attribute(value)} for key, value in attributes.items()],
    }
    if end_s is not None:
        made["endTimeUnixNano"] = str(BASE + round(end_s * SECOND))
    if status is not None:
        made["status"] = {"code": status}
    if flags is not None:
        made["flags"] = flags
    if events is not None:
        made["events"] = [{"name": label, "timeUnixNano": str(BASE + round(at_s * SECOND))} for label, at_s in events]
    return made


def chat(own, parent, start_s, end_s, *, model="m", tokens=(10, 5), **more):
    given = {"gen_ai__operation__name": "chat", "gen_ai__request__model": model}
    if tokens is not None:
        given |= {"gen_ai__usage__input_tokens": tokens[0], "gen_ai__usage__output_tokens": tokens[1]}
    return span(own, parent, f"chat {model}", start_s, end_s, **(given | more))


def workflow(own, parent, name, start_s, end_s, **more):
    given = {"gen_ai__operation__name": "invoke_workflow", "gen_ai__workflow__name": name}
    return span(own, parent, f"invoke_workflow {name}", start_s, end_s, **(given | more))


def agent(own, parent, name, start_s, end_s, **more):
    given = {"gen_ai__operation__name": "invoke_agent", "gen_ai__agent__name": name}
    return span(own, parent, f"invoke_agent {name}", start_s, end_s, **(given | more))


def request(*spans, scope="scepsy", resource=()):
    attributes = [{"key": key, "value": attribute(value)} for key, value in dict(resource).items()]
    return {
        "resourceSpans": [
            {"resource": {"attributes": attributes}, "scopeSpans": [{"scope": {"name": scope}, "spans": list(spans)}]}
        ]
    }


def write(path, *requests):
    """One request per line."""
    path.write_text("".join(json.dumps(each) + "\n" for each in requests), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def otlp():
    """The makers above, under one name."""
    return SimpleNamespace(
        span=span, chat=chat, workflow=workflow, agent=agent, request=request, write=write, SECOND=SECOND, BASE=BASE
    )


@pytest.fixture
def read(tmp_path):
    """Writes spans into a file, reads them back."""

    def read_back(*spans, **kwargs):
        return read_executions([write(tmp_path / "spans.jsonl", request(*spans, **kwargs))])

    return read_back
