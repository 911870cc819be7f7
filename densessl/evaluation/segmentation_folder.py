"""Folders of pictures with a mask or a depth map for each; VOC's layout too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from densessl.datasets import LoadChannels, UnreadableImageError, read_image
from densessl.datasets.channels import resize_channels
from densessl.errors import DenseSSLError

from .features import Sample
from .progress import progress
from .training_features import resize_nearest

IGNORED = 255
"""Label of pixels that do not count."""
_THREADS = 4
_AHEAD = 16  # samples read at once


@dataclass(frozen=True)
class LabelledFolder:
    """Pictures of a split and their labels, read and resized when asked for.

    Pictures are resized to ``size`` whatever their shape: by areas to fewer pixels,
    bilinearly to more. Each new label is the one at its centre.

    Attributes:
        pairs: files of a picture and of its labels.
        size: ``(H, W)`` of the samples in px.
        read: labels ``(H, W)`` of a file, at the size of the picture's file.
        title: what a pass over the samples is called where its progress is shown.
        read_picture: picture ``(H, W, C)`` of a file, such as `FeatureExtractor.read`.
    """

    pairs: Sequence[tuple[Path, Path]]
    size: tuple[int, int]
    read: Callable[[Path], np.ndarray]
    title: str = 'pictures'
    read_picture: Callable[[Path], np.ndarray] = read_image

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """``(H, W, C)``, uint8 RGB unless told otherwise, and ``(H, W)`` labels.

        Raises:
            DenseSSLError: a file cannot be read, or the two differ in size.
        """
        picture, path = self.pairs[index]
        try:
            image = self.read_picture(picture)
        except UnreadableImageError as error:
            raise DenseSSLError(f'{error}; replace the picture') from error
        labels = self.read(path)
        if labels.shape != image.shape[:2]:
            raise DenseSSLError(
                f'{path}: labels of {labels.shape[0]}x{labels.shape[1]} px, and the '
                f'picture {picture.name} has {image.shape[0]}x{image.shape[1]}; '
                'resize one to the other, labels by nearest neighbour'
            )
        fewer = self.size[0] * self.size[1] < labels.size
        way = cv2.INTER_AREA if fewer else cv2.INTER_LINEAR
        return (
            resize_channels(image, self.size, way),
            resize_nearest(torch.from_numpy(labels)[None], self.size)[0].numpy(),
        )

    def __iter__(self) -> Iterator[Sample]:
        """Samples in order, a few read ahead by threads; shows its progress."""
        yield from progress(self._ahead(), len(self), self.title)

    def _ahead(self) -> Iterator[Sample]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(self), _AHEAD):
                chunk = range(start, min(start + _AHEAD, len(self)))
                yield from pool.map(self.__getitem__, chunk)


def mask_pairs(data: Path, split: str) -> list[tuple[Path, Path]]:
    """Pictures and masks of a split, in the order of their names.

    Either ``images/SPLIT`` and ``annotations/SPLIT`` with files of equal stems, or
    VOC's folders: ``ImageSets/Segmentation/SPLIT.txt`` lists stems of ``JPEGImages``;
    a mask is that of ``SegmentationClass``, or else of ``SegmentationClassAug``.

    Raises:
        DenseSSLError: no such folder or split, or a file without its partner.
    """
    if not (data / 'JPEGImages').is_dir():
        return paired(data / 'images' / split, data / 'annotations' / split, ('png',))
    lists = data / 'ImageSets' / 'Segmentation'
    try:
        stems = (lists / f'{split}.txt').read_text(encoding='utf-8').split()
    except OSError:
        found = ', '.join(sorted(path.stem for path in lists.glob('*.txt'))) or 'none'
        raise DenseSSLError(
            f'{lists / split}.txt: no such list; there are: {found}; add it, or name '
            'another one as train_split or val_split'
        ) from None
    pairs = []
    for stem in sorted(stems):
        picture = data / 'JPEGImages' / f'{stem}.jpg'
        masks = [
            data / folder / f'{stem}.png'
            for folder in ('SegmentationClass', 'SegmentationClassAug')
        ]
        mask = next((path for path in masks if path.is_file()), None)
        if mask is None or not picture.is_file():
            raise DenseSSLError(
                f'{lists / split}.txt names {stem}, but there is no '
                f'{picture if mask else masks[0]}; complete the data, or the list'
            )
        pairs.append((picture, mask))
    if not pairs:
        raise DenseSSLError(f'{lists / split}.txt: no stem in it; list some pictures')
    return pairs


def paired(
    pictures: Path, labels: Path, endings: Sequence[str]
) -> list[tuple[Path, Path]]:
    """Files of equal stems in two folders, in the order of their stems.

    Args:
        pictures: folder of pictures.
        labels: folder of their labels.
        endings: of files with labels, in lower case.

    Raises:
        DenseSSLError: a folder is missing or empty, or a file has no partner.
    """
    files = []
    for folder, kinds in ((pictures, LoadChannels.endings), (labels, endings)):
        if not folder.is_dir():
            raise DenseSSLError(
                f'{folder}: no such folder; data of a split are in {pictures} and '
                f'{labels}, with equal stems'
            )
        paths = [p for p in sorted(folder.iterdir()) if p.suffix[1:].lower() in kinds]
        found = {path.stem: path for path in paths}
        if not found:
            raise DenseSSLError(
                f'{folder}: no file that ends in {", ".join(kinds)}; '
                f'it needs one for each file of the other folder'
            )
        twice = [path for path in paths if path not in found.values()]
        if twice:
            raise DenseSSLError(
                f'{twice[0]}: another file of {folder} has the same stem; remove one'
            )
        files.append(found)
    alone = sorted(files[0].keys() ^ files[1].keys())
    if alone:
        raise DenseSSLError(
            f'{pictures} and {labels}: {len(alone)} stems are in one of them only, '
            f'such as {alone[0]!r}; give each picture one file of labels'
        )
    return [(picture, files[1][stem]) for stem, picture in files[0].items()]


def read_plane(path: Path) -> np.ndarray:
    """Values ``(H, W)`` of a grey or palette PNG, 8 or 16 bit, as they are stored.

    Raises:
        DenseSSLError: not a picture, or one with colours.
    """
    try:
        with Image.open(path) as image:
            mode, plane = image.mode, np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise DenseSSLError(
            f'{path}: not a picture ({str(error)[:60]}); replace it by a grey PNG'
        ) from None
    if plane.ndim != 2:
        raise DenseSSLError(
            f'{path}: has colours (mode {mode}); give one number a pixel, as grey or '
            'palette PNG'
        )
    return plane


def read_mask(path: Path, num_classes: int, ignore: Sequence[int] = ()) -> np.ndarray:
    """Classes ``(H, W)`` uint8 of a mask; pixels that do not count are 255.

    Args:
        path: as for `read_plane`.
        num_classes: at most 255; labels run from 0 to ``num_classes - 1``.
        ignore: labels that do not count either.

    Raises:
        DenseSSLError: the file cannot be read, or a label is outside the range.
    """
    mask = read_plane(path)
    mask = np.where(np.isin(mask, ignore), IGNORED, mask)
    wrong = mask[(mask != IGNORED) & ((mask < 0) | (mask >= num_classes))]
    if wrong.size:
        raise DenseSSLError(
            f'{path}: label {wrong[0]} is outside 0..{num_classes - 1} (and '
            f'{IGNORED}, ignored); correct the mask or classes, or put it in ignore'
        )
    return mask.astype(np.uint8)


def check_masks(folder: LabelledFolder, names: Sequence[str], split: str) -> None:
    """Read all masks once, before hours go into features.

    Args:
        folder: with `read_mask` as its reader.
        names: of the classes.
        split: what to call it in an error.

    Raises:
        DenseSSLError: a mask cannot be read, has a label outside the range, or a
            class occurs in none.
    """
    counts = np.zeros(256, np.int64)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(folder), _AHEAD):
            paths = [path for _, path in folder.pairs[start : start + _AHEAD]]
            for mask in pool.map(folder.read, paths):
                counts += np.bincount(mask.ravel(), minlength=256)
    empty = [name for name, count in zip(names, counts, strict=False) if not count]
    if empty:
        raise DenseSSLError(
            f'{split} masks ({len(folder)}): no pixel of class {", ".join(empty)}; '
            'correct classes, or add pictures with it: a mean over fewer classes '
            'would not compare'
        )
