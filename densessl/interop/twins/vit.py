"""Plain vision transformers in other packages."""

from __future__ import annotations

from dataclasses import dataclass

import timm
from torch import nn

from densessl.errors import DenseSSLError
from densessl.interop import layouts

from .base import Twin, arguments, last_map


@dataclass(frozen=True)
class _ViTShape:
    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    size: int
    channels: int
    cls: bool
    norm: bool


def is_plain(network: nn.Module) -> bool:
    """Whether a timm ViT has the parts of a plain one and no others."""
    names = set(network.state_dict())
    plain = ('cls_token', 'pos_embed', 'patch_embed.proj.', 'norm.')
    block = ('norm1.', 'norm2.', 'attn.qkv.', 'attn.proj.', 'mlp.fc1.', 'mlp.fc2.')
    return 'pos_embed' in names and all(
        name.split('.', 2)[2].startswith(block)
        if name.startswith('blocks.')
        else name.startswith(plain)
        for name in names
    )


def _vit_shape(network: nn.Module) -> _ViTShape:
    state, block = network.state_dict(), network.blocks[0]
    if 'pos_embed' not in state:
        raise DenseSSLError(
            'a ViT without position embeddings: other packages have none; use it '
            'through densessl.load_backbone'
        )
    cls = 'cls_token' in state
    rows = state['pos_embed'].shape[1] - cls
    projection = network.patch_embed.proj
    patch = projection.kernel_size[0]
    side = round(rows**0.5)
    if side * side != rows or projection.bias is None:
        raise DenseSSLError(
            f'a ViT with {rows} position embeddings and '
            f'{"no " if projection.bias is None else "a "}bias in its patch embedding: '
            'other packages take square tables and a bias; use it through '
            'densessl.load_backbone'
        )
    return _ViTShape(
        width=projection.out_channels,
        depth=len(network.blocks),
        heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        patch=patch,
        size=side * patch,
        channels=projection.in_channels,
        cls=cls,
        norm='norm.weight' in state,
    )


def vit_twin(network: nn.Module, target: str) -> Twin | None:
    """A plain ViT, ours or timm's, in a target; None where the target has none."""
    shape = _vit_shape(network)
    builders = dict(
        mmseg=_vit_mmseg,
        mmdet=_vit_mmpretrain,
        mmpretrain=_vit_mmpretrain,
        timm=_vit_timm,
        hf=_vit_hf,
    )
    if target not in builders:
        return None
    keymap, config, build, features = builders[target](shape)
    return Twin(keymap, network.state_dict(), config, build, features, shape.size)


def _vit_mmpretrain(shape: _ViTShape):
    config = dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(
            embed_dims=shape.width,
            num_layers=shape.depth,
            num_heads=shape.heads,
            feedforward_channels=shape.hidden,
        ),
        img_size=shape.size,
        patch_size=shape.patch,
        in_channels=shape.channels,
        with_cls_token=shape.cls,
        final_norm=shape.norm,
        out_type='featmap',
        norm_cfg=dict(type='LN', eps=1e-6),
    )

    def build() -> nn.Module:
        from mmpretrain.models import VisionTransformer

        return VisionTransformer(**arguments(config))

    return layouts.VIT_MMPRETRAIN, config, build, last_map


def _vit_mmseg(shape: _ViTShape):
    if shape.hidden % shape.width:
        raise DenseSSLError(
            f'--to mmseg: its ViT has whole numbers for mlp_ratio, not '
            f'{shape.hidden}/{shape.width}; export --to mmpretrain and name '
            "type='mmpretrain.VisionTransformer'"
        )
    config = dict(
        type='mmseg.VisionTransformer',
        img_size=[shape.size, shape.size],
        patch_size=shape.patch,
        in_channels=shape.channels,
        embed_dims=shape.width,
        num_layers=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=shape.hidden // shape.width,
        out_indices=[shape.depth - 1],
        with_cls_token=shape.cls,
        final_norm=shape.norm,
        patch_bias=True,
        norm_cfg=dict(type='LN', eps=1e-6),
    )

    def build() -> nn.Module:
        from mmseg.models.backbones import VisionTransformer

        return VisionTransformer(**arguments(config))

    keymap = layouts.VIT_MMSEG if shape.cls else layouts.VIT_MMSEG_NO_CLS
    return keymap, config, build, last_map


def _vit_timm(shape: _ViTShape):
    config = dict(
        img_size=shape.size,
        patch_size=shape.patch,
        in_chans=shape.channels,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=shape.hidden / shape.width,
        class_token=shape.cls,
        final_norm=shape.norm,
        global_pool='token' if shape.cls else 'avg',
        fc_norm=False,
        num_classes=0,
        dynamic_img_size=True,
    )
    return (
        layouts.VIT_TIMM,
        config,
        lambda: timm.models.VisionTransformer(**config),
        lambda module, x: module.forward_features(x)[:, int(shape.cls) :],
    )


def _vit_hf(shape: _ViTShape):
    if not (shape.cls and shape.norm):
        lacks = 'class token' if not shape.cls else 'final LayerNorm'
        raise DenseSSLError(
            f"--to hf: Hugging Face's ViT has a class token and a final LayerNorm, "
            f'this backbone no {lacks}; choose from mmseg, mmdet, mmpretrain, timm'
        )
    config = dict(
        architectures=['ViTModel'],
        model_type='vit',
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.hidden,
        image_size=shape.size,
        patch_size=shape.patch,
        num_channels=shape.channels,
        layer_norm_eps=1e-6,
        qkv_bias=True,
        hidden_act='gelu',
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return (
        layouts.VIT_HF,
        config,
        None,
        lambda module, x: module(x).last_hidden_state[:, 1:],
    )
