"""Presets: a config that suits a number of pictures, fitted to the machine.

``tools/train.py --preset``; the configs are those of ``configs/presets``, their reasons
stand in docs/presets.md.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image

import densessl
from densessl.datasets.channels import LoadChannels
from densessl.datasets.image_io import ENDINGS
from densessl.datasets.unlabelled import scan_folder
from densessl.doctor.machine import cores
from densessl.errors import DenseSSLError

from .sizing import backbone_stages, fit_sides, image_bytes, images_at_once, split_batch

FOLDER = Path(densessl.__file__).parents[1] / 'configs/presets'
SIZES = {'1k': 3_000, '10k': 30_000, '100k': 300_000, '1m': float('inf')}
"""Pictures below which each size is taken: about the middle, by ratio, to the next."""
PROCESSES = {'1gpu': 1, '8gpu': 8}
"""Processes that a preset's batch and lr are written for."""
NAMES = ('cpu', *(f'{s}-pictures_{p}' for s in SIZES for p in PROCESSES))
QUICKSTART = 'configs/quickstart/selfpatch_vit-t8_demo.py'
GIB = 2**30

_MANY = 4  # processes from which on those of 8gpu are taken
_FEW = 300  # pictures
_HEADERS = 200  # that are read to learn the pictures' sides


@dataclass(frozen=True)
class Pictures:
    """What a look at folders finds.

    Attributes:
        count: pictures in all.
        folders: where they lie.
        side: median of their shorter sides in px, or None where no header of the
            sample can be read.
    """

    count: int
    folders: tuple[str, ...]
    side: float | None

    @classmethod
    def look(cls, folders: Sequence[str], endings: Sequence[str] = ENDINGS) -> Pictures:
        """Count the pictures below folders, and read a sample of their headers.

        Raises:
            DenseSSLError: a folder is missing, or without pictures.
        """
        paths: list[str] = []
        for folder in map(os.path.expanduser, folders):
            if not os.path.isdir(folder):
                raise DenseSSLError(
                    f"data folder '{folder}' is no folder; give the one that holds "
                    'the pictures'
                )
            names, _ = scan_folder(folder, endings)
            if not names:
                raise DenseSSLError(
                    f"data folder '{folder}' holds no picture; give one with "
                    f'{", ".join(endings[:-1])} or {endings[-1]} files'
                )
            paths += [os.path.join(folder, os.fsdecode(name)) for name in names]
        sample = paths[:: -(-len(paths) // _HEADERS)]
        sides = [side for side in map(_shorter_side, sample) if side]
        return cls(len(paths), tuple(folders), median(sides) if sides else None)


@dataclass(frozen=True)
class Machine:
    """What a training runs on; the same in all its processes.

    Attributes:
        gpus: that this machine has for it.
        processes: of the run, over all machines.
        local_processes: on this machine.
        memory: bytes for one process: of the smallest GPU, or half of the main memory,
            shared by the local processes.
        cores: of this machine.
    """

    gpus: int
    processes: int
    local_processes: int
    memory: int
    cores: float

    @classmethod
    def look(cls) -> Machine:
        """This machine, and the processes that torchrun announces."""
        processes = int(os.environ.get('WORLD_SIZE', 1))
        local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # All, not what is free now: processes that find different numbers of parts
        # would wait for each other for ever.
        if gpus:
            properties = map(torch.cuda.get_device_properties, range(gpus))
            memory = min(one.total_memory for one in properties)
        else:
            pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
            memory = pages // 2 // local
        return cls(gpus, processes, local, memory, cores())


def choose(count: int, machine: Machine) -> str:
    """Name of the preset for a number of pictures on a machine."""
    if not machine.gpus:
        return 'cpu'
    size = next(name for name, below in SIZES.items() if count < below)
    return f'{size}-pictures_{"8gpu" if machine.processes >= _MANY else "1gpu"}'


def preset_path(name: str) -> str:
    """The config of a preset.

    Raises:
        DenseSSLError: there is none of this name.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, ['auto', *NAMES], 1)
        guess = f'; did you mean {near[0]!r}?' if near else ''
        raise DenseSSLError(
            f'--preset {name}: no such preset{guess}; choose auto, {", ".join(NAMES)}'
        )
    return str(FOLDER / f'{name}.py')


def find_preset(
    name: str, folders: Sequence[str] | None, options: Collection[str]
) -> tuple[str, Pictures, Machine]:
    """The config that ``--preset`` means, and what it was chosen for.

    Args:
        name: of a preset, or ``'auto'``.
        folders: what ``--data`` gave.
        options: keys of ``--cfg-options``.

    Raises:
        DenseSSLError: no such preset, no folder, or a folder without pictures.
    """
    path = None if name == 'auto' else preset_path(name)
    if not folders:
        raise DenseSSLError(
            f'--preset {name} looks at the pictures it trains on; add --data DIR'
        )
    endings = LoadChannels.endings if 'pictures.channels' in options else ENDINGS
    pictures, machine = Pictures.look(folders, endings), Machine.look()
    return path or preset_path(choose(pictures.count, machine)), pictures, machine


def fit_preset(
    cfg: Config, pictures: Pictures, machine: Machine, options: Collection[str] = ()
) -> list[str]:
    """Fit a preset to the machine: batch and its parts, workers, sides of the views.

    The images of a step stay the preset's; what ``options`` names stays as it is.

    Args:
        cfg: the preset with the overrides of the command line; changed in place.
        pictures: to train on.
        machine: to train on.
        options: keys of ``--cfg-options``.

    Returns:
        Lines that say what was chosen, and why.
    """
    name = Path(cfg.filename).stem
    steps = cfg.train_dataloader.dataset.pipeline
    views = next((step.views for step in steps if 'views' in step), [])
    lines = [
        f'preset {name} ({cfg.filename}; reasons: docs/presets.md)',
        f'pictures: {pictures.count:,} in {", ".join(pictures.folders)}, shorter side '
        + (f'{pictures.side:g} px (median)' if pictures.side else 'not known'),
        *_advice(name, pictures, machine),
        _fit_views(cfg, views, pictures.side, options),
        _fit_batch(cfg, views, pictures.count, machine, options),
        _fit_workers(cfg, machine, options),
    ]
    return [line for line in lines if line]


def print_choice(lines: Sequence[str]) -> None:
    """Print lines in the first process, the later ones indented."""
    if os.environ.get('RANK', '0') == '0':
        print('\n  '.join(lines), flush=True)


def _advice(name: str, pictures: Pictures, machine: Machine) -> list[str]:
    lines = []
    if pictures.count < _FEW:
        lines.append(
            f'few pictures: fewer than {_FEW} teach a fresh network little; going on '
            'from public weights suits them better, see configs/methods/continue'
        )
    idle = machine.gpus - machine.local_processes
    if machine.gpus and idle > 0:
        lines.append(
            f'GPUs: {idle} of {machine.gpus} stay idle; bash tools/dist_train.sh '
            f'--preset=auto {machine.gpus} --data DIR uses all'
        )
    if not machine.gpus:
        what = 'so a small ViT on views of 64 px' if name == 'cpu' else 'and it is slow'
        lines.append(
            f'no GPU, {what}: presets for GPUs show 1 to 200 million images, and 2 CPU '
            'cores train Swin-T and ViT-S on fewer than one a second; for a result in '
            f'minutes: python tools/train.py {QUICKSTART} --data DIR'
        )
    return lines


def _fit_views(cfg: Config, views: Sequence[dict], side: float | None, options) -> str:
    stages = backbone_stages(cfg.model.backbone)
    mine = any(key.startswith('train_dataloader.dataset') for key in options)
    old = [view['size'] for view in views]
    if side is None or stages is None or mine or not views:
        return ''
    new = fit_sides(old, side, stages[-1][0])
    if new == old:
        return ''
    for view, size in zip(views, new, strict=True):
        view['size'] = size
    shown = [' + '.join(map(str, sorted(set(x), reverse=True))) for x in (old, new)]
    return f'views: {shown[1]} px in place of {shown[0]}, as the pictures are small'


def _fit_batch(
    cfg: Config, views: Sequence[dict], count: int, machine: Machine, options
) -> str:
    loader, device = cfg.train_dataloader, 'cuda' if machine.gpus else 'cpu'
    hardware = Path(cfg.filename).stem.split('_')[-1]
    images = loader.batch_size * PROCESSES.get(hardware, 1)
    if 'train_dataloader.batch_size' in options:
        images = loader.batch_size * machine.processes
    need = image_bytes(cfg.model.backbone, views, device)
    each, fits = images / machine.processes, images
    if need is not None:
        fits = images_at_once(machine.memory, need, each, views)
    each, parts = split_batch(images, machine.processes, fits)
    if 'model.accumulate' in options:
        parts = cfg.model.accumulate
    loader.batch_size, cfg.model.accumulate = each, parts
    total = each * machine.processes
    steps = cfg.train_cfg.max_epochs * ((loader.sampler.length or count) // total)
    takes = 'is not known' if need is None else f'is about {need / 2**20:.0f} MiB'
    return (
        f'batch: {total} images a step = {machine.processes} process(es) x {parts} '
        f'part(s) of {each / parts:g}, {steps:,} steps; memory of an image {takes}, '
        f'of a process {machine.memory / GIB:.0f} GiB'
    )


def _fit_workers(cfg: Config, machine: Machine, options) -> str:
    loader = cfg.train_dataloader
    if 'train_dataloader.num_workers' not in options:
        share = int(machine.cores) // machine.local_processes
        loader.num_workers = min(loader.num_workers, max(share, 1))
    return (
        f'workers: {loader.num_workers} a process, for {machine.cores:g} cores and '
        f'{machine.local_processes} process(es)'
    )


def _shorter_side(path: str) -> int | None:
    """In px, from the header; None where it cannot be read."""
    try:
        if path.lower().endswith('.npy'):
            return sorted(np.load(path, mmap_mode='r').shape)[-2]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path) as picture:
                return min(picture.size)
    except (OSError, SyntaxError, ValueError, IndexError, Image.DecompressionBombError):
        return None
