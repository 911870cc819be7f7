"""Saving and resuming runs."""

from __future__ import annotations

from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook

from densessl.engine.checkpoint import (
    list_runs,
    load_newest_run,
    load_run,
    restore_run,
    save_run,
)
from densessl.engine.distributed import unwrap
from densessl.engine.start import start_from
from densessl.errors import DenseSSLError
from densessl.registry import HOOKS


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Saves the run, and the teacher's backbone, every few epochs and at the end.

    Args:
        interval: epochs between two checkpoints.
        interval_steps: also every so many steps; 0 for not.
        keep: how many of the newest to keep; 0 keeps all.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int = 1, interval_steps: int = 0, keep: int = 3):
        self.interval = interval
        self.interval_steps = interval_steps
        self.keep = keep

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Save in the middle of an epoch."""
        steps = runner.iter + 1
        in_epoch = steps % runner.train_loop.steps_per_epoch
        if self.interval_steps and in_epoch and steps % self.interval_steps == 0:
            self._save(runner, steps)

    def after_train_epoch(self, runner) -> None:
        """Save at the end of an epoch."""
        epochs = runner.epoch + 1
        if epochs % self.interval == 0 or epochs == runner.max_epochs:
            self._save(runner, runner.iter)

    @master_only
    def _save(self, runner, steps: int) -> None:
        folder = Path(runner.work_dir)
        path = save_run(runner, steps, folder)
        runner.logger.info(f'saved {path}')
        if self.keep:
            for old in list_runs(folder)[: -self.keep]:
                old.unlink()


@HOOKS.register_module()
class ResumeHook(Hook):
    """Goes on with a run, or starts one from weights, just before training.

    Args:
        resume: a checkpoint of this run; ``'newest'`` finds it in the work dir.
        init_from: weights that start a new run: a ``backbone.safetensors``, or what
            ``tools/convert.py import`` wrote.
        add_heads: let ``resume`` take a checkpoint that lacks some of the heads.
        inflate_channels: let ``init_from`` take weights of another number of channels,
            see :func:`densessl.interop.channels.inflate_channels`.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self,
        resume: str | None = None,
        init_from: str | None = None,
        add_heads: bool = False,
        inflate_channels: bool = False,
    ) -> None:
        if resume and init_from:
            raise DenseSSLError(
                '--resume and --init-from exclude each other: the first goes on with a '
                'run, the second starts a new one; give one of them'
            )
        if add_heads and not resume:
            raise DenseSSLError(
                '--add-heads goes on with a run that lacks heads; name its checkpoint '
                'by --resume STEP_PTH'
            )
        self.resume = resume
        self.add_heads = add_heads
        if inflate_channels and not init_from:
            raise DenseSSLError(
                '--inflate-channels spreads weights over other channels; name the '
                'weights by --init-from FILE'
            )
        self.init_from, self.inflate_channels = init_from, inflate_channels

    def before_train(self, runner) -> None:
        """Load what was asked for."""
        if self.resume:
            if self.resume == 'newest':
                path, state = load_newest_run(Path(runner.work_dir))
            else:
                path = Path(self.resume)
                state = load_run(path)
            restore_run(runner, state, path, self.add_heads)
            runner.logger.info(f'resumed {path} after step {runner.iter}')
        elif self.init_from:
            for line in start_from(
                unwrap(runner.model), self.init_from, inflate=self.inflate_channels
            ):
                runner.logger.info(line)
