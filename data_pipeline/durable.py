"""What is on the disk, and not only in memory."""

import os
from pathlib import Path


def synchronise(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
