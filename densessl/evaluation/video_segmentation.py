"""Video object segmentation: the first mask, carried on by the nearest features."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from densessl.datasets import read_image
from densessl.errors import DenseSSLError
from densessl.registry import EVALUATORS
from densessl.visualization.matches import stack_titled

from .davis import (
    PALETTE,
    Video,
    Year,
    contour,
    measure_video,
    read_mask,
    read_videos,
    write_mask,
)
from .features import FeatureExtractor
from .label_propagation import hard_labels, propagate_labels
from .progress import progress
from .protocol import Scores, score_settings
from .training_features import resize_nearest

_MULTIPLE_PX = 64  # of the longer side, as in DINO's code
_SHOWN = 5
_SHOWN_PX = 120


@EVALUATORS.register_module()
@dataclass(frozen=True)
class VideoSegmentation:
    """DAVIS, semi-supervised, on frozen patch tokens, as DINO evaluates it.

    The mask of the first frame is given. Each further frame's tokens take the mean of
    the labels of their nearest tokens in the first and the previous frames, see
    `propagate_labels`. The scores are resized bilinearly to the frame, scaled to 0..1
    channel by channel, and each pixel takes the greatest. One frame is in the
    backbone at a time; J and F are taken at the masks' own size.

    Metrics are means over objects of what each has over its frames, the first and the
    last left out, under DAVIS's names: ``J_m`` and ``F_m``, the means; ``J&F_m``, the
    mean of the two; ``J_r`` and ``F_r``, the share of the frames above 0.5.

    Attributes:
        year: 2016, one object a video; or 2017, several.
        split: of ``ImageSets/<year>/<split>.txt``.
        height: shorter side of a frame in px. The longer side keeps the proportion,
            rounded down to a multiple of 64, then both to multiples of the patch.
        num_previous: previous frames that give labels, beside the first.
        radius: a token looks for its nearest ones at most this far, in tokens, to
            each side.
        top_k: how many nearest tokens give labels, over all frames together.
        temperature: of the weights of the labels, no unit.

    Raises:
        DenseSSLError: a number is out of range.
    """

    year: Year = 2017
    split: str = 'val'
    height: int = 480
    num_previous: int = 7
    radius: int = 12
    top_k: int = 5
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.year not in (2016, 2017):
            raise DenseSSLError(
                f'VideoSegmentation: year={self.year!r} is unknown; use 2016 or 2017'
            )
        least = dict(height=1, num_previous=0, radius=0, top_k=1)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise DenseSSLError(
                    f'VideoSegmentation: {name}={getattr(self, name)} is too small; '
                    f'give {low} or more'
                )
        if self.temperature <= 0:
            raise DenseSSLError(
                f'VideoSegmentation: temperature={self.temperature} is not above 0; '
                'the published one is 0.1'
            )

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Segment and measure all videos; see `EvaluationProtocol`.

        Writes ``predictions/<video>/<frame>.png`` with DAVIS's palette, ``<video>.png``
        with some frames, and ``objects.csv`` with the measures of each object.
        """
        videos = read_videos(data, self.year, self.split)
        rows, pictures = [], []
        for video in videos:
            folder, count = out / 'predictions' / video.name, len(video.frames)
            masks = progress(self.segment(extractor, video), count, video.name)
            for frame, mask in zip(video.frames, masks, strict=True):
                write_mask(folder / f'{frame.stem}.png', mask)
            rows += measure_video(video, folder, self.year)
            pictures.append(out / f'{video.name}.png')
            sheet = contact_sheet(video, folder, self.year)
            Image.fromarray(sheet).save(pictures[-1])
        with (out / 'objects.csv').open('w', newline='') as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        mean = {
            name: float(np.mean([row[name] for row in rows]))
            for name in ('J_m', 'J_r', 'F_m', 'F_r')
        }
        both = (mean['J_m'] + mean['F_m']) / 2
        settings = score_settings(self) | dict(
            patch_size=extractor.backbone.patch_size,
            num_videos=len(videos),
            num_objects=len(rows),
            num_frames=sum(len(video.frames) for video in videos),
        )
        return Scores({'J&F_m': both, **mean}, settings, pictures)

    @torch.no_grad()
    def segment(
        self, extractor: FeatureExtractor, video: Video
    ) -> Iterator[np.ndarray]:
        """Object numbers of the frames, one after the other; the first are given.

        Yields:
            ``(H, W)`` uint8, of the size of the frame.

        Raises:
            DenseSSLError: the first mask has no object or another size than its frame,
                a frame another size than the first, or features are not finite.
        """
        first = read_mask(video.masks[0], self.year)
        numbers = np.unique(np.append(first, np.uint8(0)))
        if len(numbers) < 2:
            raise DenseSSLError(
                f'DAVIS video {video.name}: the first annotation {video.masks[0]} '
                'marks no object; take the video off the list'
            )
        previous: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.num_previous)
        given = None
        for path in video.frames:
            frame = read_image(path)
            if frame.shape[:2] != first.shape:
                what = 'its mask' if given is None else 'the first annotation'
                raise DenseSSLError(
                    f'DAVIS video {video.name}: frame {path.name} is '
                    f'{frame.shape[:2]} and {what} {first.shape}; all frames and masks '
                    'of a video need one size'
                )
            size = frame_size(first.shape, self.height, extractor.backbone.patch_size)
            features = self._features(extractor, frame, size, path)
            if given is None:
                index = torch.from_numpy(np.searchsorted(numbers, first))
                small = resize_nearest(index[None], features.shape[:2])[0]
                labels = F.one_hot(small, len(numbers)).to(features)
                given = features, labels
                yield first
                continue
            context = [given, *previous]
            labels = propagate_labels(
                features,
                torch.stack([each for each, _ in context]),
                torch.stack([each for _, each in context]),
                radius=self.radius,
                top_k=self.top_k,
                temperature=self.temperature,
            )
            previous.append((features, labels))
            index = resize_nearest(hard_labels(labels, size)[None], first.shape)[0]
            yield numbers[index.cpu().numpy()]

    def _features(
        self,
        extractor: FeatureExtractor,
        frame: np.ndarray,
        size: tuple[int, int],
        path: Path,
    ) -> Tensor:
        """Unit tokens ``(h, w, D)`` of one frame."""
        # Bilinear also where it shrinks, as in the protocol.
        tokens = extractor(cv2.resize(frame, size[::-1])[None])
        unit = F.normalize(tokens.patches[0], dim=-1).unflatten(0, tokens.grid)
        if not torch.isfinite(unit).all():
            raise DenseSSLError(
                f'VideoSegmentation: features of {path} are not finite; the backbone '
                'has diverged, or needs precision fp32'
            )
        return unit


def frame_size(size: tuple[int, int], shorter: int, patch: int) -> tuple[int, int]:
    """``(H, W)`` at which a frame goes into the backbone.

    Args:
        size: ``(H, W)`` of the frame.
        shorter: its shorter side afterwards, in px.
        patch: both sides become multiples of it, rounded down.

    Raises:
        DenseSSLError: a side would have no patch.
    """
    short = shorter // patch * patch
    long = shorter * max(size) // min(size) // _MULTIPLE_PX * _MULTIPLE_PX
    long = long // patch * patch
    if not short or not long:
        raise DenseSSLError(
            f'VideoSegmentation: frames of {size[0]}x{size[1]} px at height={shorter} '
            f'have no patch of {patch} px and {_MULTIPLE_PX} px of width; raise height'
        )
    return (short, long) if size[0] <= size[1] else (long, short)


def contact_sheet(video: Video, folder: Path, year: Year) -> np.ndarray:
    """Some frames with predicted masks, and below them with the annotated ones.

    Args:
        video: frames and annotations.
        folder: the predicted masks.
        year: how to read the annotations.

    Returns:
        Uint8 RGB ``(H, W, 3)``.
    """
    chosen = np.linspace(0, len(video.frames) - 2, _SHOWN).round().astype(int)
    rows = {'predicted': [], 'annotated': []}
    for i in dict.fromkeys(chosen.tolist()):
        frame, true = read_image(video.frames[i]), video.masks[i]
        rows['predicted'].append(_overlay(frame, read_mask(folder / true.name, 2017)))
        rows['annotated'].append(_overlay(frame, read_mask(true, year)))
    return stack_titled({title: np.hstack(row) for title, row in rows.items()})


def _overlay(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The frame, small, with its objects in their colours."""
    size = round(_SHOWN_PX * frame.shape[1] / frame.shape[0]), _SHOWN_PX
    frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    mixed = np.where(mask[..., None] > 0, frame // 2 + PALETTE[mask] // 2, frame)
    mixed[contour(mask)] = 255
    return mixed
