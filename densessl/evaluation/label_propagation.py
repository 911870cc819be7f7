"""Labels of a frame's tokens, from the nearest tokens of other frames."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_segmentation import resize_bilinear

_TILE = 12  # tokens whose neighbours are compared at once, in rows and columns


@torch.no_grad()
def propagate_labels(
    query: Tensor,
    context: Tensor,
    labels: Tensor,
    *,
    radius: int = 12,
    top_k: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Labels of a frame's tokens, from the nearest tokens of other frames.

    ``L_i = sum_j w_ij L_j / sum_j w_ij``, ``w_ij = exp(cos(i, j) / temperature)``, over
    the ``top_k`` tokens ``j`` most similar to ``i`` of all context tokens that are at
    most ``radius`` rows and columns away; tokens as similar as the last of them count
    too (Caron et al., ICCV 2021, after Jabri et al., NeurIPS 2020).

    Tiles of 12 x 12 tokens are compared with the part of the grid that their windows
    cover, so memory grows with ``T * radius^2`` and not with ``h^2 * w^2``.

    Args:
        query: ``(h, w, D)`` features of length 1.
        context: ``(T, h, w, D)`` of length 1.
        labels: ``(T, h, w, C)``, a score for each class.
        radius: in tokens, 0 or more.
        top_k: 1 or more.
        temperature: above 0, no unit.

    Returns:
        ``(h, w, C)``.
    """
    h, w, depth = query.shape
    row, column = (torch.arange(side, device=query.device) for side in (h, w))
    found = labels.new_empty(h, w, labels.shape[-1])
    for top in range(0, h, _TILE):
        rows = slice(top, min(h, top + _TILE))
        near_rows = slice(max(0, rows.start - radius), rows.stop + radius)
        close_rows = (row[rows, None] - row[near_rows]).abs() <= radius
        for left in range(0, w, _TILE):
            columns = slice(left, min(w, left + _TILE))
            near_columns = slice(max(0, left - radius), columns.stop + radius)
            close_columns = (column[columns, None] - column[near_columns]).abs()
            inside = close_rows[:, None, :, None] & (close_columns <= radius)[:, None]
            ours = query[rows, columns]
            theirs = context[:, near_rows, near_columns].reshape(-1, depth)
            similarity = ours.reshape(-1, depth) @ theirs.mT  # (q, T * keys)
            similarity.view(len(similarity), len(context), -1).masked_fill_(
                ~inside.reshape(len(similarity), 1, -1), float('-inf')
            )
            found[rows, columns] = _weighted_mean(
                similarity,
                labels[:, near_rows, near_columns].flatten(0, 2),
                top_k,
                temperature,
            ).view(*ours.shape[:2], -1)
    return found


def _weighted_mean(
    similarity: Tensor, labels: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Mean ``(q, C)`` of labels ``(n, C)`` by the greatest of ``(q, n)``; not -inf."""
    top = similarity.topk(min(top_k, similarity.shape[1])).values
    least = top[:, -1:].clamp_min(torch.finfo(top.dtype).min)  # fewer than top_k
    query, key = (similarity >= least).nonzero(as_tuple=True)
    weight = ((similarity[query, key] - top[query, 0]) / temperature).exp()[:, None]
    size = len(similarity)
    summed = labels.new_zeros(size, labels.shape[1])
    summed.index_add_(0, query, weight * labels[key])
    return summed / weight.new_zeros(size, 1).index_add_(0, query, weight)


def hard_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of each pixel, from scores of the tokens.

    Scores are resized bilinearly, and each class's then scaled to 0..1, so that a
    small object, whose scores stay low, can win. A class that is the same everywhere
    gets 0.

    Args:
        labels: ``(h, w, C)``.
        size: ``(H, W)`` px.

    Returns:
        ``(H, W)`` int64, of equals the first class.
    """
    scores = resize_bilinear(labels.permute(2, 0, 1)[None], size)[0]
    low, high = scores.aminmax(dim=2)
    low, high = low.amin(1)[:, None, None], high.amax(1)[:, None, None]
    spread = torch.where(high > low, high - low, 1.0)
    return ((scores - low) / spread).argmax(0)
