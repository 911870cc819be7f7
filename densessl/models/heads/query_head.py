"""What LOCA's two tasks share: query views, each patch with its reference patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from mmengine import dist
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.models.features import ViewFeatures

from .base import Head, thin


class Correspondence(NamedTuple):
    """Where the ``M`` tokens of an image's queries lie in its ``R`` references.

    Attributes:
        index: ``(B, M, R)`` long, LOCA's h(j), the raster index of the reference patch;
            -1 where there is none.
        weights: ``(B, M, R)`` float32, what a token counts in a mean over images.
        monitors: ``omega``, the share of tokens with a patch; ``missed``, the share of
            queries without any such token.
    """

    index: Tensor
    weights: Tensor
    monitors: dict[str, Tensor]


class QueryHead(Head):
    """A task of query views against reference views (LOCA, WACV 2024).

    Every view of ``query_roles`` meets every view of ``reference_role`` but itself.

    Args:
        reference_role: role of the views that the teacher sees.
        query_roles: roles of the views that the student sees.
        average: of a loss over the tokens in Omega: ``'query'`` takes the mean of each
            query and then of queries and images, a query without any counting as zero
            (the paper); ``'token'`` the mean over all of them of all ranks' images (the
            authors' code; one device's there).
        loss_weight: see :class:`Head`.

    Raises:
        DenseSSLError: an option is out of range.
    """

    needs_geometry = True
    whole_views = False

    def __init__(
        self,
        reference_role: str = 'reference',
        query_roles: Sequence[str] = ('random', 'focal'),
        *,
        average: Literal['query', 'token'] = 'query',
        loss_weight: float | dict = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        if average not in ('query', 'token'):
            raise DenseSSLError(
                f'{type(self).__name__}: average={average!r}; choose query or token'
            )
        if isinstance(query_roles, str) or not query_roles:
            raise DenseSSLError(
                f'{type(self).__name__}: query_roles={query_roles!r}; give a list of '
                'roles'
            )
        self.reference_role = reference_role
        self.teacher_roles = (reference_role,)
        self.query_roles = self.student_roles = tuple(query_roles)
        self.average = average

    def correspond(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry
    ) -> list[Tensor]:
        """h(j) by query role, ``(B, v, n, R)``, from geometry alone.

        It is -1 outside a reference, and for a reference itself.
        """
        grid = teacher.grids[self.reference_role]
        references = geometry[:, teacher.places[self.reference_role]]
        indices = []
        for role, same in zip(self.query_roles, self.same_views(student), strict=True):
            queries = geometry[:, student.places[role]]
            index = queries[:, :, None].greatest_overlap_patch(
                references[:, None], student.grids[role], grid
            )  # (B, v, R, N)
            same = same.to(index.device, non_blocking=True)
            index = index.masked_fill(same[..., None], -1)
            if role in student.kept:
                kept = student.kept[role].transpose(0, 1)[:, :, None]
                index = index.gather(-1, kept.expand(-1, -1, index.shape[2], -1))
            indices.append(index.transpose(2, 3))
        return indices

    def same_views(self, features: ViewFeatures) -> list[Tensor]:
        """By query role ``(v, R)`` bool, which queries are a reference themselves."""
        views = torch.arange(max(place.stop for place in features.places.values()))
        references = views[features.places[self.reference_role]]
        return [
            views[features.places[role]][:, None] == references
            for role in self.query_roles
        ]

    def weigh(self, indices: list[Tensor], same: list[Tensor]) -> Correspondence:
        """What each token counts, with tokens image by image.

        Args:
            indices: by role ``(B, v, n, R)``, -1 for tokens that are not in Omega.
            same: see :meth:`same_views`.
        """
        images = len(indices[0])
        pairs = sum(int((~s).sum()) for s in same)
        tokens = sum(
            int((~s).sum()) * x.shape[2] for s, x in zip(same, indices, strict=True)
        )
        inside = [index >= 0 for index in indices]
        counts = [x.sum(2, keepdim=True) for x in inside]  # (B, v, 1, R)
        total = torch.stack([x.sum() for x in inside]).sum().float()
        met = torch.stack([(x > 0).sum() for x in counts]).sum()
        if self.average == 'query':
            weights = [
                x / n.clamp_min(1) / max(pairs, 1)
                for x, n in zip(inside, counts, strict=True)
            ]
        else:  # the weights are averaged over this rank's images, and over ranks
            everywhere = torch.stack([total, total.new_full((), images)])
            dist.all_reduce(everywhere, 'sum')
            each = (everywhere[0] / everywhere[1]).clamp_min(1e-6)
            weights = [x / each for x in inside]
        return Correspondence(
            torch.cat([x.flatten(1, 2) for x in indices], 1),
            torch.cat([x.flatten(1, 2) for x in weights], 1),
            dict(
                omega=total / max(images * tokens, 1),
                missed=1 - met / max(images * pairs, 1),
            ),
        )

    def monitored_features(self, teacher: ViewFeatures) -> Tensor:
        """Patch tokens of the references, evenly thinned to a few thousand."""
        return thin(teacher.tokens[self.reference_role])
