"""Unsupervised segmentation: k-means of patch tokens, clusters matched to classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.registry import EVALUATORS

from .features import FeatureExtractor
from .mask_pictures import save_masks
from .progress import progress
from .protocol import Scores
from .segmentation_folder import IGNORED, LabelledFolder
from .segmentation_protocol import MaskProtocol, by_class, extracted
from .training_features import resize_nearest

_ROWS = 2**16  # of the distances that are there at once


@EVALUATORS.register_module()
@dataclass(frozen=True, kw_only=True)
class KMeansSegmentation(MaskProtocol):
    """mIoU of k-means clusters of the validation tokens, each matched to one class.

    No label is used but for the matching, which is the one-to-one assignment with the
    greatest mIoU (Hungarian). Of several runs of k-means that with the least inertia
    counts. A pixel has the cluster of the patch it lies in.

    Metrics: ``miou``, ``pixel_accuracy``, ``inertia`` (mean squared distance of a token
    from its centre) and ``iou/CLASS``. With more clusters than classes, pixels of an
    unmatched cluster are wrong; with fewer, an unmatched class has IoU 0.

    Attributes:
        num_clusters: ``K``; None for the number of classes.
        normalize: bring tokens to length 1 first.
        max_tokens: most tokens k-means sees, the same number from each picture; all
            tokens get a cluster.
        restarts: runs of k-means.
        iterations: most steps of a run.
    """

    num_clusters: int | None = None
    normalize: bool = True
    max_tokens: int = 2**19
    restarts: int = 5
    iterations: int = 100

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Cluster, match, score and draw; see `EvaluationProtocol`."""
        val = self.open(extractor, data, self.val_split)
        rng = torch.Generator().manual_seed(self.seed)
        tokens = self.sample(extractor, val, rng)
        num = len(self.names) if self.num_clusters is None else self.num_clusters
        centres, inertia = kmeans(tokens, num, rng, self.restarts, self.iterations)

        counts = torch.zeros(len(self.names), num, dtype=torch.int64)
        clusters = []
        for _, masks, found in extracted(extractor, val):
            patches = self.scaled(found.patches).flatten(0, 1)
            maps = nearest_centre(patches, centres)[0].cpu().view(-1, *found.grid)
            clusters.append(maps)
            counts += overlaps(masks, resize_nearest(maps, val.size), counts.shape)
        labels, per_class = match_clusters(counts)
        right = sum(counts[c, k] for k, c in enumerate(labels.tolist()) if c != IGNORED)
        metrics = dict(
            miou=per_class.mean().item(),
            pixel_accuracy=(right / counts.sum()).item(),
            inertia=inertia,
        )
        metrics.update(by_class('iou', self.names, per_class))
        about = self.settings()
        about.update(num_clusters=num, num_val=len(val), num_tokens=len(tokens))
        return Scores(metrics, about, self.draw(val, torch.cat(clusters), labels, out))

    def scaled(self, patches: Tensor) -> Tensor:
        """Tokens ``(..., D)`` as they are clustered."""
        return F.normalize(patches, dim=-1) if self.normalize else patches

    def sample(
        self, extractor: FeatureExtractor, val: LabelledFolder, rng: torch.Generator
    ) -> Tensor:
        """``(n, D)`` tokens for k-means, on the backbone's device."""
        each, kept = max(1, self.max_tokens // len(val)), []
        for _, _, found in extracted(extractor, val):
            for patches in self.scaled(found.patches):
                if each < len(patches):
                    order = torch.randperm(len(patches), generator=rng)
                    patches = patches[order[:each].to(patches.device)]
                kept.append(patches)
        return torch.cat(kept)

    def draw(
        self, val: LabelledFolder, clusters: Tensor, labels: Tensor, out: Path
    ) -> list[Path]:
        """Pictures with their masks; ``clusters`` is ``(M, h, w)``."""
        paths, stems = [], self.chosen(val)
        for index in sorted(stems):
            image, mask = (torch.from_numpy(part)[None] for part in val[index])
            pred = labels[resize_nearest(clusters[index][None], val.size)]
            paths += save_masks(out, stems, index, image, mask, pred, self.names)
        return paths


def kmeans(
    tokens: Tensor,
    num: int,
    rng: torch.Generator,
    restarts: int = 5,
    iterations: int = 100,
) -> tuple[Tensor, float]:
    """Centres of k-means: k-means++ and Lloyd's steps, the best of several runs.

    A run ends when no token changes its cluster. A cluster that lost all tokens starts
    again at the token farthest from its centre.

    Args:
        tokens: ``(n, D)`` float32.
        num: ``K`` clusters.
        rng: on the CPU.
        restarts: runs; that with the least inertia counts.
        iterations: most steps of a run.

    Returns:
        ``(K, D)`` centres, and the mean squared distance from the nearest one.

    Raises:
        DenseSSLError: fewer tokens than clusters, or a number below 1.
    """
    if min(num, restarts, iterations) < 1 or len(tokens) < num:
        raise DenseSSLError(
            f'k-means: {len(tokens)} tokens, {num} clusters, {restarts} restarts, '
            f'{iterations} iterations; give 1 or more, and a token for each cluster'
        )
    shift = tokens.mean(0)  # a common offset would cost digits of the distances
    tokens = tokens - shift
    best, least = tokens[:num], float('inf')
    for _ in progress(range(restarts), restarts, 'k-means'):
        centres, labels = _plus_plus(tokens, num, rng), None
        for _ in range(iterations):
            new, distance = nearest_centre(tokens, centres)
            if labels is not None and torch.equal(new, labels):
                break
            labels = new
            centres = _means(tokens, labels, distance, num)
        inertia = nearest_centre(tokens, centres)[1].double().mean().item()
        if inertia < least:
            best, least = centres, inertia
    return best + shift, least


def nearest_centre(tokens: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Index ``(n,)`` of the nearest of ``(K, D)`` centres, and its squared distance."""
    middle = centres.mean(0)
    centres = centres - middle
    index, distance = [], []
    for part in tokens.split(_ROWS):
        part = part - middle
        apart = centres.square().sum(1) - 2 * part @ centres.mT
        least = apart.min(1)
        index.append(least.indices)
        distance.append((least.values + part.square().sum(1)).clamp_min(0))
    return torch.cat(index), torch.cat(distance)


def _plus_plus(tokens: Tensor, num: int, rng: torch.Generator) -> Tensor:
    """Tokens as first centres, each drawn by its squared distance from the others."""
    first = int(torch.randint(len(tokens), (), generator=rng))
    chosen, distance = [first], None
    while len(chosen) < num:
        last = nearest_centre(tokens, tokens[chosen[-1:]])[1].double()
        distance = last if distance is None else torch.minimum(distance, last)
        mass = distance.cumsum(0)
        at = torch.rand((), generator=rng, dtype=torch.float64).to(mass) * mass[-1]
        index = int(torch.searchsorted(mass, at, right=True))
        chosen.append(min(index, len(tokens) - 1))
    return tokens[chosen]


def _means(tokens: Tensor, labels: Tensor, distance: Tensor, num: int) -> Tensor:
    """``(K, D)`` mean of each cluster's tokens."""
    sums, sizes = tokens.new_zeros(num, tokens.shape[1]), tokens.new_zeros(num)
    for part, label in zip(tokens.split(_ROWS), labels.split(_ROWS), strict=True):
        member = F.one_hot(label, num).to(tokens)  # a matrix product: deterministic
        sums += member.mT @ part
        sizes += member.sum(0)
    centres = sums / sizes.clamp_min(1)[:, None]
    empty = (sizes == 0).nonzero()[:, 0]
    centres[empty] = tokens[distance.topk(len(empty)).indices]
    return centres


def overlaps(masks: Tensor, clusters: Tensor, shape: tuple[int, int]) -> Tensor:
    """Counts ``(C, K)`` of pixels of class ``c`` in cluster ``k``.

    Args:
        masks: classes in ``0..C-1``, 255 ignored.
        clusters: clusters in ``0..K-1``, same shape.
        shape: ``(C, K)``.
    """
    valid = masks != IGNORED
    index = masks[valid].long() * shape[1] + clusters[valid]
    return torch.bincount(index, minlength=shape[0] * shape[1]).view(shape)


def match_clusters(counts: Tensor) -> tuple[Tensor, Tensor]:
    """One class for each cluster and one cluster for each class, with the best mIoU.

    Args:
        counts: ``(C, K)`` pixels of class ``c`` in cluster ``k``.

    Returns:
        ``(K,)`` long class of each cluster, 255 for none, and ``(C,)`` float64 IoU of
        each class, 0 for one without a cluster.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    pixels = counts.double()
    either = pixels.sum(1, keepdim=True) + pixels.sum(0) - pixels
    iou = pixels / either.clamp_min(1)
    classes, clusters = map(
        torch.from_numpy, linear_sum_assignment(iou.numpy(), maximize=True)
    )
    labels = torch.full((counts.shape[1],), IGNORED)
    labels[clusters] = classes
    per_class = torch.zeros(len(counts), dtype=torch.float64)
    per_class[classes] = iou[classes, clusters]
    return labels, per_class
