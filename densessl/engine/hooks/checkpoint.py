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
from densessl.errors import DenseSSLError
from densessl.interop.backbone import load_strictly, read_backbone
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
        init_from: a ``backbone.safetensors`` whose weights start a new run.
        add_heads: let ``resume`` take a checkpoint that lacks some of the heads.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self,
        resume: str | None = None,
        init_from: str | None = None,
        add_heads: bool = False,
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
        self.init_from = init_from

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
            if self.init_from.endswith('.pth'):
                raise DenseSSLError(
                    f'--init-from: {self.init_from} is a checkpoint of a run, not '
                    'weights; give the backbone.safetensors beside it, or go on with '
                    'the run by --resume'
                )
            state, _ = read_backbone(self.init_from)
            model = unwrap(runner.model)
            for backbone in (model.backbone, model.teacher.backbone):
                load_strictly(backbone, state, f'--init-from: {self.init_from}')
            runner.logger.info(f'backbone of student and teacher: {self.init_from}')
