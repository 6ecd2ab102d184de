"""The one exception that means "the user can mend this"."""


class LonghaulError(Exception):
    """A mistake in what was given to Longhaul: one sentence that names the thing and the mend.

    The command line prints it without a traceback and exits with code 2.
    """
