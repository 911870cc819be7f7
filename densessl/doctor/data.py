"""A folder of pictures, by a random sample of it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from mmengine.config import Config

from densessl.benchmark.data import one_thread
from densessl.datasets.channels import LoadChannels
from densessl.datasets.image_io import UnreadableImageError
from densessl.datasets.statistics import ChannelStatistics, channel_statistics
from densessl.datasets.unlabelled import UnlabelledImages
from densessl.errors import DenseSSLError
from densessl.registry import MODELS

from .check import Check, failure
from .config import largest_view
from .machine import MIB, Loading, cores
from .sample import Picture, look

_PICTURES = 200  # of the sample
_FEW_PICTURES = 1000
_MANY = 0.1  # share of pictures that are smaller than a crop, of which a line tells
_FAR = 0.5  # standard deviations between the pictures' mean and the config's
_WIDER = 1.5  # times; between their standard deviations


def open_folder(
    folders: Sequence[str], channels: int = 1, bits: int = 8
) -> UnlabelledImages:
    """Folders of pictures without a config, to be read as they are stored."""
    return UnlabelledImages(list(folders), pipeline=[LoadChannels(channels, bits)])


def check_pictures(
    dataset: UnlabelledImages,
    cfg: Config | None,
    loading: Loading | None,
    images_per_second: float | None,
) -> Iterator[Check]:
    """All checks of a folder, on one sample of it.

    Args:
        dataset: of the config, or from :func:`open_folder`.
        cfg: the config, or None.
        loading: of the config, or None.
        images_per_second: that the steps of a process take; None if not known.
    """
    to_rgb = cfg is not None and _channels(cfg) == 'rgb'
    broken = (cfg.default_hooks.get('broken') if cfg else None) or {}
    sample = look(dataset, _PICTURES, as_stored=cfg is None)
    yield from check_count(dataset)
    yield from check_broken(sample, broken.get('max_broken', 0.01))
    kinds = Counter(p.kind for p in sample if p.kind)
    yield from check_kinds(sample, kinds, to_rgb)
    yield from check_sides(sample, largest_view(cfg) if cfg else 0)
    yield from check_duplicates(sample)
    yield from check_speed(dataset, sample, loading, images_per_second)
    if any(p.sides for p in sample) and (to_rgb or len(kinds) == 1):
        if cfg is None:
            dataset = open_folder(dataset.roots, *next(iter(kinds)))
        found = channel_statistics(dataset, min(len(sample), _PICTURES // 2))
        yield from check_statistics(found, cfg)


def check_count(dataset: UnlabelledImages) -> Iterator[Check]:
    """Pictures enough for a run of their own."""
    about = f'{len(dataset)} in {", ".join(dataset.roots)}'
    if len(dataset) < _FEW_PICTURES:
        yield Check(
            'warn',
            'pictures',
            about,
            f'few to learn from alone (below {_FEW_PICTURES}); add pictures, or start '
            'from trained weights by --init-from',
        )
    else:
        yield Check('ok', 'pictures', about)


def check_broken(pictures: Sequence[Picture], max_broken: float) -> Iterator[Check]:
    """Every picture of the sample can be read.

    Args:
        pictures: the sample.
        max_broken: share of broken pictures that stops a run.
    """
    broken = [p for p in pictures if isinstance(p.error, UnreadableImageError)]
    if not broken:
        yield Check('ok', 'broken pictures', f'none of {len(pictures)} read')
        return
    share = len(broken) / len(pictures)
    names = ', '.join(f'{p.path} ({p.error.why})' for p in broken[:3])
    yield Check(
        'fail' if share > max_broken else 'warn',
        'broken pictures',
        f'{len(broken)} of {len(pictures)} read: {names}',
        'mend or delete them; a run replaces them, and stops above a share of '
        f'{max_broken:g} (default_hooks.broken.max_broken)',
    )


def check_kinds(
    pictures: Sequence[Picture], kinds: Counter[tuple[int, int]], to_rgb: bool
) -> Iterator[Check]:
    """One number of channels and one depth throughout, and those of the config.

    Args:
        pictures: the sample.
        kinds: how many have so many channels and bits.
        to_rgb: whether training makes RGB of 8 bits of every picture.
    """
    wrong = [
        p.error
        for p in pictures
        if p.error and not isinstance(p.error, UnreadableImageError)
    ]
    about = ', '.join(
        f'{count} of {channels} x {bits} bits'
        for (channels, bits), count in kinds.most_common()
    )
    if wrong:
        yield failure('channels', wrong[0], 'convert it, or take it out of the folder')
    elif len(kinds) > 1:
        yield Check(
            'warn' if to_rgb else 'fail',
            'channels',
            f'are mixed: {about}' + ('; training makes RGB of all' if to_rgb else ''),
            'keep one kind in the folder, or convert the rest',
        )
    elif kinds and to_rgb and (3, 8) not in kinds:
        yield Check(
            'warn',
            'channels',
            f'{about}, of which training makes RGB of 8 bits',
            'to train on them as stored, set the pictures.* that '
            'tools/doctor.py --data DIR prints without a config',
        )
    elif kinds:
        yield Check('ok', 'channels', about)


def check_sides(pictures: Sequence[Picture], crop: int) -> Iterator[Check]:
    """Pictures at least as large as the largest view.

    Args:
        pictures: the sample.
        crop: longer side of the largest view, in px; 0 for no config.
    """
    shorter = sorted(min(p.sides) for p in pictures if p.sides)
    if not shorter:
        return
    middle = shorter[len(shorter) // 2]
    about = f'{shorter[0]} to {shorter[-1]} px, median {middle}'
    small = sum(side < crop for side in shorter) / len(shorter)
    if small > _MANY:
        yield Check(
            'warn',
            'shorter sides',
            f'{about}; {small:.0%} are smaller than views of {crop} px, which '
            'enlarges them',
            'set a smaller size of the views, or leave small pictures out',
        )
    else:
        yield Check('ok', 'shorter sides', about)


def check_duplicates(pictures: Sequence[Picture]) -> Iterator[Check]:
    """Files of the sample with the same bytes."""
    groups = defaultdict(list)
    for picture in pictures:
        groups[picture.digest].append(picture.path)
    copies = [paths for paths in groups.values() if len(paths) > 1]
    if copies:
        extra = sum(len(paths) - 1 for paths in copies)
        yield Check(
            'warn',
            'duplicates',
            f'{extra} of {len(pictures)} read, such as {copies[0][0]} and '
            f'{copies[0][1]}',
            'keep one of each, or they count more than the rest',
        )
    else:
        yield Check('ok', 'duplicates', f'none among {len(pictures)} read')


def check_statistics(found: ChannelStatistics, cfg: Config | None) -> Iterator[Check]:
    """Mean and standard deviation against those that a config normalises with.

    Args:
        found: of the sample, in the data's own units.
        cfg: the config; None prints what one needs.
    """
    about = (
        f'mean {_listed(found.mean)}, std {_listed(found.std)} over {found.pictures} '
        'pictures'
    )
    if min(found.std) == 0:
        yield Check(
            'fail',
            'statistics',
            f'{about}: channel {found.std.index(0)} is constant',
            'leave it out, or mend the pictures',
        )
        return
    if cfg is None:
        stored = (found.channels, found.bits) != (3, 8)
        more = f'; as stored: --cfg-options {found.options}' if stored else ''
        yield Check('ok', 'statistics', about + more)
        return
    preprocessor = cfg.model.get('data_preprocessor') or dict(type='ViewPreprocessor')
    given = MODELS.build(preprocessor).normalization
    mean, std = given['mean'], given['std']
    far = any(
        abs(a - b) > _FAR * s for a, b, s in zip(found.mean, mean, std, strict=True)
    ) or any(
        not 1 / _WIDER < a / b < _WIDER for a, b in zip(found.std, std, strict=True)
    )
    if not far:
        yield Check('ok', 'statistics', about)
        return
    remedy = f'--cfg-options {found.options}'
    if _channels(cfg) == 'rgb':
        remedy = (
            "set model.data_preprocessor=dict(type='ViewPreprocessor', "
            f'mean={_listed(found.mean)}, std={_listed(found.std)}) in the config'
        )
    yield Check(
        'warn',
        'statistics',
        f'{about}; the config has {_listed(mean)} and {_listed(std)}',
        f'{remedy}, unless trained weights want the old ones',
    )


def check_speed(
    dataset: UnlabelledImages,
    pictures: Sequence[Picture],
    loading: Loading | None,
    images_per_second: float | None,
) -> Iterator[Check]:
    """How fast pictures are read and cropped, against what a step takes.

    Args:
        dataset: with the config's whole pipeline, or one that only reads.
        pictures: the sample.
        loading: of the config, or None.
        images_per_second: that the steps of one process take; None if not known.
    """
    seconds = sum(p.seconds for p in pictures) or 1e-9
    read = seconds / len(pictures)
    about = (
        f'{sum(p.size for p in pictures) / MIB / seconds:.0f} MiB/s, '
        f'{1 / read:.0f} pictures/s'
    )
    if loading is None or images_per_second is None:
        yield Check('ok', 'read speed', about)
        return
    spent, made = 0.0, 0
    with one_thread():
        for index in np.random.default_rng(1).integers(len(dataset), size=32).tolist():
            start = time.perf_counter()
            try:
                dataset[index]
            except DenseSSLError:  # of which other checks tell
                continue
            spent, made = spent + time.perf_counter() - start, made + 1
            if spent > 3:
                break
    if not made:
        yield Check('ok', 'read speed', about)
        return
    workers = max(1, loading.workers)
    there = max(1.0, cores() / loading.processes)
    at_once = min(workers, there)
    supply = at_once / (spent / made + read)
    about += (
        f'; {supply:.0f} images/s from {workers} workers, '
        f'{images_per_second:.1f} taken by the steps'
    )
    if supply >= images_per_second:
        yield Check('ok', 'read speed', about)
        return
    wanted = int(np.ceil(workers * images_per_second / supply))
    yield Check(
        'warn',
        'read speed',
        about,
        f'set train_dataloader.num_workers={wanted}'
        if wanted <= there
        else 'store pictures smaller (twice the largest view), or on a faster disk',
    )


def _channels(cfg: Config) -> int | str:
    return (cfg.get('pictures') or {}).get('channels', 'rgb')


def _listed(values: Sequence[float]) -> str:
    return '[' + ','.join(f'{value:.4g}' for value in values) + ']'
