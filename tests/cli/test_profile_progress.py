"""What a long measurement shows of itself."""

import io

import pytest
from rich.console import Console

from scepsy.cli.profile_progress import show_progress
from scepsy.profiling import Progress


@pytest.mark.parametrize("terminal", [True, False])
def test_measurements_are_lines_and_a_terminal_shows_the_time_left(terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, no_color=True)
    with show_progress(console) as tell:
        tell(Progress(text="engine ready [in brackets]", done=1, points=12, left_s=None))
        tell(Progress(text="prefill of 16 tokens: 1.0 ms", done=2, points=12, left_s=90.2))
    shown = file.getvalue()
    assert "engine ready [in brackets]\n" in shown
    assert "prefill of 16 tokens: 1.0 ms\n" in shown
    assert ("about 0:01:30 left" in shown) == terminal
    assert ("2/12" in shown.replace(" ", "")) == terminal
