"""A training config: it builds, all of it is read, and its batches fit the run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import Registry
from torch.utils.data import DataLoader, Dataset

from densessl.engine.checkpoint import list_runs
from densessl.engine.launch import load_config, parse_args
from densessl.errors import DenseSSLError
from densessl.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    TRANSFORMS,
)

from .check import Check
from .machine import MIB, Loading

_FEW_STEPS = 10
# What MMEngine's runner reads of sections that no constructor checks.
_READ = {
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'env_cfg.mp_cfg': {'mp_start_method', 'opencv_num_threads'},
    'randomness': {'seed', 'deterministic', 'diff_rank_seed'},
}
_LOADER = {'num_batch_per_epoch', 'disable_subprocess_warning'}
_GIVEN = {'self', 'runner', 'dataloader'}  # to a loop, by the runner


def load(
    config: str | None,
    data: list[str] | None = None,
    work_dir: str | None = None,
    options: list[str] | None = None,
    preset: str | None = None,
) -> Config:
    """A config or preset as ``tools/train.py`` reads it, with the same arguments."""
    words = [config] if config else []
    for option, values in (
        ('--preset', preset and [preset]),
        ('--data', data),
        ('--work-dir', work_dir and [work_dir]),
        ('--cfg-options', options),
    ):
        words += [option, *values] if values else []
    return load_config(parse_args(words))


def check_parts(cfg: Config) -> Iterator[Check]:
    """Hooks and the like can be built, and every key is read by something."""
    for name, hook in cfg.default_hooks.items():
        if hook is not None:
            build(f'default_hooks.{name}', HOOKS, hook)
    for number, hook in enumerate(cfg.get('custom_hooks') or ()):
        build(f'custom_hooks.{number}', HOOKS, hook)
    if cfg.get('log_processor'):
        build('log_processor', LOG_PROCESSORS, cfg.log_processor)
    lost = unread_keys(cfg)
    for key, known in lost.items():
        near = ', '.join(sorted(known))
        yield Check(
            'fail', 'config', f'nothing reads the key {key!r}', f'use one of {near}'
        )
    if not lost:
        yield Check('ok', 'config', f'{cfg.filename} is read to the last key')


def unread_keys(cfg: Config) -> dict[str, set[str]]:
    """Keys of sections that MMEngine passes over in silence, with those it knows."""
    loop = inspect.signature(LOOPS.get(cfg.train_cfg.type).__init__).parameters
    loader = inspect.signature(DataLoader.__init__).parameters
    sections = _READ | {
        'train_cfg': set(loop) - _GIVEN | {'type'},
        'train_dataloader': set(loader) - _GIVEN | _LOADER,
    }
    found = {}
    for section, known in sections.items():
        node: Any = cfg
        for part in section.split('.'):
            node = node.get(part) or {}
        found |= {f'{section}.{key}': known for key in node if key not in known}
    return found


def dataset(cfg: Config) -> Dataset:
    """The pictures a config trains on; DenseSSLError where they cannot be had."""
    return build('train_dataloader.dataset', DATASETS, cfg.train_dataloader.dataset)


def noise_samples(cfg: Config, count: int) -> list[dict[str, Any]]:
    """Pictures of noise through a config's own crops, whatever it trains on."""
    pictures = cfg.get('pictures') or {}
    bits, channels = pictures.get('bits', 8), pictures.get('channels', 'rgb')
    shape = (256, 256, 3 if channels == 'rgb' else channels)
    steps = [
        build('train_dataloader.dataset.pipeline', TRANSFORMS, step)
        for step in cfg.train_dataloader.dataset.pipeline
    ]
    samples = []
    for number in range(count):
        rng = np.random.default_rng(number)
        image = rng.integers(0, 2**bits, shape, dtype=f'uint{bits}')
        results = dict(img=image, path=str(number), rng=rng)
        for step in steps:
            if not hasattr(step, 'endings'):  # a reader
                results = step(results)
        samples.append(results)
    return samples


def loading(cfg: Config, processes: int) -> Loading:
    """What the loader of a config holds at once."""
    loader = cfg.train_dataloader
    (sample,) = noise_samples(cfg, 1)
    views = sample['inputs'].values()
    return Loading(
        processes=processes,
        workers=loader.num_workers,
        prefetch=loader.get('prefetch_factor') or 2,
        batch_bytes=loader.batch_size
        * sum(view.numel() * view.element_size() for view in views),
        batch_tensors=len(views) + 4,  # those of the geometry
    )


def largest_view(cfg: Config) -> int:
    """Longer side of the largest view, in px; 0 where the config cuts none."""
    (sample,) = noise_samples(cfg, 1)
    return max(
        (max(views.shape[-2:]) for views in sample['inputs'].values()), default=0
    )


def check_steps(cfg: Config, pictures: Dataset, processes: int) -> Iterator[Check]:
    """Batch, processes and epochs against the number of pictures."""
    loader = cfg.train_dataloader
    sampler = DATA_SAMPLERS.build(
        loader.sampler, default_args=dict(dataset=pictures, seed=0)
    )
    batches = DATA_SAMPLERS.build(
        loader.batch_sampler,
        default_args=dict(
            sampler=sampler,
            batch_size=loader.batch_size,
            rank=0,
            world_size=processes,
        ),
    )
    parts = cfg.model.get('accumulate', 1)
    about = (
        f'{len(batches)} an epoch of {len(sampler)} images from {len(pictures)} '
        f'pictures, {loader.batch_size} x {processes} each, {cfg.train_cfg.max_epochs} '
        'epochs'
    )
    if parts > 0 and loader.batch_size % parts:
        yield Check(
            'fail',
            'steps',
            f'a batch of {loader.batch_size} does not split into model.accumulate='
            f'{parts} equal parts',
            f'set train_dataloader.batch_size={-(-loader.batch_size // parts) * parts}',
        )
    elif len(batches) < _FEW_STEPS:
        yield Check(
            'warn',
            'steps',
            about,
            'warm-up and schedules count epochs: set train_dataloader.sampler.length='
            f'{100 * loader.batch_size * processes} or so, or a smaller batch',
        )
    else:
        yield Check('ok', 'steps', about)


def disk_need(cfg: Config, checkpoint_bytes: int) -> tuple[int, str]:
    """Bytes of the checkpoints that lie in a work dir at once, and that in words."""
    hook = cfg.default_hooks.checkpoint
    count = hook.get('keep', 3)
    if count == 0:  # all
        count = -(-cfg.train_cfg.max_epochs // hook.get('interval', 1))
    count += 1  # a new one is written before an old one goes
    need = count * checkpoint_bytes
    return need, f'{count} checkpoints of {checkpoint_bytes / MIB:.0f} MiB'


def check_work_dir(cfg: Config) -> Iterator[Check]:
    """The work dir holds no run that this one would meet."""
    runs = list_runs(Path(cfg.work_dir))
    if runs:
        yield Check(
            'warn',
            'work dir',
            f'{cfg.work_dir} holds a run ({runs[-1].name})',
            'go on with it by tools/train.py --resume, or choose another --work-dir',
        )
    else:
        yield Check('ok', 'work dir', f'{cfg.work_dir} holds no run')


def build(where: str, registry: Registry, cfg: dict) -> Any:
    """A part of a config.

    Raises:
        DenseSSLError: it cannot be built; ``where`` in the config says which.
    """
    try:
        return registry.build(cfg)
    except DenseSSLError:
        raise
    except Exception as error:
        text = ' '.join(str(error.args[0] if error.args else error).split())
        raise DenseSSLError(
            f'{where}: {text}; correct the config, or take the key out'
        ) from error
