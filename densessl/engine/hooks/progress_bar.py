"""One line on a terminal that says how far the training is."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TextIO

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from densessl.registry import HOOKS

_CLEAR = '\x1b[2K'


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Step, time left, share of waiting for data and loss, on a terminal alone.

    Files and pipes get the log's plain lines and nothing else. The cursor goes back to
    the start of the line each time, so that a line of the log takes its place.

    Args:
        width: of the bar, in characters.
    """

    priority = 'VERY_LOW'  # after the times of the step are known

    def __init__(self, width: int = 24) -> None:
        self.width = width
        self.stream: TextIO = sys.stderr

    @property
    def _shown(self) -> bool:
        return is_main_process() and self.stream.isatty()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Draw."""
        if self._shown:
            self.stream.write(f'{_CLEAR}{self.line(runner)}\r')
            self.stream.flush()

    def after_train(self, runner) -> None:
        """Leave a clean line."""
        if self._shown:
            self.stream.write(_CLEAR)
            self.stream.flush()

    def line(self, runner) -> str:
        """What is drawn after a step."""
        done, total = runner.iter + 1, runner.max_iters
        full = self.width * done // total
        bar = '#' * full + '.' * (self.width - full)
        words = [f'[{bar}] {done}/{total}', f'{done / total:.0%}']
        scalars = runner.message_hub.log_scalars
        if 'train/time' in scalars:
            step = scalars['train/time'].mean(50)
            left = timedelta(seconds=round((total - done) * step))
            waits = scalars['train/data_time'].mean(50) / step
            words += [f'{left} left', f'data wait {waits:.0%}']
        if 'train/loss' in scalars:
            words.append(f'loss {scalars["train/loss"].current():.4f}')
        return '  '.join(words)
