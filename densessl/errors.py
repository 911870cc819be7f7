"""The one error that users can cause: a single line with the thing and the remedy."""

from __future__ import annotations


class DenseSSLError(Exception):
    """A wrong input; the message names it, says what was found, and the remedy.

    Command lines print the message alone, without a traceback, and exit with 2.
    """


def one_line(error: Exception) -> str:
    """The message alone, also of an error that came through a worker or a registry."""
    text = str(error.args[0]) if error.args else str(error)
    line = (
        text.strip().splitlines()[-1] if 'Traceback' in text else ' '.join(text.split())
    )
    for mark in ('DenseSSLError: ', 'UnreadableImageError: '):
        line = line.split(mark)[-1]
    return line
