"""Patch dropping: which patches of a view a network gets, or a head sees."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.registry import TASK_UTILS


@TASK_UTILS.register_module()
class PatchDrop:
    """Draws the patches that stay, anew at each call, from torch's generator.

    Draws come from the CPU's generator, so that they do not depend on the device.

    Args:
        keep: patches that stay: a number (int), or a share of the grid (float, rounded
            down).
        kind: ``'random'`` patches, a ``'run'`` of consecutive ones in raster order, or
            a ``'block'``, as near to a square as fits (of its last row some may be
            missing).
        per_image: one draw for each image; else one for all (LOCA's code).
        after_encoder: the encoder gets all patches, and its output loses some.

    Raises:
        DenseSSLError: an option is out of range.
    """

    def __init__(
        self,
        keep: int | float,
        kind: Literal['random', 'run', 'block'] = 'random',
        *,
        per_image: bool = False,
        after_encoder: bool = False,
    ) -> None:
        if keep < 0 or (isinstance(keep, float) and keep > 1):
            raise DenseSSLError(
                f'PatchDrop: keep={keep}; give a number of patches, or a share of 0.0 '
                'to 1.0'
            )
        if kind not in ('random', 'run', 'block'):
            raise DenseSSLError(
                f'PatchDrop: unknown kind {kind!r}; choose random, run or block'
            )
        self.keep = keep
        self.kind = kind
        self.per_image = per_image
        self.after_encoder = after_encoder

    def count(self, grid: tuple[int, int]) -> int:
        """How many patches of a grid ``(h, w)`` stay.

        Raises:
            DenseSSLError: more are to stay than there are.
        """
        patches = math.prod(grid)
        if isinstance(self.keep, float):
            return math.floor(self.keep * patches + 1e-6)  # 0.3 x 10 is below 3
        if self.keep > patches:
            raise DenseSSLError(
                f'PatchDrop: keep={self.keep}, but a grid of {grid[0]} x {grid[1]} has '
                f'{patches} patches; keep fewer, or give a share such as 0.36'
            )
        return self.keep

    def __call__(
        self, grid: tuple[int, int], images: int, device: torch.device | str = 'cpu'
    ) -> Tensor:
        """Raster indices of the patches that stay, ascending, ``(images, count)``."""
        count = self.count(grid)
        draws = images if self.per_image else 1
        draw = dict(random=_random, run=_run, block=_block)[self.kind]
        kept = draw(grid, count, draws).to(device, non_blocking=True)
        return kept.expand(images, -1)


def _random(grid: tuple[int, int], count: int, draws: int) -> Tensor:
    order = torch.rand(draws, math.prod(grid)).argsort(1)
    return order[:, :count].sort(1).values


def _run(grid: tuple[int, int], count: int, draws: int) -> Tensor:
    start = torch.randint(math.prod(grid) - count + 1, (draws, 1))
    return start + torch.arange(count)


def _block(grid: tuple[int, int], count: int, draws: int) -> Tensor:
    h, w = grid
    rows = min(h, max(1, round(math.sqrt(count))))
    rows = max(rows, math.ceil(count / w))
    columns = math.ceil(count / rows)
    top = torch.randint(h - rows + 1, (draws, 1))
    left = torch.randint(w - columns + 1, (draws, 1))
    place = torch.arange(count)
    row, column = (place // columns, place % columns) if count else (place, place)
    return (top + row) * w + left + column


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """``tokens[..., index[..., i], :]``, ``(..., n, D)`` of ``(..., N, D)``."""
    return tokens.gather(-2, index[..., None].expand(*index.shape, tokens.shape[-1]))
