"""SelfPatch's task: a patch predicts the summary of its most similar neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from densessl.losses import Pairs
from densessl.matching import (
    check_neighbourhood,
    similar_neighbours,
    top_k_neighbours,
)
from densessl.models.features import ViewFeatures, by_image
from densessl.registry import MODELS

from .base import DistillationHead, thin


@dataclass(frozen=True)
class Positives:
    """Which neighbours of a patch are its positives; see :class:`SelfPatchHead`.

    Raises:
        DenseSSLError: an option is out of range.
    """

    top_k: int | Literal['adaptive'] = 4
    window: int | Literal['all'] = 3
    border: Literal['wrap', 'clip'] = 'wrap'
    threshold: float = 0.95

    def __post_init__(self) -> None:
        check_neighbourhood(self.top_k, self.window, self.border, self.threshold)

    def summarize(self, teacher: ViewFeatures, role: str) -> tuple[Tensor, Tensor]:
        """``y^(i)`` of each patch of the views of a role, and of how many positives.

        Returns:
            ``(v * B, N, D)`` and ``(v * B, N)``.
        """
        tokens, grid = teacher.tokens[role].flatten(0, 1), teacher.grids[role]
        if self.top_k == 'adaptive':
            index, valid = similar_neighbours(
                tokens, grid, self.threshold, self.window, self.border
            )
        else:
            index, valid = top_k_neighbours(
                tokens, grid, self.top_k, self.window, self.border
            )
        return teacher.neck.aggregate(tokens, index, valid), valid.sum(-1)


@MODELS.register_module()
class SelfPatchHead(DistillationHead):
    """Patch-level self-distillation (SelfPatch, CVPR 2022, Eqs. 5-7).

    In each view, for each patch ``i``: the positives are the ``top_k`` of its
    neighbours by cosine similarity of the teacher's patch features; their summary
    ``y^(i) = h({f_j})`` comes from the teacher's aggregator, and the loss is
    ``mean_i H(g'(y^(i)) teacher, g'(f_i) student)``, averaged over all views.

    Monitor ``positives``: their mean number a patch.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: prototypes ``K`` of the patch projector.
        top_k: positives a patch; ``'adaptive'`` takes all neighbours whose cosine is
            over the threshold, and at least the most similar one.
        window: side of the neighbourhood in patches, odd; ``'all'`` for every patch.
        border: ``'wrap'`` around the grid (the authors' code), or ``'clip'`` at it.
        threshold: a cosine, read by ``'adaptive'`` alone.
        loss_weight: see :class:`Head`.
        **options: see :class:`DistillationHead`.
    """

    needs_aggregate = True

    def __init__(
        self,
        embed_dims: int,
        out_dims: int = 4096,
        *,
        top_k: int | Literal['adaptive'] = 4,
        window: int | Literal['all'] = 3,
        border: Literal['wrap', 'clip'] = 'wrap',
        threshold: float = 0.95,
        loss_weight: float | dict = 0.1,
        **options,
    ) -> None:
        super().__init__(embed_dims, out_dims, loss_weight=loss_weight, **options)
        self.positives = Positives(top_k, window, border, threshold)

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """See :meth:`Head.loss`."""
        views = len(student.pooled)
        targets, weights, positives = [], [], []
        for role, tokens in student.tokens.items():
            count, images, num_patches, _ = tokens.shape
            with torch.no_grad():
                summary, number = self.positives.summarize(teacher, role)
            targets.append(by_image(summary.unflatten(0, (count, images))))
            positives.append(number.flatten())
            weight = tokens.new_full((), 1 / (views * num_patches), dtype=torch.float)
            weights.append(weight.expand(count * num_patches))
        terms = self.distill(
            student.neck.normalize(student.by_image()),
            student.projectors[name],
            torch.cat(targets, 1),
            teacher.projectors[name],
            Pairs.aligned(torch.cat(weights), student.pooled.shape[1]),
        )
        return terms | dict(positives=torch.cat(positives).float().mean())

    def monitored_features(self, teacher: ViewFeatures) -> Tensor:
        """Patch tokens of the first role, evenly thinned to a few thousand."""
        return thin(next(iter(teacher.tokens.values())))
