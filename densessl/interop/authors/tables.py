"""Lines of key maps that several authors' layouts are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from densessl.interop import layouts
from densessl.interop.keymap import Extra, KeyMap, Own, Rule

Line = Rule | Extra | Own


def lines_of(table: KeyMap) -> list[Line]:
    """All lines of a key map."""
    return [*table.extras, *table.rules, *table.own]


def behind(lines: Iterable[Line], ours: str, theirs: str) -> list[Line]:
    """Lines with a prefix before the names of each side."""
    out: list[Line] = []
    for line in lines:
        if isinstance(line, Extra):
            changed: dict = dict(theirs=theirs + line.theirs)
        elif isinstance(line, Own):
            changed = dict(ours=ours + line.ours, source=ours + line.source)
        else:
            names = tuple(theirs + name for name in line.names)
            one = isinstance(line.theirs, str)
            changed = dict(ours=ours + line.ours, theirs=names[0] if one else names)
        out.append(replace(line, **changed))
    return out


def same(*names: str) -> list[Line]:
    """Rules for names that are the same on both sides."""
    return [Rule(name, name) for name in names]


def _flip(table: Tensor) -> Tensor:
    """``((2 w - 1)^2, heads)`` by query minus key, to ours by key minus query.

    Ours is ``(heads, 2 w - 1, 2 w - 1)``.
    """
    side = round(len(table) ** 0.5)
    return table.T.unflatten(1, (side, side)).flip(1, 2)


_CVT = 'stages.{s}.blocks.{i}'
_CVT_ATTENTION = 'stage{s}.1.layers.{i}.0'
_CVT_MLP = 'stage{s}.1.layers.{i}.1'


def _pointwise(ours: str, theirs: str) -> list[Line]:
    """A linear layer that they write as a 1 x 1 convolution."""
    return [
        Rule(
            f'{ours}.weight',
            f'{theirs}.weight',
            lambda weight: weight[..., None, None],
            lambda weight: weight.flatten(1),
        ),
        Rule(f'{ours}.bias', f'{theirs}.bias'),
    ]


CVT = KeyMap(
    'CvT of EsViT',
    Rule('stages.{s}.embed.{p}', 'stage{s}.0.proj.{p}'),
    Rule('stages.{s}.norm.{p}', 'stage{s}.0.norm.{p}'),
    Rule(f'{_CVT}.norm1.{{p}}', f'{_CVT_ATTENTION}.norm.{{p}}'),
    Rule(f'{_CVT}.attn.depthwise.weight', f'{_CVT_ATTENTION}.fn.qkv.dw.weight'),
    Rule(f'{_CVT}.attn.batch_norm.{{p}}', f'{_CVT_ATTENTION}.fn.qkv.bn.{{p}}'),
    *_pointwise(f'{_CVT}.attn.qkv', f'{_CVT_ATTENTION}.fn.qkv.pw'),
    *_pointwise(f'{_CVT}.attn.proj', f'{_CVT_ATTENTION}.fn.proj_out'),
    Rule(
        f'{_CVT}.attn.bias_table',
        f'{_CVT_ATTENTION}.fn.rel_pos_bias_table',
        lambda table: table.flip(1, 2).flatten(1).T,
        _flip,
    ),
    Rule(f'{_CVT}.norm2.{{p}}', f'{_CVT_MLP}.norm.{{p}}'),
    *_pointwise(f'{_CVT}.mlp.fc1', f'{_CVT_MLP}.fn.net.0'),
    *_pointwise(f'{_CVT}.mlp.fc2', f'{_CVT_MLP}.fn.net.2'),
    Rule('norm.{p}', 'norm.{p}'),
    Extra('{rest*}.rel_pos_idx', 'tables that follow from sizes'),
)

# The backbones of the authors' PyTorch code, by kind.
BACKBONES = dict(
    vit=lines_of(layouts.VIT_TIMM),
    swin=lines_of(layouts.swin_original()),
    resnet=lines_of(layouts.RESNET),
    cvt=lines_of(CVT),
)

# DINO's projector, and MoBY's
PROJECTOR = same('mlp.{i}.{p}', 'last_layer.{p}')
BATCH_NORM_MLP = [
    Rule('0.{p}', 'linear_hidden.1.{p}'),
    Rule('1.{p}', 'linear_hidden.2.{p}'),
    Rule('3.{p}', 'linear_out.{p}'),
]

# SelfPatch's aggregator
CLASS_ATTENTION = [
    Rule('token', 'cls_token'),
    Rule('blocks.{i}.norm1.{p}', 'cls_blocks.{i}.norm1.{p}'),
    Rule('blocks.{i}.q.{p}', 'cls_blocks.{i}.attn.q.{p}'),
    Rule(
        'blocks.{i}.kv.{p}',
        ('cls_blocks.{i}.attn.k.{p}', 'cls_blocks.{i}.attn.v.{p}'),
        lambda kv: kv.chunk(2),
        lambda k, v: torch.cat([k, v]),
    ),
    Rule('blocks.{i}.proj.{p}', 'cls_blocks.{i}.attn.proj.{p}'),
    Rule('blocks.{i}.norm2.{p}', 'cls_blocks.{i}.norm2.{p}'),
    Rule('blocks.{i}.mlp.{layer}.{p}', 'cls_blocks.{i}.mlp.{layer}.{p}'),
    Rule('norm.{p}', 'norm.{p}'),
]


def center(ours: str, theirs: str, ones: int = 1) -> Rule:
    """A centre ``(K,)``; theirs has ``ones`` axes of length 1 before it."""
    return Rule(
        ours,
        theirs,
        lambda values: values.reshape(*[1] * ones, -1),
        lambda values: values.flatten(),
    )
