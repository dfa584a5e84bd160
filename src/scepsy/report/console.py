"""Where commands print."""

from __future__ import annotations

from rich.console import Console


class CommandConsole(Console):
    """A console that leaves it to the command line what a closed pipe means: rich would end with 1."""

    def on_broken_pipe(self) -> None:
        """Tell the caller."""
        raise BrokenPipeError
