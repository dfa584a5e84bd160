"""What capture must never do to a program that uses the openai client."""

import asyncio
import gc
import time

import pytest
from openai_calls import CLOCK_NS, MESSAGES

import scepsy
from scepsy import semconv


async def test_a_cancelled_call(recorded, server, aclient):
    begin_ns = time.time_ns()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(aclient.chat.completions.create(model="slow", messages=MESSAGES), 0.05)
    call = recorded.call
    assert call.attributes[semconv.OUTCOME] == "cancelled"
    assert begin_ns + 40_000_000 < call.end_time < time.time_ns() + CLOCK_NS


def test_errors_in_the_hook_do_not_reach_the_program(recorded, server, client, monkeypatch, caplog):
    from scepsy_integrations.openai import hook

    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(hook.Exchange, "begin", fail)
    assert client.chat.completions.create(model="m", messages=MESSAGES).choices
    monkeypatch.undo()
    monkeypatch.setattr(hook.Exchange, "arrived", fail)
    monkeypatch.setattr(hook.Exchange, "received", fail)
    assert client.chat.completions.create(model="m", messages=MESSAGES).choices
    assert len(list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))) == 6
    assert "capture failed" in caplog.text
    assert len(recorded.calls) == 2


def handles():
    return {id(known) for known in gc.get_objects() if type(known) is scepsy.capture.Handle}


def test_what_has_been_written_does_not_wait_for_the_garbage_collector(server, client, tmp_path):
    scepsy.instrument(directory=tmp_path)
    gc.collect()
    before = handles()  # of other tests, in contexts that live on
    gc.disable()
    try:
        for _ in range(3):
            client.chat.completions.create(model="m", messages=MESSAGES)
        scepsy.uninstrument()
        # Who has written or sent the last one may hold it for a moment longer.
        for _ in range(500):
            left = handles() - before
            if not left:
                break
            time.sleep(0.01)
    finally:
        gc.enable()
    assert left == set()
