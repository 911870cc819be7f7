"""The vision transformer of every ViT method here, on timm's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from mmengine.model import BaseModule
from timm.layers import PatchEmbed
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.models.mlp import LeanMlp
from densessl.registry import MODELS

from .position_embedding import resize_pos_embed, sample_pos_embed
from .reference_block import ReferenceBlock

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


def block_numbers(layers: Sequence[int], depth: int, model: str) -> list[int]:
    """Blocks counted from 0, of numbers that may be negative to count from the end.

    Raises:
        DenseSSLError: the model has fewer blocks.
    """
    if any(not -depth <= layer < depth for layer in layers):
        raise DenseSSLError(
            f'{model}: layers {list(layers)} of a model with {depth} blocks; count '
            f'from 0 to {depth - 1}'
        )
    return [layer % depth for layer in layers]


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
        pos_embed_resize: its mode, ``'bicubic'`` or ``'bilinear'``.
        pos_embed_std: standard deviation of the embeddings at the start.
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
        pos_embed_resize: Literal['bicubic', 'bilinear'] = 'bicubic',
        pos_embed_std: float = 0.02,
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
        if pos_embed_resize not in ('bicubic', 'bilinear'):
            raise DenseSSLError(
                f'VisionTransformer: pos_embed_resize={pos_embed_resize!r}; choose '
                'bicubic or bilinear'
            )
        self.pos_embed_resize = pos_embed_resize
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
            ReferenceBlock(
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
        for parameter, std in ((self.cls_token, 0.02), (self.pos_embed, pos_embed_std)):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=std)

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        references: Tensor | None = None,
        positions: bool = True,
        patches: bool = True,
    ) -> Tokens:
        """Tokens of the last block.

        Args:
            images: ``(B, C, H, W)``, normalised; the patch divides ``H`` and ``W``.
            keep: ``(B, n)`` raster indices of the patches to keep; the others are
                dropped before the first block. None keeps all.
            references: ``(B, M, D)`` tokens that attend to the patches and to
                themselves, and that nobody attends to: with them or without, class
                token and patches are the same.
            positions: whether the tokens get their position embeddings.
            patches: whether the patch tokens are asked for. Without them the last block
                has keys and values of patches, and all else of it for class token and
                references alone, which come out the same.

        Returns:
            :class:`Tokens`; with ``keep``, ``patches`` is ``(B, n, D)``, and if they
            are not asked for ``(B, 0, D)``.
        """
        return self.forward_layers(
            images,
            [len(self.blocks) - 1],
            keep=keep,
            references=references,
            positions=positions,
            patches=patches,
        )[0]

    def forward_layers(
        self,
        images: Tensor,
        layers: Sequence[int],
        *,
        keep: Tensor | None = None,
        references: Tensor | None = None,
        positions: bool = True,
        patches: bool = True,
        norm: bool = True,
    ) -> list[Tokens]:
        """Tokens after chosen blocks; see ``forward``.

        Args:
            images: as in ``forward``.
            layers: blocks counted from 0; negative ones count from the end.
            keep: as in ``forward``.
            references: as in ``forward``.
            positions: as in ``forward``.
            patches: as in ``forward``, of the last of the chosen blocks.
            norm: whether each goes through the final norm.
        """
        wanted = block_numbers(layers, len(self.blocks), 'VisionTransformer')
        x, grid = self.embed(images, keep, positions)
        first = int(self.cls_token is not None)
        outputs = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            rows = first if i == max(wanted) and not patches else None
            if references is None:
                x = block(x, rows)
            else:
                x, references = block(x, rows, references, first)
            if i in wanted:
                final = self.norm if norm else nn.Identity()
                out = final(x)
                outputs[i] = Tokens(
                    patches=out[:, first:],
                    grid=grid,
                    cls=out[:, 0] if first else None,
                    references=None if references is None else final(references),
                )
        return [outputs[layer] for layer in wanted]

    def last_attention(self, images: Tensor) -> Tensor:
        """Attention of the last block, ``(B, heads, T, T)`` over ``[cls, patches]``."""
        x, _ = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attention(x)

    def last_reference_attention(self, images: Tensor, references: Tensor) -> Tensor:
        """Attention of references in the last block, ``(B, heads, M, N + 1)``.

        Over the patches, and last the reference itself; arguments as in ``forward``.
        """
        x, _ = self.embed(images)
        first = int(self.cls_token is not None)
        for block in self.blocks[:-1]:
            x, references = block(x, None, references, first)
        return self.blocks[-1].reference_attention(x, references, first)

    def embed(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        positions: bool = True,
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
        cls_pos, patch_pos = (
            self.position_embeddings(grid) if positions else (None, None)
        )
        if patch_pos is not None:
            x = x + patch_pos
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        if self.cls_token is not None:
            cls = self.cls_token if cls_pos is None else self.cls_token + cls_pos
            x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
        return x, grid

    def position_embeddings(
        self, grid: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings of the class token ``(1, 1, D)`` and of a grid ``(1, N, D)``."""
        if self.pos_embed is None:
            return None, None
        cls_pos, table = self._position_table()
        resized = resize_pos_embed(
            table, grid, self.pos_embed_offset, self.pos_embed_resize
        )
        return cls_pos, resized

    def position_embeddings_at(self, points: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embeddings between the patches, bicubic; at a patch's centre its own.

        They are samples of the table itself, also where the grid is another one: a
        table resized by ``'bicubic'`` consists of such samples.

        Args:
            points: ``(B, M, 2)`` fractions ``(x, y)`` of the input, in ``[0, 1]``.
            grid: ``(h, w)`` patches of the input.

        Returns:
            ``(B, M, D)``.

        Raises:
            DenseSSLError: there are no position embeddings, or a point lies outside
                (looked at on a CPU only, where it costs no wait).
        """
        if self.pos_embed is None:
            raise DenseSSLError(
                'VisionTransformer: reference tokens are position embeddings, and '
                'pos_embed=False leaves none; set pos_embed=True'
            )
        inside = (points >= 0) & (points <= 1)
        if points.device.type == 'cpu' and not bool(inside.all()):
            raise DenseSSLError(
                'VisionTransformer: a reference point lies outside its view, at '
                f'{points.min():.3g} or {points.max():.3g} of the side; give fractions '
                'of the view in [0, 1]'
            )
        _, table = self._position_table()
        return sample_pos_embed(table, points, grid, self.pos_embed_offset)

    def _position_table(self) -> tuple[Tensor | None, Tensor]:
        """The class token's ``(1, 1, D)`` and the patches' ``(1, h0, w0, D)``."""
        first = int(self.cls_token is not None)
        patches = self.pos_embed[:, first:]
        table = patches.unflatten(1, (self._table_side, self._table_side))
        return (self.pos_embed[:, :1] if first else None), table


def _layer_norm(width: int, **kwargs) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, **kwargs)
