"""LOCA's first task: each query patch predicts its place in a reference view."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.losses import box_loss
from densessl.models.backbones.vision_transformer import init_linear
from densessl.models.features import ViewFeatures
from densessl.models.patch_drop import PatchDrop, gather_tokens
from densessl.registry import MODELS

from .cross_attention import CrossAttentionBlock
from .query_head import Correspondence, QueryHead


@MODELS.register_module()
class PositionHead(QueryHead):
    """Query patches are classified into the patches of a reference (LOCA, WACV 2024).

    ``L = mean over Omega of -log softmax(W LN(a(q_j, Z)))[h(j)]``: the query tokens
    attend, by one block ``a``, to the reference tokens ``Z`` of which a share
    ``mask_ratio`` is hidden, anew at each call. The head is the student's alone; its
    weights are its own, not a projector's.

    Monitors: ``accuracy`` and ``distance`` (mean, in reference patches) of what is
    predicted over Omega, ``omega`` and ``missed``; for boxes ``iou``, ``omega`` and
    ``missed``.

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        grid: patches ``(h, w)`` of a reference, or the side of a square of them.
        mask_ratio: share of the reference that is hidden (the paper's eta), 0 to 1;
            with nothing left to see, queries are classified as they are.
        mask: what stays visible, a ``'run'``, a ``'block'`` or ``'random'`` patches;
            see :class:`densessl.models.PatchDrop`.
        per_image: draw what stays visible for each image; else once for all.
        task: ``'patch'``; ``'center'``, of each query only the patch nearest its
            centre; ``'box'``, from the mean of a query's tokens the box of its part
            that lies in the reference (L1 and GIoU); ``'own'``, the place in the query
            itself, without any reference (single-view prediction).
        encoder: whose tokens of the reference are seen, the ``'teacher'``'s, or the
            ``'student'``'s, with gradient (the authors' code without clusters).
        num_heads: attention heads; by default one for every 64 channels, at least 1.
        alike: how strongly query patches attend at the start to what looks like them:
            the block's queries start as this many times its keys. 0 draws them apart,
            as in the authors' code, from which a short run learns no places.
        **options: see :class:`QueryHead`.

    Raises:
        DenseSSLError: an option is out of range.
    """

    def __init__(
        self,
        embed_dims: int,
        *,
        grid: int | tuple[int, int] = 14,
        mask_ratio: float = 0.8,
        mask: Literal['random', 'run', 'block'] = 'run',
        per_image: bool = False,
        task: Literal['patch', 'center', 'box', 'own'] = 'patch',
        encoder: Literal['teacher', 'student'] = 'teacher',
        num_heads: int | None = None,
        alike: float = 0.0,
        **options,
    ) -> None:
        super().__init__(**options)
        if alike < 0:
            raise DenseSSLError(
                f'PositionHead: alike={alike}; give 0 or more, such as 4'
            )
        if not 0 <= mask_ratio <= 1:
            raise DenseSSLError(
                f'PositionHead: mask_ratio={mask_ratio}; give a share of 0 to 1'
            )
        for key, value, known in (
            ('task', task, ('patch', 'center', 'box', 'own')),
            ('encoder', encoder, ('teacher', 'student')),
        ):
            if value not in known:
                raise DenseSSLError(
                    f'PositionHead: {key}={value!r}; choose from {", ".join(known)}'
                )
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        self.task = task
        self.needs_geometry = task != 'own'
        self.encoder = encoder
        if encoder == 'student':
            self.student_roles = (self.reference_role, *self.query_roles)
        self.visible = PatchDrop(1.0 - mask_ratio, mask, per_image=per_image)
        sees = task != 'own' and self.visible.count(self.grid) > 0
        num_heads = num_heads or max(1, embed_dims // 64)
        self.block = CrossAttentionBlock(embed_dims, num_heads, alike) if sees else None
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self.predictor = nn.Linear(
            embed_dims, 4 if task == 'box' else math.prod(self.grid)
        )
        self.predictor.apply(init_linear)

    def build_projector(self) -> nn.Module:
        """Nothing: the teacher takes no part in the prediction."""
        return nn.Identity()

    def loss(
        self, student: ViewFeatures, teacher: ViewFeatures, geometry, name: str
    ) -> dict[str, Tensor]:
        """See :meth:`Head.loss`."""
        self._check_grids(student, teacher)
        queries = student.by_image(self.query_roles)  # (B, M, D)
        source = student if self.encoder == 'student' else teacher
        references = self._draw_visible(source.tokens[self.reference_role])
        seen = self._attend(queries, references)
        if self.task == 'box':
            return self._box_loss(seen, student, teacher, geometry)
        matched = self._targets(student, teacher, geometry)
        with torch.autocast(seen.device.type, enabled=False):
            logits = self.predictor(self.norm(_float32(seen)))
            logits = logits.expand(*matched.index.shape, -1)  # (B, M, R, N)
            target = matched.index.clamp_min(0)
            entropies = F.cross_entropy(
                logits.flatten(0, 2), target.flatten(), reduction='none'
            )
            loss = (entropies * matched.weights.flatten()).sum() / len(queries)
        return dict(loss=loss, **self.scores(logits, matched.index), **matched.monitors)

    def predict(self, queries: Tensor, references: Tensor) -> Tensor:
        """Logits of the places of query tokens, of which any share may be hidden.

        Args:
            queries: ``(B, M, D)``.
            references: ``(R, B, n, D)``, the tokens that are seen; with ``n = 0`` the
                block attends to nothing. A head without a block looks at none.

        Returns:
            ``(B, M, R, N)`` float32, or without a block ``(B, M, 1, N)``.
        """
        return self.predictor(self.norm(_float32(self._attend(queries, references))))

    @torch.no_grad()
    def scores(self, logits: Tensor, index: Tensor) -> dict[str, Tensor]:
        """``accuracy`` and mean ``distance``, in reference patches, over Omega.

        Args:
            logits: ``(..., N)``.
            index: ``(...)`` long, the true places; -1 outside Omega.
        """
        inside, width = index >= 0, self.grid[1]
        found = logits.argmax(-1)
        rows = found // width - index // width
        columns = found % width - index % width
        count = inside.sum().clamp_min(1)
        distance = torch.hypot(rows.float(), columns.float())
        return dict(
            accuracy=((found == index) & inside).sum() / count,
            distance=(distance * inside).sum() / count,
        )

    def _draw_visible(self, references: Tensor) -> Tensor:
        """Those of ``(R, B, N, D)`` that are seen."""
        count, images, tokens, _ = references.shape
        if self.block is None or tokens != math.prod(self.grid):
            return references  # nobody looks, or the encoder had some only
        index = self.visible(self.grid, images, references.device)
        return gather_tokens(references, index.expand(count, -1, -1))

    def _attend(self, queries: Tensor, references: Tensor) -> Tensor:
        """``(B, M, R, D)``, or with nothing to see ``(B, M, 1, D)``."""
        if self.block is None:
            return queries[:, :, None]
        count, images = references.shape[:2]
        seen = self.block(
            queries.expand(count, -1, -1, -1).flatten(0, 1), references.flatten(0, 1)
        )
        return seen.unflatten(0, (count, images)).permute(1, 2, 0, 3)

    def _targets(self, student, teacher, geometry) -> Correspondence:
        if self.task == 'own':
            indices, same = [], []
            for role in self.query_roles:
                views, images, tokens, _ = student.tokens[role].shape
                every = torch.arange(tokens, device=student.tokens[role].device)
                kept = student.kept.get(role, every.expand(views, images, -1))
                indices.append(kept.transpose(0, 1)[..., None])
                same.append(torch.zeros(views, 1, dtype=torch.bool))
            return self.weigh(indices, same)
        indices = self.correspond(student, teacher, geometry)
        if self.task == 'center':
            indices = [
                index.masked_fill(~_central(student, role)[..., None], -1)
                for role, index in zip(self.query_roles, indices, strict=True)
            ]
        return self.weigh(indices, self.same_views(student))

    def _box_loss(self, seen: Tensor, student, teacher, geometry) -> dict[str, Tensor]:
        same = self.same_views(student)
        counts = [student.tokens[role].shape[2] for role in self.query_roles]
        means, targets, indices = [], [], []
        parts = seen.split([len(s) * n for s, n in zip(same, counts, strict=True)], 1)
        references = geometry[:, teacher.places[self.reference_role]]
        for role, s, part in zip(self.query_roles, same, parts, strict=True):
            means.append(part.unflatten(1, (len(s), -1)).mean(2))  # (B, v, R, D)
            queries = geometry[:, student.places[role]]
            boxes, meets = _shared_boxes(queries, references)
            meets &= ~s.to(meets.device)
            targets.append(boxes)
            indices.append(meets.long()[:, :, None] - 1)
        matched = self.weigh(indices, same)
        means = _float32(torch.cat(means, 1))
        target = torch.cat(targets, 1).to(means.dtype)  # (B, V, R, 4)
        with torch.autocast(seen.device.type, enabled=False):
            predicted = self.predictor(self.norm(means)).sigmoid().expand_as(target)
            losses, iou = box_loss(predicted, target)
        inside = matched.index >= 0
        return dict(
            loss=(losses * matched.weights).sum() / len(losses),
            iou=(iou * inside).sum() / inside.sum().clamp_min(1),
            **matched.monitors,
        )

    def _check_grids(self, student: ViewFeatures, teacher: ViewFeatures) -> None:
        grids = {self.reference_role: teacher.grids[self.reference_role]}
        if self.task == 'own':
            grids = {role: student.grids[role] for role in self.query_roles}
        for role, grid in grids.items():
            if tuple(grid) != self.grid:
                raise DenseSSLError(
                    f'PositionHead: views of role {role!r} have {grid[0]} x {grid[1]} '
                    f'patches, the head is for {self.grid[0]} x {self.grid[1]}; set '
                    f'its grid to ({grid[0]}, {grid[1]})'
                )


def _float32(x: Tensor) -> Tensor:
    """At least: float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _central(student: ViewFeatures, role: str) -> Tensor:
    """Which token is the one nearest to its view's centre, ``(B, v, n)`` bool."""
    views, images = student.tokens[role].shape[:2]
    h, w = student.grids[role]
    place = torch.arange(h * w, device=student.tokens[role].device)
    square = (2 * (place // w) + 1 - h).square() + (2 * (place % w) + 1 - w).square()
    rank = (square * h * w + place).expand(views, images, -1)  # ties: the first
    if role in student.kept:
        rank = rank.gather(-1, student.kept[role])
    return (rank == rank.amin(-1, keepdim=True)).transpose(0, 1)


def _shared_boxes(
    queries: ViewGeometry, references: ViewGeometry
) -> tuple[Tensor, Tensor]:
    """The part of each query in each reference, as the reference sees it.

    Returns:
        ``(B, v, R, 4)`` centre, width and height in ``[0, 1]``, and ``(B, v, R)`` bool,
        whether there is such a part.
    """
    references = references[:, None]
    shared = queries[:, :, None].overlap(references)
    middle = shared[..., :2] + shared[..., 2:] / 2
    center = references.to_view(middle[..., None, :]).squeeze(-2)
    extent = shared[..., 2:] / references.box[..., 2:]
    return torch.cat([center, extent], -1), (shared[..., 2:] > 0).all(-1)
