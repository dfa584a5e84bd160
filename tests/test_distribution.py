"""What is installed: the wheel and the sdist as the build backend makes them."""

import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling import build

ROOT = Path(__file__).parents[1]
PACKAGES = {"scepsy", "scepsy_integrations", "scepsy_optimizer"}


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_wheel(at_root, tmp_path):
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        names = set(wheel.namelist())
        (about,) = (name for name in names if name.endswith("/METADATA"))
        metadata = Parser().parsestr(wheel.read(about).decode())
        entry_points = wheel.read(about.replace("METADATA", "entry_points.txt")).decode()
    # No generic name, such as tests or examples, lands among other people's modules.
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, about.partition("/")[0]}
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {f"scepsy/_examples/{name}.py" for name in ("beam_search", "research", "retrieval")} <= names
    assert "scepsy/report/page.html" in names
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "scepsy = scepsy.cli:main" in entry_points
    for framework in ("langchain", "llama-index", "openai"):
        assert f"scepsy-{framework} = " in entry_points


def test_the_sdist_has_what_its_tests_need(at_root, tmp_path):
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = ("CHANGELOG.md", "LICENSE", "Makefile", "mkdocs.yml", "docs/index.md", "examples/supervisor.py")
    assert {*needed, "src/scepsy/py.typed", "tests/test_distribution.py", "benchmarks/outcome.py"} <= names
    assert not {name for name in names if name.startswith((".ci", "build/", "dist/", ".venv"))}
