import importlib.util
import sys
from pathlib import Path

import pytest

import scepsy
from scepsy.capture import recorder


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


_recorded = _load(Path(__file__).parent.parent / "capture" / "recorded.py")
_loopback = _load(Path(__file__).with_name("loopback.py"))
_load(Path(__file__).with_name("openai_calls.py"))


@pytest.fixture
def recorded():
    """Everything that Scepsy captures during the test, with every framework's hook on."""
    held = _recorded.Recorded()
    scepsy.instrument(provider=held.provider)
    yield held
    scepsy.uninstrument()
    left = list(recorder.open.values())
    recorder.forget()
    assert not left, f"still open: {[handle.name for handle in left]}"


@pytest.fixture(scope="session")
def _server():
    server = _loopback.Loopback().start()
    yield server
    server.stop()


@pytest.fixture
async def server(_server):
    """A server of the OpenAI API on this machine; what it saw is what was really called."""
    _server.seen.clear()
    yield _server
    await _server.close_clients()


@pytest.fixture
def client(server):
    import openai

    with openai.OpenAI(base_url=server.url, api_key="key") as made:
        yield made


@pytest.fixture
async def aclient(server):
    import openai

    async with openai.AsyncOpenAI(base_url=server.url, api_key="key") as made:
        yield made
