"""The one error that users can cause: a single line with the thing and the remedy."""

from __future__ import annotations


class DenseSSLError(Exception):
    """A wrong input; the message names it, says what was found, and the remedy.

    Command lines print the message alone, without a traceback, and exit with 2.
    """
