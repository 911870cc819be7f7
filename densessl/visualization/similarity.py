"""How alike all patches are to one of them, also in other pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.errors import DenseSSLError

from .panels import Grid, enlarged, framed, heat_over, side_by_side


def cosines(patches: Tensor, query: int) -> Tensor:
    """Cosine of every patch with one patch of the first picture.

    Args:
        patches: ``(n, N, D)`` features of ``n`` pictures.
        query: raster index of the patch.

    Returns:
        ``(n, N)`` float32 in -1..1; 0 for a patch without length.

    Raises:
        DenseSSLError: features are not finite.
    """
    if not torch.isfinite(patches).all():
        raise DenseSSLError(
            f'similarity: features {tuple(patches.shape)} are not all finite; the '
            'backbone has diverged, take an earlier checkpoint'
        )
    unit = F.normalize(patches.float(), dim=-1)
    return unit @ unit[0, query]


def similarity_sheets(
    images: Sequence[np.ndarray], values: Tensor, query: int, grid: Grid
) -> list[np.ndarray]:
    """A sheet for each picture: the query, the picture, and its cosines in colour.

    Colours run from dark blue at the least cosine of all pictures to yellow at the
    greatest, which titles tell, so that sheets of one call compare.

    Args:
        images: ``n`` pictures ``(H, W, 3)`` uint8 RGB of one size.
        values: ``(n, N)`` cosines with the query.
        query: raster index of the query patch in the first picture.
        grid: ``(h, w)``.
    """
    low, high = values.min().item(), values.max().item()
    shares = ((values - low) / max(high - low, 1e-12)).cpu().numpy()
    everywhere = np.ones(grid[0] * grid[1], bool)
    asked = framed(enlarged(images[0]), query, grid)
    title = f'cosine, {low:.2f} to {high:.2f}'
    sheets = []
    for number, (image, share) in enumerate(zip(images, shares, strict=True)):
        image = enlarged(image)
        heat = heat_over(image, share, everywhere, grid)
        panels = [(f'patch {query}', asked), ('picture', image), (title, heat)]
        if number == 0:
            panels = [panels[0], (title, framed(heat, query, grid))]
        sheets.append(side_by_side(panels))
    return sheets
