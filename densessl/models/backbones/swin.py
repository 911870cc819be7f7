"""Swin of MMPretrain behind the interface of our backbones."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.model import BaseModule
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.models.mlp import LeanLayers
from densessl.registry import MODELS

from .openmmlab import SwinTransformer as MMSwinTransformer
from .vision_transformer import block_numbers, init_linear
from .window_attention import LeanShiftWindowMSA, LeanSwinBlock


@MODELS.register_module()
class SwinTransformer(BaseModule):
    """MMPretrain's Swin (arXiv:2103.14030) giving tokens for views of any size.

    Maps that the window does not divide are padded, also those smaller than the
    window, so that 96-pixel views work. A stage whose map at ``img_size`` is no larger
    than the window does not shift, as in the original Swin, whatever the view's size.
    The tokens are the last stage's, LayerNormed; ``patch_size`` is their distance in
    pixels.

    Args:
        arch: ``'tiny' | 'small' | 'base'``, or MMPretrain's dict.
        img_size: side of the usual input in pixels.
        drop_path_rate: stochastic depth of the last block.
        window_size: one for all stages, or one a stage.
        in_channels: channels of the input.
        init_cfg: MMEngine's initialisation, for use in downstream packages.

    Raises:
        DenseSSLError: unknown architecture, another number of windows than stages, a
            window larger than its stage's map at ``img_size``.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        *,
        img_size: int = 224,
        drop_path_rate: float = 0.1,
        window_size: int | list[int] = 7,
        in_channels: int = 3,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        known = ('tiny', 'small', 'base')
        if isinstance(arch, str) and arch not in known:
            raise DenseSSLError(
                f'SwinTransformer: unknown arch {arch!r}; choose from '
                f'{", ".join(known)}, or give a dict of embed_dims, depths, num_heads'
            )
        stages = 4 if isinstance(arch, str) else len(arch['depths'])
        maps = [-(-img_size // (4 * 2**stage)) for stage in range(stages)]
        self.img_size, self.patch_size = img_size, 4 * 2 ** (stages - 1)
        windows = _windows(window_size, maps, img_size)
        unshifted = dict(block_cfgs=dict(attn_cfgs=dict(shift_size=0)))
        self.model = MMSwinTransformer(
            arch=arch,
            stage_cfgs=[
                dict(window_size=window, **(unshifted if side <= window else {}))
                for side, window in zip(maps, windows, strict=True)
            ],
            img_size=img_size,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            pad_small_map=True,
            out_indices=(stages - 1,),
        )
        for stage in self.model.stages:
            for block in stage.blocks:
                block.ffn.layers = LeanLayers(*block.ffn.layers)
                block.attn.__class__ = LeanShiftWindowMSA  # the same parameters
                block.__class__ = LeanSwinBlock
        self.model.apply(init_linear)
        for name, parameter in self.model.named_parameters():
            if name.endswith('relative_position_bias_table'):
                nn.init.trunc_normal_(parameter, std=0.02)
        self.embed_dims = self.model.num_features[-1]

    def forward(self, images: Tensor) -> Tokens:
        """Tokens of ``images`` ``(B, C, H, W)``; 4 stages: ``H / 32, W / 32``."""
        (features,) = self.model(images)
        return Tokens(features.flatten(2).mT, tuple(features.shape[2:]))

    def forward_layers(
        self, images: Tensor, layers: Sequence[int], *, norm: bool = True
    ) -> list[Tokens]:
        """Tokens after chosen blocks, counted through all stages.

        Args:
            images: as in ``forward``.
            layers: blocks counted from 0; negative ones count from the end.
            norm: whether those of the last stage go through the final norm, as in
                EsViT's linear evaluation; other stages have none.

        Raises:
            DenseSSLError: the model has fewer blocks.
        """
        blocks = [block for stage in self.model.stages for block in stage.blocks]
        wanted = block_numbers(layers, len(blocks), 'SwinTransformer')
        last_stage = len(blocks) - len(self.model.stages[-1].blocks)
        final = getattr(self.model, f'norm{len(self.model.stages) - 1}')
        outputs: dict[int, Tokens] = {}

        def keep(layer: int, args: tuple, out: Tensor) -> None:
            normed = norm and layer >= last_stage
            outputs[layer] = Tokens(final(out) if normed else out, tuple(args[1]))

        hooks = [
            blocks[layer].register_forward_hook(
                lambda _, args, out, layer=layer: keep(layer, args, out)
            )
            for layer in set(wanted)
        ]
        try:
            self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [outputs[layer] for layer in wanted]


def _windows(window_size: int | list[int], maps: list[int], img_size: int) -> list[int]:
    """A window for each stage, given the side of its map at ``img_size``."""
    if isinstance(window_size, int):
        windows = [window_size] * len(maps)
    else:
        windows = list(window_size)
    if len(windows) != len(maps):
        raise DenseSSLError(
            f'SwinTransformer: window_size={windows} for {len(maps)} stages; give one '
            'number, or one a stage'
        )
    for stage, (window, side) in enumerate(zip(windows, maps, strict=True), 1):
        if window > side:
            fitting = [min(pair) for pair in zip(windows, maps, strict=True)]
            raise DenseSSLError(
                f'SwinTransformer: stage {stage} has a window of {window} on a '
                f'{side} x {side} map at img_size={img_size}; give '
                f'window_size={fitting}'
            )
    return windows
