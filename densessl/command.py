"""How every command line ends: 0, or users' errors in one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from torch import distributed

from densessl.errors import DenseSSLError, one_line


def run_command(command: Callable[..., object], *args: Any) -> int:
    """Run a command; a `DenseSSLError` is one line on stderr, not a traceback.

    With ``DENSESSL_TRACEBACK`` set, the error is raised as it is. The process group, if
    there is one, is left either way.

    Args:
        command: what the command line asks for; what it returns is dropped.
        *args: of the command.

    Returns:
        The exit code: 0, or 2 after a `DenseSSLError`.
    """
    try:
        command(*args)
    except DenseSSLError as error:
        if os.environ.get('DENSESSL_TRACEBACK'):
            raise
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 2
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    return 0
