"""Views through a branch: those that are treated alike share a forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from densessl.models.backbones.vision_transformer import VisionTransformer
from densessl.models.features import Tokens, ViewFeatures
from densessl.models.heads.base import Head
from densessl.models.patch_drop import PatchDrop, gather_tokens


class Branch(nn.Module):
    """Backbone, neck and projectors: the part that student and teacher both have."""

    def __init__(self, backbone: nn.Module, neck: nn.Module, projectors: nn.ModuleDict):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.projectors = projectors


def encode_views(
    branch: nn.Module,
    inputs: Mapping[str, Tensor],
    roles: Collection[str] | None = None,
    *,
    drop: Mapping[str, PatchDrop] | None = None,
    no_positions: Collection[str] = (),
    points: Mapping[str, Tensor] | None = None,
    reference_tokens: Callable[[Tensor, tuple[int, int]], Tensor] | None = None,
    patches: Collection[str] | None = None,
) -> ViewFeatures:
    """Features of a branch: one forward for all views of a size, treated alike.

    Args:
        branch: has ``backbone``, ``neck`` and ``projectors``, as :class:`Branch`.
        inputs: per role ``(v, B, C, H, W)``, normalised.
        roles: roles the branch sees; None for all.
        drop: by role, the patches the branch does without.
        no_positions: roles seen without position embeddings.
        points: by role ``(v, B, m, 2)``, the reference points that views carry.
        reference_tokens: from points ``(v * B, m, 2)`` and a grid to their tokens.
        patches: roles whose patch tokens are read, None for all. Of others, unless they
            share a forward with these, the features have ``(v, B, 0, D)`` of them.
    """
    drop, points = drop or {}, points or {}
    wanted = [role for role in inputs if roles is None or role in roles]
    alike: dict[tuple, list[str]] = {}
    for role in wanted:
        count = points[role].shape[2] if role in points else 0
        key = (
            *inputs[role].shape[2:],
            role in no_positions,
            role if role in drop else '',
            count,
        )
        alike.setdefault(key, []).append(role)
    tokens, grids, pooled, kept, references = {}, {}, {}, {}, {}
    for group in alike.values():
        counts = [len(inputs[role]) for role in group]
        images = inputs[group[0]]
        if len(group) > 1:
            images = torch.cat([inputs[role] for role in group])
        shape = images.shape[:2]
        options: dict = dict(positions=False) if group[0] in no_positions else {}
        if patches is not None and not {*patches, *drop}.intersection(group):
            options['patches'] = False
        if group[0] in points:
            grid = _grid(branch.backbone, images)
            places = torch.cat([points[role] for role in group]).flatten(0, 1)
            options['references'] = reference_tokens(places, grid)
        out, index = _encode(
            branch.backbone, images.flatten(0, 1), drop.get(group[0]), options
        )
        if out.references is not None:
            parts = out.references.unflatten(0, shape).split(counts)
            references.update(zip(group, parts, strict=True))
        if index is not None:
            kept[group[0]] = index.unflatten(0, shape)
        parts = zip(
            group,
            out.patches.unflatten(0, shape).split(counts),
            branch.neck.pool(out).unflatten(0, shape).split(counts),
            strict=True,
        )
        for role, own, representation in parts:
            tokens[role], grids[role] = own, out.grid
            pooled[role] = representation
    return ViewFeatures(
        pooled=torch.cat([pooled[role] for role in wanted]),
        tokens={role: tokens[role] for role in wanted},
        grids=grids,
        neck=branch.neck,
        projectors=branch.projectors,
        kept=kept,
        references=references,
        places=view_places(inputs),
    )


def patch_roles(
    branch: nn.Module, heads: Mapping[str, Head], student: bool
) -> set[str] | None:
    """Roles whose patch tokens anybody reads of a branch's views; None for all.

    Args:
        branch: as in :func:`encode_views`.
        heads: those that take part.
        student: whether the branch is the student.
    """
    vit = isinstance(branch.backbone, VisionTransformer)
    if not vit or getattr(branch.neck, 'needs_patches', True):
        return None
    reading = [head for head in heads.values() if head.needs_patches]
    return union(h.student_roles if student else h.teacher_roles for h in reading)


def union(roles: Iterable[tuple[str, ...] | None]) -> set[str] | None:
    """Roles that any head asks for; None, for all, where one asks for all."""
    roles = list(roles)
    return None if None in roles else {role for some in roles for role in some}


def view_places(inputs: Mapping[str, Tensor]) -> dict[str, slice]:
    """Where the views of each role stand among all views of a batch."""
    places, start = {}, 0
    for role, views in inputs.items():
        places[role] = slice(start, start + len(views))
        start += len(views)
    return places


def _grid(backbone: nn.Module, images: Tensor) -> tuple[int, int]:
    h, w = (side // backbone.patch_size for side in images.shape[-2:])
    return h, w


def _encode(
    backbone: nn.Module, images: Tensor, drop: PatchDrop | None, options: dict
) -> tuple[Tokens, Tensor | None]:
    """Tokens of ``(B, C, H, W)``; with ``drop``, of some patches and which ones."""
    if drop is None:
        return backbone(images, **options), None
    if drop.after_encoder:
        out = backbone(images, **options)
        index = drop(out.grid, len(images), images.device)
        return replace(out, patches=gather_tokens(out.patches, index)), index
    index = drop(_grid(backbone, images), len(images), images.device)
    return backbone(images, keep=index, **options), index
