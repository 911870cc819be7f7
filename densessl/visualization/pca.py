"""Patch features as colours: their first three principal components as RGB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from densessl.datasets.channels import shown_as_rgb
from densessl.errors import DenseSSLError
from densessl.evaluation.features import FeatureExtractor

_GAP_PX = 4
_TITLE_PX = 18


def principal_components(tokens: Tensor, num: int = 3) -> Tensor:
    """Coordinates of all tokens in one basis, shared by all pictures.

    The basis is the leading eigenvectors of the covariance of all ``n * N`` tokens, in
    float64, each with the sign that makes its largest entry positive. The same tokens
    give the same coordinates.

    Args:
        tokens: ``(n, N, D)`` features of ``n`` pictures.
        num: components wanted; those beyond ``D`` are zero.

    Returns:
        ``(n, N, num)`` float64, centred, by falling variance. A component whose
        deviation is rounding error beside the length of the mean token is zero.

    Raises:
        DenseSSLError: features are not finite.
    """
    if not torch.isfinite(tokens).all():
        raise DenseSSLError(
            f'PCA: features {tuple(tokens.shape)} are not all finite; '
            'the backbone has diverged, take an earlier checkpoint'
        )
    flat = tokens.detach().cpu().double().flatten(0, 1)
    mean = flat.mean(0)
    flat = flat - mean
    variances, vectors = torch.linalg.eigh(flat.mT @ flat / len(flat))
    vectors = vectors.flip(1)[:, :num]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    deviations = variances.flip(0)[:num].clamp_min(0).sqrt()
    # The eigenvalues of D x D products are rounded at the scale of the greatest one.
    floor = 1e-6 * (mean.norm() + deviations[0])
    vectors = torch.where(deviations > floor, vectors, 0.0)
    missing = num - vectors.shape[1]
    components = torch.nn.functional.pad(flat @ vectors, (0, max(0, missing)))
    return components.unflatten(0, tokens.shape[:2])


def pca_colours(tokens: Tensor, tail: float = 0.01) -> Tensor:
    """``(n, N, D)`` tokens to ``(n, N, 3)`` uint8 RGB.

    Each component runs from 0 to 255 between its quantiles ``tail`` and ``1 - tail``
    over all pictures, so that a few outliers do not darken the rest. A component
    without variance is the middle grey: a collapsed network draws a grey picture.
    """
    components = principal_components(tokens)
    values = components.flatten(0, 1)
    low, high = np.quantile(values.numpy(), [tail, 1 - tail], axis=0)
    low, high = torch.from_numpy(low), torch.from_numpy(high)
    share = ((components - low) / (high - low)).nan_to_num(0.5).clamp(0, 1)
    return (share * 255).round().byte()


def pca_image(
    tokens: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    grid: tuple[int, int],
    images: Sequence[np.ndarray],
    *,
    cell_px: int = 160,
    upsample: Literal['nearest', 'bicubic'] = 'nearest',
    per_row: int = 1,
) -> np.ndarray:
    """Pictures, each followed by its features in colour, on one white sheet.

    All pictures of one set of tokens share a basis and a colour scale, so equal
    colours mean similar features; colours of different sets do not compare.

    Args:
        tokens: ``(n, N, D)`` features, or ``n`` of ``(N, D)``; or several networks' by
            title, one column each, with the titles on top.
        grid: ``(h, w)`` patches, rows and columns; ``h * w == N``.
        images: ``n`` pictures ``(H, W, 3)`` uint8 RGB of one size.
        cell_px: longer side of a picture on the sheet.
        upsample: how patches are enlarged to the size of the picture.
        per_row: pictures side by side before the next row.

    Returns:
        Uint8 RGB sheet. With ``k`` cells of ``(c_h, c_w)`` px in a row, rows and cells
        are 4 px apart and from the edge, and titles add 18 px on top.

    Raises:
        DenseSSLError: numbers, sizes or types do not fit, or features are not finite.
    """
    titles: list[str] = []
    if isinstance(tokens, Mapping):
        titles, columns = ['picture', *tokens], list(tokens.values())
    else:
        columns = [tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))]
    stack = _stack(images)
    scale = cell_px / max(stack.shape[1:3])
    height, width = (max(1, round(side * scale)) for side in stack.shape[1:3])
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    enlarge = cv2.INTER_NEAREST if upsample == 'nearest' else cv2.INTER_CUBIC
    cells = [
        [cv2.resize(image, (width, height), interpolation=shrink)] for image in stack
    ]
    for column in columns:
        if column.shape[:2] != (len(stack), grid[0] * grid[1]):
            raise DenseSSLError(
                f'PCA: features {tuple(column.shape)} do not belong to {len(stack)} '
                f'pictures of {grid[0]}x{grid[1]} patches; extract them anew'
            )
        for row, colours in zip(cells, pca_colours(column).numpy(), strict=True):
            colours = colours.reshape(*grid, 3)
            row.append(cv2.resize(colours, (width, height), interpolation=enlarge))

    per_row = min(per_row, len(stack))
    rows, across = -(-len(stack) // per_row), per_row * (1 + len(columns))
    top = _GAP_PX + (_TITLE_PX if titles else 0)
    down, right = height + _GAP_PX, width + _GAP_PX
    sheet = np.full((top + rows * down, _GAP_PX + across * right, 3), 255, np.uint8)
    for column, title in enumerate(titles * per_row):
        _write_title(sheet, title, _GAP_PX + column * right, width)
    for index, cell in enumerate(cell for row in cells for cell in row):
        y, x = top + index // across * down, _GAP_PX + index % across * right
        sheet[y : y + height, x : x + width] = cell
    return sheet


def save_pca(
    path: Path | str,
    extractor: FeatureExtractor | Mapping[str, FeatureExtractor],
    images: Sequence[np.ndarray],
    *,
    cell_px: int = 160,
    upsample: Literal['nearest', 'bicubic'] = 'nearest',
    per_row: int = 1,
) -> None:
    """Write the sheet of `pca_image` for some pictures as a PNG.

    Args:
        path: the PNG; its folder is made.
        extractor: the frozen backbone; or several by title, one column each, for
            instance ``{'untrained': ..., 'trained': ...}``, with one patch grid.
        images: ``n`` pictures ``(H, W, C)`` of one size, multiples of the patch, as the
            extractor takes them; shown by
            :func:`~densessl.datasets.channels.shown_as_rgb`.
        cell_px: longer side of a picture on the sheet.
        upsample: how patches are enlarged.
        per_row: pictures side by side before the next row.

    Raises:
        DenseSSLError: as `pca_image` and `FeatureExtractor`.
    """
    stack = _stack(images, wide=True)
    if isinstance(extractor, Mapping):
        features = {title: each(stack) for title, each in extractor.items()}
        grid = next(iter(features.values())).grid
        tokens = {title: each.patches for title, each in features.items()}
    else:
        feature = extractor(stack)
        tokens, grid = feature.patches, feature.grid
    write_png(
        path,
        pca_image(
            tokens,
            grid,
            shown_as_rgb(stack),
            cell_px=cell_px,
            upsample=upsample,
            per_row=per_row,
        ),
    )


def write_png(path: Path | str, image: np.ndarray) -> None:
    """Write an ``(H, W, 3)`` uint8 RGB picture; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode('.png', np.ascontiguousarray(image[:, :, ::-1]))
    path.write_bytes(data.tobytes())


def _stack(images: Sequence[np.ndarray], wide: bool = False) -> np.ndarray:
    """``(n, H, W, 3)`` uint8, checked; or ``(n, H, W, C)``, perhaps uint16."""
    found = sorted({(image.dtype.name, *image.shape) for image in images})
    kinds = ('uint8', 'uint16') if wide else ('uint8',)
    if len(found) != 1 or found[0][0] not in kinds or len(found[0]) != 4:
        raise DenseSSLError(
            f'PCA: pictures are {found}; give one or more uint8 (H, W, 3) of one size'
        )
    return np.stack(list(images))


def _write_title(sheet: np.ndarray, title: str, x: int, width: int) -> None:
    """Dark text above a column, shrunk to its width."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    text_width = cv2.getTextSize(title, font, 0.45, 1)[0][0]
    scale = 0.45 * min(1.0, width / max(1, text_width))
    origin = (x, _TITLE_PX - 2)
    cv2.putText(sheet, title, origin, font, scale, (40, 40, 40), 1, cv2.LINE_AA)
