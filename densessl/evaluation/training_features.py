"""Frozen tokens of a training set: kept in memory, or extracted anew each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from densessl.errors import DenseSSLError

from .features import FeatureExtractor, Sample, channel_moments, labelled_batches

Cache = Literal['fp32', 'fp16', 'none']
_DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'none': None}


class TrainingFeatures(Protocol):
    """Tokens and labels of pictures, by their index.

    Attributes:
        grid: ``(h, w)`` of the tokens.
        labels: ``(M, H, W)`` of all ``M`` pictures.
        shift: ``(D,)`` float64 mean of the tokens per channel.
        scale: ``(D,)`` float64 standard deviation; 1 for a constant channel.
    """

    grid: tuple[int, int]
    labels: Tensor
    shift: Tensor
    scale: Tensor

    def patches(self, chosen: Tensor) -> Tensor:
        """``(B, N, D)`` tokens of ``(B,)`` pictures, of any float type and device."""


@dataclass(frozen=True)
class KeptFeatures:
    """Tokens ``(M, N, D)`` in memory; see `TrainingFeatures`."""

    tokens: Tensor
    grid: tuple[int, int]
    labels: Tensor
    shift: Tensor
    scale: Tensor

    def patches(self, chosen: Tensor) -> Tensor:
        """See `TrainingFeatures.patches`."""
        return self.tokens[chosen.to(self.tokens.device)]


@dataclass(frozen=True)
class StreamedFeatures:
    """Tokens that are extracted when asked for; see `TrainingFeatures`."""

    extractor: FeatureExtractor
    samples: Sequence[Sample]
    grid: tuple[int, int]
    labels: Tensor
    shift: Tensor
    scale: Tensor

    def patches(self, chosen: Tensor) -> Tensor:
        """See `TrainingFeatures.patches`."""
        with ThreadPoolExecutor(4) as pool:
            samples = list(pool.map(self.samples.__getitem__, chosen.tolist()))
        images = torch.stack([torch.from_numpy(image) for image, _ in samples])
        return self.extractor(images).patches


def training_features(
    extractor: FeatureExtractor,
    samples: Iterable[Sample],
    label_size: tuple[int, int],
    cache: Cache,
    check: Callable[[Tensor], object] = len,
) -> TrainingFeatures:
    """One pass over a training set: labels, the tokens' moments, and maybe the tokens.

    Args:
        extractor: the frozen backbone.
        samples: pictures and labels, of one size; without a cache a
            sequence, read again and again.
        label_size: labels are kept at this ``(H, W)`` (nearest).
        cache: type of the tokens in memory, ``M * N * D`` values; fp16 is for features
            of moderate scale. ``'none'`` keeps none, and every use of a picture costs
            its way through the backbone.
        check: called with each batch of labels at full size, to refuse wrong ones.

    Raises:
        DenseSSLError: unknown cache, features that are not finite, or as
            `labelled_batches`.
    """
    if cache not in _DTYPES:
        raise DenseSSLError(
            f'cache {cache!r} is unknown; use one of {", ".join(_DTYPES)}'
        )
    kept, labels, moments = [], [], _Moments()
    for images, masks in labelled_batches(samples, extractor.batch_size, 'training'):
        check(masks)
        tokens = extractor(images)
        labels.append(resize_nearest(masks, label_size))
        if cache == 'none':
            check_finite(tokens.patches, sum(map(len, labels)) - len(masks))
            moments.add(tokens.patches)
        else:
            kept.append(tokens.patches.to('cpu', _DTYPES[cache]))
    if cache == 'none':
        about = (tokens.grid, torch.cat(labels), *moments.result())
        return StreamedFeatures(extractor, samples, *about)
    return keep_features(torch.cat(kept), tokens.grid, torch.cat(labels))


def keep_features(
    tokens: Tensor, grid: tuple[int, int], labels: Tensor
) -> KeptFeatures:
    """Features ``(M, N, D)`` that are there already, with their labels.

    Raises:
        DenseSSLError: features are not finite.
    """
    check_finite(tokens)
    return KeptFeatures(tokens, grid, labels, *channel_moments(tokens))


def check_finite(patches: Tensor, first: int = 0) -> None:
    """Refuse features ``(B, N, D)`` of pictures from ``first`` on that overflowed.

    Raises:
        DenseSSLError: names the first such picture.
    """
    for index, picture in enumerate(patches, first):
        if not torch.isfinite(picture).all():
            raise DenseSSLError(
                f'features of picture {index} are not finite; '
                'the backbone has diverged, or needs precision and cache fp32'
            )


def resize_nearest(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """``(B, H, W)`` labels to ``(B, *size)``: each new centre takes its old pixel."""
    rows, columns = (
        (2 * torch.arange(new, device=masks.device) + 1) * old // (2 * new)
        for old, new in zip(masks.shape[1:], size, strict=True)
    )
    return masks[:, rows[:, None], columns]


class _Moments:
    """`channel_moments` of batches that pass by once."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor, Tensor]] = []

    def add(self, patches: Tensor) -> None:
        flat = patches.double().flatten(0, 1)
        var, mean = torch.var_mean(flat, 0, correction=0)
        self.parts.append((len(flat), mean.cpu(), var.cpu()))

    def result(self) -> tuple[Tensor, Tensor]:
        share = torch.tensor([float(part[0]) for part in self.parts]).double()
        share = (share / share.sum())[:, None]
        means, variances = (torch.stack([p[i] for p in self.parts]) for i in (1, 2))
        mean = (share * means).sum(0)
        std = (share * (variances + (means - mean).square())).sum(0).sqrt()
        return mean, torch.where(std <= 1e-6 * mean.abs(), 1.0, std)
