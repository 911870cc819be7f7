"""DINO's task: a student view predicts the teacher's other, global views."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from densessl.losses import Pairs
from densessl.models.features import ViewFeatures
from densessl.registry import MODELS

from .base import DistillationHead


@MODELS.register_module()
class ViewHead(DistillationHead):
    """Cross-entropy between the representations of different views.

    ``L = mean over pairs (i, v), v != i, of H(P_t(view i), P_s(view v))`` with ``i`` a
    view of ``target_role`` and ``v`` any view (DINO, arXiv:2104.14294, Eq. 3).

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: prototypes ``K``.
        target_role: role of the views the teacher predicts from; they come first.
        center_views: whether the centre averages the teacher's outputs of the
            ``'target'`` views (DINO), or of ``'all'`` views (SelfPatch's code).
        student_views: whether the student predicts from ``'all'`` views (the papers),
            or from the ``'target'`` views alone (DenseDINO's published command).
        **options: see :class:`DistillationHead`.
    """

    needs_patches = False
    whole_views = False

    def __init__(
        self,
        embed_dims: int,
        out_dims: int = 65536,
        *,
        target_role: str = 'global',
        center_views: Literal['target', 'all'] = 'target',
        student_views: Literal['target', 'all'] = 'all',
        **options,
    ) -> None:
        super().__init__(embed_dims, out_dims, **options)
        self.target_role = target_role
        self.center_views = center_views
        self.student_views = student_views
        self.teacher_roles = (target_role,) if center_views == 'target' else None
        self.student_roles = (target_role,) if student_views == 'target' else None

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """See :meth:`Head.loss`."""
        targets = len(teacher.tokens[self.target_role])
        pooled = student.pooled
        if self.student_views == 'target':
            pooled = student.pooled_of(self.target_role)
        weights = pair_weights(len(pooled), targets, pooled.device)
        return self.distill(
            pooled.transpose(0, 1),
            student.projectors[name],
            teacher.pooled[:targets].transpose(0, 1),
            teacher.projectors[name],
            Pairs.shared(weights, pooled.shape[1]),
            teacher.pooled if self.center_views == 'all' else None,
        )


def pair_weights(
    views: int, targets: int, device: torch.device | str = 'cpu'
) -> Tensor:
    """``(V, T)``: equal weights for all pairs but a view with itself; they sum to 1."""
    weights = torch.ones(views, targets, device=device)
    weights.fill_diagonal_(0)
    return weights / max(targets * (views - 1), 1)
