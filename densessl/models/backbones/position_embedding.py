"""Position embeddings of a table for other grids, and between its patches."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_pos_embed(
    table: Tensor,
    grid: tuple[int, int],
    offset: float = 0.1,
    mode: Literal['bicubic', 'bilinear'] = 'bicubic',
) -> Tensor:
    """Position embeddings for another grid.

    Args:
        table: ``(1, h0, w0, D)``.
        grid: ``(h, w)`` to resize to.
        offset: added to ``h`` and ``w`` before the scale is taken. DINO's code, which
            the methods here build on, resizes by ``(h + 0.1) / h0`` and so samples at
            slightly shifted places; 0 gives the plain resize. Bicubic only.
        mode: ``'bicubic'`` without antialiasing (DINO's code), or ``'bilinear'`` with
            it (LOCA's).

    Returns:
        ``(1, h * w, D)``; the table itself where the grids are equal.
    """
    h0, w0 = table.shape[1:3]
    if (h0, w0) == tuple(grid):
        return table.flatten(1, 2)
    table_chw = table.permute(0, 3, 1, 2).float()
    if mode == 'bilinear':
        resized = F.interpolate(table_chw, size=grid, mode=mode, antialias=True)
    else:
        resized = F.interpolate(
            table_chw,
            scale_factor=((grid[0] + offset) / h0, (grid[1] + offset) / w0),
            mode='bicubic',
            recompute_scale_factor=False,
        )
    if resized.shape[2:] != tuple(grid):
        raise AssertionError(f'{tuple(resized.shape)} for a grid of {grid}')
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def sample_pos_embed(
    table: Tensor, points: Tensor, grid: tuple[int, int], offset: float = 0.1
) -> Tensor:
    """Position embeddings between the patches, bicubic.

    Args:
        table: ``(1, h0, w0, D)``.
        points: ``(B, M, 2)`` fractions ``(x, y)`` of an input, in ``[0, 1]``.
        grid: ``(h, w)`` patches of the input.
        offset: see :func:`resize_pos_embed`.

    Returns:
        ``(B, M, D)``; at a patch's centre its own, as :func:`resize_pos_embed` resizes
        the table by ``'bicubic'``.
    """
    h, w = grid
    offset = 0.0 if tuple(grid) == tuple(table.shape[1:3]) else offset
    x, y = points.unbind(-1)
    points = torch.stack([x * (w / (w + offset)), y * (h / (h + offset))], -1)
    sampled = F.grid_sample(
        table.permute(0, 3, 1, 2).float(),
        (2 * points - 1)[None].float(),
        mode='bicubic',
        padding_mode='border',
        align_corners=False,
    )
    return sampled[0].permute(1, 2, 0).to(table.dtype)
