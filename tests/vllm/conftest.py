"""Two small models with random weights, served by the real vLLM for CPU from an environment of its own."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SIZES = {"small": (256, 4), "large": (512, 8)}


@pytest.fixture(scope="session")
def vllm_command():
    """How one engine is started: the wheel for CPU has no working `vllm` script."""
    if not PYTHON.exists():
        pytest.fail("there is no .venv-vllm; make test-vllm makes it")
    return (str(PYTHON), "-m", "vllm.entrypoints.openai.api_server")


@pytest.fixture(scope="session")
def models(vllm_command, tmp_path_factory):
    """Directory of each model by served name."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, (hidden, layers)) in enumerate(SIZES.items()):
        argv = [vllm_command[0], str(Path(__file__).with_name("make_model.py"))]
        argv += [str(folder / name), str(hidden), str(layers), str(seed)]
        subprocess.run(argv, check=True, capture_output=True, text=True)
    return {name: folder / name for name in SIZES}
