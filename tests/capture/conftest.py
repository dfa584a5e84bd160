import importlib.util
from pathlib import Path

import pytest

import scepsy
from scepsy.capture import recorder

_spec = importlib.util.spec_from_file_location("recorded", Path(__file__).with_name("recorded.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


@pytest.fixture
def recorded():
    """Everything that Scepsy captures during the test."""
    held = _module.Recorded()
    scepsy.instrument(provider=held.provider)
    yield held
    scepsy.uninstrument()
    left = list(recorder.open.values())
    recorder.forget()
    assert not left, f"still open: {[handle.name for handle in left]}"
