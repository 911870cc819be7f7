"""Heads that read depth from frozen tokens."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


def depth_head(
    kind: Literal['linear', 'dpt'], channels: int, layers: int = 1
) -> nn.Module:
    """A head ``(B, D, h, w)`` to ``(B, 1, h', w')``.

    Args:
        kind: ``'linear'``, a 1x1 convolution from zero weights, or ``'dpt'``.
        channels: ``D``, of all layers together.
        layers: number of them, side by side along the channels.
    """
    if kind == 'dpt':
        return DPTDepthHead(channels, layers)
    convolution = nn.Conv2d(channels, 1, 1)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution


class DPTDepthHead(nn.Module):
    """A small head in the style of DPT (arXiv:2103.13413, Sec. 3).

    Four levels at 4, 2, 1 and 1/2 times the grid of the tokens are fused from coarse to
    fine by residual units. DPT takes each level from another layer of the backbone;
    here level ``i`` has layer ``i L // 4`` of the ``L`` there are, the earliest at the
    finest level, so that with one layer all levels have it. Levels are resized
    bilinearly, where DPT has strided and transposed convolutions.

    Args:
        channels: of the tokens, all layers together.
        layers: ``L``, side by side along the channels.
        width: channels of the head.
    """

    SCALES = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, channels: int, layers: int = 1, width: int = 64) -> None:
        super().__init__()
        self.layers = layers
        self.project = nn.ModuleList(
            nn.Conv2d(channels // layers, width, 1) for _ in self.SCALES
        )
        self.level = nn.ModuleList(ResidualUnit(width) for _ in self.SCALES)
        self.fuse = nn.ModuleList(ResidualUnit(width) for _ in self.SCALES)
        self.out = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, 1, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, D, h, w)`` standardised tokens to ``(B, 1, 4 h, 4 w)``."""
        layers = maps.chunk(self.layers, 1)
        fused = None
        for i in reversed(range(len(self.SCALES))):
            size = [max(1, round(side * self.SCALES[i])) for side in maps.shape[2:]]
            level = self.project[i](layers[i * self.layers // len(self.SCALES)])
            level = self.level[i](F.interpolate(level, size, mode='bilinear'))
            if fused is not None:
                level = level + F.interpolate(fused, size, mode='bilinear')
            fused = self.fuse[i](level)
        return self.out(fused)


class ResidualUnit(nn.Module):
    """``x + conv(relu(conv(relu(x))))`` with 3x3 convolutions.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, width, h, w)`` to the same shape."""
        return maps + self.second(self.first(maps.relu()).relu())
