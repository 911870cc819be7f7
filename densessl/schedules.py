"""Schedules in closed form: the value at a step depends on the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
