"""SelfPatch's task for a method with a predictor: no prototypes, no centre."""

from __future__ import annotations

from typing import Literal

import torch
from mmengine import dist
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.losses import info_nce
from densessl.models.features import ViewFeatures
from densessl.registry import MODELS

from .base import thin
from .contrastive_head import PredictionHead
from .selfpatch_head import Positives


@MODELS.register_module()
class ContrastiveSelfPatchHead(PredictionHead):
    """SelfPatch (CVPR 2022, Sec. 3) on MoBY: ``L = mean_i D(q(f_i), k(y^(i)))``.

    Positives and their summary ``y^(i)`` are those of :class:`SelfPatchHead`. The
    prediction ``q`` is the student's, the key ``k`` the teacher's, of the same view;
    the mean is over patches, images and views. ``D(q, k) = 2 - 2 cos(q, k)``; or, with
    negatives, InfoNCE of ``q`` with ``k`` against the keys ``k(y^(i))`` that the other
    images of the step, those of other ranks included, have at the same place ``i`` of
    the same view. Taken from one place, negatives do not differ by their position.

    With negatives this is an objective of the whole batch: ranks exchange the keys in
    ``loss``, once for each view. Under ``accumulate`` the batch is one part of every
    rank.

    Monitors: ``positives``, their mean number a patch; ``cosine`` between predictions
    and keys; with negatives ``accuracy``, see :class:`densessl.losses.Contrast`.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: width of an embedding.
        top_k: see :class:`SelfPatchHead`.
        window: see :class:`SelfPatchHead`.
        border: see :class:`SelfPatchHead`.
        threshold: see :class:`SelfPatchHead`.
        negatives: whether other images repel.
        loss_weight: see :class:`Head`.
        **options: see :class:`PredictionHead`.
    """

    needs_aggregate = True

    def __init__(
        self,
        embed_dims: int,
        out_dims: int = 256,
        *,
        top_k: int | Literal['adaptive'] = 4,
        window: int | Literal['all'] = 3,
        border: Literal['wrap', 'clip'] = 'wrap',
        threshold: float = 0.95,
        negatives: bool = False,
        loss_weight: float | dict = 0.1,
        **options,
    ) -> None:
        super().__init__(embed_dims, out_dims, loss_weight=loss_weight, **options)
        self.positives = Positives(top_k, window, border, threshold)
        self.negatives = negatives

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """See :meth:`Head.loss`."""
        terms: list[dict[str, Tensor]] = []
        for role, views in student.tokens.items():
            with torch.no_grad():
                summaries, positives = self.positives.summarize(teacher, role)
            for view, summary in zip(views, summaries.chunk(len(views)), strict=True):
                shape = view.shape[:2]  # images, patches
                rows = student.neck.normalize(view).flatten(0, 1)
                query = self.query(student, name, rows).unflatten(0, shape)
                key = self.key(teacher, name, summary.flatten(0, 1))
                compared = self._compare(query, key.unflatten(0, shape))
                terms.append(compared | dict(positives=positives.float().mean()))
        return {k: torch.stack([t[k] for t in terms]).mean() for k in terms[0]}

    def _compare(self, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """Loss and monitors of ``(B, N, d)`` unit-length predictions of one view."""
        cosine = (query * key).sum(-1).mean()
        if not self.negatives:
            return dict(loss=2 - 2 * cosine, cosine=cosine.detach())
        images = len(key)
        every = torch.cat(dist.all_gather(key.contiguous()))
        if len(every) < 2:
            raise DenseSSLError(
                'ContrastiveSelfPatchHead: negatives are of other images, and a batch '
                'of one has none; raise batch_size to 2 or more, lower accumulate, or '
                'set negatives=False'
            )
        own = dist.get_rank() * images + torch.arange(images, device=key.device)
        other = torch.arange(len(every), device=key.device) != own[:, None]
        contrast = info_nce(
            *(x.transpose(0, 1) for x in (query, key, every)), self.temp, other
        )
        return dict(
            loss=contrast.loss, cosine=cosine.detach(), accuracy=contrast.accuracy
        )

    def monitored_features(self, teacher: ViewFeatures) -> Tensor:
        """Patch tokens of the first role, evenly thinned to a few thousand."""
        return thin(next(iter(teacher.tokens.values())))
