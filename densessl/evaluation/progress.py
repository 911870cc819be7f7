"""Progress of a loop: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from mmengine.dist import is_main_process

T = TypeVar('T')

_BAR = 30
_LINE_SECONDS = 30


def progress(
    items: Iterable[T], total: int, title: str, stream: TextIO | None = None
) -> Iterator[T]:
    """Hand on the items and say on stderr how many are done.

    On a terminal a bar is drawn over itself. Elsewhere a line follows every 30 seconds,
    and one at the end. Ranks other than the first are silent.

    Args:
        items: what to loop over.
        total: how many there are.
        title: what is being done, such as ``'features of train'``.
        stream: where to write; None is stderr.
    """
    stream = stream or sys.stderr
    bar = stream.isatty()
    start = shown = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        due = now - shown > (0.1 if bar else _LINE_SECONDS) or done == total
        if due and is_main_process():
            shown = now
            print(_line(done, total, title, now - start, bar), file=stream, end='')
            stream.flush()


def _line(done: int, total: int, title: str, seconds: float, bar: bool) -> str:
    last = done == total
    left = '' if last else f', {seconds / done * (total - done):.0f} s left'
    words = f'{title}: {done}/{total}, {seconds:.0f} s{left}'
    if not bar:
        return f'{words}\n'
    full = _BAR * done // total
    end = '\n' if last else ''
    return f'\r\x1b[K[{"#" * full}{"." * (_BAR - full)}] {words}{end}'
