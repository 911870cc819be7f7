"""Pictures with values of their patches over them, side by side under titles."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from densessl.errors import DenseSSLError

from .matches import GAP_PX, Grid, stack_titled

PANEL_PX = 160
"""Pictures smaller than this are enlarged by a whole number."""
_INK = (255, 40, 40)
_DIMMED = 0.35


def patch_at(point: tuple[float, float], grid: Grid) -> int:
    """Raster index of the patch that covers a point.

    Args:
        point: ``(x, y)`` in fractions of width and height, 0..1.
        grid: ``(h, w)`` patches.

    Raises:
        DenseSSLError: the point lies outside the picture.
    """
    if not all(0 <= part <= 1 for part in point):
        raise DenseSSLError(
            f'--query {point[0]:g},{point[1]:g}: the point lies outside the picture; '
            'give x,y in fractions of its width and height, 0 to 1'
        )
    (x, y), (h, w) = point, grid
    return min(int(y * h), h - 1) * w + min(int(x * w), w - 1)


def enlarged(image: np.ndarray) -> np.ndarray:
    """A picture whose pixels became squares, its longer side `PANEL_PX` or more."""
    zoom = -(-PANEL_PX // max(image.shape[:2]))
    return image.repeat(zoom, 0).repeat(zoom, 1)


def heat_over(
    image: np.ndarray, values: np.ndarray, shown: np.ndarray, grid: Grid
) -> np.ndarray:
    """A picture in grey with colours over the patches that are shown.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        values: ``(h * w,)`` in 0..1, dark blue to yellow (viridis).
        shown: ``(h * w,)`` bool; the other patches are dimmed.
        grid: ``(h, w)``.

    Returns:
        ``(H, W, 3)`` uint8 RGB: seven parts colour, three parts grey.
    """
    size = image.shape[1::-1]
    levels = (values.reshape(grid).clip(0, 1) * 255).round().astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[:, :, ::-1]
    colours = cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST)
    mask = shown.reshape(grid).astype(np.uint8)
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)[..., None] > 0
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(float)
    mixed = np.where(mask, 0.7 * colours + 0.3 * grey, _DIMMED * grey)
    return mixed.round().astype(np.uint8)


def framed(image: np.ndarray, patch: int, grid: Grid) -> np.ndarray:
    """A copy of a picture with a red frame around one patch."""
    image = np.ascontiguousarray(image)
    (height, width), (h, w) = image.shape[:2], grid
    row, column = divmod(patch, w)
    top, left = row * height // h, column * width // w
    bottom, right = (row + 1) * height // h - 1, (column + 1) * width // w - 1
    return cv2.rectangle(image.copy(), (left, top), (right, bottom), _INK, 2)


def side_by_side(
    panels: Sequence[tuple[str, np.ndarray]], per_row: int = 4
) -> np.ndarray:
    """Titled pictures of one size in rows, `GAP_PX` of white around each.

    Args:
        panels: titles and ``(H, W, 3)`` uint8 RGB.
        per_row: pictures in a row.

    Returns:
        Uint8 RGB; each picture has its title above it, see `stack_titled`.
    """
    cells = [
        np.pad(
            stack_titled({title: picture}),
            ((GAP_PX, 0), (GAP_PX, 0), (0, 0)),
            constant_values=255,
        )
        for title, picture in panels
    ]
    per_row = min(per_row, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % per_row)
    rows = [
        np.concatenate(cells[start : start + per_row], 1)
        for start in range(0, len(cells), per_row)
    ]
    sheet = np.concatenate(rows)
    return np.pad(sheet, ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=255)
