"""Localisation or classification: which of the two a segmentation is bad at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from densessl.registry import EVALUATORS

from .features import FeatureExtractor
from .mask_pictures import save_masks
from .metrics import confusion_matrix, mean_iou
from .protocol import Scores
from .segmentation_protocol import LinearSegmentationProtocol, by_class, extracted


@EVALUATORS.register_module()
@dataclass(frozen=True, kw_only=True)
class Localisation(LinearSegmentationProtocol):
    """Linear segmentation, its two halves scored apart (LOCA, Table 5).

    Classification is the mAP of a picture's set of labels, where a class has the
    greatest probability that the 1x1 convolution gives it at any patch. Localisation
    is the mIoU after each predicted mask, the pixels of a class in a picture, has taken
    the label of the true mask it overlaps best, so that wrong names no longer count.

    Metrics: ``localisation_miou``, ``classification_map``, the plain ``miou``, and
    ``localisation_iou/CLASS`` and ``ap/CLASS``.
    """

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Train, score and draw the plain masks; see `EvaluationProtocol`."""
        train, val = (
            self.open(extractor, data, split)
            for split in (self.train_split, self.val_split)
        )
        classifier = self.learn(extractor, train)
        matrices, scores, pictures, stems = [], [], [], self.chosen(val)
        for images, masks, tokens in extracted(extractor, val):
            logits = classifier.logits(tokens.patches, tokens.grid)
            scores.append(logits.softmax(1).amax((2, 3)).cpu())
            preds = classifier.predict(tokens, val.size)
            first = len(matrices)
            pictures += save_masks(out, stems, first, images, masks, preds, self.names)
            for pred, mask in zip(preds, masks.to(preds.device), strict=True):
                matrices.append(confusion_matrix(pred, mask, len(self.names)).cpu())
        counts = torch.stack(matrices)
        precision = average_precision(torch.cat(scores), counts.sum(2) > 0)
        renamed, per_class = mean_iou(take_best_label(counts).sum(0))
        metrics = dict(
            localisation_miou=renamed,
            classification_map=precision.nanmean().item(),
            miou=mean_iou(counts.sum(0))[0],
        )
        metrics.update(by_class('localisation_iou', self.names, per_class))
        metrics.update(by_class('ap', self.names, precision))
        return Scores(metrics, self.about(train, val), pictures)


def take_best_label(confusion: Tensor) -> Tensor:
    """Confusion matrices of pictures after their predicted masks were renamed.

    The mask predicted as ``p`` becomes ``argmax_t IoU(mask t, mask p)``; masks that get
    one label become one. Pixels without a true label are outside of all masks.

    Args:
        confusion: ``(B, C, C)`` counts, one matrix a picture, rows are targets.

    Returns:
        ``(B, C, C)`` int64.
    """
    counts = confusion.double()
    either = counts.sum(2, keepdim=True) + counts.sum(1, keepdim=True) - counts
    best = (counts / either.clamp_min(1)).argmax(1, keepdim=True)  # (B, 1, C)
    renamed = torch.zeros_like(confusion)
    return renamed.scatter_add_(2, best.expand_as(confusion), confusion)


def average_precision(scores: Tensor, present: Tensor) -> Tensor:
    """Average precision of ranking pictures, for each class.

    ``AP = sum_n (R_n - R_(n-1)) P_n`` over the distinct thresholds ``n``: precision
    times the recall it adds, not interpolated. Equal scores share a threshold.

    Args:
        scores: ``(M, C)``, greater where the class is more likely.
        present: ``(M, C)`` bool, whether the class is in the picture.

    Returns:
        ``(C,)`` float64 in 0..1; NaN for a class in no picture.
    """
    values, order = scores.sort(0, descending=True)
    hits = present.gather(0, order).double()
    last = torch.ones_like(hits, dtype=torch.bool)  # of its run of equal scores
    last[:-1] = values[:-1] != values[1:]
    found = hits.cumsum(0)
    rank = torch.arange(1, len(hits) + 1, dtype=torch.float64)[:, None]
    result = []
    for column in range(hits.shape[1]):
        at = last[:, column]
        recalled = found[at, column]
        gained = recalled.diff(prepend=recalled.new_zeros(1))
        result.append((gained * recalled / rank[at, 0]).sum() / recalled[-1])
    return torch.stack(result)
