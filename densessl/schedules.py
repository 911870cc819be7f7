"""Schedules in closed form: the value at a step depends on the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from densessl.errors import DenseSSLError


@dataclass(frozen=True)
class Progress:
    """How far the training is.

    Attributes:
        step: optimiser steps done before this one, from 0.
        total_steps: steps of the whole run.
        steps_per_epoch: steps of one epoch.
    """

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.steps_per_epoch


def cosine(start: float, end: float, step: int, total_steps: int) -> float:
    """Half a cosine wave from ``start`` at step 0 to ``end`` at ``total_steps``."""
    progress = min(max(step / max(total_steps, 1), 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Temperature:
    """Teacher temperature: linear from ``start`` to ``end``, then constant.

    Attributes:
        start: value at step 0, > 0.
        end: value once the warm-up is over, > 0.
        warmup_epochs: length of the linear part.
    """

    start: float
    end: float
    warmup_epochs: float = 0

    def __post_init__(self):
        if self.start <= 0 or self.end <= 0:
            raise DenseSSLError(
                f'teacher_temp: found {self.start} -> {self.end}; temperatures are '
                'greater than 0, the papers use 0.04 to 0.07'
            )

    @classmethod
    def of(cls, value: float | dict) -> Temperature:
        """From a number (constant) or ``dict(start, end, warmup_epochs)``."""
        return cls(**value) if isinstance(value, dict) else cls(value, value)

    def at(self, progress: Progress) -> float:
        """Value for the step that ``progress`` stands before."""
        warmup_steps = self.warmup_epochs * progress.steps_per_epoch
        if progress.step >= warmup_steps:
            return self.end
        return self.start + (self.end - self.start) * progress.step / warmup_steps


@dataclass(frozen=True)
class LossWeight:
    """Weight of a head's loss: 0, then linear to ``end``, then constant.

    Attributes:
        end: value in the end, >= 0.
        start_epoch: epochs of the run before the weight leaves 0.
        fade_epochs: length of the linear part; 0 is a jump.

    Raises:
        DenseSSLError: a value is below 0, or no number.
    """

    end: float
    start_epoch: float = 0
    fade_epochs: float = 0

    def __post_init__(self):
        for name, value in vars(self).items():
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number or value < 0:
                raise DenseSSLError(
                    f'loss_weight: {name}={value!r}; give a number of 0 or more'
                )

    @classmethod
    def of(cls, value: float | dict) -> LossWeight:
        """From a number (constant) or ``dict(end, start_epoch, fade_epochs)``."""
        if not isinstance(value, dict):
            return cls(value)
        known = [field.name for field in fields(cls)]
        if 'end' not in value or not set(value) <= set(known):
            raise DenseSSLError(
                f'loss_weight: found dict({", ".join(value)}); give end, and as needed '
                'start_epoch and fade_epochs'
            )
        return cls(**value)

    @property
    def moves(self) -> bool:
        """Whether it is 0 at first and something else later."""
        return self.end > 0 and (self.start_epoch > 0 or self.fade_epochs > 0)

    def at(self, progress: Progress) -> float:
        """Value for the step that ``progress`` stands before.

        Raises:
            DenseSSLError: the run ends before ``start_epoch``.
        """
        epochs = progress.total_steps / progress.steps_per_epoch
        if self.moves and self.start_epoch >= epochs:
            raise DenseSSLError(
                f'loss_weight: start_epoch={self.start_epoch:g} never comes, the run '
                f'has {epochs:g} epochs; start earlier, or leave the head out'
            )
        done = progress.step - self.start_epoch * progress.steps_per_epoch
        fade = self.fade_epochs * progress.steps_per_epoch
        if done < 0:
            return 0.0
        return self.end if done >= fade else self.end * done / fade
