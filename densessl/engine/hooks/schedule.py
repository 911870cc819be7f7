"""Learning rate and weight decay by step."""

from __future__ import annotations

from mmengine.hooks import Hook

from densessl.registry import HOOKS
from densessl.schedules import Progress, cosine


def learning_rate(
    peak: float,
    end: float,
    warmup_steps: int,
    progress: Progress,
    product: bool = False,
) -> float:
    """Linear from 0 to ``peak`` over the warm-up's steps, then a cosine to ``end``.

    The last step of the warm-up has the peak already, as in DINO's code. With
    ``product`` the cosine spans the whole run, and the warm-up is a factor of it.
    """
    step = progress.step
    share = min(step / max(warmup_steps - 1, 1), 1.0) if warmup_steps else 1.0
    if product:
        return share * cosine(peak, end, step, progress.total_steps)
    if step < warmup_steps:
        return share * peak
    return cosine(peak, end, step - warmup_steps, progress.total_steps - warmup_steps)


@HOOKS.register_module()
class ScheduleHook(Hook):
    """Sets lr and weight decay before every step, each a function of the step alone.

    The config's lr holds for ``base_batch_size`` images a step and is scaled by the
    real batch, ``lr x batch / base`` (the line is logged); its weight decay is the
    first step's. Groups without weight decay stay without.

    Args:
        warmup_epochs: length of the linear warm-up from 0.
        min_lr: learning rate at the end, not scaled; a share where ``relative``.
        relative: whether ``min_lr`` is a share of the peak.
        end_weight_decay: weight decay at the end; None keeps it constant.
        base_batch_size: images the config's lr holds for; None scales nothing.
        product: a cosine over the whole run times the warm-up (LOCA's code), not one
            after the other.
    """

    priority = 'HIGHEST'  # before the values are logged

    def __init__(
        self,
        warmup_epochs: float = 10,
        min_lr: float = 1e-6,
        *,
        relative: bool = False,
        end_weight_decay: float | None = None,
        base_batch_size: int | None = 256,
        product: bool = False,
    ) -> None:
        self.warmup_epochs = warmup_epochs
        self.min_lr = min_lr
        self.relative = relative
        self.end_weight_decay = end_weight_decay
        self.base_batch_size = base_batch_size
        self.product = product

    def before_run(self, runner) -> None:
        """Note the config's values, and scale the lr by the batch."""
        optimizer = runner.optim_wrapper.optimizer
        batch = runner.train_dataloader.batch_sampler.global_batch_size
        scale = batch / self.base_batch_size if self.base_batch_size else 1.0
        lr = optimizer.defaults['lr']
        runner.logger.info(
            f'learning rate: {lr:g} x {batch} / {self.base_batch_size or batch} images '
            f'= {lr * scale:g} ({runner.world_size} process(es), '
            f'{batch // runner.world_size} images each)'
        )
        self._peak = lr * scale
        self._base = [
            (group['lr'] / lr if lr else 0.0, group['weight_decay'])
            for group in optimizer.param_groups
        ]

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Set both for the step to come."""
        progress = runner.train_loop.progress
        warmup = round(self.warmup_epochs * progress.steps_per_epoch)
        end = self.min_lr * self._peak if self.relative else self.min_lr
        lr = learning_rate(
            self._peak, min(end, self._peak), warmup, progress, self.product
        )
        optimizer = runner.optim_wrapper.optimizer
        start = optimizer.defaults['weight_decay']
        ratio = 1.0
        if self.end_weight_decay is not None and start:
            now = cosine(
                start, self.end_weight_decay, progress.step, progress.total_steps
            )
            ratio = now / start
        groups = zip(optimizer.param_groups, self._base, strict=True)
        for group, (lr_share, weight_decay) in groups:
            group['lr'] = lr * lr_share
            group['weight_decay'] = weight_decay * ratio
