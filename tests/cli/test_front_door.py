"""What is met before any command runs: help, examples, suggestions, completion, what to do next, and how soon."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from scepsy import __version__
from scepsy.cli import COMMANDS, main, make_parser
from scepsy.cli.completion import SHELLS
from scepsy.cli.next_steps import describe_next_steps
from scepsy.cli.watch import _BAND, _DEAD_BAND
from scepsy_optimizer.adapt import BAND, DEAD_BAND

SHELL_SIGNS = ("|", "||", ">", "&&")


def parsers(parser):
    """Every parser below one that has no commands of its own, by its words."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield parser
    for action in inner:
        for child in action.choices.values():
            yield from parsers(child)


def test_every_help_has_an_example_and_every_argument_a_word():
    for parser in parsers(make_parser()):
        assert f"  {parser.prog} " in parser.epilog or f"(scepsy {parser.prog.split()[-1]}" in parser.epilog, (
            parser.prog
        )
        assert all(action.help for action in parser._actions), parser.prog


def test_every_example_is_understood():
    parser = make_parser()
    count = 0
    for command in parsers(parser):
        for line in command.epilog.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["scepsy"]:
                continue
            end = next((index for index, word in enumerate(words) if word in SHELL_SIGNS), len(words))
            assert parser.parse_args(words[1:end]).command == words[1]
            count += 1
    assert count >= len(COMMANDS)


def test_what_watch_says_of_its_defaults_is_what_the_optimizer_has():
    assert (_BAND, _DEAD_BAND) == (BAND, DEAD_BAND)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"scepsy {__version__}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimise"], "scepsy: no command 'optimise': did you mean optimize? See scepsy --help\n"),
        (["optimize"], "scepsy optimize: the following arguments are required: TRACES, --cluster; see scepsy"),
        (["plan", "shwo", "plan.yaml"], "scepsy plan: argument ACTION: invalid choice: 'shwo'"),
        (["collect", "--port", "99999"], "'99999' is no port: give a number from 1 to 65535, or 0 for a free one; see"),
        (["doctor", "--command", "'open"], 'scepsy doctor: --command "\'open": No closing quotation; write it as in'),
        pytest.param(
            ["demo", "--examples", "nowhere"],
            "scepsy demo: --examples nowhere: there is no beam_search.py in it",
            marks=pytest.mark.extras,
        ),
    ],
)
def test_words_that_are_wrong_get_one_line_with_the_way_out(capsys, words, told):
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert (code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert told in shown.err


def test_a_missing_extra_is_one_line_that_installs_it(capsys, monkeypatch):
    def run(_args, _console):
        raise ModuleNotFoundError("No module named 'aiohttp'", name="aiohttp.web")

    monkeypatch.setattr("scepsy.cli.stop.run", run)
    assert main(["stop"]) == 2
    assert capsys.readouterr().err == "scepsy stop: aiohttp is not installed: pip install 'scepsy[deploy]'\n"


def test_a_file_that_may_not_be_read_is_one_line(capsys, monkeypatch, tmp_path):
    plan = tmp_path / "plan.yaml"

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert main(["plan", "show", str(plan)]) == 2
    told = (
        f"scepsy plan: {plan}: cannot be read: Permission denied; expected a plan file, as scepsy optimize writes it\n"
    )
    assert capsys.readouterr().err == told


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupt(args, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("scepsy.cli.status"), "run", interrupt)
    assert main(["status"]) == 130
    assert capsys.readouterr().err == "scepsy status: interrupted\n"


def test_help_completion_and_what_comes_next_load_nothing_heavy(tmp_path):
    """Each takes as long as Python does to start, and argparse."""
    script = f"""
import contextlib, io, sys
from scepsy.cli import main
for words in [], ["--help"], *([name, "--help"] for name in {COMMANDS!r}):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words)
heavy = "aiohttp highspy msgspec networkx numpy opentelemetry psutil pydantic rich yaml".split()
print([name for name in heavy if name in sys.modules])
"""
    environment = {**os.environ, "SCEPSY_HOME": str(tmp_path)}
    words = [sys.executable, "-c", script]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert shown.stdout == "[]\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_told_every_command_and_where_files_go(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "what-if" in script
    installed = shutil.which(shell)
    if installed is not None:
        subprocess.run([installed, "-n"], input=script, text=True, check=True)


def test_bash_completes(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "scepsy.bash").write_text(capsys.readouterr().out)
    (tmp_path / "traces.jsonl").touch()

    def complete(*words):
        asked = f"source scepsy.bash; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_scepsy"
        asked += '; echo "${COMPREPLY[@]}"'
        shown = subprocess.run(
            [shutil.which("bash") or "", "-c", asked], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return shown.stdout.split()

    assert complete("scepsy", "opt") == ["optimize"]
    assert complete("scepsy", "optimize", "--what") == ["--what-if"]
    assert complete("scepsy", "deploy", "--engine", "em") == ["emulator"]
    assert complete("scepsy", "report", "tra") == ["traces.jsonl"]


def test_an_empty_directory_is_told_how_to_begin(scepsy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SCEPSY_TRACES", raising=False)
    code, out, err = scepsy()
    assert (code, err) == (0, "")
    assert "Found here: no traces, no plan; nothing is deployed." in out
    assert "scepsy demo " in out
    assert "scepsy collect --upstream" in out


def test_traces_ask_for_a_plan_and_a_plan_to_be_deployed(traces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCEPSY_TRACES", traces.name)
    shown = "\n".join(describe_next_steps())
    assert f"Found: traces in {traces.name}." in shown
    assert f"  scepsy optimize {traces.name} --cluster auto --rate 1 " in shown
    (tmp_path / "other.yaml").write_text("format: scepsy-cluster/1\n")
    (tmp_path / "my plan.yaml").write_text("format: scepsy-plan/1\n")
    (tmp_path / "locked.yaml").mkdir()
    shown = "\n".join(describe_next_steps())
    assert f"Found: plan my plan.yaml; traces in {traces.name}." in shown
    assert "  scepsy deploy 'my plan.yaml' " in shown


def test_what_runs_is_watched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scepsy.cli.next_steps._running", lambda: ["staging"])
    (tmp_path / "plan.yaml").write_text("format: scepsy-plan/1\n")
    shown = "\n".join(describe_next_steps())
    assert "Found: staging running; plan plan.yaml." in shown
    assert "  scepsy status staging --watch " in shown
    assert "  scepsy apply plan.yaml --name staging --dry-run " in shown


def test_json_is_all_that_standard_output_has(scepsy, traces, tmp_path, monkeypatch):
    """Also where a library would greet on it: as a process of its own."""
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    plan, page = tmp_path / "plan.yaml", tmp_path / "plan.html"
    words = ["optimize", traces, "--cluster", "4xH100", "--rate", "2", "--json", "-o", plan, "--html", page]
    command = [sys.executable, "-m", "scepsy", *map(str, words)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout)["plan"]["rate_rps"] == 2
    assert '"what_if": {' in page.read_text()
    code, out, _ = scepsy("plan", "show", plan, "--json")
    assert (code, json.loads(out)["wrong"]) == (0, [])
    code, out, _ = scepsy("plan", "diff", plan, plan, "--json")
    assert (code, json.loads(out)["steps"], json.loads(out)["interrupted"]) == (0, [], [])
    code, out, _ = scepsy("deploy", plan, "--to", "kubernetes", "--mode", "agent", "--image", "engines", "--json")
    assert (code, json.loads(out)["kind"]) == (0, "List")


def test_a_page_of_a_plan_file_has_what_the_plan_has(scepsy, traces, tmp_path):
    plan, page = tmp_path / "plan.yaml", tmp_path / "plan.html"
    assert scepsy("optimize", traces, "--cluster", "4xH100", "--rate", "2", "-o", plan)[0] == 0
    code, out, _ = scepsy("plan", "show", plan, "--html", page)
    assert code == 0
    assert "The bottleneck is " in out
    assert f"written to {page}" in out
    assert '"what_if": null' in page.read_text()
    assert '"llm_latency_s": {"' in page.read_text()


def test_a_process_without_standard_output_ends_in_order(monkeypatch, tmp_path):
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["status"]) == 0


def test_colours_are_for_terminals(scepsy):
    _, out, _ = scepsy("doctor")
    assert "\x1b" not in out
    assert "packages: " in out
