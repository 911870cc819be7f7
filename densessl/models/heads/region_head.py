"""EsViT's and GLSD's task: student tokens predict teacher tokens of other views."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.losses import Pairs
from densessl.models.features import ViewFeatures
from densessl.models.matchers import ViewTokens, build_matcher
from densessl.registry import MODELS

from .base import DistillationHead, thin
from .match_monitor import MatchMonitor


@MODELS.register_module()
class RegionHead(DistillationHead):
    """Cross-entropy between matched tokens of different views.

    For each teacher view ``i`` of ``target_role`` and each student view ``v != i``,
    a matcher gives student token ``m`` the teacher token ``n*(m)``, and

    ``L = mean over pairs (i, v) of (1/T) sum_m H(P_t(n*(m)), P_s(m))``

    over the matches that count, ``T`` being all tokens of ``v`` (EsViT,
    arXiv:2106.09785, Eq. 3; GLSD, WACV 2023). The matcher sees the backbone's features;
    the head has its own projector and centre.

    Monitors, averaged over images and teacher views: ``match_perplexity``, how many of
    a view's tokens are matched, as ``exp(entropy)`` of the histogram of matches. With
    tracked geometry ``overlap``, the share of student tokens whose centre lies in the
    teacher's view, and of these ``match_distance``, the mean distance to the match in
    teacher tokens, and ``match_locality``, 1 minus the mean squared distance over that
    of the same matches dealt out at random: 1 by place, 0 by chance.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        out_dims: prototypes ``K``.
        matching: ``'similarity'`` (EsViT), ``'geometric'`` (GLSD), a matcher's config,
            or None, which leaves the whole head out.
        target_role: role of the views the teacher predicts from; they come first.
        **options: see :class:`DistillationHead`.

    Attributes:
        target_tokens: tokens of a teacher view of the last batch.
    """

    def __init__(
        self,
        embed_dims: int,
        out_dims: int = 65536,
        *,
        matching: str | dict | None = 'geometric',
        target_role: str = 'global',
        **options,
    ) -> None:
        super().__init__(embed_dims, out_dims, **options)
        self.enabled = matching is not None
        self.matcher = build_matcher(matching) if self.enabled else None
        self.needs_geometry = self.enabled and self.matcher.needs_geometry
        self.target_role = target_role
        self.teacher_roles = (target_role,)
        self.target_tokens = 0
        self._checked: set[tuple] = set()

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """See :meth:`Head.loss`."""
        views = _views(student, geometry)
        target = _views(teacher, geometry)[self.target_role]
        if self.needs_geometry:
            self._check_geometry(views)

        index, weights, monitors = self.match(list(views.values()), target)
        tokens = target.tokens.flatten(1, 2)
        pairs, kept, used = Pairs.matched(index, weights, tokens.shape[1])
        rows = student.by_image().flatten(0, 1)
        terms = self.distill(
            student.neck.normalize(rows.index_select(0, kept)),
            student.projectors[name],
            teacher.neck.normalize(tokens),
            teacher.projectors[name],
            pairs,
            used=used,
        )
        return terms | monitors

    @torch.no_grad()
    def match(
        self, views: list[ViewTokens], target: ViewTokens
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Partners and weights of all student tokens, and the monitors.

        Args:
            views: the student's, ``R`` tokens an image; those of ``target`` come first.
            target: the teacher's ``T`` views of ``M`` tokens.

        Returns:
            ``index (B, R, T)``, the partners of each token among the image's ``T * M``
            teacher tokens, one a view; ``weights (B, R, T)``; and scalars.
        """
        targets, tokens = target.tokens.shape[1:3]
        self.target_tokens = tokens
        pairs = targets * (sum(view.tokens.shape[1] for view in views) - 1)
        indices, weights = [], []
        monitor = MatchMonitor(target)
        start = 0
        for view in views:
            count, rows = view.tokens.shape[1:3]
            partners, shares = [], []
            for i in range(targets):
                one = _one_view(target, i)
                matches = self.matcher(view, one)
                other = torch.arange(start, start + count, device=one.tokens.device)
                counted = matches.valid & (other != i)[:, None]
                partners.append(matches.index.flatten(1) + i * tokens)
                shares.append(counted.flatten(1) / (pairs * rows))
                monitor.add(i, view, one, matches.index, counted, other != i)
            indices.append(torch.stack(partners, -1))
            weights.append(torch.stack(shares, -1))
            start += count
        return torch.cat(indices, 1), torch.cat(weights, 1), monitor.values()

    def monitored_features(self, teacher: ViewFeatures) -> Tensor:
        """Patch tokens of the target views, evenly thinned to a few thousand."""
        return thin(teacher.tokens[self.target_role])

    def _check_geometry(self, views: dict[str, ViewTokens]) -> None:
        """Once a set of views: their grids fit their geometry."""
        key = tuple((role, view.grid) for role, view in views.items())
        if key in self._checked:
            return
        kind = type(self.matcher).__name__
        cells = {}
        for role, view in views.items():
            size = view.geometry.size[0, 0].tolist()
            cells[role] = tuple(
                side / count for side, count in zip(size, view.grid, strict=True)
            )
            if len(set(cells.values())) > 1:
                found = ', '.join(
                    f'{role} {h:g} x {w:g} px' for role, (h, w) in cells.items()
                )
                raise DenseSSLError(
                    f'{kind}: the token grids do not fit the views (a token would be '
                    f"{found}); make each view's side a multiple of the backbone's "
                    'stride'
                )
        self._checked.add(key)


def _views(
    features: ViewFeatures, geometry: ViewGeometry | None
) -> dict[str, ViewTokens]:
    """A branch's tokens by role, without gradient, ``(B, v, N, D)``."""
    return {
        role: ViewTokens(
            tokens.detach().transpose(0, 1),
            features.grids[role],
            None if geometry is None else geometry[:, features.places[role]],
        )
        for role, tokens in features.tokens.items()
    }


def _one_view(views: ViewTokens, i: int) -> ViewTokens:
    part = slice(i, i + 1)
    geometry = None if views.geometry is None else views.geometry[:, part]
    return ViewTokens(views.tokens[:, part], views.grid, geometry)
