"""Training: loop, optimiser, checkpoints, hooks and the launcher."""

from . import hooks
from .distributed import DistributedDataParallel
from .loop import TrainLoop
from .optim import MixedPrecisionOptimWrapper, TwoGroupConstructor
from .runner import Runner

__all__ = [
    'DistributedDataParallel',
    'MixedPrecisionOptimWrapper',
    'Runner',
    'TrainLoop',
    'TwoGroupConstructor',
    'hooks',
]
