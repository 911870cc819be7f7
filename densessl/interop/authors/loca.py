"""LOCA's checkpoints: Flax's train state, ``params`` and their average ``ema_params``.

Flax writes a linear layer as a kernel ``(in, out)``, attention as kernels
``(D, heads, c)``, and joins the names of nested modules; in a file they stand in nested
dicts (msgpack) or behind slashes (npz).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.interop.backbone import branch
from densessl.interop.keymap import Extra, KeyMap, Own, Rule

from .layout import Layout, State, Traits
from .reading import flatten
from .tables import Line, behind

_ROOTS = dict(params='', ema_params='teacher.')
_BLOCK = 'encoderblock_{i}'


def _gather(checkpoint: Mapping) -> State:
    flat = flatten(checkpoint)
    roots = tuple(f'{root}.' for root in _ROOTS)
    if any(name.startswith(roots) for name in flat):
        return {name: value for name, value in flat.items() if name.startswith(roots)}
    return {f'ema_params.{name}': value for name, value in flat.items()}


def _traits(flat: State) -> Traits:
    kernels = (
        kernel
        for name, kernel in flat.items()
        if name.endswith('MultiHeadDotProductAttention_0.query.kernel')
    )
    kernel = next(kernels, None)
    if kernel is None or kernel.ndim != 3:
        raise DenseSSLError(
            'loca: no attention kernel of shape (D, heads, c); the file is of another '
            'layout'
        )
    return Traits('vit', False, kernel.shape[1])


def _transpose(matrix: Tensor) -> Tensor:
    return matrix.T


def _linear(ours: str, theirs: str) -> list[Line]:
    return [
        Rule(f'{ours}.weight', f'{theirs}.kernel', _transpose, _transpose),
        Rule(f'{ours}.bias', f'{theirs}.bias'),
    ]


def _norm(ours: str, theirs: str) -> list[Line]:
    return [
        Rule(f'{ours}.weight', f'{theirs}.scale'),
        Rule(f'{ours}.bias', f'{theirs}.bias'),
    ]


def _heads_in(ours: str, theirs: str, parts: tuple[str, ...], heads: int) -> list[Line]:
    """Projections to heads, joined in ours: kernels ``(D, heads, c)``."""

    def kernels(weight: Tensor):
        split = [w.T.unflatten(1, (heads, -1)) for w in weight.chunk(len(parts))]
        return split if len(parts) > 1 else split[0]

    def biases(bias: Tensor):
        split = [b.unflatten(0, (heads, -1)) for b in bias.chunk(len(parts))]
        return split if len(parts) > 1 else split[0]

    def names(leaf: str):
        all_names = tuple(f'{theirs}.{part}.{leaf}' for part in parts)
        return all_names if len(parts) > 1 else all_names[0]

    return [
        Rule(
            f'{ours}.weight',
            names('kernel'),
            kernels,
            lambda *kernels: torch.cat([k.flatten(1).T for k in kernels]),
        ),
        Rule(
            f'{ours}.bias',
            names('bias'),
            biases,
            lambda *biases: torch.cat([b.flatten() for b in biases]),
        ),
    ]


def _heads_out(ours: str, theirs: str, heads: int) -> list[Line]:
    """The projection from heads: a kernel ``(heads, c, D)``."""
    return [
        Rule(
            f'{ours}.weight',
            f'{theirs}.kernel',
            lambda weight: weight.T.unflatten(0, (heads, -1)),
            lambda kernel: kernel.flatten(0, 1).T,
        ),
        Rule(f'{ours}.bias', f'{theirs}.bias'),
    ]


def _grid(table: Tensor) -> Tensor:
    side = math.isqrt(table.shape[1])
    return table.unflatten(1, (side, side))


def _encoder(heads: int) -> list[Line]:
    attention = f'{_BLOCK}.MultiHeadDotProductAttention_0'
    return [
        Rule(
            'patch_embed.proj.weight',
            'ToTokenSequence_0.embedding.kernel',  # (h, w, in, out)
            lambda weight: weight.permute(2, 3, 1, 0),
            lambda kernel: kernel.permute(3, 2, 0, 1),
        ),
        Rule('patch_embed.proj.bias', 'ToTokenSequence_0.embedding.bias'),
        Rule(
            'pos_embed',
            'ToTokenSequence_0.posembed_input',  # (1, h, w, D)
            _grid,
            lambda table: table.flatten(1, 2),
        ),
        *_norm('blocks.{i}.norm1', f'{_BLOCK}.LayerNorm_0'),
        *_heads_in('blocks.{i}.attn.qkv', attention, ('query', 'key', 'value'), heads),
        *_heads_out('blocks.{i}.attn.proj', f'{attention}.out', heads),
        *_norm('blocks.{i}.norm2', f'{_BLOCK}.LayerNorm_1'),
        *_linear('blocks.{i}.mlp.fc1', f'{_BLOCK}.MlpBlock_0.Dense_0'),
        *_linear('blocks.{i}.mlp.fc2', f'{_BLOCK}.MlpBlock_0.Dense_1'),
        *_norm('norm', 'encoder_norm'),
    ]


_CLUSTERS: list[Line] = [
    *_linear('mlp.0', 'Dense_0'),
    *_linear('mlp.2', 'Dense_1'),
    *_linear('mlp.4', 'Dense_2'),
    Rule(
        'last_layer.weight_v',
        'prototypes.kernel',
        lambda v: v.T,
        lambda kernel: kernel.T,
    ),
    Own('last_layer.weight_g', 'last_layer.weight_v', lambda v: v.new_ones(len(v), 1)),
]


def _position(heads: int) -> list[Line]:
    attention = 'cross_attention_block.MultiHeadDotProductAttention_0'
    return [
        *_norm('block.norm_q', 'cross_attention_block.LayerNorm_0'),
        *_norm('block.norm_kv', 'cross_attention_block.LayerNorm_1'),
        *_heads_in('block.q', attention, ('query',), heads),
        *_heads_in('block.kv', attention, ('key', 'value'), heads),
        *_heads_out('block.proj', f'{attention}.out', heads),
        *_norm('block.norm2', 'cross_attention_block.LayerNorm_2'),
        *_linear('block.mlp.fc1', 'cross_attention_block.MlpBlock_0.Dense_0'),
        *_linear('block.mlp.fc2', 'cross_attention_block.MlpBlock_0.Dense_1'),
        *_norm('norm', 'final_norm'),
        *_linear('predictor', 'position_predictor'),
    ]


def _table(traits: Traits) -> KeyMap:
    heads = traits.num_heads or 1
    lines: list[Line] = []
    for root, ours in _ROOTS.items():
        lines += behind(_encoder(heads), f'{ours}backbone.', f'{root}.')
        lines += behind(
            _CLUSTERS,
            f'{ours}projectors.cluster.',
            f'{root}.projection_head_for_clustering_prediction.',
        )
    lines += behind(_position(heads), 'heads.position.', 'params.')
    unread = "the average of the position head's weights, which nothing reads"
    lines += [
        Extra(f'ema_params.{part}.{{rest*}}', unread)
        for part in ('cross_attention_block', 'final_norm', 'position_predictor')
    ]
    return KeyMap('loca', *lines)


def _scatter(flat: State) -> dict[str, Any]:
    """Nested dicts of numpy arrays, as Flax has them."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split('.')
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value.numpy()
    return tree


def _finish(state: State) -> State:
    """Without ``params`` in the file the position head comes with the average."""
    if branch(state, 'backbone.'):
        return state
    return {k: v for k, v in state.items() if not k.startswith('heads.')}


LAYOUTS = [
    Layout(
        'loca',
        _gather,
        _traits,
        _table,
        _scatter,
        ('projectors.cluster.', 'heads.position.'),
        vit=dict(cls_token=False, final_norm=True),
        options=dict(vit=dict(pos_embed_resize='bilinear')),
        differs={
            '': "LOCA's code takes GELU by its tanh formula, ours exactly, so features "
            'are near, not equal'
        },
        finish=_finish,
    )
]
