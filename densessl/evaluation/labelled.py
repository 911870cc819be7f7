"""Pictures in class folders, and one feature vector for each of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.dist import all_gather, get_dist_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from densessl.datasets import read_image
from densessl.datasets.unlabelled import read_list, scan_folder
from densessl.errors import DenseSSLError

from .features import FeatureExtractor
from .progress import progress


@dataclass(frozen=True)
class LabelledImages:
    """Pictures with a class each.

    Attributes:
        paths: ``M`` files.
        labels: ``(M,)`` int64 numbers of their classes.
        classes: names of the classes, in order.
    """

    paths: list[str]
    labels: Tensor
    classes: list[str]


def read_split(
    data: Path,
    split: str,
    classes: Sequence[str] | None = None,
    list_file: str | Path | None = None,
) -> LabelledImages:
    """The pictures of ``data/split/CLASS/``, at any depth below the class.

    Args:
        data: folder of the data set.
        split: a folder in it, such as ``'train'``.
        classes: the classes there may be, in order; None: those that are found.
        list_file: use only the pictures that this list names, relative to the split.

    Raises:
        DenseSSLError: no such folder, no class folders, an empty or unknown class, or
            a list that does not fit.
    """
    root = Path(data) / split
    if not root.is_dir():
        raise DenseSSLError(
            f'{root}: no such folder; the data set needs pictures in '
            f'{split}/CLASS/, give its folder by --data'
        )
    there = sorted(
        entry.name
        for entry in root.iterdir()
        if entry.is_dir() and not entry.name.startswith('.')
    )
    if not there:
        raise DenseSSLError(
            f'{root}: no class folders; sort the pictures into {split}/CLASS/'
        )
    known = there if classes is None else list(classes)
    for name in there:
        if name not in known:
            raise DenseSSLError(
                f'{root / name}: a class that the training pictures lack; add it there '
                'or remove it here'
            )
    if list_file is not None:
        found = _listed(root, list_file, known)
    else:
        found = [
            (name, f'{root}/{name}/{os.fsdecode(picture)}')
            for name in there
            for picture in _pictures(root / name)
        ]
    numbers = {name: number for number, name in enumerate(known)}
    return LabelledImages(
        [path for _, path in found],
        torch.tensor([numbers[name] for name, _ in found]),
        known,
    )


def _pictures(folder: Path) -> list[bytes]:
    pictures, _ = scan_folder(str(folder))
    if not pictures:
        raise DenseSSLError(
            f'{folder}: a class without pictures; add some or remove the folder'
        )
    return pictures


def _listed(
    root: Path, list_file: str | Path, classes: Sequence[str]
) -> list[tuple[str, str]]:
    base, names = read_list(str(list_file), str(root))
    found = []
    for name in map(os.fsdecode, names):
        folder = name.partition('/')[0]
        if folder not in classes:
            raise DenseSSLError(
                f"list file '{list_file}': '{name}' is in no class folder of {root}; "
                'give lines such as CLASS/PICTURE.jpg'
            )
        found.append((folder, f'{base}/{name}'))
    if not found:
        raise DenseSSLError(f"list file '{list_file}': no pictures; add some")
    return found


class CentreCrops(Dataset):
    """Middle parts of pictures, uint8 ``(3, crop, crop)``.

    Args:
        paths: the files.
        resize: px of the shorter side before the crop, by an antialiased bicubic
            filter.
        crop: side of the crop in px.
    """

    def __init__(self, paths: Sequence[str], resize: int, crop: int) -> None:
        if crop > resize:
            raise DenseSSLError(
                f'crop={crop} px of pictures resized to {resize} px; set '
                f'protocol.resize to {crop} or more'
            )
        self.paths = paths
        self.resize = resize
        self.crop = crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        picture = Image.fromarray(read_image(self.paths[index]))
        picture = TF.resize(picture, self.resize, InterpolationMode.BICUBIC)
        return TF.pil_to_tensor(TF.center_crop(picture, self.crop))


def pooled_features(
    extractor: FeatureExtractor,
    pictures: CentreCrops,
    num_workers: int,
    title: str,
) -> Tensor:
    """`FeatureExtractor.pooled` of every picture, on all ranks.

    Each rank of torchrun takes every so-many-th picture; the features are gathered
    batch by batch.

    Args:
        extractor: the frozen backbone.
        pictures: ``M`` pictures.
        num_workers: processes that read them, on each rank.
        title: what to call them in the progress.

    Returns:
        ``(M, P)`` float32 on the CPU, in the pictures' order.

    Raises:
        DenseSSLError: a picture cannot be read, or a feature is not finite.
    """
    rank, world = get_dist_info()
    total = len(pictures)
    steps = -(-total // world)  # ranks that have no more repeat the last picture
    own = [min(step * world + rank, total - 1) for step in range(steps)]
    loader = DataLoader(
        Subset(pictures, own), extractor.batch_size, num_workers=num_workers
    )
    parts, done = [], 0
    for batch in progress(loader, len(loader), f'features of {title}'):
        ranks = all_gather(extractor.pooled(batch))
        part = torch.stack(ranks, 1).flatten(0, 1).cpu()[: total - done]
        parts.append(part)
        finite = part.isfinite().all(1)
        if not finite.all():
            path = pictures.paths[done + int(finite.logical_not().nonzero()[0])]
            raise DenseSSLError(
                f'features of {path} are not finite; the backbone has diverged, or '
                'needs --precision fp32'
            )
        done += len(part)
    return torch.cat(parts)
