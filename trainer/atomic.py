"""Files and directories that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file or a directory: a path beside `path`, with its suffix.

    What was written there is renamed to `path`, in the place of what stood there, when the block ends, and removed when
    the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and path.exists():  # a directory cannot be renamed over another that is not empty
            old = path.with_name(f".old-{path.name}")
            _remove(old)
            path.rename(old)
            temporary.rename(path)
            _remove(old)
        else:
            temporary.replace(path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
