"""LOCA's second task: each query patch predicts its reference patch's cluster."""

from __future__ import annotations

from typing import Literal

import torch
from mmengine import dist
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.losses import (
    Pairs,
    assigned_counts,
    distillation_loss,
    entropy,
    mean_prediction,
    sinkhorn_center,
)
from densessl.models.features import ViewFeatures
from densessl.registry import MODELS
from densessl.schedules import Progress, Temperature

from .projector import DINOProjector
from .query_head import QueryHead


@MODELS.register_module()
class ClusterHead(QueryHead):
    """Cross-entropy to balanced cluster assignments, and me-max (LOCA, WACV 2024).

    ``L = mean over Omega of H(T(h(j)), P_s(j)) + sum_k p_k log p_k``, where ``T`` are
    the teacher's assignments of all reference patches, ``softmax(z_t / tau_t)`` after
    Sinkhorn-Knopp over the global batch, ``P_s = softmax(z_s / tau_s)``, and ``p`` is
    the mean of ``P_s`` over all query patches of all ranks.

    This is an objective of a whole batch: Sinkhorn-Knopp and ``p`` talk to other ranks
    within ``loss``, ``K`` values a time. Under ``accumulate`` the batch is one part of
    every rank. The gradient of ``p`` is that of the own rank's share; gradients
    averaged over ranks, as DDP does, are then those of one process with all images.

    Monitors: ``cross_entropy``; ``teacher_entropy`` and ``kl``, see
    :class:`densessl.losses.Distillation`; ``prediction_entropy``, that of ``p``;
    ``used_prototypes``, those that any reference patch of this rank is assigned to;
    ``omega`` and ``missed``, see :class:`Correspondence`.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: prototypes ``K``, at least 2.
        level: ``'patch'``, or ``'image'``: the neck's representation of a query
            predicts that of the reference, wherever they lie.
        sinkhorn: rounds of Sinkhorn-Knopp; 0 leaves the softmax as it is.
        me_max: whether the entropy of ``p`` is maximised.
        student_temp: temperature of the student.
        teacher_temp: a number, or ``dict(start, end, warmup_epochs)``.
        freeze_last_layer_epochs: epochs in which the prototypes stay as they are.
        projector: options of :class:`DINOProjector`.
        **options: see :class:`QueryHead`.

    Attributes:
        center: ``(K,)``, what Sinkhorn-Knopp last took off the teacher's logits.
    """

    def __init__(
        self,
        embed_dims: int,
        out_dims: int = 4096,
        *,
        level: Literal['patch', 'image'] = 'patch',
        sinkhorn: int = 3,
        me_max: bool = True,
        student_temp: float = 0.1,
        teacher_temp: float | dict = 0.05,
        freeze_last_layer_epochs: float = 0,
        projector: dict | None = None,
        **options,
    ) -> None:
        super().__init__(**options)
        if out_dims < 2:
            raise DenseSSLError(
                f'ClusterHead: out_dims={out_dims}; clusters are at least 2 (paper: '
                '4096)'
            )
        if level not in ('patch', 'image'):
            raise DenseSSLError(f'ClusterHead: level={level!r}; choose patch or image')
        if sinkhorn < 0 or student_temp <= 0:
            raise DenseSSLError(
                f'ClusterHead: sinkhorn={sinkhorn}, student_temp={student_temp}; give '
                '0 or more rounds (paper: 3) and a temperature greater than 0 (0.1)'
            )
        self.level = level
        self.needs_geometry = level == 'patch'
        self.sinkhorn = sinkhorn
        self.me_max = me_max
        self.student_temp = student_temp
        self.temperature = Temperature.of(teacher_temp)
        self.teacher_temp = self.temperature.start
        self.freeze_last_layer_epochs = freeze_last_layer_epochs
        self._projector = dict(
            embed_dims=embed_dims, out_dims=out_dims, **(projector or {})
        )
        self.center = torch.zeros(out_dims)

    def build_projector(self) -> DINOProjector:
        """A new projector for the student; its last layer are the prototypes."""
        return DINOProjector(**self._projector)

    def start_step(self, progress: Progress) -> None:
        """Set weight and teacher temperature."""
        super().start_step(progress)
        self.teacher_temp = self.temperature.at(progress)

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """See :meth:`Head.loss`."""
        own, other = student.projectors[name], teacher.projectors[name]
        queries, references = self._rows(student, teacher)
        matched = self._match(student, teacher, geometry)
        with torch.no_grad():
            targets = other.embed(references)
            self.center = sinkhorn_center(
                targets.flatten(0, 1),
                other.last_layer,
                self.teacher_temp,
                self.sinkhorn,
                all_reduce=_sum_over_ranks,
            )
            used = assigned_counts(targets.flatten(0, 1), other.last_layer, self.center)

        # references of an image lie one after the other
        size = references.shape[1] // matched.index.shape[2]
        start = size * torch.arange(matched.index.shape[2], device=targets.device)
        pairs, rows, partners = Pairs.matched(
            matched.index.clamp_min(0) + start, matched.weights, references.shape[1]
        )
        queries = own.embed(queries)
        result = distillation_loss(
            queries.flatten(0, 1).index_select(0, rows),
            own.last_layer,
            targets.flatten(0, 1).index_select(0, partners),
            other.last_layer,
            self.center,
            pairs,
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp,
        )
        with torch.set_grad_enabled(self.me_max and torch.is_grad_enabled()):
            mean = _over_ranks(
                mean_prediction(
                    queries.flatten(0, 1), own.last_layer, self.student_temp
                )
            )
            balance = entropy(mean)
        return dict(
            loss=result.loss - balance if self.me_max else result.loss,
            cross_entropy=result.loss.detach(),
            teacher_entropy=result.teacher_entropy,
            kl=result.kl,
            prediction_entropy=balance.detach(),
            used_prototypes=(used > 0).sum().float(),
            **matched.monitors,
        )

    def _rows(
        self, student: ViewFeatures, teacher: ViewFeatures
    ) -> tuple[Tensor, Tensor]:
        """What is clustered, image by image: queries and references."""
        if self.level == 'image':
            queries = torch.cat([student.pooled_of(role) for role in self.query_roles])
            references = teacher.pooled_of(self.reference_role)
            return queries.transpose(0, 1), references.transpose(0, 1)
        tokens = teacher.by_image([self.reference_role])
        queries = student.by_image(self.query_roles)
        return student.neck.normalize(queries), teacher.neck.normalize(tokens)

    def _match(self, student, teacher, geometry):
        same = self.same_views(student)
        if self.level == 'patch':
            indices = self.correspond(student, teacher, geometry)
        else:  # one token a view, wherever the view lies
            images = student.pooled.shape[1]
            device = student.pooled.device
            here = [s.to(device, non_blocking=True) for s in same]
            indices = [(-s.long())[:, None].expand(images, -1, -1, -1) for s in here]
        return self.weigh(indices, same)


def _sum_over_ranks(values: Tensor) -> None:
    dist.all_reduce(values, 'sum')


def _over_ranks(mean: Tensor) -> Tensor:
    """The mean over ranks, with the gradient of the own rank's."""
    total = mean.detach().clone()
    dist.all_reduce(total, 'sum')
    return mean + (total / dist.get_world_size() - mean.detach())
