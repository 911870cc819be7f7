"""DINO's checkpoints, and those of the methods that build on its code.

A dict of ``student`` (behind ``module.``), ``teacher`` and ``dino_loss`` (the centres),
besides optimiser and arguments; or a backbone's state dict alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from densessl.interop.backbone import branch
from densessl.interop.keymap import KeyMap, Rule

from .layout import Layout, State, Traits, original_kind, weights_of
from .reading import flatten
from .tables import BACKBONES, CLASS_ATTENTION, PROJECTOR, Line, behind, center

_BRANCHES = dict(student='', teacher='teacher.')


@dataclass(frozen=True)
class _Head:
    """A head of ours and where the authors keep it.

    Attributes:
        ours: its name in our configs.
        theirs: the projector's, in student and teacher.
        center: the centre's, in ``dino_loss``.
        axes: axes of length 1 before those of the centre.
    """

    ours: str
    theirs: str
    center: str
    axes: int = 1


def _family(
    name: str,
    *heads: _Head,
    neck: str = '',
    inside: bool = False,
    backbone: Callable[[Traits], list[Line]] = lambda traits: BACKBONES[traits.kind],
    more: Sequence[Line] = (),
    **options,
) -> Layout:
    """A layout of DINO's kind.

    Args:
        name: what ``--from`` takes.
        *heads: its heads.
        neck: the aggregator's name in student and teacher.
        inside: whether the projectors are members of a transformer, so that its own
            names have no prefix (EsViT); else the backbone's are behind ``backbone.``.
        backbone: lines of the backbone.
        more: further lines of a branch.
        **options: further ones of :class:`Layout`.
    """
    apart = tuple(f'{head.theirs}.' for head in heads) + ((f'{neck}.',) if neck else ())

    def gather(checkpoint: Mapping) -> State:
        branches = {
            key: flatten(checkpoint[key])
            for key in _BRANCHES
            if isinstance(checkpoint.get(key), Mapping)
        }
        if not branches:
            branches = dict(teacher=flatten(weights_of(checkpoint)))
        out: State = {}
        for key, weights in branches.items():
            for theirs, value in weights.items():
                theirs = theirs.removeprefix('module.')
                if not theirs.startswith(('backbone.', *apart)):
                    theirs = f'backbone.{theirs}'
                out[f'{key}.{theirs}'] = value
        if isinstance(checkpoint.get('dino_loss'), Mapping):
            out.update(flatten(checkpoint['dino_loss'], 'dino_loss.'))
        return out

    def table(traits: Traits) -> KeyMap:
        lines: list[Line] = []
        for key, ours in _BRANCHES.items():
            lines += behind(more, ours, f'{key}.')
            lines += behind(backbone(traits), f'{ours}backbone.', f'{key}.backbone.')
            for head in heads:
                places = (f'{ours}projectors.{head.ours}.', f'{key}.{head.theirs}.')
                lines += behind(PROJECTOR, *places)
            if neck:
                lines += behind(CLASS_ATTENTION, f'{ours}neck.', f'{key}.{neck}.')
        for head in heads:
            lines.append(
                center(
                    f'heads.{head.ours}.center', f'dino_loss.{head.center}', head.axes
                )
            )
        return KeyMap(name, *lines)

    def scatter(flat: State) -> dict[str, Any]:
        bare = inside and original_kind(list(flat)) != 'resnet'
        student, teacher = (
            {
                theirs.removeprefix('backbone.') if bare else theirs: value
                for theirs, value in branch(flat, f'{key}.').items()
            }
            for key in _BRANCHES
        )
        return dict(
            student={f'module.{key}': value for key, value in student.items()},
            teacher=teacher,
            dino_loss=branch(flat, 'dino_loss.'),
        )

    parts = [f'projectors.{head.ours}.' for head in heads]
    parts += [f'heads.{head.ours}.center' for head in heads]
    parts += ['neck.'] if neck else []
    return Layout(name, gather, _traits, table, scatter, tuple(parts), **options)


def _split_positions(traits: Traits) -> list[Line]:
    """DenseDINO's: the class token has position embeddings of its own."""
    lines = [
        line
        for line in BACKBONES[traits.kind]
        if getattr(line, 'ours', '') != 'pos_embed'
    ]
    if not traits.cls:
        return [*lines, Rule('pos_embed', 'patch_pos_embed')]
    table = Rule(
        'pos_embed',
        ('cls_pos_embed', 'patch_pos_embed'),
        lambda table: (table[:, :1], table[:, 1:]),
        lambda cls, patches: torch.cat([cls, patches], 1),
    )
    return [*lines, table]


def _traits(flat: State) -> Traits:
    cls = any(name.endswith('backbone.cls_token') for name in flat)
    return Traits(original_kind(list(flat)), cls)


_VIEW = _Head('view', 'head', 'center')
_WHOLE_VIT = dict(cls_token=True, final_norm=True)
_ESVIT = dict(
    vit=_WHOLE_VIT,
    inside=True,
    options=dict(vit=dict(pos_embed_offset=0.0)),
    differs=dict(
        cvt="EsViT's CvT has x sigmoid(1.702 x) where ours has GELU, so features are "
        'near, not equal',
    ),
)
_REGION = _Head('region', 'head_dense', 'center_grid')

LAYOUTS = [
    _family('dino', _VIEW, vit=_WHOLE_VIT),
    _family(
        'selfpatch',
        _Head('view', 'c_head', 'center', axes=2),
        _Head('selfpatch', 'p_head', 'patch_center'),
        neck='ca_head',
        vit=dict(cls_token=False, final_norm=False),
    ),
    _family('esvit', _VIEW, _REGION, **_ESVIT),
    _family('glsd', _VIEW, _REGION, **_ESVIT),
    _family(
        'densedino',
        _VIEW,
        _Head('points', 'ref_head', 'ref_center'),
        vit=dict(final_norm=True),
        backbone=_split_positions,
        more=[center('projectors.points.content', 'backbone.ref_learn_token', 2)],
    ),
]
