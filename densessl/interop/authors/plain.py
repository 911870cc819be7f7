"""Backbones without a method: DINOv2's, timm's and MMPretrain's files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from densessl.interop import layouts
from densessl.interop.backbone import branch
from densessl.interop.keymap import Extra, KeyMap, Rule

from .layout import Layout, State, Traits, original_kind, weights_of
from .reading import flatten
from .tables import Line, behind, lines_of, same

_OURS = 'teacher.backbone.'


def _bare(checkpoint: Mapping) -> State:
    return {
        name.removeprefix('module.'): value
        for name, value in flatten(weights_of(checkpoint)).items()
    }


def _timm_table(traits: Traits) -> KeyMap:
    tables = dict(vit=layouts.VIT_TIMM, swin=layouts.swin_timm(), resnet=layouts.RESNET)
    table = tables[traits.kind]
    if traits.kind == 'swin' and not traits.cls:  # merging where the original has it
        table = layouts.swin_original()
    return KeyMap('timm', *behind(lines_of(table), _OURS, ''))


def _timm_traits(flat: State) -> Traits:
    """``cls``: of a Swin, whether the merging is in the stage that it opens."""
    old = 'layers.0.downsample.reduction.weight' in flat
    return Traits(original_kind(list(flat)), not old)


def _mm_gather(checkpoint: Mapping) -> State:
    """Names of the backbone; heads, necks and the like keep theirs."""
    flat = _bare(checkpoint)
    if any(name.startswith('backbone.') for name in flat):
        return flat
    return {f'backbone.{name}': value for name, value in flat.items()}


def _mm_traits(flat: State) -> Traits:
    names = list(flat)
    if any('.ffn.layers.' in name and '.stages.' in name for name in names):
        return Traits('swin')
    if any('.ffn.layers.' in name for name in names):
        return Traits('vit')
    return Traits(original_kind(names))


def _mm_table(traits: Traits) -> KeyMap:
    tables = dict(
        vit=layouts.VIT_MMPRETRAIN,
        swin=layouts.SWIN_MMPRETRAIN,
        resnet=layouts.RESNET,
    )
    other = [
        Extra(f'{part}.{{rest*}}', 'heads and necks')
        for part in ('head', 'neck', 'target_generator', 'data_preprocessor')
    ]
    other.append(Extra('{rest*}.attn_mask', 'tables that follow from sizes'))
    lines = behind(lines_of(tables[traits.kind]), _OURS, 'backbone.')
    return KeyMap('mmpretrain', *lines, *other)


# DINOv2

_DINOV2: list[Line] = [
    *same(
        'cls_token',
        'pos_embed',
        'patch_embed.proj.{p}',
        'blocks.{i}.norm1.{p}',
        'blocks.{i}.norm2.{p}',
        'blocks.{i}.attn.{layer}.{p}',
        'blocks.{i}.ls1.gamma',
        'blocks.{i}.ls2.gamma',
        'norm.{p}',
    ),
    Rule('reg_token', 'register_tokens'),
    Rule('reg_token', 'reg_token'),  # as timm's own files have it
    Extra('mask_token', 'the token of masked patches, which only its training uses'),
]
_MLP = same('blocks.{i}.mlp.{layer}.{p}')
# timm keeps the two halves of SwiGLU's first layer together, as DINOv2 does
_SWIGLU: list[Line] = [
    Rule('blocks.{i}.mlp.fc1.{p}', 'blocks.{i}.mlp.w12.{p}'),
    Rule('blocks.{i}.mlp.fc2.{p}', 'blocks.{i}.mlp.w3.{p}'),
]
_CHUNK = re.compile(r'blocks\.\d+\.(\d+)\.')


def _v2_gather(checkpoint: Mapping) -> State:
    """Names behind ``student.`` and ``teacher.``; chunks of blocks are undone."""
    flat = _bare(checkpoint)
    if not any(name.startswith(('student.', 'teacher.')) for name in flat):
        flat = {f'teacher.{name}': value for name, value in flat.items()}
    out: State = {}
    for name, value in flat.items():
        which, _, rest = name.partition('.')
        if not rest.startswith(('backbone.', 'dino_head.', 'ibot_head.')):
            rest = f'backbone.{rest}'
        rest = _CHUNK.sub(r'blocks.\1.', rest)
        out[f'{which}.{rest}'] = value
    for which in ('student', 'teacher'):
        registers = f'{which}.backbone.register_tokens'
        table = f'{which}.backbone.pos_embed'
        if registers in out and table in out:  # timm has the sum, and no row for it
            cls = f'{which}.backbone.cls_token'
            out[cls] = out[cls] + out[table][:, :1]
            out[table] = out[table][:, 1:]
    return out


def _v2_table(traits: Traits) -> KeyMap:
    lines = _DINOV2 + (_SWIGLU if traits.kind == 'swiglu' else _MLP)
    heads = 'projectors of DINOv2, whose losses are none of ours'
    return KeyMap(
        'dinov2',
        *behind(lines, 'backbone.model.', 'student.backbone.'),
        *behind(lines, 'teacher.backbone.model.', 'teacher.backbone.'),
        Extra('student.dino_head.{rest*}', heads),
        Extra('student.ibot_head.{rest*}', heads),
        Extra('teacher.dino_head.{rest*}', heads),
        Extra('teacher.ibot_head.{rest*}', heads),
    )


def _v2_scatter(flat: State) -> dict[str, Any]:
    state = branch(flat, 'teacher.backbone.')
    width = state['cls_token'].shape[-1]
    out = dict(state, mask_token=state['cls_token'].new_zeros(1, width))
    if 'register_tokens' in out:
        table = out['pos_embed']
        out['pos_embed'] = torch.cat([table.new_zeros(1, 1, width), table], 1)
    return out


LAYOUTS = [
    Layout(
        'dinov2',
        _v2_gather,
        lambda flat: Traits(
            'swiglu' if any('.mlp.w12.' in name for name in flat) else 'mlp'
        ),
        _v2_table,
        _v2_scatter,
        differs={'': 'timm resizes position embeddings with antialiasing, DINOv2 not'},
    ),
    Layout('timm', _bare, _timm_traits, _timm_table, dict, vit=dict(final_norm=True)),
    Layout(
        'mmpretrain',
        _mm_gather,
        _mm_traits,
        _mm_table,
        lambda flat: dict(state_dict=dict(flat)),
    ),
]
