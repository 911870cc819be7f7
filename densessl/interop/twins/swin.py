"""Swin in other packages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import timm
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.interop import layouts
from densessl.models.backbones import SwinTransformer, TimmBackbone

from .base import Twin, arguments, input_size, last_map


def swin_twin(backbone: nn.Module, target: str) -> Twin | None:
    """A Swin, ours or timm's, in a target; None where the target has none."""
    if isinstance(backbone, TimmBackbone):
        state = layouts.swin_timm(len(backbone.model.layers)).back(
            backbone.model.state_dict()
        )
        size, stages = input_size(backbone), backbone.model.layers
        depths = [len(stage.blocks) for stage in stages]
        heads = [stage.blocks[0].attn.num_heads for stage in stages]
    else:
        state, size = backbone.state_dict(), backbone.img_size
        stages = backbone.model.stages
        depths = [len(stage.blocks) for stage in stages]
        heads = [stage.blocks[0].attn.w_msa.num_heads for stage in stages]
    windows = [
        (round(len(state[f'{_table(i)}']) ** 0.5) + 1) // 2 for i in range(len(depths))
    ]
    width = len(state['model.patch_embed.projection.bias'])
    channels = state['model.patch_embed.projection.weight'].shape[1]
    shape = _SwinShape(width, depths, heads, windows, size, channels)
    builders = dict(
        mmseg=_swin_pyramid,
        mmdet=_swin_pyramid,
        mmpretrain=_swin_mmpretrain,
        timm=_swin_timm,
        hf=_swin_hf,
    )
    if target not in builders:
        return None
    keymap, config, build, features, scale = builders[target](shape, target)
    size = scale * shape.size
    reference = partial(_features_of_size, shape, state, size)
    return Twin(keymap, state, config, build, features, size, reference)


def _table(stage: int) -> str:
    return f'model.stages.{stage}.blocks.0.attn.w_msa.relative_position_bias_table'


@dataclass(frozen=True)
class _SwinShape:
    width: int
    depths: list[int]
    heads: list[int]
    windows: list[int]
    size: int
    channels: int

    @property
    def arch(self) -> dict:
        return dict(embed_dims=self.width, depths=self.depths, num_heads=self.heads)

    def one_window(self, target: str) -> int:
        if len(set(self.windows)) > 1:
            raise DenseSSLError(
                f'--to {target}: its Swin has one window for all stages, this backbone '
                f'{self.windows}; export --to mmpretrain and name '
                "type='mmpretrain.SwinTransformer'"
            )
        return self.windows[0]


def _features_of_size(
    shape: _SwinShape, state: dict[str, Tensor], size: int, images: Tensor
) -> Tensor:
    """Patch tokens of our Swin, with the shifts that images of another size have."""
    ours = SwinTransformer(
        shape.arch,
        img_size=size,
        window_size=shape.windows,
        in_channels=shape.channels,
        drop_path_rate=0.0,
    )
    ours.load_state_dict(state)
    return ours.eval()(images).patches


def _swin_pyramid(shape: _SwinShape, target: str):
    config = dict(
        type=f'{target}.SwinTransformer',
        pretrain_img_size=shape.size,
        in_channels=shape.channels,
        embed_dims=shape.width,
        depths=shape.depths,
        num_heads=shape.heads,
        window_size=shape.one_window(target),
        out_indices=list(range(len(shape.depths))),
        strides=[4] + [2] * (len(shape.depths) - 1),
    )

    def build() -> nn.Module:
        if target == 'mmseg':
            from mmseg.models.backbones import SwinTransformer as Theirs
        else:
            from mmdet.models.backbones import SwinTransformer as Theirs
        return Theirs(**arguments(config))

    widths = [shape.width * 2**i for i in range(len(shape.depths))]
    # They shift windows on every map, Swin itself on maps larger than a window only:
    # the same on images of twice the size, and on those of fine-tuning.
    return layouts.swin_feature_pyramid(widths), config, build, last_map, 2


def _swin_mmpretrain(shape: _SwinShape, target: str):
    config = dict(
        type='mmpretrain.SwinTransformer',
        arch=shape.arch,
        img_size=shape.size,
        in_channels=shape.channels,
        stage_cfgs=[dict(window_size=window) for window in shape.windows],
        out_indices=[len(shape.depths) - 1],
    )

    def build() -> nn.Module:
        from mmpretrain.models import SwinTransformer as Theirs

        return Theirs(**arguments(config))

    return layouts.SWIN_MMPRETRAIN, config, build, last_map, 1


def _swin_timm(shape: _SwinShape, target: str):
    config = dict(
        img_size=shape.size,
        patch_size=4,
        in_chans=shape.channels,
        embed_dim=shape.width,
        depths=shape.depths,
        num_heads=shape.heads,
        window_size=max(shape.windows),
        num_classes=0,
        strict_img_size=False,
    )
    return (
        layouts.swin_timm(len(shape.depths)),
        config,
        lambda: timm.models.SwinTransformer(**config),
        lambda module, x: module.forward_features(x).flatten(1, 2),
        1,
    )


def _swin_hf(shape: _SwinShape, target: str):
    config = dict(
        architectures=['SwinModel'],
        model_type='swin',
        image_size=shape.size,
        patch_size=4,
        num_channels=shape.channels,
        embed_dim=shape.width,
        depths=shape.depths,
        num_heads=shape.heads,
        window_size=shape.one_window(target),
        layer_norm_eps=1e-5,
        hidden_act='gelu',
        drop_path_rate=0.0,
    )
    return (
        layouts.swin_hf(len(shape.depths)),
        config,
        None,
        lambda module, x: module(x).last_hidden_state,
        1,
    )
