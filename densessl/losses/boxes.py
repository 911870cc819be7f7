"""Regression of boxes."""

from __future__ import annotations

import torch
from torch import Tensor


def box_loss(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``|a - b|_1 + 1 - GIoU(a, b)`` of pairs of boxes, and their IoU.

    ``GIoU = IoU - (|hull| - |union|) / |hull|`` (Rezatofighi et al., CVPR 2019).

    Args:
        predicted: ``(..., 4)`` boxes ``(centre x, centre y, width, height)``, sides >
            0.
        target: likewise.

    Returns:
        ``(...)`` losses, in 0..6 for boxes in the unit square; ``(...)`` IoU, detached.
    """
    (a_low, a_high), (b_low, b_high) = _corners(predicted), _corners(target)
    shared = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp_min(0)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    overlap = shared.prod(-1)
    union = predicted[..., 2:].prod(-1) + target[..., 2:].prod(-1) - overlap
    tiny = torch.finfo(union.dtype).tiny
    iou = overlap / union.clamp_min(tiny)
    giou = iou - (hull - union) / hull.clamp_min(tiny)
    return (predicted - target).abs().sum(-1) + 1 - giou, iou.detach()


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return center - half, center + half
