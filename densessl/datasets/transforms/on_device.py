"""The operations of ``photometric`` on batches of views, on whatever device holds them.

Numbers are drawn where the views are cut, so a sample stays a function of its key. The
results are those of ``photometric`` but for rounding: there levels are whole numbers
after each operation, and here never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.datasets.transforms.photometric import LUMA, Changes

_NEVER = 256.0  # a threshold above all levels


def pack(changes: Sequence[Changes]) -> Tensor:
    """Changes of ``V`` views as numbers ``(V, 11)``, to be stacked into batches.

    They are four kinds in order (-1 for none), four amounts by kind, whether grey,
    sigma, and threshold.
    """
    rows = []
    for jitter, gray, sigma, threshold in changes:
        kinds, amounts = [-1.0] * 4, [0.0] * 4
        for turn, (kind, amount) in enumerate(jitter):
            kinds[turn], amounts[kind] = kind, amount
        last = _NEVER if threshold is None else threshold
        rows.append([*kinds, *amounts, gray, sigma, last])
    return torch.tensor(rows, dtype=torch.float32)


def augment_views(views: Tensor, changes: Tensor) -> Tensor:
    """Change views in place, each as was drawn for it.

    Which views an operation works on is known on the CPU, so that no operation waits
    for the device.

    Args:
        views: ``(N, 3, H, W)`` float RGB, 0 to 255, on any device.
        changes: ``(N, 11)`` of :func:`pack`, on the CPU.

    Returns:
        ``views``, 0 to 255, no whole numbers.
    """

    def change(chosen: Tensor, function: Callable, amounts: Tensor) -> None:
        where = chosen.nonzero()[:, 0]
        if len(where):
            amounts = amounts[where].to(views.device, non_blocking=True)
            where = where.to(views.device, non_blocking=True)
            changed = function(views[where], amounts)
            views.index_copy_(0, where, changed.clamp_(0, 255))

    amounts = changes[:, :, None, None, None]
    for turn in range(4):
        for kind, function in enumerate(_JITTERS):
            change(changes[:, turn] == kind, function, amounts[:, 4 + kind])
    change(changes[:, 8] > 0, _to_grayscale, amounts[:, 8])
    change(changes[:, 9] > 0, _blur, bells(changes[:, 9]))
    change(changes[:, 10] < _NEVER, _solarize, amounts[:, 10])
    return views


def bells(sigma: Tensor) -> Tensor:
    """Weights ``(N, K)`` of blurs, cut where ``photometric.gaussian_blur`` cuts them.

    Args:
        sigma: ``(N,)`` standard deviations in px; of 0, a single weight.
    """
    reach = (6 * sigma + 1).round().div(2).floor()[:, None]
    taps = torch.arange(-reach.max(), reach.max() + 1)
    heights = torch.exp(-0.5 * (taps / sigma[:, None].clamp(min=1e-3)) ** 2)
    heights = heights * (taps.abs() <= reach)
    return heights / heights.sum(1, keepdim=True)


def _gray(views: Tensor) -> Tensor:
    """``(N, 1, H, W)``."""
    r, g, b = views.split(1, dim=1)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def _brightness(views: Tensor, factor: Tensor) -> Tensor:
    return views * factor


def _contrast(views: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(views).mean((2, 3), keepdim=True), views, factor)


def _saturation(views: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(views), views, factor)


def _hue(views: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue, the place on the hexagon of HSV; value and chroma stay."""
    r, g, b = views.split(1, dim=1)
    value = views.amax(1, keepdim=True)
    chroma = value - views.amin(1, keepdim=True)
    safe = chroma.clamp(min=1e-6)
    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, hue) + 6 * shift
    place = torch.cat([hue + 5, hue + 3, hue + 1], 1) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def _to_grayscale(views: Tensor, _: Tensor) -> Tensor:
    return _gray(views).repeat(1, 3, 1, 1)


def _blur(views: Tensor, weights: Tensor) -> Tensor:
    """Rows, then columns, all views at once; border pixels are repeated."""
    count, channels, height, width = views.shape
    planes, reach = count * channels, weights.shape[1] // 2
    kernels = weights.repeat_interleave(channels, 0).view(planes, 1, 1, -1)
    views = views.view(1, planes, height, width)
    views = F.pad(views, (reach, reach, 0, 0), mode='replicate')
    views = F.conv2d(views, kernels, groups=planes)
    views = F.pad(views, (0, 0, reach, reach), mode='replicate')
    views = F.conv2d(views, kernels.transpose(2, 3), groups=planes)
    return views.view(count, channels, height, width)


def _solarize(views: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(views < threshold, views, 255 - views)


_JITTERS = (_brightness, _contrast, _saturation, _hue)
