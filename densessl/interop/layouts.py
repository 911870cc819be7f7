"""Layouts of ViT, Swin and ResNet in other packages, as tables.

Ours is that of ``backbone.safetensors`` (docs/checkpoints.md): a ViT has timm's names,
a Swin MMPretrain's behind ``model.``, a timm model its own behind ``model.``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .keymap import Extra, KeyMap, Own, Rule


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, ``(3 D, ...)`` -> three ``(D, ...)``."""
    return tensor.chunk(3)


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _zero_row_first(table: Tensor) -> Tensor:
    """A table of position embeddings with a row for a class token nobody uses."""
    return torch.cat([torch.zeros_like(table[:, :1]), table], 1)


_PATCH = (
    Rule('cls_token', 'cls_token'),
    Rule('pos_embed', 'pos_embed'),
    Rule('patch_embed.proj.{p}', 'patch_embed.projection.{p}'),
)
_MM_BLOCK = (
    Rule('blocks.{i}.norm1.{p}', 'layers.{i}.ln1.{p}'),
    Rule('blocks.{i}.norm2.{p}', 'layers.{i}.ln2.{p}'),
    Rule('blocks.{i}.mlp.fc1.{p}', 'layers.{i}.ffn.layers.0.0.{p}'),
    Rule('blocks.{i}.mlp.fc2.{p}', 'layers.{i}.ffn.layers.1.{p}'),
    Rule('norm.{p}', 'ln1.{p}'),
)
VIT_MMPRETRAIN = KeyMap(
    'mmpretrain ViT',
    *_PATCH,
    Rule('blocks.{i}.attn.{layer}.{p}', 'layers.{i}.attn.{layer}.{p}'),
    *_MM_BLOCK,
    Extra('head.{rest*}', 'classifier'),
)
_MMSEG_ATTENTION = (
    Rule('blocks.{i}.attn.qkv.weight', 'layers.{i}.attn.attn.in_proj_weight'),
    Rule('blocks.{i}.attn.qkv.bias', 'layers.{i}.attn.attn.in_proj_bias'),
    Rule('blocks.{i}.attn.proj.{p}', 'layers.{i}.attn.attn.out_proj.{p}'),
)
VIT_MMSEG = KeyMap('mmseg ViT', *_PATCH, *_MMSEG_ATTENTION, *_MM_BLOCK)
# MMSegmentation's ViT keeps the parameters of a class token that it does without.
VIT_MMSEG_NO_CLS = KeyMap(
    'mmseg ViT without class token',
    Rule('pos_embed', 'pos_embed', _zero_row_first, lambda table: table[:, 1:]),
    _PATCH[2],
    *_MMSEG_ATTENTION,
    *_MM_BLOCK,
    Extra(
        'cls_token',
        'class token that is not used',
        lambda state: state['pos_embed'].new_zeros(1, 1, state['pos_embed'].shape[-1]),
    ),
)
VIT_TIMM = KeyMap(
    'timm ViT',
    Rule('cls_token', 'cls_token'),
    Rule('pos_embed', 'pos_embed'),
    Rule('patch_embed.proj.{p}', 'patch_embed.proj.{p}'),
    Rule('blocks.{i}.{layer}.{p}', 'blocks.{i}.{layer}.{p}'),
    Rule('blocks.{i}.attn.qkv.{p}', 'blocks.{i}.attn.qkv.{p}'),
    Rule('blocks.{i}.attn.proj.{p}', 'blocks.{i}.attn.proj.{p}'),
    Rule('blocks.{i}.mlp.{layer}.{p}', 'blocks.{i}.mlp.{layer}.{p}'),
    Rule('norm.{p}', 'norm.{p}'),
    Extra('head.{rest*}', 'classifier'),
)
_HF_VIT = 'encoder.layer.{i}'
VIT_HF = KeyMap(
    'Hugging Face ViT',
    Rule('cls_token', 'embeddings.cls_token'),
    Rule('pos_embed', 'embeddings.position_embeddings'),
    Rule('patch_embed.proj.{p}', 'embeddings.patch_embeddings.projection.{p}'),
    Rule('blocks.{i}.norm1.{p}', f'{_HF_VIT}.layernorm_before.{{p}}'),
    Rule('blocks.{i}.norm2.{p}', f'{_HF_VIT}.layernorm_after.{{p}}'),
    Rule(
        'blocks.{i}.attn.qkv.{p}',
        tuple(
            f'{_HF_VIT}.attention.attention.{part}.{{p}}'
            for part in ('query', 'key', 'value')
        ),
        _split,
        _join,
    ),
    Rule('blocks.{i}.attn.proj.{p}', f'{_HF_VIT}.attention.output.dense.{{p}}'),
    Rule('blocks.{i}.mlp.fc1.{p}', f'{_HF_VIT}.intermediate.dense.{{p}}'),
    Rule('blocks.{i}.mlp.fc2.{p}', f'{_HF_VIT}.output.dense.{{p}}'),
    Rule('norm.{p}', 'layernorm.{p}'),
    Extra('pooler.{rest*}', 'pooler'),
)

# Patch merging reads the 2 x 2 neighbours (row, column) of each channel in the order
# 00 01 10 11, channel by channel; the original Swin, timm and Hugging Face read all
# channels of 00, then of 10, 01 and 11.
_ORDER = (0, 2, 1, 3)


def _merging_there(x: Tensor) -> Tensor:
    """``(..., C * 4)``, channel by channel, to ``(..., 4 * C)``."""
    return x.unflatten(-1, (-1, 4))[..., _ORDER].mT.flatten(-2)


def _merging_back(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).mT[..., _ORDER].flatten(-2)


def relative_position_index(table: Tensor) -> Tensor:
    """Which row of a Swin bias table a pair of tokens of a window reads.

    Args:
        table: ``((2 w - 1)^2, heads)``, for a window of side ``w``.

    Returns:
        ``(w^2, w^2)``: ``(dy + w - 1) (2 w - 1) + dx + w - 1`` for token ``a`` minus
        token ``b``, in raster order.
    """
    span = round(len(table) ** 0.5)
    side = (span + 1) // 2
    token = torch.arange(side * side)
    row, column = token // side, token % side
    dy = row[:, None] - row + side - 1
    dx = column[:, None] - column + side - 1
    return dy * span + dx


_BLOCK = 'model.stages.{i}.blocks.{j}'
_INDEX = Own(
    f'{_BLOCK}.attn.w_msa.relative_position_index',
    f'{_BLOCK}.attn.w_msa.relative_position_bias_table',
    relative_position_index,
)


def swin_original(
    stages: int = 4, name: str = 'original Swin', shift: int = 0
) -> KeyMap:
    """The original Swin's names.

    Args:
        stages: how many it has.
        name: of the layout.
        shift: 1 where patch merging is the first part of the next stage, as in timm.
    """
    block = 'layers.{i}.blocks.{j}'
    merging = []
    for stage in range(stages - 1):
        ours = f'model.stages.{stage}.downsample'
        theirs = f'layers.{stage + shift}.downsample'
        merging += [
            Rule(f'{ours}.{layer}', f'{theirs}.{layer}', _merging_there, _merging_back)
            for layer in ('norm.weight', 'norm.bias', 'reduction.weight')
        ]
    return KeyMap(
        name,
        Rule('model.patch_embed.projection.{p}', 'patch_embed.proj.{p}'),
        Rule('model.patch_embed.norm.{p}', 'patch_embed.norm.{p}'),
        Rule(f'{_BLOCK}.norm1.{{p}}', f'{block}.norm1.{{p}}'),
        Rule(f'{_BLOCK}.norm2.{{p}}', f'{block}.norm2.{{p}}'),
        Rule(
            f'{_BLOCK}.attn.w_msa.relative_position_bias_table',
            f'{block}.attn.relative_position_bias_table',
        ),
        Rule(f'{_BLOCK}.attn.w_msa.qkv.{{p}}', f'{block}.attn.qkv.{{p}}'),
        Rule(f'{_BLOCK}.attn.w_msa.proj.{{p}}', f'{block}.attn.proj.{{p}}'),
        Rule(f'{_BLOCK}.ffn.layers.0.0.{{p}}', f'{block}.mlp.fc1.{{p}}'),
        Rule(f'{_BLOCK}.ffn.layers.1.{{p}}', f'{block}.mlp.fc2.{{p}}'),
        *merging,
        Rule(f'model.norm{stages - 1}.{{p}}', 'norm.{p}'),
        _INDEX,
        Extra('{rest*}.attn.relative_position_index', 'tables that follow from sizes'),
        Extra('{rest*}.attn_mask', 'tables that follow from sizes'),
        Extra('head.{rest*}', 'classifier'),
    )


def swin_timm(stages: int = 4) -> KeyMap:
    """Timm's Swin."""
    return swin_original(stages, 'timm Swin', 1)


SWIN_MMPRETRAIN = KeyMap(
    'mmpretrain Swin',
    Rule('model.{rest*}', '{rest*}'),
)


def _ones(width: int):
    return lambda state: torch.ones(width)


def _zeros(width: int):
    return lambda state: torch.zeros(width)


def swin_feature_pyramid(widths: list[int]) -> KeyMap:
    """Swin of MMSegmentation and MMDetection, which norm the output of every stage.

    The norms of all stages but the last are new in fine-tuning, as for every Swin
    there; they are written as they start, so that no name stays unfilled.
    """
    extras = []
    for stage, width in enumerate(widths[:-1]):
        for name, make in (('weight', _ones(width)), ('bias', _zeros(width))):
            extras.append(
                Extra(f'norm{stage}.{name}', 'norms of the inner stages', make)
            )
    return KeyMap(
        'Swin with a norm for each stage', *extras, Rule('model.{rest*}', '{rest*}')
    )


_HF_SWIN = 'encoder.layers.{i}.blocks.{j}'


def swin_hf(stages: int = 4) -> KeyMap:
    """Swin of Hugging Face, as its files have it."""
    return KeyMap(
        'Hugging Face Swin',
        Rule(
            'model.patch_embed.projection.{p}',
            'embeddings.patch_embeddings.projection.{p}',
        ),
        Rule('model.patch_embed.norm.{p}', 'embeddings.norm.{p}'),
        Rule(f'{_BLOCK}.norm1.{{p}}', f'{_HF_SWIN}.layernorm_before.{{p}}'),
        Rule(f'{_BLOCK}.norm2.{{p}}', f'{_HF_SWIN}.layernorm_after.{{p}}'),
        Rule(
            f'{_BLOCK}.attn.w_msa.relative_position_bias_table',
            f'{_HF_SWIN}.attention.self.relative_position_bias_table',
        ),
        Rule(
            f'{_BLOCK}.attn.w_msa.qkv.{{p}}',
            tuple(
                f'{_HF_SWIN}.attention.self.{part}.{{p}}'
                for part in ('query', 'key', 'value')
            ),
            _split,
            _join,
        ),
        Rule(
            f'{_BLOCK}.attn.w_msa.proj.{{p}}',
            f'{_HF_SWIN}.attention.output.dense.{{p}}',
        ),
        Rule(f'{_BLOCK}.ffn.layers.0.0.{{p}}', f'{_HF_SWIN}.intermediate.dense.{{p}}'),
        Rule(f'{_BLOCK}.ffn.layers.1.{{p}}', f'{_HF_SWIN}.output.dense.{{p}}'),
        *[
            Rule(
                f'model.stages.{{i}}.downsample.{layer}',
                f'encoder.layers.{{i}}.downsample.{layer}',
                _merging_there,
                _merging_back,
            )
            for layer in ('norm.weight', 'norm.bias', 'reduction.weight')
        ],
        Rule(f'model.norm{stages - 1}.{{p}}', 'layernorm.{p}'),
        _INDEX,
        Extra('{rest*}.relative_position_index', 'tables that follow from sizes'),
    )


# torchvision's names, which timm, MMPretrain, MMSegmentation and MMDetection keep.
RESNET = KeyMap(
    'ResNet', Extra('fc.{rest*}', 'classifier'), Rule('model.{rest*}', '{rest*}')
)
