"""Where Scepsy is installed without extras: everything that needs none works, the rest names its extra."""

import subprocess
import sys

import pytest

from scepsy.cli import COMMANDS

EXTRAS = (
    *("aiohttp", "multidict", "orjson", "prometheus_client", "psutil", "pynvml", "uvloop", "yarl"),
    *("aiconfigurator_core", "google.protobuf", "kubernetes", "opentelemetry.proto", "pyarrow", "ray", "zstandard"),
    *("langchain_core", "langchain_openai", "langgraph", "llama_index", "openai"),
)
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
from scepsy.cli import main
for command in {COMMANDS!r}:
    try:
        main([command, "--help"])
    except SystemExit as done:
        assert done.code == 0, command
sys.exit(main(sys.argv[1:]))
"""


def bare(tmp_path, *words):
    environment = {"SCEPSY_HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )


def test_traces_become_a_plan(traces, tmp_path):
    done = bare(tmp_path, "optimize", traces, "--cluster", "4xH100", "--rate", 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("words", "extra"), [(("collect",), "collect"), (("demo",), "demo"), (("status", "--on", "ray"), "ray")]
)
def test_what_needs_an_extra_names_it(words, extra, tmp_path):
    done = bare(tmp_path, *words)
    assert done.returncode == 2
    assert f"scepsy[{extra}]" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
