import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import scepsy.deployment.shim as shim_module

SHIM = shim_module.__file__

# An engine like vLLM: forks a child in its session and one outside, which forks again; ignores SIGTERM if told to.
ENGINE = """
import os, signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
nested = "import subprocess, sys, time; subprocess.Popen(%r); time.sleep(600)" % (sleeper,)
subprocess.Popen(sleeper)
subprocess.Popen([sys.executable, "-c", nested], start_new_session=True)
print("up", os.getsid(0) == os.getpid(), flush=True)
time.sleep(600)
"""


class Shim:
    def __init__(self, folder, *words, grace_s=0.3):
        self.log = folder / "engine.log"
        self.scratch = folder / "for-the-engine"
        self.scratch.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", SHIM, str(grace_s), str(self.log), str(self.scratch), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(self.scratch)},
        )
        self.engine = self.process.stdout.readline()

    def wait(self):
        code = self.process.wait(10)
        self.close()
        return code

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(10)


@pytest.fixture
def start(tmp_path, process_table, wait):
    """Start a shim on the engine; returns when its four processes are there."""

    def make(*words, **options):
        shim = Shim(tmp_path, sys.executable, "-c", ENGINE, *words, **options)
        wait(lambda: len(process_table()) == 5)
        return shim

    return make


@pytest.mark.parametrize("how", ["its pipe ends", "it is told"])
@pytest.mark.parametrize("stubborn", [(), ("stubborn",)])
def test_the_whole_tree_ends_when(start, process_table, how, stubborn):
    shim = start(*stubborn)
    assert int(shim.engine) > 0
    if how == "it is told":
        shim.process.terminate()
        shim.process.wait(10)
    assert shim.close() == (128 + signal.SIGKILL if stubborn else 128 + signal.SIGTERM)
    assert process_table() == []
    assert not shim.scratch.exists()
    assert "up True" in shim.log.read_text()


def test_the_rest_ends_with_the_engine(start, process_table):
    shim = start()
    os.kill(int(shim.engine), signal.SIGKILL)
    assert shim.wait() == 128 + signal.SIGKILL
    assert process_table() == []


def test_the_engines_exit_code_is_passed_on(tmp_path, process_table):
    shim = Shim(tmp_path, "sh", "-c", "echo words; echo more >&2; exit 7")
    assert shim.wait() == 7
    assert shim.log.read_text() == "words\nmore\n"


def test_a_command_that_cannot_be_started(tmp_path, process_table):
    shim = Shim(tmp_path, "/nowhere/engine")
    assert (shim.engine, shim.wait()) == (b"", 127)
    assert shim.log.read_text() == "cannot start /nowhere/engine: No such file or directory\n"
    assert not shim.scratch.exists()


def test_what_a_killed_shim_leaves_can_be_ended(start, process_table, wait):
    from scepsy.deployment.processes import Identity, identify
    from scepsy.deployment.state import Kept, end_kept

    shim = start()
    kept = Kept(id="x", shim=identify(shim.process.pid), engine=identify(int(shim.engine)), scratch=str(shim.scratch))
    # An id that has been given to another process since is left alone.
    reused = Identity(pid=kept.engine.pid, ticks=kept.engine.ticks - 1)
    end_kept(Kept(id="y", shim=Identity(pid=os.getpid(), ticks=1), engine=reused, scratch=str(shim.scratch / "none")))
    assert len(process_table()) == 5
    shim.process.kill()
    shim.close()
    wait(lambda: int(shim.engine) not in [pid for pid, _ in process_table()])  # it dies with its shim
    assert len(process_table()) == 3
    # Those that have left the engine's session are known by the folder that they were given for temporary files.
    end_kept(kept)
    assert not shim.scratch.exists()
    assert process_table() == []


@pytest.mark.parametrize("shim_is_killed", [False, True])
def test_shared_memory_is_cleaned_up_by_its_tracker(tmp_path, process_table, wait, shim_is_killed):
    """Python's resource tracker is spared until all others are dead, so that it removes what they leaked."""
    from scepsy.deployment.processes import identify
    from scepsy.deployment.state import Kept, end_kept

    code = (
        "import signal, sys, time\n"
        "from multiprocessing.shared_memory import SharedMemory\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "memory = SharedMemory(create=True, size=16)\n"
        "print(memory.name, flush=True)\n"
        "time.sleep(600)\n"
    )
    shim = Shim(tmp_path, sys.executable, "-c", code)
    wait(lambda: shim.log.exists() and shim.log.read_text().strip())
    block = Path("/dev/shm") / shim.log.read_text().strip().splitlines()[0]  # noqa: S108 - where Linux keeps it
    assert block.exists()
    kept = Kept(id="x", shim=identify(shim.process.pid), engine=identify(int(shim.engine)), scratch=str(shim.scratch))
    if shim_is_killed:
        shim.process.kill()
        shim.close()
        end_kept(kept)
    else:
        assert shim.close() == 128 + signal.SIGKILL
    assert not block.exists()


def test_the_soft_limit_of_files_is_raised(tmp_path, process_table):
    shim = Shim(tmp_path, sys.executable, "-c", "import resource as r; print(list(r.getrlimit(r.RLIMIT_NOFILE)))")
    assert shim.wait() == 0
    soft, hard = json.loads(shim.log.read_text())
    assert soft == hard
