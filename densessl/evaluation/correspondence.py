"""Correspondence: do the tokens of a picture find themselves in its mirror image?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from densessl.datasets.transforms.photometric import color_jitter, to_grayscale
from densessl.datasets.unlabelled import scan_folder
from densessl.errors import DenseSSLError
from densessl.registry import EVALUATORS
from densessl.visualization.matches import draw_matches, stack_titled

from .features import FeatureExtractor
from .labelled import CentreCrops
from .progress import progress
from .protocol import Scores, score_settings


class Matches(NamedTuple):
    """The most similar token of the other view, for each token of ``B`` pictures.

    Attributes:
        index: ``(B, N)`` long.
        similarity: ``(B, N)`` cosine, in -1..1.
        distance: ``(B, N)`` from the found to the true token, in tokens.
    """

    index: Tensor
    similarity: Tensor
    distance: Tensor


@EVALUATORS.register_module()
@dataclass(frozen=True)
class Correspondence:
    """Tokens of a picture and of its flipped, recoloured copy, matched by similarity.

    View 1 is the centre crop. View 2 is view 1 mirrored left to right, with colour
    jitter, in grey. Each token of view 1 takes the token of view 2 with the greatest
    cosine; the true one is its mirror image. Accuracy is the share of tokens that find
    it, the distance how far the found one is away (L2, in tokens; a right one counts
    with 0), over the ``top`` pairs of each picture that are most similar (EsViT,
    arXiv:2106.09785) and over all tokens (GLSD). Both are means over pictures.

    Attributes:
        resize: px of the shorter side before the crop.
        crop: side of the central crop in px, a multiple of the patch.
        top: number of most similar pairs.
        jitter: brightness, contrast, saturation and hue, see `color_jitter`.
        max_pictures: pictures to take, evenly from the sorted ones; None for all.
        num_drawn: how many of them are drawn.
        seed: of the colours.

    Raises:
        DenseSSLError: a number is out of range.
    """

    resize: int = 256
    crop: int = 224
    top: int = 10
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    max_pictures: int | None = None
    num_drawn: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in dict(crop=1, top=1, max_pictures=1, num_drawn=0).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise DenseSSLError(
                    f'Correspondence: {name}={value} is too small; give {low} or more'
                )

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Match all pictures below a folder; see `EvaluationProtocol`.

        Draws ``matches_<i>_<name>.png`` for the first pictures.
        """
        crops = CentreCrops(self._paths(data), self.resize, self.crop)
        chunks = torch.arange(len(crops)).split(extractor.batch_size)
        values, pictures = [], []
        for chunk in progress(chunks, len(chunks), 'batches of pictures'):
            views = [self.views(crops, index) for index in chunk.tolist()]
            first, second = map(np.stack, zip(*views, strict=True))
            ours, theirs = extractor(first), extractor(second)
            matches = match_mirrored(ours.patches, theirs.patches, ours.grid)
            for i, index in enumerate(chunk.tolist()):
                mine = Matches(*(each[i] for each in matches))
                best = mine.similarity.topk(min(self.top, len(mine.index))).indices
                values.append(_scores(mine.distance[best]) + _scores(mine.distance))
                if index < self.num_drawn:
                    path = (
                        out / f'matches_{index:03d}_{Path(crops.paths[index]).stem}.png'
                    )
                    sheet = _sheet(views[i], ours.grid, mine, best, values[-1])
                    Image.fromarray(sheet).save(path)
                    pictures.append(path)
        names = [
            f'{what}_{over}'
            for over in (f'top{self.top}', 'all')
            for what in ('accuracy', 'distance_tokens')
        ]
        mean = np.mean(values, axis=0).tolist()
        settings = score_settings(self) | dict(grid=ours.grid, num_pictures=len(crops))
        return Scores(dict(zip(names, mean, strict=True)), settings, pictures)

    def views(self, crops: CentreCrops, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Both views ``(crop, crop, 3)`` uint8 RGB of a picture.

        The colours of the second follow from the seed and the index.
        """
        first = crops[index].permute(1, 2, 0).numpy()
        rng = np.random.default_rng((self.seed, index))
        mirrored = np.ascontiguousarray(first[:, ::-1])
        return first, to_grayscale(color_jitter(mirrored, self.jitter, rng))

    def _paths(self, data: Path) -> list[str]:
        names, _ = scan_folder(str(data)) if data.is_dir() else ([], None)
        if not names:
            what = 'no picture below' if data.is_dir() else 'no folder'
            raise DenseSSLError(
                f'Correspondence: {what} {data}; give a folder with pictures, at any '
                'depth'
            )
        count = min(len(names), self.max_pictures or len(names))
        chosen = np.arange(count) * len(names) // count
        return [os.path.join(data, os.fsdecode(names[i])) for i in chosen]


@torch.no_grad()
def match_mirrored(ours: Tensor, theirs: Tensor, grid: tuple[int, int]) -> Matches:
    """Match tokens of views with those of the mirrored views.

    Args:
        ours: ``(B, N, D)`` tokens of the views, in raster order.
        theirs: ``(B, N, D)`` of the same views mirrored left to right.
        grid: ``(h, w)``, ``h * w == N``.

    Raises:
        DenseSSLError: features are not finite.
    """
    h, w = grid
    place = torch.arange(h * w, device=ours.device)
    row, column = place // w, place % w
    found = []
    for one, other in zip(ours, theirs, strict=True):
        cosine = F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).mT
        if not torch.isfinite(cosine).all():
            raise DenseSSLError(
                'Correspondence: features are not finite; the backbone has diverged, '
                'or needs precision fp32'
            )
        similarity, index = cosine.max(1)
        away = torch.hypot(
            (index // w - row).float(), (index % w - (w - 1 - column)).float()
        )
        found.append((index, similarity, away))
    return Matches(*map(torch.stack, zip(*found, strict=True)))


def _scores(distance: Tensor) -> tuple[float, float]:
    """Accuracy and mean distance."""
    return (distance == 0).float().mean().item(), distance.mean().item()


def _sheet(
    views: tuple[np.ndarray, np.ndarray],
    grid: tuple[int, int],
    matches: Matches,
    best: Tensor,
    scores: tuple[float, ...],
) -> np.ndarray:
    """The most similar pairs, and below them some of all."""
    index = matches.index.cpu().numpy()
    every = np.ones(len(index), bool)
    chosen = np.isin(np.arange(len(index)), best.cpu().numpy())
    rows = {}
    for title, valid, (accuracy, away) in (
        (f'{len(best)} most similar', chosen, scores[:2]),
        ('all (24 shown)', every, scores[2:]),
    ):
        title = f'{title}: {accuracy:.0%} right, {away:.1f} tokens off'
        rows[title] = draw_matches(views, (grid, grid), index, valid)
    return stack_titled(rows)
