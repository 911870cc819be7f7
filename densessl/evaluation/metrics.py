"""Segmentation scores from one confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl.errors import DenseSSLError


def check_labels(
    labels: Tensor, num_classes: int, ignore_index: int | None = 255
) -> Tensor:
    """Valid pixels of a label map, after a check that every label has a class.

    Args:
        labels: integers of any shape.
        num_classes: labels run from 0 to ``num_classes - 1``.
        ignore_index: label of pixels to leave out; None if there is no such label.

    Returns:
        Boolean map of the same shape, False where the label is ``ignore_index``.

    Raises:
        DenseSSLError: labels are not integers, or one is outside the range.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise DenseSSLError(
            f'labels: type {labels.dtype} is not an integer; give class numbers'
        )
    labels = labels.long()  # a byte would wrap: 256 classes, ignore_index=-1
    valid = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        valid = labels != ignore_index
    wrong = labels[valid & ((labels < 0) | (labels >= num_classes))]
    if wrong.numel():
        ignored = '' if ignore_index is None else f' (and {ignore_index}, ignored)'
        raise DenseSSLError(
            f'labels: value {int(wrong[0])} is outside 0..{num_classes - 1}{ignored}; '
            'correct the labels or the number of classes'
        )
    return valid


def confusion_matrix(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Counts ``M[t, p]`` of pixels with target ``t`` that were predicted as ``p``.

    Matrices of several pictures add up.

    Args:
        pred: predicted classes, integers of any shape, in ``0..C-1`` where counted.
        target: true classes, same shape; ``ignore_index`` leaves a pixel out.
        num_classes: ``C``.
        ignore_index: target label that is not counted.

    Returns:
        ``(C, C)`` int64, rows are targets.

    Raises:
        DenseSSLError: shapes differ, or a label is outside the range.
    """
    if pred.shape != target.shape:
        raise DenseSSLError(
            f'confusion_matrix: prediction {tuple(pred.shape)} and target '
            f'{tuple(target.shape)} differ in shape; resize the prediction'
        )
    valid = check_labels(target, num_classes, ignore_index)
    pred, target = pred[valid].long(), target[valid].long()
    check_labels(pred, num_classes, ignore_index=None)
    counts = torch.bincount(target * num_classes + pred, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def mean_iou(confusion: Tensor) -> tuple[float, Tensor]:
    """Intersection over union per class, and its mean over the classes that occur.

    ``IoU_c = M[c, c] / (sum_p M[c, p] + sum_t M[t, c] - M[c, c])``

    Args:
        confusion: ``(C, C)`` counts, rows are targets.

    Returns:
        Mean IoU in 0..1, and ``(C,)`` float64 IoU per class. A class absent from
        both prediction and target is NaN and left out of the mean; the mean is NaN
        if no pixel was counted.
    """
    confusion = confusion.cpu().double()
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    per_class = both / either  # 0 / 0 is NaN: the class does not occur
    return per_class.nanmean().item(), per_class


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of counted pixels that have the right class, in 0..1; NaN if none."""
    confusion = confusion.cpu().double()
    return (confusion.trace() / confusion.sum()).item()
