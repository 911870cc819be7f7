"""ViL, the vision longformer: attention to the windows around, and a global token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.models.mlp import LeanMlp
from densessl.registry import MODELS
from densessl.schedules import Progress

from .cvt import (
    drop_path_rates,
    from_windows,
    grid_cells,
    init_layer,
    pad_to,
    relative_bias,
    stage_settings,
    to_windows,
)

ARCHITECTURES = {
    'tiny': dict(
        embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(3, 3, 6, 12)
    ),
}


class LongformerAttention(nn.Module):
    """Attention of a map's tokens and a global one, in windows or in full.

    In windows, a token attends to its own window, the 8 around it and the global token;
    what lies outside the map is masked, so nothing wraps around. The global token
    attends to all tokens and itself, by the same projections. Every head adds a bias
    that depends on the offset from query to key, or one of two scalars where either is
    the global token; the global token's bias towards itself is 0, as the softmax only
    sees its difference to the other one.

    In the last block of a stage nobody reads the global token's output, which is then
    not computed (``keep_global=False``).

    Args:
        width: channels.
        num_heads: attention heads.
        window: side of a window in tokens.
        windowed: whether to attend in windows; the table of biases, ``4 window - 1``
            on a side, is the same in full attention.
        has_global: whether the first token is the global one.
        keep_global: whether the output has the global token.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: int,
        *,
        windowed: bool,
        has_global: bool,
        keep_global: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.windowed = windowed
        self.has_global = has_global
        self.keep_global = keep_global
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        side = 4 * window - 1
        self.local_bias = nn.Parameter(torch.empty(num_heads, side, side))
        self.local_to_global = self.global_to_local = None
        if has_global:
            self.local_to_global = nn.Parameter(torch.empty(num_heads))
        if keep_global:
            self.global_to_local = nn.Parameter(torch.empty(num_heads))
        for bias in (self.local_bias, self.local_to_global, self.global_to_local):
            if bias is not None:
                nn.init.trunc_normal_(bias, std=0.02)

    def forward(
        self, x: Tensor, grid: tuple[int, int], neighbour: int | None = None
    ) -> Tensor:
        """Attended tokens.

        Args:
            x: ``(B, T, C)``, the global token first, then the map in raster order.
            grid: ``(h, w)`` of the map.
            neighbour: the one window of the 8 around, in raster order, that tokens
                attend to besides their own; None for all. Full attention ignores it.

        Returns:
            ``(B, T, C)``, without the global token unless it is kept.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.windowed:  # keeping 9 copies of keys and values would fill the memory
            x = checkpoint(
                self._windowed,
                qkv,
                grid,
                neighbour,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            if self.keep_global:
                x = torch.cat([self._global(qkv), x], dim=2)
        else:
            x = self._full(qkv, grid)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _windowed(
        self, qkv: Tensor, grid: tuple[int, int], neighbour: int | None
    ) -> Tensor:
        """Map's tokens ``(B, heads, N, d)`` of ``qkv`` ``(3, B, heads, T, d)``."""
        slots = range(9) if neighbour is None else (4, neighbour + (neighbour >= 4))
        local = qkv[..., int(self.has_global) :, :].unflatten(-2, grid)
        windows = to_windows(pad_to(local, self.window), self.window)
        shape = windows.shape[1:5]  # B, heads, rows, columns
        kv = _around(windows[1:], slots)
        if self.has_global:
            token = qkv[1:, :, :, :1, None, None].transpose(-4, -2)
            kv.append(token.expand(-1, *shape, -1, -1))
        k, v = torch.cat(kv, dim=-2).flatten(2, 4)  # B, heads * windows, keys, d
        q = windows[0].flatten(1, 3)
        bias = self._window_bias(grid, slots).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, bias)
        x = from_windows(x.unflatten(1, shape[1:]), self.window)
        return x[:, :, : grid[0], : grid[1]].flatten(2, 3)

    def _window_bias(self, grid: tuple[int, int], slots: Sequence[int]) -> Tensor:
        """``(1, heads * windows, w * w, keys)``, minus infinity outside the map."""
        side, device = self.window, self.local_bias.device
        queries = grid_cells(side, side, device) + side
        keys = to_windows(
            grid_cells(3 * side, 3 * side, device).view(3 * side, -1, 2), side
        )
        keys = keys.flatten(0, 1)  # 9, w * w, 2
        bias = relative_bias(self.local_bias, keys - queries[:, None, None])
        bias = torch.cat([bias[:, :, slot] for slot in slots], dim=-1)

        on_map = to_windows(pad_to(torch.ones(*grid, 1, device=device), side), side)
        on_map = torch.cat(_around(on_map, slots), dim=-2)  # rows, columns, keys, 1
        bias = bias[:, None, None].masked_fill(on_map.mT == 0, -torch.inf)
        if self.has_global:
            scalar = self.local_to_global.view(-1, 1, 1, 1, 1)
            bias = torch.cat([bias, scalar.expand(*bias.shape[:-1], 1)], dim=-1)
        return bias.flatten(0, 2)[None]

    def _global(self, qkv: Tensor) -> Tensor:
        """Global token ``(B, heads, 1, d)``."""
        q, k, v = qkv
        bias = self._global_bias(k.shape[2] - 1)[None].to(q.dtype)
        return F.scaled_dot_product_attention(q[:, :, :1], k, v, bias)

    def _global_bias(self, count: int) -> Tensor:
        """``(heads, 1, 1 + count)``: of the global token towards itself and a map."""
        return F.pad(self.global_to_local.view(-1, 1, 1).expand(-1, -1, count), (1, 0))

    def _full(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """Kept tokens ``(B, heads, T, d)`` by attention of all to all."""
        q, k, v = qkv
        bias = self._full_bias(grid)
        if self.has_global:
            scalar = self.local_to_global.view(-1, 1, 1)
            bias = torch.cat([scalar.expand(-1, bias.shape[1], 1), bias], dim=-1)
            if self.keep_global:
                bias = torch.cat([self._global_bias(bias.shape[1]), bias], dim=1)
            else:
                q = q[:, :, 1:]
        return F.scaled_dot_product_attention(q, k, v, bias[None].to(q.dtype))

    def _full_bias(self, grid: tuple[int, int]) -> Tensor:
        """``(heads, N, N)``; offsets beyond the table stretch it, bicubically."""
        table = self.local_bias
        size = [max(2 * side - 1, table.shape[-1]) for side in grid]
        if max(size) > table.shape[-1]:
            table = F.interpolate(
                table[None], size, mode='bicubic', align_corners=True
            )[0]
        cells = grid_cells(*grid, table.device)
        return relative_bias(table, cells - cells[:, None])


def _around(windows: Tensor, slots: Sequence[int]) -> list[Tensor]:
    """Windows around every window; zeros beyond the border.

    Args:
        windows: ``(..., rows, columns, w * w, C)``.
        slots: which of the 3 x 3 around each, in raster order; 4 is the window itself.

    Returns:
        A tensor like ``windows`` for every slot.
    """
    rows, columns = windows.shape[-4:-2]
    framed = F.pad(windows, (0, 0, 0, 0, 1, 1, 1, 1))
    corners = [divmod(slot, 3) for slot in slots]
    return [framed[..., y : y + rows, x : x + columns, :, :] for y, x in corners]


class _Block(nn.Module):
    def __init__(self, width, attn: LongformerAttention, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = LeanMlp(width, 4 * width)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, grid: tuple[int, int], neighbour: int | None
    ) -> Tensor:
        attended = self.drop_path(self.attn(self.norm1(x), grid, neighbour))
        x = x[:, -attended.shape[1] :] + attended  # without a global token not kept
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Stage(nn.Module):
    """A patch convolution that opens the stage, LayerNorm, a global token, blocks.

    Args:
        channels: of the input maps.
        width: of the output maps.
        patch: side of the convolution's patches in cells of the input.
        has_global: whether a global token joins the blocks.
        blocks: the last of them drops the global token.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        patch: int,
        has_global: bool,
        blocks: Sequence[_Block],
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.global_token = None
        if has_global:
            self.global_token = nn.Parameter(torch.empty(1, 1, width))
            nn.init.trunc_normal_(self.global_token, std=0.02)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, neighbour: int | None) -> Tensor:
        """Maps ``(B, C, H, W)``; the sides are divided by the patch, rounding up."""
        height, width = x.shape[2:]
        x = self.embed(F.pad(x, (0, -width % self.patch, 0, -height % self.patch)))
        grid = tuple(x.shape[2:])
        x = self.norm(x.flatten(2).mT)
        if self.global_token is not None:
            token = self.global_token.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([token, x], dim=1)
        for block in self.blocks:
            x = block(x, grid, neighbour)
        return x.mT.unflatten(2, grid)


@MODELS.register_module()
class VisionLongformer(BaseModule):
    """ViL (arXiv:2103.15358) as in EsViT (arXiv:2106.09785), for any input size.

    The first stages attend to neighbouring windows and a global token, so that their
    cost is linear in the number of tokens; the others attend in full. Positions enter
    by relative biases alone. Every stage but the last has a global token of its own;
    the tokens given are the map of the last stage, LayerNormed. Maps are filled up
    where a patch does not divide them: the grid of a side of s pixels is ``s / 32``,
    rounded up.

    Args:
        arch: ``'tiny'``, or a dict of ``embed_dims``, ``depths`` and ``num_heads``,
            each with a number a stage.
        num_heads: heads a stage instead of the architecture's. ``'tiny'`` has the
            paper's (3, 3, 6, 12); the authors' command has (3, 6, 12, 24).
        window_size: side of the attention windows in tokens.
        windowed_stages: how many stages, from the first, attend in windows.
        neighbours: ``'all'``, or ``'random'`` for the authors' shortcut: in training
            tokens attend to their own and one window around it, drawn anew each step
            by :meth:`start_step`; the last part of the training, and evaluation, have
            all 8.
        random_share: the part of the training that ``'random'`` draws in, 0 to 1.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        in_channels: channels of the input.
        init_cfg: MMEngine's initialisation, for use in downstream packages.

    Attributes:
        neighbour: the window drawn for this step, 0 to 7 in raster order, or None for
            all.

    Raises:
        DenseSSLError: unknown or inconsistent architecture, unknown ``neighbours``, a
            share outside 0 to 1.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        *,
        num_heads: Sequence[int] | None = None,
        window_size: int = 7,
        windowed_stages: int = 2,
        neighbours: str = 'all',
        random_share: float = 0.75,
        drop_path_rate: float = 0.1,
        in_channels: int = 3,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if neighbours not in ('all', 'random'):
            raise DenseSSLError(
                f"VisionLongformer: found neighbours={neighbours!r}; give 'all' or "
                "'random'"
            )
        if not 0 <= random_share <= 1:
            raise DenseSSLError(
                f'VisionLongformer: found random_share={random_share}; give the part '
                'of the training with random neighbours, 0 to 1'
            )
        self.neighbours = neighbours
        self.random_share = random_share
        self.neighbour: int | None = None

        settings = stage_settings('VisionLongformer', arch, ARCHITECTURES, num_heads)
        self.patch_size = 4 * 2 ** (len(settings) - 1)  # between tokens, in pixels
        rates = drop_path_rates(drop_path_rate, [depth for _, depth, _ in settings])
        channels = in_channels
        self.stages = nn.ModuleList()
        for i, (width, depth, heads) in enumerate(settings):
            has_global = i < len(settings) - 1
            blocks = []
            for j, rate in enumerate(rates[i]):
                attention = LongformerAttention(
                    width,
                    heads,
                    window_size,
                    windowed=i < windowed_stages,
                    has_global=has_global,
                    keep_global=has_global and j < depth - 1,
                )
                blocks.append(_Block(width, attention, rate))
            patch = 2 if i else 4
            self.stages.append(_Stage(channels, width, patch, has_global, blocks))
            channels = width
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.embed_dims = channels
        self.apply(init_layer)

    def start_step(self, progress: Progress) -> None:
        """Draw the step's neighbour window by torch's generator, or go back to all."""
        random_steps = self.random_share * progress.total_steps
        draws = self.neighbours == 'random' and progress.step < random_steps
        self.neighbour = int(torch.randint(8, ())) if draws else None

    def forward(self, images: Tensor) -> Tokens:
        """Tokens of ``images`` ``(B, C, H, W)``; ``cls`` is None."""
        neighbour = self.neighbour if self.training else None
        maps = images
        for stage in self.stages:
            maps = stage(maps, neighbour)
        return Tokens(self.norm(maps.flatten(2).mT), tuple(maps.shape[2:]))
