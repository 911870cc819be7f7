"""What every head is, and what heads that distil a centred teacher share."""

from __future__ import annotations

import torch
from mmengine import dist
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.losses import Distillation, Pairs, distillation_loss
from densessl.models.features import ViewFeatures
from densessl.schedules import LossWeight, Progress, Temperature

from .projector import DINOProjector

_MONITORED = 2048  # tokens the health hook gets a step


class Head(nn.Module):
    """A pretext task: its projector, its targets, its loss.

    The algorithm calls, each step, ``start_step`` once, ``loss`` for each part of the
    batch, and ``end_step`` once. Ranks talk to each other in ``end_step``; in ``loss``
    only where the objective itself is one of the whole batch (LOCA's). The projector
    belongs to the branches: the student trains it, the teacher holds an averaged copy.
    A head whose weight is 0 rests: but for ``start_step`` nothing is called.

    Args:
        loss_weight: factor of the loss in the total, a number or
            ``dict(end, start_epoch, fade_epochs)``, see
            :class:`densessl.schedules.LossWeight`.

    Attributes:
        enabled: whether the head takes part; the algorithm leaves others out.
        weight: the factor's schedule.
        loss_weight: the factor in this step.
        target_role: role of the views the teacher predicts from, if the head has one;
            the recipe's first.
        teacher_roles: roles of the views the teacher must see, None for all.
        student_roles: roles of the views the student must see, None for all.
        needs_patches: whether the head reads patch tokens, not representations and
            reference tokens alone.
        whole_views: whether the head needs every patch of the student's views.
        needs_geometry: whether the batch must say where each view lies.
        needs_points: whether the backbone must carry reference tokens for the head.
        needs_aggregate: whether the neck must represent sets of patches.
        freeze_last_layer_epochs: epochs in which the projector's last layer gets no
            gradient.
    """

    enabled: bool = True
    target_role: str | None = None
    teacher_roles: tuple[str, ...] | None = None
    student_roles: tuple[str, ...] | None = None
    needs_patches: bool = True
    whole_views: bool = True
    needs_geometry: bool = False
    needs_points: bool = False
    needs_aggregate: bool = False
    freeze_last_layer_epochs: float = 0

    def __init__(self, *, loss_weight: float | dict = 1.0) -> None:
        super().__init__()
        self.weight = LossWeight.of(loss_weight)
        self.loss_weight = 0.0 if self.weight.moves else self.weight.end

    def build_projector(self) -> nn.Module:
        """A new projector for the student."""
        raise NotImplementedError

    def start_step(self, progress: Progress) -> None:
        """Set what depends on how far the training is: here, the weight."""
        self.loss_weight = self.weight.at(progress)

    def place_points(
        self, geometry, places: dict[str, slice]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Where the reference points of a batch lie; asked for if ``needs_points``.

        Args:
            geometry: :class:`densessl.geometry.ViewGeometry` ``(B, V)``.
            places: where the views of a role stand among the ``V``.

        Returns:
            For the student and for the teacher, by role, ``(v, B, m, 2)`` points
            ``(x, y)`` in view coordinates.
        """
        raise NotImplementedError

    def reference_tokens(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        points: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:
        """Tokens ``(B, m, D)`` that a branch's backbone is to carry for points.

        Args:
            backbone: the branch's own.
            projector: the branch's own, of this head.
            points: ``(B, m, 2)`` in view coordinates.
            grid: ``(h, w)`` patches of the views.
        """
        raise NotImplementedError

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """Scalars of one part of a batch: ``'loss'`` and monitors (detached).

        Args:
            student: features of at least the roles of ``student_roles``.
            teacher: features of at least the roles of ``teacher_roles``.
            geometry: :class:`densessl.geometry.ViewGeometry` ``(B, V)`` or None.
            name: the head's own name, the key of its projectors.
        """
        raise NotImplementedError

    def end_step(self) -> None:
        """Update centres, queues and the like, once the optimiser has the gradient."""

    def monitored_features(self, teacher: ViewFeatures) -> Tensor:
        """``(n, D)`` teacher features the health hook looks at."""
        return teacher.pooled.flatten(0, 1)


class DistillationHead(Head):
    """Temperatures and the centre of a DINO-like head.

    The centre follows the mean teacher logits of the global batch,
    ``c <- m c + (1 - m) mean(z_t)`` (DINO, Eq. 4). The last layer is linear, so the
    mean logits are the layer at the mean bottleneck: ranks exchange that, not ``K``
    values.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: prototypes ``K``.
        student_temp: temperature of the student.
        teacher_temp: a number, or ``dict(start, end, warmup_epochs)``.
        center_momentum: share of the old centre that stays.
        loss_weight: see :class:`Head`.
        freeze_last_layer_epochs: epochs in which the last layer stays as it is.
        projector: options of :class:`DINOProjector`.
    """

    center: Tensor

    def __init__(
        self,
        embed_dims: int,
        out_dims: int,
        *,
        student_temp: float = 0.1,
        teacher_temp: float | dict = 0.04,
        center_momentum: float = 0.9,
        loss_weight: float | dict = 1.0,
        freeze_last_layer_epochs: float = 1,
        projector: dict | None = None,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        if not 0 <= center_momentum <= 1:
            raise DenseSSLError(
                f'{type(self).__name__}: center_momentum={center_momentum} is no share;'
                ' give a number from 0 to 1 (papers: 0.9)'
            )
        if student_temp <= 0:
            raise DenseSSLError(
                f'{type(self).__name__}: student_temp={student_temp}; temperatures are '
                'greater than 0 (papers: 0.1)'
            )
        self.student_temp = student_temp
        self.temperature = Temperature.of(teacher_temp)
        self.teacher_temp = self.temperature.start
        self.center_momentum = center_momentum
        self.freeze_last_layer_epochs = freeze_last_layer_epochs
        self._projector = dict(
            embed_dims=embed_dims, out_dims=out_dims, **(projector or {})
        )
        self.register_buffer('center', torch.zeros(out_dims))
        self._seen: list[tuple[Tensor, int, DINOProjector]] = []

    def build_projector(self) -> DINOProjector:
        """A new projector for the student."""
        return DINOProjector(**self._projector)

    def start_step(self, progress: Progress) -> None:
        """Set weight and teacher temperature, and forget the last step's batch."""
        super().start_step(progress)
        self.teacher_temp = self.temperature.at(progress)
        self._seen = []

    def distill(
        self,
        student: Tensor,
        student_projector: DINOProjector,
        teacher: Tensor,
        teacher_projector: DINOProjector,
        pairs: Pairs,
        centered: Tensor | None = None,
        used: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss and monitors of student rows against teacher rows.

        Args:
            student: ``(..., D)`` features before the projector, image by image; the
                rows of ``pairs``.
            student_projector: the student's.
            teacher: ``(..., D)`` features before the projector, image by image.
            teacher_projector: the teacher's.
            pairs: see :class:`densessl.losses.Pairs`.
            centered: ``(..., D)`` teacher features whose mean moves the centre; by
                default those of ``teacher``.
            used: ``(m,)`` long, the rows of ``teacher`` that ``pairs`` is about; None
                for all.
        """
        with torch.no_grad():
            teacher_rows = teacher_projector.embed(teacher)
            rows = (
                teacher_rows if centered is None else teacher_projector.embed(centered)
            )
            if self.training:
                rows = rows.flatten(0, -2)
                self._seen.append((rows.sum(0), len(rows), teacher_projector))
            teacher_rows = teacher_rows.flatten(0, -2)
            if used is not None:
                teacher_rows = teacher_rows.index_select(0, used)
        result: Distillation = distillation_loss(
            student_projector.embed(student).flatten(0, -2),
            student_projector.last_layer,
            teacher_rows,
            teacher_projector.last_layer,
            self.center,
            pairs,
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp,
        )
        return dict(
            loss=result.loss,
            teacher_entropy=result.teacher_entropy,
            kl=result.kl,
            center_norm=self.center.norm(),
        )

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the centre by the mean teacher logits of all parts and all ranks."""
        if not self._seen:
            return
        sums, counts, projectors = zip(*self._seen, strict=True)
        total = torch.cat([sum(sums), sums[0].new_full((1,), sum(counts))])
        dist.all_reduce(total, 'sum')
        mean = (total[:-1] / total[-1]).to(self.center.dtype)
        mean_logits = projectors[0].last_layer(mean)
        self.center.lerp_(mean_logits, 1 - self.center_momentum)
        self._seen = []


def thin(tokens: Tensor) -> Tensor:
    """At most about 2048 of ``(..., D)`` tokens, evenly spaced, ``(n, D)``."""
    tokens = tokens.flatten(0, -2)
    return tokens[:: max(1, len(tokens) // _MONITORED)]
