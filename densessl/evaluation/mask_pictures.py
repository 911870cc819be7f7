"""Pictures of masks: the photograph, the truth and the prediction, with a legend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from densessl.datasets.channels import shown_as_rgb
from densessl.visualization.pca import write_png

_GAP_PX = 4
_LINE_PX = 18
_LEGEND_PX = 140
_INK = (40, 40, 40)
_IGNORED = 255


def class_colours(num: int) -> np.ndarray:
    """Colours ``(num, 3)`` uint8 RGB: hues a golden section apart, light and darker."""
    hsv = np.empty((1, num, 3), np.float32)
    hsv[0, :, 0] = np.arange(num) * 0.618034 % 1 * 360
    hsv[0, :, 1] = 0.8
    hsv[0, :, 2] = np.where(np.arange(num) % 2, 0.6, 0.95)
    return (cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0] * 255).round().astype(np.uint8)


def mask_sheet(
    image: np.ndarray, truth: np.ndarray, pred: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Picture, true and predicted mask side by side, and a legend on the right.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        truth: ``(H, W)`` classes; 255 is drawn white.
        pred: ``(H, W)`` classes; 255 is drawn white.
        names: of the classes; the legend has those that occur.

    Returns:
        Uint8 RGB sheet.
    """
    table = np.full((256, 3), 255, np.uint8)
    table[: len(names)] = class_colours(len(names))
    shown = [c for c in np.union1d(truth, pred).tolist() if c != _IGNORED]
    height, width = truth.shape
    rows = max(height, _LINE_PX * len(shown))
    sheet = np.full((rows, 3 * (width + _GAP_PX) + _LEGEND_PX, 3), 255, np.uint8)
    for column, panel in enumerate((image, table[truth], table[pred])):
        left = column * (width + _GAP_PX)
        sheet[:height, left : left + width] = panel
    left = 3 * (width + _GAP_PX)
    for line, label in enumerate(shown):
        top = line * _LINE_PX
        sheet[top + 2 : top + _LINE_PX - 2, left : left + _LINE_PX] = table[label]
        write(sheet, names[label], left + _LINE_PX + 4, top)
    return sheet


def write(sheet: np.ndarray, text: str, left: int, top: int) -> None:
    """Put a line of dark text on a sheet, its upper left corner at a place in px."""
    origin, font = (left, top + _LINE_PX - 5), cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(sheet, text, origin, font, 0.4, _INK, 1, cv2.LINE_AA)


def save_picture(path: Path, sheet: np.ndarray) -> Path:
    """Write ``(H, W, 3)`` uint8 RGB as PNG and hand its path back; makes the folder."""
    write_png(path, sheet)
    return path


def evenly(total: int, count: int) -> set[int]:
    """At most ``count`` indices below ``total``, evenly spaced."""
    return set(np.linspace(0, total - 1, min(total, count)).round().astype(int))


def save_masks(
    out: Path,
    stems: dict[int, str],
    first: int,
    images: Tensor,
    truths: Tensor,
    preds: Tensor,
    names: Sequence[str],
) -> list[Path]:
    """Draw those pictures of a batch that were chosen, as ``masks/STEM.png``.

    Args:
        out: folder.
        stems: names of the chosen pictures, by index.
        first: index of the first picture of the batch.
        images: ``(B, H, W, C)``.
        truths: ``(B, H, W)`` classes, 255 ignored.
        preds: ``(B, H, W)`` classes, 255 for none.
        names: of the classes.
    """
    paths = []
    for index in sorted(set(range(first, first + len(images))) & set(stems)):
        masks = (part[index - first].cpu() for part in (truths, preds))
        truth, pred = (mask.to(torch.uint8).numpy() for mask in masks)
        image = shown_as_rgb(images[index - first].cpu().numpy())
        sheet = mask_sheet(image, truth, pred, names)
        paths.append(save_picture(out / 'masks' / f'{stems[index]}.png', sheet))
    return paths
