"""Which code ran."""

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this code, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True
        )
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
