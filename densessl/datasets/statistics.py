"""Mean and standard deviation of the channels of a folder of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np

from densessl.datasets.channels import LoadChannels, read_channels
from densessl.datasets.image_io import UnreadableImageError
from densessl.datasets.unlabelled import UnlabelledImages
from densessl.errors import DenseSSLError

_PIXELS = 2**20  # at once; the sums of their squares stay below 2**64


@dataclass(frozen=True)
class ChannelStatistics:
    """What :func:`channel_statistics` found.

    Attributes:
        channels: of every picture.
        bits: of their samples, 8 or 16.
        mean: of each channel over all pixels, in 0..255 or 0..65535.
        std: standard deviation likewise, divided by the number of pixels.
        pictures: how many were read.
        pixels: of these pictures.
        broken: pictures that could not be read, and are left out.
    """

    channels: int
    bits: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pictures: int
    pixels: int
    broken: tuple[str, ...] = ()

    @property
    def options(self) -> str:
        """What ``--cfg-options`` needs to train on such pictures."""
        mean, std = (
            ','.join(f'{value:.6g}' for value in values)
            for values in (self.mean, self.std)
        )
        if self.channels == 1:  # a list of one, for mmengine's parser
            mean, std = f'[{mean}]', f'[{std}]'
        return (
            f'pictures.channels={self.channels} pictures.bits={self.bits} '
            f'pictures.mean={mean} pictures.std={std}'
        )


def channel_statistics(
    data: UnlabelledImages | str | os.PathLike[str],
    pictures: int | None = 1000,
    *,
    channels: int | None = None,
    bits: int | None = None,
) -> ChannelStatistics:
    """Mean and standard deviation of each channel, over all pixels of a sample.

    Sums are kept as integers, so the result does not depend on the order or on the
    number of pixels: it is exact up to the last rounding.

    Args:
        data: a folder, whose pictures are read as they are stored; or a data set, whose
            pictures are read as it reads them.
        pictures: how many to read, evenly spaced through the sorted names; None reads
            all.
        channels: of a folder's pictures; None takes those of the first.
        bits: of their samples, 8 or 16; None takes those of the first.

    Raises:
        DenseSSLError: no picture can be read, or they are of several kinds.
    """
    if isinstance(data, UnlabelledImages):
        dataset, read = data, data.picture
    else:
        reader = LoadChannels(channels or 1, bits or 8)  # for the endings
        dataset = UnlabelledImages(str(data), pipeline=[reader])
        read = _first_decides(dataset, channels, bits)
    count = len(dataset) if pictures is None else min(pictures, len(dataset))
    if count < 1:
        raise DenseSSLError(f'pictures={pictures}; give at least 1, or None for all')
    indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    broken: list[str] = []
    sums = squares = None
    pixels = 0
    for index in indices:
        try:
            image = read(index)
        except UnreadableImageError as error:
            broken.append(error.path)
            continue
        flat = image.reshape(-1, image.shape[2])
        if sums is None:  # every reader gives one kind of picture
            kind = image.shape[2], 8 * image.itemsize
            sums, squares = [0] * kind[0], [0] * kind[0]
        for start in range(0, len(flat), _PIXELS):
            part = flat[start : start + _PIXELS].astype(np.uint64)
            sums = _plus(sums, part.sum(axis=0))
            squares = _plus(squares, (part * part).sum(axis=0))
        pixels += len(flat)
    if sums is None:
        raise DenseSSLError(
            f"none of {count} pictures can be read, such as '{broken[0]}'; check the "
            'folder'
        )
    return ChannelStatistics(
        *kind,
        mean=tuple(total / pixels for total in sums),
        std=tuple(
            sqrt((pixels * square - total * total) / pixels**2)
            for total, square in zip(sums, squares, strict=True)
        ),
        pictures=count - len(broken),
        pixels=pixels,
        broken=tuple(broken),
    )


def _first_decides(
    dataset: UnlabelledImages, channels: int | None, bits: int | None
) -> Callable[[int], np.ndarray]:
    """Read as stored; what is not given is taken from the first picture read."""
    wanted = [channels, bits]

    def read(index: int) -> np.ndarray:
        image = read_channels(dataset.path(index), *wanted)
        wanted[:] = image.shape[2], 8 * image.itemsize
        return image

    return read


def _plus(totals: list[int], more: np.ndarray) -> list[int]:
    return [a + int(b) for a, b in zip(totals, more, strict=True)]
