"""A random sample of a folder: what is in each file, read whole."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass

import numpy as np

from densessl.datasets.channels import read_channels
from densessl.datasets.unlabelled import UnlabelledImages
from densessl.errors import DenseSSLError

_SECONDS = 10.0  # for the sample, once 20 are read


@dataclass(frozen=True)
class Picture:
    """What a look at one file found.

    Attributes:
        path: of the file.
        size: bytes.
        seconds: that reading them took, not from the page cache where that can be.
        digest: of the bytes.
        sides: ``(H, W)`` in px; None of what cannot be read.
        kind: channels and bits as stored; None likewise.
        error: why training cannot use it.
    """

    path: str
    size: int
    seconds: float
    digest: bytes
    sides: tuple[int, int] | None
    kind: tuple[int, int] | None
    error: DenseSSLError | None


def look(dataset: UnlabelledImages, count: int, as_stored: bool) -> list[Picture]:
    """Read random pictures whole, those of a small folder all.

    Args:
        dataset: the pictures.
        count: how many; fewer of a slow disk.
        as_stored: leave out the data set's own reader.

    Returns:
        What was found, in random order.
    """
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(dataset))[:count].tolist()
    pictures: list[Picture] = []
    start = time.monotonic()
    for index in chosen:
        if len(pictures) >= 20 and time.monotonic() - start > _SECONDS:
            break
        path = dataset.path(index)
        error = sides = kind = None
        data, seconds = _read_cold(path)
        try:
            image = read_channels(path)
            sides, kind = image.shape[:2], (image.shape[2], 8 * image.itemsize)
        except DenseSSLError as found:
            error = found if as_stored else None  # LoadImage reads more kinds
        if not as_stored:
            try:
                sides = dataset.picture(index).shape[:2]
            except DenseSSLError as found:
                error = found
        digest = hashlib.sha256(data).digest()
        pictures.append(Picture(path, len(data), seconds, digest, sides, kind, error))
    return pictures


def _read_cold(path: str) -> tuple[bytes, float]:
    """A file's bytes, and the seconds from the disk, past the page cache."""
    try:
        with open(path, 'rb') as file:
            if hasattr(os, 'posix_fadvise'):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            return file.read(), time.perf_counter() - start
    except OSError:
        return b'', 0.0
