"""The vision transformer of every ViT method here, on timm's layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.models.mlp import LeanMlp
from densessl.registry import MODELS

# width, depth, heads
ARCHITECTURES = {
    'tiny': (192, 12, 3),
    'small': (384, 12, 6),
    'base': (768, 12, 12),
    'large': (1024, 24, 16),
    'huge': (1280, 32, 16),
}


def init_linear(module: nn.Module) -> None:
    """Truncated normal of std 0.02 and zero bias; use with ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_pos_embed(
    table: Tensor, grid: tuple[int, int], offset: float = 0.1
) -> Tensor:
    """Position embeddings for another grid, bicubic without antialiasing.

    Args:
        table: ``(1, h0, w0, D)``.
        grid: ``(h, w)`` to resize to.
        offset: added to ``h`` and ``w`` before the scale is taken. DINO's code, which
            the methods here build on, resizes by ``(h + 0.1) / h0`` and so samples at
            slightly shifted places; 0 gives the plain resize.

    Returns:
        ``(1, h * w, D)``; the table itself where the grids are equal.
    """
    h0, w0 = table.shape[1:3]
    if (h0, w0) == tuple(grid):
        return table.flatten(1, 2)
    scale = ((grid[0] + offset) / h0, (grid[1] + offset) / w0)
    resized = F.interpolate(
        table.permute(0, 3, 1, 2).float(),
        scale_factor=scale,
        mode='bicubic',
        recompute_scale_factor=False,
    )
    if resized.shape[2:] != tuple(grid):
        raise AssertionError(f'{tuple(resized.shape)} for a grid of {grid}')
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


@MODELS.register_module()
class VisionTransformer(BaseModule):
    """ViT (arXiv:2010.11929) for any input size, with and without a CLS token.

    Args:
        arch: ``'tiny' | 'small' | 'base' | 'large' | 'huge'``, or a dict of
            ``embed_dims``, ``depth`` and ``num_heads``.
        patch_size: side of a patch in pixels.
        img_size: side in pixels of the square input whose grid the table of position
            embeddings has; other inputs get an interpolated table.
        in_channels: channels of the input.
        cls_token: whether a class token is put before the patches.
        pos_embed: whether tokens get learned position embeddings.
        final_norm: LayerNorm on the output of the last block.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        pos_embed_offset: see :func:`resize_pos_embed`.
        mlp_ratio: hidden width of the MLP over ``embed_dims``.
        init_cfg: MMEngine's initialisation, for use in downstream packages.

    Raises:
        DenseSSLError: unknown architecture, sizes the patch does not divide.
    """

    def __init__(
        self,
        arch: str | dict = 'small',
        patch_size: int = 16,
        *,
        img_size: int = 224,
        in_channels: int = 3,
        cls_token: bool = True,
        pos_embed: bool = True,
        final_norm: bool = True,
        drop_path_rate: float = 0.0,
        pos_embed_offset: float = 0.1,
        mlp_ratio: float = 4.0,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if isinstance(arch, str):
            if arch not in ARCHITECTURES:
                raise DenseSSLError(
                    f'VisionTransformer: unknown arch {arch!r}; choose from '
                    f'{", ".join(ARCHITECTURES)}, or give a dict of embed_dims, depth '
                    'and num_heads'
                )
            width, depth, heads = ARCHITECTURES[arch]
        else:
            width, depth, heads = arch['embed_dims'], arch['depth'], arch['num_heads']
        if img_size % patch_size:
            raise DenseSSLError(
                f'VisionTransformer: img_size={img_size} is not a multiple of '
                f'patch_size={patch_size}; give a multiple'
            )
        self.embed_dims = width
        self.patch_size = patch_size
        self.pos_embed_offset = pos_embed_offset
        side = img_size // patch_size

        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=patch_size,
            in_chans=in_channels,
            embed_dim=width,
            strict_img_size=False,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if cls_token else None
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, int(cls_token) + side * side, width))
            if pos_embed
            else None
        )
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=True,
                drop_path=rate,
                norm_layer=_layer_norm,
                mlp_layer=LeanMlp,
            )
            for rate in rates
        )
        self.norm = _layer_norm(width) if final_norm else nn.Identity()
        self._table_side = side

        self.apply(init_linear)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        extra_tokens: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tokens:
        """Tokens of the last block.

        Args:
            images: ``(B, C, H, W)``, normalised; the patch divides ``H`` and ``W``.
            keep: ``(B, n)`` raster indices of the patches to keep; the others are
                dropped before the first block. None keeps all.
            extra_tokens: ``(B, M, D)``, put after the patches as they are.
            attn_mask: additive or boolean (True = may attend), broadcastable to
                ``(B, heads, T, T)``, over ``[cls, patches, extra]``.

        Returns:
            :class:`Tokens`; with ``keep``, ``patches`` is ``(B, n, D)``.
        """
        return self.forward_layers(
            images,
            [len(self.blocks) - 1],
            keep=keep,
            extra_tokens=extra_tokens,
            attn_mask=attn_mask,
        )[0]

    def forward_layers(
        self,
        images: Tensor,
        layers: Sequence[int],
        *,
        keep: Tensor | None = None,
        extra_tokens: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> list[Tokens]:
        """Tokens after chosen blocks, each through the final norm; see ``forward``.

        Args:
            images: as in ``forward``.
            layers: blocks counted from 0; negative ones count from the end.
            keep: as in ``forward``.
            extra_tokens: as in ``forward``.
            attn_mask: as in ``forward``.
        """
        depth = len(self.blocks)
        if any(not -depth <= layer < depth for layer in layers):
            raise DenseSSLError(
                f'VisionTransformer: layers {list(layers)} of a model with {depth} '
                f'blocks; count from 0 to {depth - 1}'
            )
        wanted = [layer % depth for layer in layers]
        x, grid = self.embed(images, keep, extra_tokens)
        outputs = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x, attn_mask=attn_mask)
            if i in wanted:
                extra = 0 if extra_tokens is None else extra_tokens.shape[1]
                outputs[i] = self._split(self.norm(x), grid, extra)
        return [outputs[layer] for layer in wanted]

    def last_attention(self, images: Tensor) -> Tensor:
        """Attention of the last block, ``(B, heads, T, T)`` over ``[cls, patches]``."""
        x, _ = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        attn = self.blocks[-1].attn
        x = self.blocks[-1].norm1(x)
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
        q, k = qkv.permute(2, 0, 3, 1, 4)[:2]
        return (q * attn.scale @ k.mT).softmax(-1)

    def embed(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        extra_tokens: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Input of the first block ``(B, T, D)``, and the patch grid ``(h, w)``."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise DenseSSLError(
                f'VisionTransformer: an input of {height}x{width} px is not a multiple '
                f'of patch_size={self.patch_size}; choose view sizes that are'
            )
        grid = (height // self.patch_size, width // self.patch_size)
        x = self.patch_embed(images)
        cls_pos, patch_pos = self.position_embeddings(grid)
        if patch_pos is not None:
            x = x + patch_pos
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        parts = [x]
        if self.cls_token is not None:
            cls = self.cls_token if cls_pos is None else self.cls_token + cls_pos
            parts.insert(0, cls.expand(len(x), -1, -1))
        if extra_tokens is not None:
            parts.append(extra_tokens)
        return (torch.cat(parts, 1) if len(parts) > 1 else x), grid

    def position_embeddings(
        self, grid: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings of the class token ``(1, 1, D)`` and of a grid ``(1, N, D)``."""
        if self.pos_embed is None:
            return None, None
        cls_count = int(self.cls_token is not None)
        cls_pos, patches = self.pos_embed.split(
            [cls_count, self.pos_embed.shape[1] - cls_count], dim=1
        )
        table = patches.unflatten(1, (self._table_side, self._table_side))
        resized = resize_pos_embed(table, grid, self.pos_embed_offset)
        return (cls_pos if cls_count else None), resized

    def _split(self, x: Tensor, grid: tuple[int, int], extra: int) -> Tokens:
        first = int(self.cls_token is not None)
        last = x.shape[1] - extra
        return Tokens(
            patches=x[:, first:last],
            grid=grid,
            cls=x[:, 0] if first else None,
            extra=x[:, last:] if extra else None,
        )


def _layer_norm(width: int, **kwargs) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, **kwargs)
