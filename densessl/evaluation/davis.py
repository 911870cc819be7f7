"""DAVIS: its folders, its palette masks, and its measures J and F."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from densessl.errors import DenseSSLError

Year = Literal[2016, 2017]
_VOID = 255  # DAVIS 2017: pixels of no object


@dataclass(frozen=True)
class Video:
    """One sequence.

    Attributes:
        name: of its folder.
        frames: pictures in order, three or more.
        masks: one for each frame; that of the last frame may not exist, as it is
            left out of the measures.
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]


def read_videos(root: Path, year: Year, split: str = 'val') -> list[Video]:
    """The sequences that ``ImageSets/<year>/<split>.txt`` lists, in its order.

    Frames are ``JPEGImages/480p/<name>/*.jpg``, masks
    ``Annotations/480p/<name>/*.png`` of the same stem.

    Raises:
        DenseSSLError: the list is missing or empty, a sequence has no frames or fewer
            than three, or a mask is missing.
    """
    listed = Path(root) / 'ImageSets' / str(year) / f'{split}.txt'
    try:
        names = listed.read_text().split()
    except OSError as error:
        found = sorted(Path(root).glob(f'ImageSets/*/{split}.txt'))
        there = f'; there is {found[0]}, of another year' if found else ''
        raise DenseSSLError(
            f'DAVIS {year}: cannot read {listed}: {error.strerror}{there}; give the '
            'folder that holds ImageSets, JPEGImages and Annotations, and its year'
        ) from error
    if not names:
        raise DenseSSLError(f'DAVIS {year}: {listed} names no video; list one a line')
    return [_read_video(Path(root), name) for name in names]


def _read_video(root: Path, name: str) -> Video:
    folder = root / 'JPEGImages' / '480p' / name
    frames = tuple(sorted(folder.glob('*.jpg')))
    if len(frames) < 3:
        raise DenseSSLError(
            f'DAVIS video {name}: {len(frames)} frame(s) in {folder}; three are '
            'needed, as the first is given and the last is left out'
        )
    annotated = root / 'Annotations' / '480p' / name
    masks = tuple(annotated / f'{frame.stem}.png' for frame in frames)
    for mask in masks[:-1]:
        if not mask.is_file():
            which = 'the first annotation' if mask == masks[0] else 'an annotation'
            raise DenseSSLError(
                f'DAVIS video {name}: {which} is missing, {mask}; unpack Annotations '
                'again, or take the video off the list'
            )
    return Video(name, frames, masks)


def read_mask(path: Path, year: Year) -> np.ndarray:
    """Object numbers ``(H, W)`` uint8, 0 for the background.

    2016: every value above 0 is object 1. 2017: palette indices, and 255 is the
    background.

    Raises:
        DenseSSLError: the file cannot be read, or in 2017 has no indices.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ('P', 'L', '1'):
                if year == 2017:
                    raise DenseSSLError(
                        f'mask {path}: a picture of kind {picture.mode} has no object '
                        'numbers; save it with a palette, or grey'
                    )
                picture = picture.convert('L')
            mask = np.array(picture, dtype=np.uint8)
    except (OSError, SyntaxError) as error:
        line = str(error).splitlines()[0]
        raise DenseSSLError(
            f'mask {path}: cannot be read ({line}); replace the file'
        ) from error
    if year == 2016:
        return (mask > 0).astype(np.uint8)
    return np.where(mask == _VOID, 0, mask).astype(np.uint8)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Object numbers ``(H, W)`` uint8 as a PNG with DAVIS's palette; makes the folder.

    Raises:
        DenseSSLError: the file cannot be written.
    """
    picture = Image.fromarray(mask)
    picture.putpalette(PALETTE.tobytes())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise DenseSSLError(
            f'cannot write {path}: {error.strerror}; choose another folder'
        ) from error


def _palette() -> np.ndarray:
    """``(256, 3)`` uint8 RGB.

    Bits 0, 1, 2 of a number are the top bits of red, green and blue, bits 3, 4, 5 the
    next lower ones, and so on: the colours of PASCAL VOC, which DAVIS took over.
    """
    number = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        level, channel = divmod(bit, 3)
        colours[:, channel] |= ((number >> bit & 1) << (7 - level)).astype(np.uint8)
    return colours


PALETTE = _palette()
"""``(256, 3)`` uint8 RGB of each object number."""


def measure_video(video: Video, folder: Path, year: Year) -> list[dict[str, Any]]:
    """J and F of predicted masks, for each object of the first annotation.

    Means over the frames, the first and the last left out; the recall is the share of
    them with a value above 0.5.

    Args:
        video: frames and annotations.
        folder: the predicted masks, as `write_mask` writes them.
        year: how to read the annotations.

    Returns:
        Rows of ``video``, ``object`` (its number), means ``J_m`` and ``F_m``, recalls
        ``J_r`` and ``F_r``.

    Raises:
        DenseSSLError: an annotation has another size than its prediction.
    """
    first = read_mask(video.masks[0], year)
    numbers = np.unique(first[first > 0])
    values = []
    for path in video.masks[1:-1]:
        true, pred = read_mask(path, year), read_mask(folder / path.name, 2017)
        if pred.shape != true.shape:
            raise DenseSSLError(
                f'DAVIS video {video.name}: mask {path.name} is {true.shape} and its '
                f'frame {pred.shape}; all frames and masks of a video need one size'
            )
        pairs = [(pred == number, true == number) for number in numbers]
        values.append(
            [(region_similarity(*pair), boundary_measure(*pair)) for pair in pairs]
        )
    mean = np.mean(values, axis=0)  # (objects, 2), of (frames, objects, 2)
    recall = np.mean(np.array(values) > 0.5, axis=0)
    return [
        dict(
            video=video.name,
            object=int(number),
            **dict(zip(('J_m', 'F_m'), mean[i].tolist(), strict=True)),
            **dict(zip(('J_r', 'F_r'), recall[i].tolist(), strict=True)),
        )
        for i, number in enumerate(numbers)
    ]


def region_similarity(pred: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two masks (Perazzi et al., CVPR 2016, sec. 4).

    Args:
        pred: ``(H, W)`` bool.
        true: ``(H, W)`` bool.

    Returns:
        In 0..1; 1 where both masks are empty.
    """
    union = np.count_nonzero(pred | true)
    return np.count_nonzero(pred & true) / union if union else 1.0


def boundary_measure(
    pred: np.ndarray, true: np.ndarray, tolerance: float = 0.008
) -> float:
    """F: how well the contours of two masks agree (Perazzi et al., CVPR 2016, sec. 4).

    ``F = 2 P R / (P + R)``; ``P`` is the share of the predicted contour's pixels that
    have a true one at a distance of at most ``d``, ``R`` the same with the two
    exchanged, ``d = ceil(tolerance * sqrt(H^2 + W^2))`` px. As in DAVIS's code, this
    is a dilation by a disk in place of the assignment of pixels to each other that
    the paper starts from.

    Args:
        pred: ``(H, W)`` bool.
        true: ``(H, W)`` bool.
        tolerance: as a share of the picture's diagonal, above 0.

    Returns:
        In 0..1; 1 where neither mask has a contour, 0 where one has none.
    """
    reach = math.ceil(tolerance * math.hypot(*true.shape))
    ours, theirs = contour(pred), contour(true)
    if not (ours.any() and theirs.any()):
        return float(ours.any() == theirs.any())
    offset = np.arange(-reach, reach + 1) ** 2
    disk = (offset[:, None] + offset <= reach**2).astype(np.uint8)
    precision = cv2.dilate(theirs.astype(np.uint8), disk)[ours].mean()
    recall = cv2.dilate(ours.astype(np.uint8), disk)[theirs].mean()
    if not precision + recall:
        return 0.0
    return float(2 * precision * recall / (precision + recall))


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or right below.

    Beyond the edge of the picture the mask goes on as it is, so there is no contour
    along the edge.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        ``(H, W)`` bool.
    """
    on = np.pad(mask, ((0, 1), (0, 1)), mode='edge')
    here = on[:-1, :-1]
    return (here != on[:-1, 1:]) | (here != on[1:, :-1]) | (here != on[1:, 1:])
