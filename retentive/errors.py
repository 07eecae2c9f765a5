"""The exception that stands for a user's mistake, and the helper that names the nearest word."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A user's mistake. The message is one line: what was given, what is allowed, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the entry of `allowed` closest to `given`, or nothing."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
