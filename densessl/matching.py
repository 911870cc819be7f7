"""Who is compared with whom: the neighbours of a patch (SelfPatch)."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.errors import DenseSSLError

Window = int | Literal['all'] | None
Border = Literal['wrap', 'clip']

# Similarities held at a time where a patch is compared with all others (16 MiB).
_MAX_SIMILARITIES = 2**22


def neighbour_index(
    grid: tuple[int, int],
    window: Window = 3,
    border: Border = 'wrap',
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The other patches of the window around each patch.

    A patch is never its own neighbour, and no neighbour is counted twice: a window
    that wraps around a grid smaller than itself meets the same patch again, and only
    the first meeting is valid.

    Args:
        grid: ``(h, w)`` patches; ``N = h * w``.
        window: odd side of the square window in patches, ``M = window**2 - 1``;
            ``'all'`` or None takes all other patches, ``M = N - 1``.
        border: what a window does past the edge of the grid. ``'wrap'`` goes on at the
            opposite edge, as the code of SelfPatch's authors does; ``'clip'`` finds no
            patch there.
        device: of the result; None is the CPU.

    Returns:
        ``index (N, M)`` long, raster indices in raster order of the window, and
        ``valid (N, M)`` bool; an index that is not valid names any patch of the grid.
        Both are cached and shared: do not write to them.

    Raises:
        DenseSSLError: the window is even or below 3, the border is unknown, or the grid
            has a single patch.
    """
    h, w = (int(side) for side in grid)
    window = None if window == 'all' else window
    _check(h, w, window, border)
    return _neighbour_index((h, w), window, border, torch.device(device or 'cpu'))


def check_neighbourhood(
    k: int | Literal['adaptive'],
    window: Window,
    border: Border,
    threshold: float = 0.95,
) -> None:
    """Raise what the search for neighbours would raise on a grid of any size.

    Args:
        k: of `top_k_neighbours`; ``'adaptive'`` stands for `similar_neighbours`.
        window: as in `neighbour_index`.
        border: as in `neighbour_index`.
        threshold: of `similar_neighbours`.

    Raises:
        DenseSSLError: see `top_k_neighbours` and `similar_neighbours`.
    """
    window = None if window == 'all' else window
    if k != 'adaptive':
        _check(10**6, 10**6, window, border, k)
        return
    _check(10**6, 10**6, window, border)
    _check_threshold(window, threshold)


@torch.no_grad()
def top_k_neighbours(
    features: Tensor,
    grid: tuple[int, int],
    k: int,
    window: Window = 3,
    border: Border = 'wrap',
) -> tuple[Tensor, Tensor]:
    """The k neighbours of each patch whose features are most similar to its own.

    SelfPatch's positives (Yun et al., CVPR 2022): of the window's patches j, the k with
    the greatest ``cos(f_i, f_j)``, most similar first; of equals, the first of the
    window in raster order. Similarities are float32 under autocast too. Costs
    ``B * N * M / 2`` dot products, one neighbour after the other, so that the memory
    is a few times that of the features; no gradient flows.

    Args:
        features: ``(B, N, D)`` patch features in raster order, of any length.
        grid: ``(h, w)``, ``h * w == N``.
        k: number of neighbours, at least 1.
        window: as in `neighbour_index`.
        border: as in `neighbour_index`.

    Returns:
        ``index (B, N, k)`` long and ``valid (B, N, k)`` bool: a patch with fewer than k
        neighbours has them first, then entries that are not valid (any patch).

    Raises:
        DenseSSLError: as `neighbour_index`, or k is below 1 or above what the window or
            the grid can give to any patch.
        ValueError: the features do not have ``h * w`` tokens.
    """
    h, w = (int(side) for side in grid)
    window = None if window == 'all' else window
    _check(h, w, window, border, k)
    unit = _unit(features, (h, w), 'top_k_neighbours')
    if window is None:
        index = _top_k_of_all(unit, k)
        return index, torch.ones_like(index, dtype=torch.bool)

    index, valid = neighbour_index((h, w), window, border, features.device)
    similarity = _similarities(unit, index, valid)
    # Not topk: only a stable sort says which of two equals comes first.
    slot = similarity.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    batch = slot.shape[0]
    return (
        index.expand(batch, -1, -1).gather(-1, slot),
        valid.expand(batch, -1, -1).gather(-1, slot),
    )


@torch.no_grad()
def similar_neighbours(
    features: Tensor,
    grid: tuple[int, int],
    threshold: float = 0.95,
    window: int = 3,
    border: Border = 'wrap',
) -> tuple[Tensor, Tensor]:
    """The neighbours of each patch whose features are more similar than a threshold.

    Of the window's patches j all with ``cos(f_i, f_j) > threshold``, and in any case
    the most similar one (of equals, the first of the window in raster order): an
    adaptive number of positives, 1 to ``M = window**2 - 1``. Similarities are those of
    `top_k_neighbours`; no gradient flows.

    Args:
        features: ``(B, N, D)`` patch features in raster order, of any length.
        grid: ``(h, w)``, ``h * w == N``.
        threshold: a cosine, -1 to 1.
        window: as in `neighbour_index`, but a number.
        border: as in `neighbour_index`.

    Returns:
        ``index (B, N, M)`` long, the whole window in raster order, and
        ``valid (B, N, M)`` bool, which of it are meant.

    Raises:
        DenseSSLError: as `neighbour_index`, or the threshold is no cosine.
        ValueError: the features do not have ``h * w`` tokens.
    """
    h, w = (int(side) for side in grid)
    _check(h, w, None if window == 'all' else window, border)
    _check_threshold(None if window == 'all' else window, threshold)
    unit = _unit(features, (h, w), 'similar_neighbours')
    index, valid = neighbour_index((h, w), window, border, features.device)
    similarity = _similarities(unit, index, valid)
    chosen = similarity > threshold  # never of what is not valid: -inf
    chosen.scatter_(-1, similarity.argmax(-1, keepdim=True), True)
    return index.expand(len(unit), -1, -1), chosen


def _unit(features: Tensor, grid: tuple[int, int], name: str) -> Tensor:
    """Features of length 1, in float32 or wider: bf16's cosines are full of ties."""
    h, w = grid
    if features.shape[1] != h * w:
        raise ValueError(
            f'{name}: {features.shape[1]} tokens do not fill a {h}x{w} grid'
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    return F.normalize(features.to(dtype), dim=-1)


def _similarities(unit: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Cosines ``(B, N, M)`` with the window's patches, -inf where not valid."""
    similarity = unit.new_empty(*unit.shape[:2], index.shape[1])
    for m in range(index.shape[1] // 2):
        # (B, N, D) against the m-th neighbours' (B, N, D)
        pair = (unit * unit.index_select(1, index[:, m])).sum(-1)
        similarity[..., m] = pair
        # The m-th step from the end leads back: the same pair, seen from the other.
        similarity[..., -1 - m] = pair.index_select(1, index[:, -1 - m])
    return similarity.masked_fill_(~valid, float('-inf'))


def _top_k_of_all(unit: Tensor, k: int) -> Tensor:
    """The k most similar other patches ``(B, N, k)`` of unit features."""
    n = unit.shape[1]
    found = []
    with torch.autocast(unit.device.type, enabled=False):
        for part in unit.split(max(1, _MAX_SIMILARITIES // n**2)):
            similarity = part @ part.transpose(1, 2)
            # Itself comes last: it is never among the first k <= N - 1.
            similarity.diagonal(dim1=1, dim2=2).fill_(float('-inf'))
            order = similarity.sort(dim=-1, descending=True, stable=True).indices
            found.append(order[..., :k].clone())  # let go of the (b, N, N) order
    return torch.cat(found)


@lru_cache(maxsize=64)
def _neighbour_index(
    grid: tuple[int, int], window: int | None, border: Border, device: torch.device
) -> tuple[Tensor, Tensor]:
    h, w = grid
    # The cache outlives the caller's mode: an inference tensor could not be used in
    # a later training step.
    with torch.inference_mode(False):
        patch = torch.arange(h * w, device=device)
        if window is None:
            other = torch.arange(h * w - 1, device=device)
            index = other + (other >= patch[:, None])
            return index, torch.ones_like(index, dtype=torch.bool)

        offsets, fresh = _offsets(grid, window, border)
        offset = torch.tensor(offsets, device=device)  # (M, 2)
        row = (patch // w)[:, None] + offset[:, 0]
        column = (patch % w)[:, None] + offset[:, 1]
        if border == 'wrap':
            row, column = row % h, column % w
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        # A repeat keeps its index: top_k_neighbours walks every step both ways.
        index = (row * w + column).masked_fill(~inside, 0)
        return index, inside & torch.tensor(fresh, device=device)


def _offsets(
    grid: tuple[int, int], window: int, border: Border
) -> tuple[list[tuple[int, int]], list[bool]]:
    """Steps (rows, columns) to the window's patches, and which lead to a new patch."""
    h, w = grid
    reach = range(-(window // 2), window // 2 + 1)
    offsets = [(dr, dc) for dr in reach for dc in reach if (dr, dc) != (0, 0)]
    if border == 'clip':
        return offsets, [True] * len(offsets)
    met = {(0, 0)}
    fresh = []
    for dr, dc in offsets:
        place = (dr % h, dc % w)
        fresh.append(place not in met)
        met.add(place)
    return offsets, fresh


def _check(
    h: int, w: int, window: int | None, border: str, k: int | None = None
) -> None:
    """Say in one line what is wrong with a neighbourhood, if anything is."""
    odd = isinstance(window, int) and window >= 3 and window % 2 == 1
    if window is not None and not odd:
        raise DenseSSLError(
            f'SelfPatch: window={window!r} has no patch at its centre with others '
            "around it; use an odd number of patches, 3 or more, or 'all'"
        )
    if border not in ('wrap', 'clip'):
        raise DenseSSLError(
            f"SelfPatch: border={border!r} is unknown; use 'wrap' or 'clip'"
        )
    if h * w < 2:
        raise DenseSSLError(
            f'SelfPatch: a patch of a {h}x{w} grid has no neighbour; '
            'enlarge the crop or use a smaller patch size'
        )
    if k is None:
        return
    if not isinstance(k, int):
        raise DenseSSLError(
            f"SelfPatch: top_k={k!r} is unknown; use a number, or 'adaptive'"
        )
    if k < 1:
        raise DenseSSLError(f'SelfPatch: k={k} selects no neighbour; use top_k >= 1')
    if window is not None and k > window**2 - 1:
        raise DenseSSLError(
            f'SelfPatch: k={k} is more than the {window**2 - 1} neighbours of a '
            f'{window}x{window} window; lower top_k or enlarge window'
        )
    # The most that any patch has, with either border: the window, cut to the grid.
    most = (h if window is None else min(window, h)) * (
        w if window is None else min(window, w)
    ) - 1
    if k > most:
        raise DenseSSLError(
            f'SelfPatch: k={k} is more than the {most} neighbours that a patch of a '
            f'{h}x{w} grid has at most; enlarge the crop, use a smaller patch size, '
            'or lower top_k'
        )


def _check_threshold(window: int | None, threshold: float) -> None:
    if window is None:
        raise DenseSSLError(
            "SelfPatch: top_k='adaptive' looks at a window, and window='all' has none; "
            'use window=3, 5, ..., or a number for top_k'
        )
    if not -1 <= threshold <= 1:
        raise DenseSSLError(
            f'SelfPatch: threshold={threshold} is no cosine; use a number from -1 to 1 '
            '(paper: 0.95)'
        )
