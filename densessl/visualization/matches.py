"""Matches between the tokens of two views, as coloured lines from one to the other."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
import torch
from torch import Tensor

from densessl.geometry import ViewGeometry

Grid = tuple[int, int]
"""Rows and columns of a view's tokens."""

GAP_PX = 4
"""Around the views of a picture."""
BETWEEN_PX = 24
"""From the left view to the right one."""
TITLE_PX = 18
"""Height of a title."""
_DOT_PX = 3
_INK = (40, 40, 40)
_SHIFT = 4  # OpenCV takes sixteenths of a pixel


def token_pixels(grid: Grid, size: tuple[int, int]) -> np.ndarray:
    """Centres of a view's tokens; pixel i covers ``[i, i + 1)``.

    Args:
        grid: ``(h, w)`` tokens.
        size: ``(H, W)`` of the view in px.

    Returns:
        ``(h * w, 2)`` float64 ``(x, y)`` in px, in raster order.
    """
    (h, w), (height, width) = grid, size
    x = (np.arange(w) + 0.5) * (width / w)
    y = (np.arange(h) + 0.5) * (height / h)
    return np.stack([np.tile(x, h), np.repeat(y, w)], axis=1)


def place_colours(grid: Grid) -> np.ndarray:
    """A colour for each place: the hue tells its column, the brightness its row.

    From red on the left to violet on the right, from bright at the top to darker at
    the bottom.

    Args:
        grid: ``(h, w)`` tokens.

    Returns:
        ``(h * w, 3)`` uint8 RGB in raster order.
    """
    h, w = grid
    hsv = np.full((h, w, 3), 255)
    hsv[..., 0] = np.linspace(0, 145, w).round()  # OpenCV's hue: 180 is a full turn
    hsv[..., 2] = np.linspace(255, 140, h).round()[:, None]
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).reshape(-1, 3)


def thinned(valid: np.ndarray, grid: Grid, most: int) -> np.ndarray:
    """At most ``most`` of the tokens that count, spread evenly over the view.

    Tokens have an order of their own, an ordered dither by two irrational steps, and
    the first ones that count are kept: matchers that differ show the same tokens.

    Args:
        valid: ``(h * w,)`` bool, in raster order.
        grid: ``(h, w)`` tokens.
        most: 1 or more.

    Returns:
        Their indices, rising.
    """
    row, column = np.divmod(np.arange(len(valid)), grid[1])
    order = np.argsort((0.7548776662 * row + 0.5698402910 * column) % 1)
    return np.sort(order[valid[order]][:most])


def draw_matches(
    views: tuple[np.ndarray, np.ndarray],
    grids: tuple[Grid, Grid],
    index: np.ndarray,
    valid: np.ndarray,
    *,
    lines: int = 24,
    zoom: int = 1,
) -> np.ndarray:
    """Two views side by side, with lines from tokens of the left to their matches.

    A line has the colour of the place where it starts, see `place_colours`; dots mark
    the centres of the two tokens. Only matches that count are drawn.

    Args:
        views: left and right, uint8 RGB ``(H, W, 3)``.
        grids: ``(h, w)`` tokens of each.
        index: ``(N,)`` integers, for each left token a right one, in raster order.
        valid: ``(N,)`` bool, which of them count.
        lines: how many are drawn at most, see `thinned`.
        zoom: whole number; a pixel of a view becomes ``zoom`` x ``zoom`` px.

    Returns:
        Uint8 RGB on white: `GAP_PX` around the views and `BETWEEN_PX` between them.
    """
    left, right = (view.repeat(zoom, 0).repeat(zoom, 1) for view in views)
    start = GAP_PX + left.shape[1] + BETWEEN_PX
    height = max(len(left), len(right)) + 2 * GAP_PX
    sheet = np.full((height, start + right.shape[1] + GAP_PX, 3), 255, np.uint8)
    sheet[GAP_PX : GAP_PX + len(left), GAP_PX : start - BETWEEN_PX] = left
    sheet[GAP_PX : GAP_PX + len(right), start:-GAP_PX] = right

    starts = token_pixels(grids[0], left.shape[:2]) + np.array([GAP_PX, GAP_PX])
    ends = token_pixels(grids[1], right.shape[:2]) + np.array([start, GAP_PX])
    colours = place_colours(grids[0])
    drawn = [
        (starts[token], ends[index[token]], colours[token].tolist())
        for token in thinned(valid, grids[0], lines)
    ]
    for first, last, colour in drawn:
        first, last = _fixed(first), _fixed(last)
        cv2.line(sheet, first, last, colour, 1, cv2.LINE_AA, _SHIFT)
    for *centres, colour in drawn:  # above all lines
        for centre in centres:
            draw_dot(sheet, centre, colour)
    return sheet


def draw_dot(
    sheet: np.ndarray, centre: np.ndarray, colour: list[int], radius: int = _DOT_PX
) -> None:
    """Draw a dot with a dark rim of 1 px onto uint8 RGB ``(H, W, 3)``.

    Args:
        sheet: is drawn on; what lies outside is left out.
        centre: ``(x, y)`` in px; pixel i covers ``[i, i + 1)``.
        colour: RGB, 0..255.
        radius: px.
    """
    for px, ink in ((radius + 1, _INK), (radius, colour)):
        at = _fixed(centre)
        cv2.circle(sheet, at, px << _SHIFT, ink, -1, cv2.LINE_AA, _SHIFT)


def stack_titled(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pictures of one width below each other, each under its title.

    Args:
        pictures: uint8 RGB ``(H, W, 3)`` by title; a long title is shrunk to the width.

    Returns:
        Uint8 RGB; each picture has `TITLE_PX` above it.
    """
    font, parts = cv2.FONT_HERSHEY_SIMPLEX, []
    for title, picture in pictures.items():
        width = picture.shape[1]
        strip = np.full((TITLE_PX, width, 3), 255, np.uint8)
        needed = cv2.getTextSize(title, font, 0.45, 1)[0][0]
        scale = 0.45 * min(1.0, (width - 2 * GAP_PX) / max(1, needed))
        origin = (GAP_PX, TITLE_PX - 4)
        cv2.putText(strip, title, origin, font, scale, _INK, 1, cv2.LINE_AA)
        parts += [strip, picture]
    return np.concatenate(parts)


def match_distance(
    student: ViewGeometry,
    teacher: ViewGeometry,
    grids: tuple[Grid, Grid],
    index: Tensor,
) -> tuple[float, int]:
    """How far from a token's own place its match is, over the tokens in the overlap.

    Args:
        student: the view that the matched tokens are of, shape ``()``.
        teacher: the view of their matches, shape ``()``.
        grids: ``(h, w)`` tokens of each.
        index: ``(N,)`` long, for each student token a teacher token.

    Returns:
        The mean distance in teacher tokens, NaN without an overlap, and the number of
        student tokens whose centre lies in the teacher's view.
    """
    h, w = grids[1]
    centers = student.token_centers(grids[0])
    place = teacher.to_view(centers) * centers.new_tensor([w, h]) - 0.5
    match = torch.stack([index % w, index // w], -1)
    away = (place - match).norm(dim=-1)[teacher.contains(centers)]
    return away.mean().item(), len(away)


def _fixed(point: np.ndarray) -> tuple[int, int]:
    """A point in OpenCV's sixteenths, where whole numbers are centres of pixels."""
    x, y = ((point - 0.5) * (1 << _SHIFT)).round().astype(int).tolist()
    return x, y
