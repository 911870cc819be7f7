"""The order of a run: a function of seed and epoch alone, whatever the process count.

Every process knows the order of the whole epoch and takes its part of each step, so
two processes with half the batch each see, step for step, what one process with the
whole batch sees; and a run resumes anywhere by slicing, without replaying data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import NamedTuple

import numpy as np
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler

from densessl.errors import DenseSSLError
from densessl.registry import DATA_SAMPLERS


class SampleKey(NamedTuple):
    """Which sample a dataset shall make; its randomness follows from the first two.

    Attributes:
        epoch: epoch number, from 0.
        position: place in the order of the whole epoch, all processes together.
        index: picture number in the dataset.
    """

    epoch: int
    position: int
    index: int


class _Part(NamedTuple):
    """Pictures ``first .. first + size - 1``, of which an epoch draws ``count``."""

    first: int
    size: int
    count: int


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler[SampleKey]):
    """The order of the pictures in each epoch, over all processes.

    Without weights an epoch is a permutation of the dataset. A dataset with
    ``weights`` (one per root, with the roots' ``root_sizes``) gets a fixed number of
    places per root, in these shares, mixed at random; a root's places walk through one
    permutation of the root after the other, on from epoch to epoch, so that none of its
    pictures is drawn a second time before all were drawn once. A ``length`` other than
    the dataset's is served in the same way.

    Args:
        dataset: anything with a length; read for its ``weights`` and ``root_sizes``.
        seed: seed of the order, the same in every process; None, which MMEngine hands
            over when each rank shall have its own seed, counts as 0.
        shuffle: False keeps the dataset's order (the roots one after the other).
        length: images an epoch shows; None for the number of pictures.

    Raises:
        DenseSSLError: the dataset is empty, or a root gets no place in an epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        seed: int | None = 0,
        shuffle: bool = True,
        length: int | None = None,
    ) -> None:
        self.seed = 0 if seed is None else seed
        self.shuffle = shuffle
        self.length = len(dataset) if length is None else length
        if len(dataset) == 0 or self.length < 1:
            raise DenseSSLError(
                f'EpochSampler: an epoch of {self.length} images from {len(dataset)} '
                'pictures has nothing to show; give a folder with pictures, length > 0'
            )
        weights = getattr(dataset, 'weights', None)
        sizes = [len(dataset)] if weights is None else dataset.root_sizes
        counts = _apportion(self.length, [1.0] if weights is None else weights)
        if 0 in counts:
            raise DenseSSLError(
                f'EpochSampler: with weights {list(weights)} root {counts.index(0)} '
                f'gets none of the {self.length} images of an epoch; raise its weight '
                'or set a greater length'
            )
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._parts = [_Part(*part) for part in zip(firsts, sizes, counts, strict=True)]
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Images of a whole epoch, over all processes and whatever the start."""
        return self.length

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go to an epoch, at its position ``start``; iterators already made stay."""
        self.epoch = epoch
        self.start = start

    def order(self) -> np.ndarray:
        """Picture numbers of the whole current epoch, ``(length,)`` int64."""
        draws = [self._draw(number) for number in range(len(self._parts))]
        order = np.concatenate(draws)
        if self.shuffle and len(draws) > 1:
            mixed = self._generator(self.epoch, len(draws)).permutation(self.length)
            order = order[mixed]
        return order

    def __iter__(self) -> Iterator[SampleKey]:
        """Keys of the current epoch from its ``start`` on."""
        return iter_keys(self.epoch, self.order(), self.start, self.length)

    def _draw(self, number: int) -> np.ndarray:
        """This epoch's stretch of the endless walk through one part's permutations."""
        first, size, count = self._parts[number]
        begin = self.epoch * count
        rounds = range(begin // size, (begin + count - 1) // size + 1)
        walk = [
            self._generator(turn, number).permutation(size)
            if self.shuffle
            else np.arange(size)
            for turn in rounds
        ]
        skip = begin - rounds[0] * size
        return first + np.concatenate(walk)[skip : skip + count]

    def _generator(self, *key: int) -> np.random.Generator:
        # A spawn key keeps these streams apart from the samples' (seed, epoch, ...).
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


@DATA_SAMPLERS.register_module()
class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """Cuts the global order into steps, and each step into one part per process.

    Step i holds positions ``[i * G, (i + 1) * G)``, ``G = world_size * batch_size``;
    rank r has the r-th ``batch_size`` of them. With ``drop_last=False`` the images left
    over make a last, smaller step, shared as evenly as can be; it is left out where
    they are fewer than the processes, as a process without images would hang the rest.

    Args:
        sampler: the global order.
        batch_size: images per process and step.
        drop_last: leave out the last, smaller step.
        rank: number of this process; None asks MMEngine.
        world_size: number of processes; None asks MMEngine.

    Raises:
        DenseSSLError: an epoch has fewer images than one step needs.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        batch_size: int,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        here, processes = get_dist_info()
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.rank = here if rank is None else rank
        self.world_size = processes if world_size is None else world_size
        if batch_size < 1:
            raise DenseSSLError(f'batch_size={batch_size} must be 1 or more')
        if len(self) == 0:
            raise DenseSSLError(
                f'an epoch of {len(sampler)} images is smaller than one step of '
                f'{self.global_batch_size} (batch_size={batch_size} x {self.world_size}'
                ' processes); lower batch_size, give more pictures, or set a greater '
                'length of the sampler'
            )

    @property
    def global_batch_size(self) -> int:
        """Images of one step over all processes."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps of a whole epoch, whatever the start."""
        return self._num_steps(len(self.sampler))

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration begin at a step of an epoch, without any replay.

        Args:
            epoch: epoch number, from 0.
            step: steps of this epoch that are done already.

        Raises:
            DenseSSLError: the epoch has fewer steps, as the data or batch changed.
        """
        if not 0 <= step <= len(self):
            raise DenseSSLError(
                f'cannot go on at step {step} of epoch {epoch}: an epoch now has '
                f'{len(self)} steps; use the data and batch size the run began with, '
                'or begin a new run'
            )
        self.sampler.set_epoch(epoch, start=step * self.global_batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """This process's keys, step by step from the sampler's start on."""
        # Read now, not at the first batch: a prefetching loader keeps its epoch.
        return self._batches(
            self.sampler.epoch, self.sampler.order(), self.sampler.start
        )

    def _batches(
        self, epoch: int, order: np.ndarray, start: int
    ) -> Iterator[list[SampleKey]]:
        for step in range(self._num_steps(len(order) - start)):
            begin = start + step * self.global_batch_size
            images = min(self.global_batch_size, len(order) - begin)
            first = begin + images * self.rank // self.world_size
            last = begin + images * (self.rank + 1) // self.world_size
            yield list(iter_keys(epoch, order, first, last))

    def _num_steps(self, images: int) -> int:
        full, rest = divmod(max(images, 0), self.global_batch_size)
        return full + int(not self.drop_last and rest >= self.world_size)


def iter_keys(
    epoch: int, order: np.ndarray, first: int, last: int
) -> Iterator[SampleKey]:
    """Keys of the positions ``first .. last - 1`` of an epoch's order."""
    for position in range(first, last):
        yield SampleKey(epoch, position, int(order[position]))


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Share out ``total`` places by weight; the greatest remainders are rounded up."""
    exact = total * np.asarray(weights, dtype=np.float64) / np.sum(weights)
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind='stable')[:left]] += 1
    return counts.tolist()
