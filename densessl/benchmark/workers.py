"""What a loader delivers with one worker process, two, and more."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset

from densessl.datasets.collate import collate_views
from densessl.errors import DenseSSLError

from .data import Pipeline, build_pipeline, pictures, sample_maker

_BATCH = 8


def run(
    config: Pipeline,
    workers: Sequence[int],
    folder: str | os.PathLike[str] | None = None,
    seconds: float = 10.0,
    size: tuple[int, int] = (480, 360),
) -> dict[int, float]:
    """Images per second, by the clock, that so many worker processes deliver.

    Samples are collated in batches of 8 and come to this process as in training;
    workers that get no core of their own share one.

    Args:
        config: as for :func:`densessl.benchmark.data.run`; it must end in views.
        workers: numbers of processes, 1 or more.
        folder: pictures; None makes some.
        seconds: for each number.
        size: ``(W, H)`` of those, in px.

    Raises:
        DenseSSLError: no pipeline, no picture, or a number below 1.
    """
    if min(workers) < 1:
        raise DenseSSLError(f'--workers {min(workers)}: give numbers from 1')
    steps = build_pipeline(config)
    with pictures(folder, size) as paths:
        samples = _Samples(steps, paths)
        return {count: _deliver(samples, count, seconds) for count in workers}


class _Samples(Dataset):
    """Samples of the pictures in turn, as many as one likes."""

    def __init__(self, steps: Sequence[Callable], paths: Sequence[str]) -> None:
        self._make = sample_maker(steps)
        self._paths = paths

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._make(self._paths[index % len(self._paths)], index)


def _deliver(samples: _Samples, workers: int, seconds: float) -> float:
    """Images per second of a loader, once each worker has given two batches."""
    batches = iter(
        DataLoader(
            samples,
            batch_size=_BATCH,
            num_workers=workers,
            collate_fn=collate_views,
            worker_init_fn=_one_opencv_thread,
        )
    )
    for _ in range(2 * workers):
        next(batches)
    begin, count = time.monotonic(), 0
    while time.monotonic() < begin + seconds:
        next(batches)
        count += _BATCH
    return count / (time.monotonic() - begin)


def _one_opencv_thread(_: int) -> None:
    cv2.setNumThreads(0)
