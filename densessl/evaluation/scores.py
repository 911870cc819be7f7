"""Scores of classifiers: accuracy, mean per class, 11-point mAP, ROC-AUC."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of the right classes.

    Args:
        logits: ``(M, C)``, or ``(M, 1)`` of the second of two classes.
        targets: ``(M,)`` int64.
    """
    return (_classes(logits) == targets).double().mean().item()


def mean_per_class(logits: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur of the share that is right; as `accuracy`."""
    right = (_classes(logits) == targets).double()
    counts = torch.bincount(targets).double()
    hits = torch.bincount(targets, right)
    return (hits[counts > 0] / counts[counts > 0]).mean().item()


def map_11_point(logits: Tensor, targets: Tensor) -> float:
    """Mean average precision as PASCAL VOC 2007 has it.

    A class's average precision is the mean over the recalls 0, 0.1, ..., 1 of the best
    precision at this recall or a greater one.

    Args:
        logits: ``(M, C)``.
        targets: ``(M, C)``: 1 for a class that is there, 0 for one that is not, -1 to
            leave the picture out for this class.

    Returns:
        The mean over the classes that occur; NaN if none does.
    """
    found = []
    for score, truth in zip(logits.mT, targets.mT, strict=True):
        score, truth = score[truth >= 0], truth[truth >= 0]
        if not (truth == 1).any():
            continue
        hits = truth[score.argsort(descending=True, stable=True)].double().cumsum(0)
        precision = hits / torch.arange(1, len(hits) + 1)
        recall = hits / hits[-1]
        best = [
            precision[recall >= level / 10 - 1e-12].max().item() for level in range(11)
        ]
        found.append(sum(best) / 11)
    return sum(found) / len(found) if found else float('nan')


def roc_auc(logits: Tensor, targets: Tensor) -> float:
    """Chance that a picture of the second class has the greater logit, ties by half.

    Args:
        logits: ``(M, 1)`` of the second class.
        targets: ``(M,)`` of 0 and 1.

    Returns:
        NaN unless both classes occur.
    """
    _, inverse, counts = logits.flatten().unique(
        return_inverse=True, return_counts=True
    )
    ends = counts.cumsum(0).double()
    rank = (ends - (counts - 1) / 2)[inverse]  # from 1, the mean of equal ones
    positive = targets == 1
    m = int(positive.sum())
    n = len(targets) - m
    if not (m and n):
        return float('nan')
    return ((rank[positive].sum() - m * (m + 1) / 2) / (m * n)).item()


def _classes(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).long()
    return logits.argmax(1)
