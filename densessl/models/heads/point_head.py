"""DenseDINO's task: a point's reference token agrees between two views."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.losses import Pairs
from densessl.models.features import ViewFeatures, by_image
from densessl.registry import MODELS

from .base import DistillationHead, thin
from .projector import DINOProjector


@MODELS.register_module()
class PointHead(DistillationHead):
    """Cross-entropy between the reference tokens of a point in two views.

    For each teacher view ``i`` of ``target_role`` and each student view ``v != i``,
    ``M`` points are laid into what the two have in common, and

    ``L = mean over pairs (i, v) and points p of H(P_t(p in i), P_s(p in v))``

    (DenseDINO, IJCAI 2023). A point enters a view as a reference token: the position
    embedding at its place, which attends to the view's patches and is seen by nobody.
    A pair without overlap counts as 0; ``MultiCrop(min_overlap=...)`` leaves none. The
    head has its own projector and centre. Random points come from torch's generator,
    seeded for each step and rank.

    Monitor ``overlap``: the share of pairs that have one.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: prototypes ``K``.
        points: points ``M`` a pair of views.
        sampling: ``'random'``, uniform over the overlap, or ``'grid'``, the centres of
            its ``sqrt(M) x sqrt(M)`` equal cells.
        target_role: role of the views the teacher predicts from; they come first.
        center_views: whether the centre averages the teacher's tokens of pairs of
            ``'target'`` views (the authors' code), or of ``'all'`` pairs.
        detach: keep the loss from moving the position embeddings it starts from.
        content: a learned vector, one for all points, is added to the embeddings.
        **options: see :class:`DistillationHead`.

    Raises:
        DenseSSLError: no points, or a number that gives no square grid.
    """

    needs_patches = False
    needs_geometry = True
    needs_points = True

    def __init__(
        self,
        embed_dims: int,
        out_dims: int = 65536,
        *,
        points: int = 4,
        sampling: Literal['random', 'grid'] = 'random',
        target_role: str = 'global',
        center_views: Literal['target', 'all'] = 'target',
        detach: bool = False,
        content: bool = False,
        **options,
    ) -> None:
        super().__init__(embed_dims, out_dims, **options)
        if points < 1:
            raise DenseSSLError(
                f'PointHead: points={points}; give 1 point a pair of views or more, or '
                'leave the head out'
            )
        if sampling not in ('random', 'grid'):
            raise DenseSSLError(
                f'PointHead: unknown sampling {sampling!r}; choose random or grid'
            )
        if sampling == 'grid' and math.isqrt(points) ** 2 != points:
            raise DenseSSLError(
                f'PointHead: points={points} make no square grid; give 1, 4, 9, 16, '
                "..., or sampling='random'"
            )
        self.points = points
        self.sampling = sampling
        self.target_role = target_role
        self.teacher_roles = (target_role,)
        self.center_views = center_views
        self.detach = detach
        self.content = embed_dims if content else 0

    def build_projector(self) -> DINOProjector:
        """A new projector for the student; it holds the content, if there is one."""
        projector = super().build_projector()
        if self.content:
            projector.content = nn.Parameter(torch.zeros(self.content))
        return projector

    @torch.no_grad()
    def place_points(
        self, geometry: ViewGeometry, places: dict[str, slice]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Where the points of all pairs lie; see :meth:`Head.place_points`.

        Each view carries the points of the pairs it is in: a teacher view ``(V - 1) M``
        of them, a student view ``T M``, or ``(T - 1) M`` if it is a target itself.
        """
        if geometry.shape[1] < 2:
            raise DenseSSLError(
                'PointHead compares two views of a picture, and the recipe cuts one; '
                'add a view'
            )
        pairs = Matchups.of(geometry, places[self.target_role])
        source = self.draw(pairs.target.overlap(pairs.student))
        ours = pairs.student.to_view(source).clamp(0, 1)
        theirs = pairs.target.to_view(source).clamp(0, 1)
        student, start = {}, 0
        for role, part in places.items():
            views = part.stop - part.start
            count = pairs.targets - (role == self.target_role)
            if count:
                one = ours[:, start : start + views * count]
                one = one.unflatten(1, (views, count))
                student[role] = one.flatten(2, 3).transpose(0, 1)
            start += views * count
        theirs = theirs[:, pairs.by_target()].unflatten(1, (pairs.targets, -1))
        return student, {self.target_role: theirs.flatten(2, 3).transpose(0, 1)}

    def draw(self, overlap: Tensor) -> Tensor:
        """Points in boxes.

        Args:
            overlap: ``(..., 4)`` boxes ``(x, y, width, height)`` in source px.

        Returns:
            ``(..., M, 2)`` points ``(x, y)`` in source px.
        """
        if self.sampling == 'random':
            shape = (*overlap.shape[:-1], self.points, 2)
            share = torch.rand(shape, dtype=overlap.dtype, device=overlap.device)
        else:
            side = math.isqrt(self.points)
            line = torch.arange(side, dtype=overlap.dtype, device=overlap.device)
            y, x = torch.meshgrid(
                (line + 0.5) / side, (line + 0.5) / side, indexing='ij'
            )
            share = torch.stack([x, y], -1).flatten(0, 1)
        return overlap[..., None, :2] + share * overlap[..., None, 2:]

    def reference_tokens(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        points: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:
        """Tokens of points; see :meth:`Head.reference_tokens`."""
        tokens = backbone.position_embeddings_at(points, grid)
        tokens = tokens.detach() if self.detach else tokens
        return tokens + projector.content if self.content else tokens

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """See :meth:`Head.loss`."""
        pairs = Matchups.of(geometry, student.places[self.target_role])
        ours = [student.references.get(role) for role in student.places]
        ours = torch.cat([by_image(x) for x in ours if x is not None], 1)
        theirs = by_image(teacher.references[self.target_role])
        theirs = theirs.unflatten(1, (-1, self.points))
        theirs = theirs[:, pairs.by_target().argsort()].flatten(1, 2)
        images, rows = ours.shape[:2]
        meets = (pairs.target.overlap_area(pairs.student) > 0).to(torch.float)
        weight = meets.repeat_interleave(self.points, 1) / (images * rows)
        centered = None
        if self.center_views == 'target' and pairs.targets > 1:
            count = pairs.targets * (pairs.targets - 1) * self.points
            centered = teacher.neck.normalize(theirs[:, :count])
        terms = self.distill(
            student.neck.normalize(ours),
            student.projectors[name],
            teacher.neck.normalize(theirs),
            teacher.projectors[name],
            Pairs(weight.view(-1, 1), None, [rows] * images, [rows] * images),
            centered,
        )
        return terms | dict(overlap=meets.mean())

    def monitored_features(self, teacher: ViewFeatures) -> Tensor:
        """Reference tokens of the target views, evenly thinned to a few thousand."""
        return thin(teacher.references[self.target_role])


class Matchups(NamedTuple):
    """All pairs of a target view ``i`` and another view ``v``, by ``v``, then ``i``.

    Target views come first, so pairs of two of them do, too.

    Attributes:
        targets: number of target views ``T``.
        views: number of views ``V``.
        target: geometry ``(B, P)`` of the target views of the ``P = T (V - 1)`` pairs.
        student: geometry ``(B, P)`` of the other views.
    """

    targets: int
    views: int
    target: ViewGeometry
    student: ViewGeometry

    @classmethod
    def of(cls, geometry: ViewGeometry, target: slice) -> Matchups:
        """Pairs of the views ``(B, V)`` of a batch with those of ``target``."""
        targets, views = target.stop - target.start, geometry.shape[1]
        first, second, _ = _pairs(targets, views, geometry.box.device)
        return cls(targets, views, geometry[:, first], geometry[:, second])

    def by_target(self) -> Tensor:
        """Order ``(P,)`` of the pairs by ``i``, then ``v``."""
        return _pairs(self.targets, self.views, self.target.box.device)[2]


@lru_cache(maxsize=64)
def _pairs(targets: int, views: int, device: torch.device) -> tuple[Tensor, ...]:
    """``i`` and ``v`` of all pairs, by ``v``, and their order by ``i``."""
    pairs = [(i, v) for v in range(views) for i in range(targets) if i != v]
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        columns = (*zip(*pairs, strict=True), order)
        return tuple(torch.tensor(column, device=device) for column in columns)
