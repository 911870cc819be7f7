"""MMEngine's runner with a quieter console."""

from __future__ import annotations

import itertools
import logging

import mmengine.runner
from mmengine.logging import MMLogger

from densessl.registry import RUNNERS

_RUN_NUMBER = itertools.count()
_THEIR_HOOKS = (
    *('runtime_info', 'timer', 'sampler_seed', 'logger'),
    *('param_scheduler', 'checkpoint'),
)
_LONG = 4  # lines; environment, config and hook listings are longer


class _NoListings(logging.Filter):
    """Keeps listings of many lines off the console; the log file has them."""

    def filter(self, record: logging.LogRecord) -> bool:
        lines = record.getMessage().count('\n')
        return record.levelno > logging.INFO or lines < _LONG


@RUNNERS.register_module()
class Runner(mmengine.runner.Runner):
    """MMEngine's runner; see its documentation."""

    def setup_env(self, env_cfg: dict) -> None:
        """Also number the runs of a process.

        MMEngine knows loggers and visualisers by the second a run began in; the second
        run of that second would write into the first one's files.
        """
        super().setup_env(env_cfg)
        if number := next(_RUN_NUMBER):
            self._timestamp += f'_{number}'

    def register_default_hooks(self, hooks: dict[str, dict | None] | None = None):
        """Also take None for a hook that is not MMEngine's, which leaves it out."""
        kept = {
            name: hook
            for name, hook in (hooks or {}).items()
            if hook is not None or name in _THEIR_HOOKS
        }
        super().register_default_hooks(kept)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """The logger, with listings in the file only."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(_NoListings())
        return logger
