"""CvT, a vision transformer with convolutions, in EsViT's windowed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import DropPath
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.models.mlp import LeanMlp
from densessl.registry import MODELS

ARCHITECTURES = {
    'tiny': dict(
        embed_dims=(64, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(1, 3, 6, 12)
    ),
}


def stage_settings(
    model: str,
    arch: str | dict,
    known: dict[str, dict],
    num_heads: Sequence[int] | None = None,
) -> list[tuple[int, int, int]]:
    """``(width, depth, heads)`` of every stage of a named or a given architecture.

    Args:
        model: what errors call the model.
        arch: a name in ``known``, or a dict like the ones there.
        known: dicts of ``embed_dims``, ``depths`` and ``num_heads``, a number a stage.
        num_heads: replaces that of ``arch`` unless it is None.

    Raises:
        DenseSSLError: unknown name, missing lists or lists that do not fit together.
    """
    keys = ('embed_dims', 'depths', 'num_heads')
    if isinstance(arch, str):
        if arch not in known:
            raise DenseSSLError(
                f'{model}: unknown arch {arch!r}; choose from {", ".join(known)}, or '
                f'give a dict of {", ".join(keys)}'
            )
        arch = known[arch]
    if num_heads is not None:
        arch = dict(arch, num_heads=num_heads)
    if set(arch) != set(keys) or len({len(numbers) for numbers in arch.values()}) != 1:
        raise DenseSSLError(
            f'{model}: found arch={arch}; give {", ".join(keys)}, each with one number '
            'a stage'
        )
    stages = list(zip(*(arch[key] for key in keys), strict=True))
    for width, _, heads in stages:
        if width % heads:
            raise DenseSSLError(
                f'{model}: embed_dims={width} do not divide among num_heads={heads}; '
                'give a multiple of the heads'
            )
    return stages


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates a stage and block, from 0 in the first to ``rate`` in the last block."""
    last = max(sum(depths) - 1, 1)
    rates = (rate * i / last for i in range(sum(depths)))
    return [list(islice(rates, depth)) for depth in depths]


def init_layer(module: nn.Module) -> None:
    """Linear and convolution: truncated normal of std 0.02 and zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pad_to(maps: Tensor, multiple: int) -> Tensor:
    """Zeros below and right of ``(..., H, W, C)`` until ``multiple`` divides H, W."""
    height, width = maps.shape[-3:-1]
    return F.pad(maps, (0, 0, 0, -width % multiple, 0, -height % multiple))


def to_windows(maps: Tensor, window: int) -> Tensor:
    """Windows ``(..., H / w, W / w, w * w, C)`` of maps ``(..., H, W, C)``."""
    cells = maps.unflatten(-2, (-1, window)).unflatten(-4, (-1, window))
    return cells.transpose(-4, -3).flatten(-3, -2)


def from_windows(windows: Tensor, window: int) -> Tensor:
    """The maps that :func:`to_windows` took apart."""
    cells = windows.unflatten(-2, (window, window)).transpose(-4, -3)
    return cells.flatten(-3, -2).flatten(-4, -3)


def grid_cells(rows: int, columns: int, device=None) -> Tensor:
    """``(rows * columns, 2)``: row and column of every cell in raster order."""
    return torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    )


def relative_bias(table: Tensor, offsets: Tensor) -> Tensor:
    """Biases ``(heads, ...)`` of offsets between cells.

    Args:
        table: ``(heads, r, c)`` with the bias of offset 0 in the middle; r, c odd.
        offsets: ``(..., 2)`` rows and columns from query to key, integers.
    """
    rows, columns = table.shape[1:]
    return table[:, offsets[..., 0] + rows // 2, offsets[..., 1] + columns // 2]


class WindowAttention(nn.Module):
    """Attention inside windows, with a convolution before queries, keys and values.

    As in EsViT's code, the map is filled up with zeros before the convolution, the
    filling takes part in BatchNorm and attention (Swin here treats it alike), and a
    map smaller than the window gets windows of its own smaller side: no filling then.

    Args:
        width: channels.
        num_heads: attention heads.
        window: side of a window in tokens.
        relative_position_bias: whether heads learn a bias an offset.
    """

    def __init__(
        self, width: int, num_heads: int, window: int, relative_position_bias: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.batch_norm = nn.BatchNorm2d(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias_table = None
        if relative_position_bias:
            side = 2 * window - 1
            self.bias_table = nn.Parameter(torch.empty(num_heads, side, side))
            nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Attended maps; in and out ``(B, H, W, C)``."""
        height, width, channels = x.shape[1:]
        window = min(self.window, height, width)
        x = pad_to(x, window)
        x = self.batch_norm(self.depthwise(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        qkv = to_windows(self.qkv(x), window)  # B, rows, columns, w * w, 3 C
        grid = qkv.shape[:3]
        qkv = qkv.flatten(0, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self._bias(window)
        if bias is not None:
            bias = bias[None].to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, bias, scale=channels**-0.5)
        x = x.transpose(1, 2).flatten(2).unflatten(0, grid)
        return self.proj(from_windows(x, window)[:, :height, :width])

    def _bias(self, window: int) -> Tensor | None:
        if self.bias_table is None:
            return None
        cells = grid_cells(window, window, self.bias_table.device)
        return relative_bias(self.bias_table, cells - cells[:, None])


class _Block(nn.Module):
    def __init__(self, width, num_heads, window, relative_position_bias, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, num_heads, window, relative_position_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = LeanMlp(width, 4 * width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Stage(nn.Module):
    """A convolution that opens the stage, LayerNorm, blocks; maps are channels first.

    Args:
        embed: the convolution.
        blocks: of the convolution's output channels.
    """

    def __init__(self, embed: nn.Conv2d, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = embed
        self.norm = nn.LayerNorm(embed.out_channels)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        return self.blocks(x).permute(0, 3, 1, 2)


@MODELS.register_module()
class CvT(BaseModule):
    """CvT (arXiv:2103.15808) with 7 x 7 windows, as EsViT (arXiv:2106.09785) has it.

    Stages open with overlapping convolutions, and so do queries, keys and values: there
    are no position embeddings. The tokens are the last stage's, LayerNormed. Inputs of
    any size will do; the grid of a side of 32 k pixels is k.

    Args:
        arch: ``'tiny'``, or a dict of ``embed_dims``, ``depths`` and ``num_heads``,
            each with a number a stage.
        window_size: side of the attention windows in tokens.
        relative_position_bias: whether heads learn a bias an offset inside a window.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        in_channels: channels of the input.
        init_cfg: MMEngine's initialisation, for use in downstream packages.

    Raises:
        DenseSSLError: unknown or inconsistent architecture.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        *,
        window_size: int = 7,
        relative_position_bias: bool = True,
        drop_path_rate: float = 0.1,
        in_channels: int = 3,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        settings = stage_settings('CvT', arch, ARCHITECTURES)
        self.patch_size = 4 * 2 ** (len(settings) - 1)  # between tokens, in pixels
        rates = drop_path_rates(drop_path_rate, [depth for _, depth, _ in settings])
        channels = in_channels
        stages = []
        for (width, _, heads), stage_rates in zip(settings, rates, strict=True):
            kernel, stride, padding = (3, 2, 1) if stages else (7, 4, 2)
            blocks = [
                _Block(width, heads, window_size, relative_position_bias, rate)
                for rate in stage_rates
            ]
            embed = nn.Conv2d(channels, width, kernel, stride, padding)
            stages.append(_Stage(embed, blocks))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(channels)
        self.embed_dims = channels
        self.apply(init_layer)

    def forward(self, images: Tensor) -> Tokens:
        """Tokens of ``images`` ``(B, C, H, W)``; ``cls`` is None."""
        maps = self.stages(images)
        return Tokens(self.norm(maps.flatten(2).mT), tuple(maps.shape[2:]))
