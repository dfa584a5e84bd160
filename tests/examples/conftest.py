import importlib.util
import sys
from pathlib import Path

import pytest

_PATH = Path(__file__).with_name("model_server.py")
_spec = importlib.util.spec_from_file_location("model_server", _PATH)
_server = importlib.util.module_from_spec(_spec)
sys.modules["model_server"] = _server
_spec.loader.exec_module(_server)


@pytest.fixture
def models():
    """A loopback OpenAI-compatible server."""
    with _server.serve() as server:
        yield server
