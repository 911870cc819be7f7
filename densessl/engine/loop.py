"""The training loop: MMEngine's, able to start in the middle of an epoch."""

from __future__ import annotations

import torch
from mmengine.runner import EpochBasedTrainLoop

from densessl.models import NonFiniteLossError
from densessl.registry import LOOPS
from densessl.schedules import Progress

from .checkpoint import save_incident
from .distributed import unwrap


@LOOPS.register_module()
class TrainLoop(EpochBasedTrainLoop):
    """Epochs whose every step depends on the seed and the step's number alone.

    Before each step the model is told how far the training is, and torch's generator
    is seeded from ``(seed, step, rank)``. Together with samples that depend on
    ``(seed, epoch, position)``, a resumed run repeats an uninterrupted one exactly, and
    no generator's state needs saving.

    Args:
        runner: the runner.
        dataloader: config or loader whose batch sampler has ``set_position``.
        max_epochs: epochs to train.
    """

    def __init__(self, runner, dataloader, max_epochs: int) -> None:
        super().__init__(runner, dataloader, max_epochs)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return len(self.dataloader)

    @property
    def progress(self) -> Progress:
        """How far the training is."""
        return Progress(self.iter, self.max_iters, self.steps_per_epoch)

    def run_epoch(self) -> None:
        """One epoch, or what is left of it after a resume."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self.iter - self.epoch * self.steps_per_epoch
        self.dataloader.batch_sampler.set_position(self.epoch, done)
        for idx, data_batch in enumerate(self.dataloader, done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """One step; a batch whose loss is not finite is kept for inspection."""
        runner = self.runner
        unwrap(runner.model).progress = self.progress
        torch.manual_seed(step_seed(runner.seed, self.iter, runner.rank))
        try:
            super().run_iter(idx, data_batch)
        except NonFiniteLossError as error:
            path = save_incident(runner, data_batch, str(error))
            raise NonFiniteLossError(
                f'step {self.iter}: {error}; see {path}'
            ) from error


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step of one rank, 63 bits."""
    mixed = (seed + 1) * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank
    mixed = (mixed ^ (mixed >> 31)) * 0x94D049BB133111EB
    return (mixed ^ (mixed >> 29)) & (2**63 - 1)
