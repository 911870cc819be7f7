"""The config of a backbone, read off the names and shapes of its weights."""

from __future__ import annotations

import math

from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.models.backbones.vision_transformer import ARCHITECTURES

State = dict[str, Tensor]

_SWIN_ARCHS = {
    (96, (2, 2, 6, 2)): 'tiny',
    (96, (2, 2, 18, 2)): 'small',
    (128, (2, 2, 18, 2)): 'base',
}
# timm's ResNets by blocks a stage, and whether a block has 3 convolutions
_RESNETS = {
    ((2, 2, 2, 2), False): 'resnet18',
    ((3, 4, 6, 3), False): 'resnet34',
    ((2, 2, 2, 2), True): 'resnet26',
    ((3, 4, 6, 3), True): 'resnet50',
    ((3, 4, 23, 3), True): 'resnet101',
    ((3, 8, 36, 3), True): 'resnet152',
}
_DINOV2 = {384: 'small', 768: 'base', 1024: 'large', 1536: 'giant'}


def kind_of(names: list[str]) -> str | None:
    """Kind of the backbone in our layout: vit, swin, cvt, resnet, dinov2 or None."""
    for kind, sign in (
        ('swin', 'model.stages.0.blocks.0.attn.w_msa.qkv.weight'),
        ('cvt', 'stages.0.blocks.0.attn.depthwise.weight'),
        ('resnet', 'model.layer1.0.conv1.weight'),
        ('dinov2', 'model.blocks.0.attn.qkv.weight'),
        ('vit', 'blocks.0.attn.qkv.weight'),
    ):
        if sign in names:
            return kind
    return None


def backbone_config(state: State, num_heads: int | None = None) -> tuple[dict, str]:
    """Config of the backbone that has these weights, and a line on what was guessed.

    Args:
        state: a backbone's state dict, in our layout.
        num_heads: heads of a ViT, which no shape tells; None for those of the known
            size, or one for every 64 channels.

    Raises:
        DenseSSLError: names or shapes of no backbone we have.
    """
    kind = kind_of(list(state))
    if kind is None:
        raise DenseSSLError(
            f'no backbone among the names {", ".join(list(state)[:3])}, ...; known are '
            'ViT, Swin, CvT, ResNet and DINOv2'
        )
    try:
        return _READERS[kind](state, num_heads)
    except KeyError as error:
        raise DenseSSLError(
            f'the {kind} has no weight {error.args[0]}; the file is incomplete'
        ) from None


def _count(state: State, prefix: str) -> int:
    """How many numbered modules there are behind a prefix."""
    rest = (name[len(prefix) :] for name in state if name.startswith(prefix))
    return len({name.split('.')[0] for name in rest})


def _heads(width: int, depth: int, num_heads: int | None) -> tuple[int, str]:
    if num_heads is not None:
        heads, told = num_heads, ''
    else:
        known = {(w, d): heads for w, d, heads in ARCHITECTURES.values()}
        heads = known.get((width, depth)) or max(1, width // 64)
        told = f'{heads} heads, which no shape tells'
    if width % heads:
        raise DenseSSLError(
            f'a width of {width} does not divide among {heads} heads; give num_heads'
        )
    return heads, told


def _table_side(state: State, table: str, extra: int, width: int) -> int:
    tokens = state[table].shape[1] - extra
    side = math.isqrt(tokens)
    if side * side != tokens or state[table].shape[-1] != width:
        raise DenseSSLError(
            f'position embeddings {tuple(state[table].shape)} are of no square grid of '
            f'{width} channels; only those of square inputs can be imported'
        )
    return side


def _patch(state: State, name: str) -> tuple[int, int, int]:
    """``(width, channels, patch)`` of a patch convolution."""
    width, channels, height, patch = state[name].shape
    if height != patch:
        raise DenseSSLError(
            f'patches of {height} x {patch} px; only square ones can be imported'
        )
    return width, channels, patch


def _vit(state: State, num_heads: int | None) -> tuple[dict, str]:
    width, channels, patch = _patch(state, 'patch_embed.proj.weight')
    depth = _count(state, 'blocks.')
    heads, told = _heads(width, depth, num_heads)
    named = {sizes: name for name, sizes in ARCHITECTURES.items()}
    arch = named.get((width, depth, heads))
    cls = 'cls_token' in state
    config = dict(
        type='VisionTransformer',
        arch=arch or dict(embed_dims=width, depth=depth, num_heads=heads),
        patch_size=patch,
        cls_token=cls,
        final_norm='norm.weight' in state,
    )
    if 'pos_embed' in state:
        side = _table_side(state, 'pos_embed', int(cls), width)
        config['img_size'] = side * patch
    else:
        config['pos_embed'] = False
    ratio = state['blocks.0.mlp.fc1.weight'].shape[0] / width
    if ratio != 4:
        config['mlp_ratio'] = ratio
    if channels != 3:
        config['in_channels'] = channels
    return config, told


def _swin(state: State, num_heads: int | None) -> tuple[dict, str]:
    width, channels, _ = _patch(state, 'model.patch_embed.projection.weight')
    stages = _count(state, 'model.stages.')
    depths = tuple(_count(state, f'model.stages.{s}.blocks.') for s in range(stages))
    tables = [
        state[f'model.stages.{s}.blocks.0.attn.w_msa.relative_position_bias_table']
        for s in range(stages)
    ]
    heads = [table.shape[1] for table in tables]
    windows = [(math.isqrt(len(table)) + 1) // 2 for table in tables]
    arch = dict(embed_dims=width, depths=list(depths), num_heads=heads)
    if heads == [width // 32 * 2**s for s in range(stages)]:
        arch = _SWIN_ARCHS.get((width, depths), arch)
    # As in all published ones, the last stage is a single window.
    side = windows[-1] * 4 * 2 ** (stages - 1)
    config = dict(
        type='SwinTransformer',
        arch=arch,
        window_size=windows[0] if len(set(windows)) == 1 else windows,
        img_size=side,
    )
    if channels != 3:
        config['in_channels'] = channels
    return config, f'img_size {side}, so that the last stage is one window'


def _cvt(state: State, num_heads: int | None) -> tuple[dict, str]:
    stages = range(_count(state, 'stages.'))
    first = [f'stages.{s}.blocks.0.attn' for s in stages]
    arch = dict(
        embed_dims=[len(state[f'stages.{s}.norm.weight']) for s in stages],
        depths=[_count(state, f'stages.{s}.blocks.') for s in stages],
    )
    config: dict = dict(type='CvT', arch=arch)
    if f'{first[0]}.bias_table' in state:
        tables = [state[f'{name}.bias_table'] for name in first]
        arch['num_heads'] = [len(table) for table in tables]
        config['window_size'] = (tables[0].shape[1] + 1) // 2
        return config, ''
    arch['num_heads'] = [max(1, width // 64) for width in arch['embed_dims']]
    config['relative_position_bias'] = False
    return config, 'a head for every 64 channels and windows of 7, as no shape tells'


def _resnet(state: State, num_heads: int | None) -> tuple[dict, str]:
    blocks = tuple(_count(state, f'model.layer{s}.') for s in range(1, 5))
    bottleneck = 'model.layer1.0.conv3.weight' in state
    width = len(state['model.layer1.0.conv1.weight'])
    name = _RESNETS.get((blocks, bottleneck))
    config = dict(type='TimmBackbone', name=name or 'resnet50')
    if width == 128 and bottleneck and name in ('resnet50', 'resnet101'):
        config['name'] = f'wide_{name}_2'
    elif name is None and bottleneck:
        config['layers'] = list(blocks)
    elif name is None:
        config.update(name='resnet34', layers=list(blocks))
    return config, ''


def _dinov2(state: State, num_heads: int | None) -> tuple[dict, str]:
    width, _, patch = _patch(state, 'model.patch_embed.proj.weight')
    depth = _count(state, 'model.blocks.')
    registers = 'model.reg_token' in state
    hidden = len(state['model.blocks.0.mlp.fc1.weight'])
    gated = hidden > state['model.blocks.0.mlp.fc2.weight'].shape[1]
    size = 'giant' if gated else _DINOV2.get(width, 'small')
    name = f'vit_{size}_patch14_{"reg4_" if registers else ""}dinov2'
    side = _table_side(state, 'model.pos_embed', 0 if registers else 1, width)
    config = dict(type='TimmBackbone', name=name, img_size=side * patch)
    if patch != 14:
        config['patch_size'] = patch
    known = _DINOV2.get(width) == size
    if not known:
        config['embed_dim'] = width
    if not known and hidden != 4 * width:
        config['mlp_ratio'] = hidden / width
    full = dict(small=12, base=12, large=24, giant=40)[size]
    if depth != full:
        config['depth'] = depth
    if registers and state['model.reg_token'].shape[1] != 4:
        config['reg_tokens'] = state['model.reg_token'].shape[1]
    told = ''
    if num_heads is not None or not known:
        heads, told = _heads(width, depth, num_heads)
        config['num_heads'] = heads
    return config, told


_READERS = dict(vit=_vit, swin=_swin, cvt=_cvt, resnet=_resnet, dinov2=_dinov2)
