"""The one exception that means "the user can mend this", and what helps to word it."""

import difflib
from collections.abc import Iterable


class LonghaulError(Exception):
    """A mistake in what was given to Longhaul: one sentence that names the thing and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint with the nearest of `names`, or nothing where none is near."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
