"""Maps of a ViT's blocks at four strides, for decoders that expect a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.registry import MODELS


@MODELS.register_module()
class ViTFeaturePyramid(BaseModule):
    """Four maps of one stride, resampled to strides 4, 8, 16 and 32.

    Patch 16: stride 4 is a deconvolution, norm, GELU and a deconvolution; 8 one
    deconvolution; 16 the map itself; 32 its max-pool over 2 x 2. Patch 8: 4 is one
    deconvolution; 8 the map itself; 16 and 32 max-pools over 2 x 2 and 4 x 4.

    Deconvolutions have 2 x 2 kernels and stride 2; channels stay. So do BEiT
    (arXiv:2106.08254), XCiT (arXiv:2106.09681) and, on them, SelfPatch in their code.
    In MMSegmentation and MMDetection it stands before FPN:
    ``neck=[dict(type='densessl.ViTFeaturePyramid', ...), dict(type='FPN', ...)]``.

    Args:
        embed_dims: channels of each map.
        patch_size: stride of the maps in pixels, 8 or 16.
        norm_cfg: OpenMMLab's config of the norm, ``BN`` or ``SyncBN``.
        init_cfg: MMEngine's initialisation; None leaves PyTorch's.

    Raises:
        DenseSSLError: another patch size.
    """

    def __init__(
        self,
        embed_dims: int,
        patch_size: int = 16,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if patch_size not in (8, 16):
            raise DenseSSLError(
                f'ViTFeaturePyramid: patch_size={patch_size}; strides 4 to 32 are made '
                'of patches of 8 or 16 px'
            )
        norm_cfg = norm_cfg or dict(type='SyncBN')

        def double() -> nn.Module:
            return nn.ConvTranspose2d(embed_dims, embed_dims, 2, stride=2)

        _, norm = build_norm_layer(norm_cfg, embed_dims)
        levels = [
            nn.Sequential(double(), norm, nn.GELU(), double()),
            double(),
            nn.Identity(),
            nn.MaxPool2d(2),
            nn.MaxPool2d(4),
        ]
        self.embed_dims = embed_dims
        self.levels = nn.ModuleList(levels[:4] if patch_size == 16 else levels[1:])
        self._least_side = 32 // patch_size

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The pyramid, finest first.

        Args:
            maps: four of ``(B, D, h, w)``, the shallowest block's first.

        Returns:
            ``(B, D, h', w')`` with ``h' = h * patch_size / stride``, rounded down.

        Raises:
            DenseSSLError: another number of maps, channels, or a map that is too small
                for stride 32.
        """
        if len(maps) != len(self.levels):
            raise DenseSSLError(
                f'ViTFeaturePyramid: {len(maps)} maps for 4 strides; give the backbone '
                'four out_indices, such as (2, 5, 8, 11)'
            )
        for x in maps:
            if x.dim() != 4 or x.shape[1] != self.embed_dims:
                raise DenseSSLError(
                    f'ViTFeaturePyramid: a map of shape {tuple(x.shape)} for '
                    f'(B, {self.embed_dims}, h, w); set embed_dims to the width of the '
                    'backbone, which must give maps without class token'
                )
            if min(x.shape[2:]) < self._least_side:
                raise DenseSSLError(
                    f'ViTFeaturePyramid: a map of {x.shape[2]} x {x.shape[3]} has no '
                    'pixel left at stride 32; give pictures of at least 32 px a side'
                )
        return tuple(level(x) for level, x in zip(self.levels, maps, strict=True))
