"""Where deployments leave their notes."""

from __future__ import annotations

import os
from pathlib import Path


def deployments_folder() -> Path:
    """Where deployments are noted: `$SCEPSY_HOME/deployments`, by default in `~/.scepsy`."""
    home = os.environ.get("SCEPSY_HOME")
    return (Path(home) if home else Path.home() / ".scepsy") / "deployments"
