"""What a user can put right, told in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command line prints the message as one line, without a traceback, and exits with 2.

    The message names the file or key, what was expected and how to fix it.
    """


class Unsound(Exception):
    """What a check found wrong, a line each. The command line prints the lines and exits with 1."""


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the closest of `names`, or "" when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
