"""What the processes of a replica are and do: its tree, its listener, its workers."""

from __future__ import annotations

import psutil


def tree(pid: int) -> set[int]:
    """A process and all below it."""
    try:
        root = psutil.Process(pid)
        return {pid, *(child.pid for child in root.children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


def listeners(port: int) -> set[int | None]:
    """The processes that listen on a TCP port; None stands for one that cannot be seen."""
    return {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
    }


def title(pid: int) -> str:
    """The first word of its command line, which a process may have changed; empty if it is gone."""
    try:
        return "".join(psutil.Process(pid).cmdline()[:1])
    except psutil.Error:
        return ""
