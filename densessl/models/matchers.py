"""Which teacher token a student token of another view is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.registry import TASK_UTILS


@dataclass(frozen=True)
class ViewTokens:
    """Tokens of views of the same size, and where the views lie in their images.

    Attributes:
        tokens: ``(B, v, N, D)`` backbone features in raster order.
        grid: ``(h, w)``, ``h * w == N``.
        geometry: ``(B, v)``, or None where the transform does not track it.
    """

    tokens: Tensor
    grid: tuple[int, int]
    geometry: ViewGeometry | None = None


class Matches(NamedTuple):
    """A matcher's answer.

    Attributes:
        index: ``(B, v, N)`` long, for each student token one teacher token, in raster
            order of the teacher's view.
        valid: ``(B, v, N)`` bool, which of them count.
    """

    index: Tensor
    valid: Tensor


class Matcher:
    """Finds a teacher token for each student token.

    Attributes:
        needs_geometry: whether views must come with their geometry.
    """

    needs_geometry = False

    def __call__(self, student: ViewTokens, teacher: ViewTokens) -> Matches:
        """Match each token of student views with one of a teacher view.

        Args:
            student: ``v`` views an image.
            teacher: one view an image, ``v == 1``; both are without gradient.
        """
        raise NotImplementedError


@TASK_UTILS.register_module()
class SimilarityMatcher(Matcher):
    """The teacher token with the most similar features (EsViT, arXiv:2106.09785).

    ``n* = argmax_n cos(f_m, f_n)`` over backbone features; every match counts.
    """

    def __call__(self, student: ViewTokens, teacher: ViewTokens) -> Matches:
        """See :class:`Matcher`."""
        # bf16 similarities are full of ties: float32 at least, also under autocast
        dtype = torch.promote_types(student.tokens.dtype, torch.float32)
        with torch.autocast(student.tokens.device.type, enabled=False):
            ours = F.normalize(student.tokens.to(dtype), dim=-1)
            theirs = F.normalize(teacher.tokens.to(dtype), dim=-1)
            index = (ours @ theirs.mT).argmax(-1)
        return Matches(index, torch.ones_like(index, dtype=torch.bool))


@TASK_UTILS.register_module()
class GeometricMatcher(Matcher):
    """The teacher token nearest in the source image (GLSD, WACV 2023).

    ``k* = argmin_j |e_k - e'_j|`` over token centres in source pixels, crop, resize and
    flip undone. A match counts where the distance is below ``s``, which is
    ``threshold`` times the larger of the two views' token diagonals. Cells of a view
    are equal, so the nearest row and the nearest column are found apart: exact, and
    ``h + w`` distances a token instead of ``h * w``.

    Args:
        threshold: share of the larger diagonal, > 0 (paper: 0.5); None lets every match
            count.
    """

    needs_geometry = True

    def __init__(self, threshold: float | None = 0.5) -> None:
        if threshold is not None and threshold <= 0:
            raise DenseSSLError(
                f'GeometricMatcher: threshold={threshold} lets no match count; give a '
                'share of the token diagonal (paper: 0.5), or None for no limit'
            )
        self.threshold = threshold

    def __call__(self, student: ViewTokens, teacher: ViewTokens) -> Matches:
        """See :class:`Matcher`."""
        ours, theirs = student.geometry, teacher.geometry
        centers = theirs.token_centers(teacher.grid).unflatten(-2, teacher.grid)
        columns = centers[..., 0, :, 0].unsqueeze(-2)  # (B, 1, 1, w)
        rows = centers[..., :, 0, 1].unsqueeze(-2)  # (B, 1, 1, h)
        x, y = ours.token_centers(student.grid).unsqueeze(-2).unbind(-1)  # (B, v, N, 1)
        dx, column = (x - columns).abs().min(-1)
        dy, row = (y - rows).abs().min(-1)
        index = row * teacher.grid[1] + column
        if self.threshold is None:
            return Matches(index, torch.ones_like(index, dtype=torch.bool))
        diagonal = torch.maximum(
            ours.token_diagonal(student.grid), theirs.token_diagonal(teacher.grid)
        )
        limit = (self.threshold * diagonal).unsqueeze(-1)
        return Matches(index, dx.square() + dy.square() < limit.square())


def build_matcher(matching: str | dict) -> Matcher:
    """A matcher by its short name or its config.

    Args:
        matching: ``'similarity'``, ``'geometric'``, or a config of a registered
            matcher, ``dict(type=...)``.

    Raises:
        DenseSSLError: it names no matcher.
    """
    short = {'similarity': 'SimilarityMatcher', 'geometric': 'GeometricMatcher'}
    cfg = (
        dict(type=short.get(matching, matching))
        if isinstance(matching, str)
        else matching
    )
    if TASK_UTILS.get(cfg['type']) is None:
        raise DenseSSLError(
            f"RegionHead: no matcher {cfg['type']!r}; use 'similarity', 'geometric' "
            'or a class registered in densessl.registry.TASK_UTILS (custom_imports '
            'imports its module)'
        )
    return TASK_UTILS.build(cfg)
