"""Windows of a token map: which tokens each holds, and attention within them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_SCORES = 2**21  # at a time on a CPU: 8 MiB in float32, of which caches hold much


class WindowLayout(NamedTuple):
    """Where the tokens of a map stand once its windows follow each other.

    Attributes:
        order: ``(T,)`` long, the token at each place; 0 at holes.
        places: ``(H * W,)`` long, the place of each token, ``order[places[t]] == t``.
        holes: ``(T - H * W,)`` long, places that the map does not reach to; None
            where there are none.
    """

    order: Tensor
    places: Tensor
    holes: Tensor | None


@lru_cache(maxsize=64)
def window_layout(
    hw_shape: tuple[int, int], side: int, shift: int, device: torch.device
) -> WindowLayout:
    """Layout of a map in windows of ``side``, rolled up and left by ``shift``.

    The map is filled up at its bottom and right until windows divide it, then rolled.

    Args:
        hw_shape: ``(H, W)`` of the map in tokens.
        side: of a window in tokens.
        shift: in tokens.
        device: of the result.
    """
    height, width = hw_shape
    rows, columns = -(-height // side), -(-width // side)
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        token = torch.full((rows * side, columns * side), -1)
        token[:height, :width] = torch.arange(height * width).view(height, width)
        token = token.roll((-shift, -shift), (0, 1)).view(rows, side, columns, side)
        order = token.transpose(1, 2).flatten()
        holes = (order < 0).nonzero().flatten()
        places = torch.empty(height * width, dtype=torch.long)
        taken = order >= 0
        places[order[taken]] = taken.nonzero().flatten()
        holes = holes.to(device) if len(holes) else None
        order = order.clamp(min=0).to(device)
        return WindowLayout(order, places.to(device), holes)


def to_windows(x: Tensor, layout: WindowLayout, filler: Tensor | None = None) -> Tensor:
    """Tokens window by window.

    Args:
        x: ``(B, H * W, C)``.
        layout: of the map.
        filler: ``(C,)`` of ``x``'s type, what holes are given; None for 0.

    Returns:
        ``(B, T, C)``.
    """
    return _TakeRows.apply(x, filler, layout.order, layout.holes, layout.places, None)


def from_windows(x: Tensor, layout: WindowLayout) -> Tensor:
    """Undo :func:`to_windows`: ``(B, T, C)`` to ``(B, H * W, C)``."""
    return _TakeRows.apply(x, None, layout.places, None, layout.order, layout.holes)


class _TakeRows(torch.autograd.Function):
    """Rows by an index that takes none twice; the gradient is taken by its inverse."""

    @staticmethod
    def forward(ctx, x, filler, index, holes, inverse, inverse_holes):
        ctx.inverse = inverse, inverse_holes
        ctx.holes = holes if filler is not None else None
        return _fill(x.index_select(1, index), holes, filler)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        index, holes = ctx.inverse
        of_filler = None
        if ctx.holes is not None:
            of_filler = grad.index_select(1, ctx.holes).sum((0, 1))
        return _fill(grad.index_select(1, index), holes), of_filler, *[None] * 4


def _fill(x: Tensor, holes: Tensor | None, filler: Tensor | None = None) -> Tensor:
    if holes is None:
        return x
    if filler is None:
        return x.index_fill_(1, holes, 0)
    return x.index_copy_(1, holes, filler.expand(len(x), len(holes), -1))


def attend_in_windows(qkv: Tensor, bias: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v`` in each window and head.

    The shares are taken again in the backward pass. On a CPU both passes go some
    windows at a time, so that what they write is still in its cache when they read it.

    Args:
        qkv: ``(W, N, 3, heads, d)``, ``W`` windows of ``N`` tokens.
        bias: ``(w, heads, N, N)``, for windows in turn: ``w`` divides ``W``.

    Returns:
        ``(W, N, heads, d)``.
    """
    return _WindowAttention.apply(qkv, bias.to(qkv.dtype))


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(qkv, bias)
        windows, tokens, _, heads, width = qkv.shape
        out = qkv.new_empty(windows, tokens, heads, width)
        for part in _parts(qkv, bias):
            q, k, v = _apart(qkv[part])
            attended = torch.bmm(_shares(q, k, bias), v)
            out[part] = attended.unflatten(0, (-1, heads)).transpose(1, 2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        qkv, bias = ctx.saved_tensors
        heads, width = qkv.shape[3:]
        grad_qkv = torch.empty_like(qkv)
        full = torch.promote_types(bias.dtype, torch.float32)  # sums need its digits
        grad_bias = torch.zeros_like(bias, dtype=full)
        for part in _parts(qkv, bias):
            q, k, v = _apart(qkv[part])
            share = _shares(q, k, bias)
            upper = grad[part].transpose(1, 2).flatten(0, 1)
            of_v = torch.bmm(share.mT, upper)
            score = torch.bmm(upper, v.mT)
            score = torch._softmax_backward_data(score, share, -1, share.dtype)
            grad_bias += score.unflatten(0, (-1, *bias.shape[:2])).sum(0, dtype=full)
            score *= width**-0.5
            for i, of in enumerate((score @ k, score.mT @ q, of_v)):
                grad_qkv[part, :, i] = of.unflatten(0, (-1, heads)).transpose(1, 2)
        return grad_qkv, grad_bias.to(bias.dtype)


def _shares(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Who attends to whom, ``(W * heads, N, N)``, of ``(W * heads, N, d)``."""
    times = len(q) // (bias.shape[0] * bias.shape[1])
    scores = bias.flatten(0, 1).repeat(times, 1, 1)
    scores.baddbmm_(q, k.mT, alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1, out=scores)


def _apart(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values of ``(W, N, 3, heads, d)``, each ``(W * heads, N, d)``."""
    return qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)


def _parts(qkv: Tensor, bias: Tensor) -> list[slice]:
    """Windows to go through at once: some multiples of ``w`` on a CPU, else all."""
    size = len(qkv)
    if qkv.device.type == 'cpu':
        size = max(1, _CPU_SCORES // bias.numel()) * len(bias)
    return [slice(start, start + size) for start in range(0, len(qkv), size)]
