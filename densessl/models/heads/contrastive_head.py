"""MoBY's task: a view predicts the key of the other view among a queue of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine import dist
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.losses import info_nce
from densessl.models.batch_norm import BatchNormMLP
from densessl.models.features import ViewFeatures
from densessl.registry import MODELS
from densessl.schedules import Progress

from .base import Head


class PredictionHead(Head):
    """Projector and predictor of a head that compares embeddings.

    Student: ``q = predictor(projector(x)) / |.|``; teacher: ``k = projector(x) / |.|``.
    The predictor is the student's alone; its weights are the head's own. Both are
    :class:`densessl.models.batch_norm.BatchNormMLP`; in training the teacher's batch
    norm, too, uses the batch. Each call is a batch of its own for it.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: width of an embedding.
        hidden_dims: width of the hidden layer of projector and predictor.
        temp: temperature of InfoNCE.
        loss_weight: see :class:`Head`.

    Raises:
        DenseSSLError: the temperature is not greater than 0.
    """

    def __init__(
        self,
        embed_dims: int,
        out_dims: int = 256,
        *,
        hidden_dims: int = 4096,
        temp: float = 0.2,
        loss_weight: float | dict = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        if temp <= 0:
            raise DenseSSLError(
                f'{type(self).__name__}: temp={temp}; temperatures are greater than 0 '
                '(MoBY: 0.2)'
            )
        self.temp = temp
        self._projector = (embed_dims, hidden_dims, out_dims)
        self.predictor = BatchNormMLP(out_dims, hidden_dims, out_dims)

    def build_projector(self) -> BatchNormMLP:
        """A new projector for the student."""
        return BatchNormMLP(*self._projector)

    def query(self, student: ViewFeatures, name: str, x: Tensor) -> Tensor:
        """Unit-length predictions ``(n, d)`` of the student's ``(n, D)``."""
        return _unit(self.predictor(student.projectors[name](x)))

    @torch.no_grad()
    def key(self, teacher: ViewFeatures, name: str, x: Tensor) -> Tensor:
        """Unit-length targets ``(n, d)`` of the teacher's ``(n, D)``."""
        return _unit(teacher.projectors[name](x))


@MODELS.register_module()
class ContrastiveHead(PredictionHead):
    """InfoNCE between two views, with queues of earlier keys (MoBY, arXiv:2105.04553).

    ``L = InfoNCE(q_1, k_2, queue_2) + InfoNCE(q_2, k_1, queue_1)``, see
    :func:`densessl.losses.info_nce`. A queue holds the last keys of its view, of all
    ranks; those of a step join it, and replace the oldest, in ``end_step``. Ranks must
    have equally many images, as they do where a last, smaller step is left out.

    Monitors: ``accuracy``, see :class:`densessl.losses.Contrast`; ``queue_filled``, the
    share of the queue that is no longer as it was drawn.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: width of an embedding.
        queue_length: keys in each of the two queues.
        role: role of the two views.
        **options: see :class:`PredictionHead`.

    Attributes:
        queue: ``(2, K, d)`` unit-length keys, by view; random ones at first, equal on
            all ranks.
        enqueued: keys that ever joined each queue; the next goes to this place, modulo
            ``K``, which holds the oldest.

    Raises:
        DenseSSLError: an option is out of range.
    """

    needs_patches = False
    whole_views = False
    queue: Tensor
    enqueued: Tensor

    def __init__(
        self,
        embed_dims: int,
        out_dims: int = 256,
        *,
        queue_length: int = 4096,
        role: str = 'global',
        **options,
    ) -> None:
        super().__init__(embed_dims, out_dims, **options)
        if queue_length < 1:
            raise DenseSSLError(
                f'ContrastiveHead: queue_length={queue_length}; without keys there is '
                'nothing to tell apart, give 1 or more (MoBY: 4096)'
            )
        self.role = role
        self.teacher_roles = self.student_roles = (role,)
        generator = torch.Generator().manual_seed(0)  # whatever the rank's own
        queue = torch.randn(2, queue_length, out_dims, generator=generator)
        self.register_buffer('queue', F.normalize(queue, dim=-1))
        self.register_buffer('enqueued', torch.zeros((), dtype=torch.long))
        self._fresh: list[Tensor] = []

    def start_step(self, progress: Progress) -> None:
        """Set the weight, and forget the last step's keys."""
        super().start_step(progress)
        self._fresh = []

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """See :meth:`Head.loss`."""
        views = student.pooled_of(self.role)
        if len(views) != 2:
            raise DenseSSLError(
                f'ContrastiveHead: {len(views)} view(s) of role {self.role!r}; it '
                'compares two, so let the recipe cut 2 of them'
            )
        queries = [self.query(student, name, view) for view in views]
        keys = [self.key(teacher, name, view) for view in teacher.pooled_of(self.role)]
        first, second = (
            info_nce(queries[v], keys[1 - v], self.queue[1 - v], self.temp)
            for v in range(2)
        )
        if self.training:
            self._fresh.append(torch.stack(keys))
        filled = (self.enqueued / self.queue.shape[1]).clamp(max=1)
        return dict(
            loss=first.loss + second.loss,
            accuracy=(first.accuracy + second.accuracy) / 2,
            queue_filled=filled,
        )

    @torch.no_grad()
    def end_step(self) -> None:
        """Let the keys of all parts and all ranks join the queues."""
        if not self._fresh:
            return
        fresh = torch.cat(self._fresh, 1)
        self.enqueue(torch.cat(dist.all_gather(fresh), 1))
        self._fresh = []

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys ``(2, n, d)`` in place of the oldest; of more than ``K``, the last.

        Places go round, so ``n`` need not divide ``K``.
        """
        count, length = keys.shape[1], self.queue.shape[1]
        places = torch.arange(count, device=keys.device)[-length:]
        index = (self.enqueued + places) % length
        self.queue[:, index] = keys[:, -length:].to(self.queue.dtype)
        self.enqueued += count


def _unit(x: Tensor) -> Tensor:
    """Unit length, float32 or wider."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
