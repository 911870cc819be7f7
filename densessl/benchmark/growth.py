"""How the time of a training step grows with what is fed to it."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from mmengine.config import Config

from densessl.errors import DenseSSLError

from .step import set_up, time_steps

AXES = {
    'batch': (1, 2, 4, 8),
    'views': (4, 8, 16, 32),
    'prototypes': (16384, 32768, 65536, 131072),
    'tokens': (96, 128, 160, 192, 224),
}


@dataclass(frozen=True)
class Growth:
    """Steps of growing size along one axis.

    Attributes:
        axis: a key of :data:`AXES`.
        sizes: images for ``'batch'``, views of the last role for ``'views'``, ``K`` of
            every head for ``'prototypes'``, patches of a view of the first role, whose
            side is changed, for ``'tokens'``.
        seconds: median of a step at each size.
    """

    axis: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """See :func:`fit_exponent`."""
        return fit_exponent(self.sizes, self.seconds)


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """``p`` of ``seconds = c * sizes ** p``, by least squares of the logarithms.

    Raises:
        ValueError: fewer than two sizes, or one that is not greater than 0.
    """
    if len(set(sizes)) < 2 or min(*sizes, *seconds) <= 0:
        raise ValueError(
            f'fit_exponent: {list(sizes)} with {list(seconds)}; give two sizes or '
            'more, all numbers greater than 0'
        )
    x, y = np.log(sizes), np.log(seconds)
    x = x - x.mean()
    return float(x @ y / (x @ x))


def measure_growth(
    cfg: Config,
    axes: Mapping[str, Sequence[int]] | None = None,
    steps: int = 3,
    batch_size: int = 1,
) -> Iterator[Growth]:
    """Measure axis after axis, everything else being as in a training config.

    Args:
        cfg: the config.
        axes: sizes an axis, by default :data:`AXES`; for ``'tokens'`` sides in pixels.
        steps: timed steps at each size, after one that is not.
        batch_size: images a step, but for ``'batch'``.

    Raises:
        DenseSSLError: no head of the config names its prototypes.
    """
    for axis, sizes in (axes or AXES).items():
        seconds, counts = [], []
        for size in sizes:
            changed = copy.deepcopy(cfg)
            counts.append(_change(changed, axis, size))
            images = size if axis == 'batch' else batch_size
            step = partial(_train_step, *set_up(changed, images))
            seconds.append(statistics.median(time_steps(step, steps, warmup=1)))
        yield Growth(axis, tuple(counts), tuple(seconds))


def _train_step(model, wrapper, batch) -> None:
    model.train_step(batch, wrapper)


def _change(cfg: Config, axis: str, size: int) -> int:
    """Change a config to one of the sizes of an axis; returns what it is to count."""
    pipeline = cfg.train_dataloader.dataset.pipeline
    views = next(step['views'] for step in pipeline if 'views' in step)
    if axis == 'views':
        views[-1]['count'] = size
    elif axis == 'prototypes':
        for head in _heads_with_prototypes(cfg):
            head['out_dims'] = size
    elif axis == 'tokens':
        for view in views:
            if view['role'] == views[0]['role']:
                view['size'] = size
        return math.ceil(size / cfg.model.backbone.get('patch_size', 32)) ** 2
    return size


def _heads_with_prototypes(cfg: Config) -> list:
    heads = [head for head in cfg.model.heads.values() if head and 'out_dims' in head]
    if not heads:
        raise DenseSSLError(
            f'growth: the heads {", ".join(cfg.model.heads)} have no out_dims, so no '
            'prototypes to vary; take a config with a ViewHead'
        )
    return heads
