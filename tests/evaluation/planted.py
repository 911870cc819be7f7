"""Folders whose pictures show their labels, and a backbone that sees colours."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch.nn.functional as F
from torch import nn

from densessl.evaluation.features import FeatureExtractor
from densessl.models.features import Tokens

COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
CLASSES = ['red', 'green', 'blue']


class MeanColours(nn.Module):
    """Tokens are the mean colours of 8 px patches, times ``gain``."""

    patch_size = 8
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(self, images):
        self.forwards += len(images)
        maps = F.avg_pool2d(images, 8) * self.gain
        return Tokens(maps.flatten(2).mT, tuple(maps.shape[2:]))


def extractor(**options) -> FeatureExtractor:
    return FeatureExtractor(MeanColours(), (0, 0, 0), (255, 255, 255), **options)


def stripes(num: int, seed: int, size=(32, 48)):
    """Masks with one class per 8 px column, and pictures in the classes' colours."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        columns = rng.permutation(np.arange(size[1] // 8) % 3)
        mask = np.tile(columns.repeat(8), (size[0], 1)).astype(np.uint8)
        yield COLOURS[mask], mask


def noise(num: int, seed: int, size=(32, 48)):
    """The same masks with pictures that know nothing of them."""
    rng = np.random.default_rng(seed + 1000)
    for _, mask in stripes(num, seed, size):
        yield rng.integers(0, 256, (*size, 3)).astype(np.uint8), mask


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        pixels = pixels[..., ::-1]
    cv2.imwrite(str(path), pixels)


def write_split(data: Path, split: str, samples, kind: str = 'annotations') -> None:
    for index, (image, labels) in enumerate(samples):
        write(data / 'images' / split / f'p{index:02d}.png', image)
        write(data / kind / split / f'p{index:02d}.png', labels)


def write_stripes(data: Path, samples=stripes, train: int = 24, val: int = 6) -> Path:
    write_split(data, 'train', samples(train, 0))
    write_split(data, 'val', samples(val, 1))
    return data
