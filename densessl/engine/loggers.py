"""Where the values of a run go: files always, TensorBoard and W&B by a switch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from densessl.errors import DenseSSLError

LOGGERS = ('tensorboard', 'wandb')


def use_loggers(cfg: Config, names: Sequence[str]) -> None:
    """Add TensorBoard or Weights & Biases to a training config.

    Losses, schedules and monitors go there as they go to ``vis_data/scalars.json`` of
    the work dir, a JSON object a line, in any case.

    Args:
        cfg: of a training, with its ``work_dir``.
        names: of ``LOGGERS``.

    Raises:
        DenseSSLError: the package of one is not installed.
    """
    backends = dict(
        tensorboard=dict(type='TensorboardVisBackend'),
        wandb=dict(
            type='WandbVisBackend',
            init_kwargs=dict(project='densessl', name=Path(cfg.work_dir).name),
        ),
    )
    for name in dict.fromkeys(names):
        if find_spec(name) is None:
            raise DenseSSLError(
                f'--log {name}: the package {name} is not installed; pip install '
                f'{name}, or leave it out: vis_data/scalars.json has the same values'
            )
        cfg.visualizer.vis_backends.append(backends[name])
