"""Balanced targets over prototypes, and the mean prediction, in chunks of rows.

What these share with :mod:`densessl.losses.distillation`: rows come as bottleneck
vectors with a layer that makes logits of them, and logits exist for a few rows only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .chunks import rows_at_once

Layer = Callable[[Tensor], Tensor]
"""From ``(n, d)`` to logits ``(n, K)``."""


@torch.no_grad()
def sinkhorn_center(
    rows: Tensor,
    layer: Layer,
    temp: float,
    rounds: int = 3,
    *,
    all_reduce: Callable[[Tensor], object] | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The centre ``c`` whose ``softmax((z - c) / temp)`` is Sinkhorn-Knopp's result.

    LOCA (WACV 2024) begins with ``Q = softmax(z / temp)`` and divides, ``rounds``
    times, each column by its sum, then each row by its sum. Rows are divided last, so
    ``Q`` remains ``softmax(z / temp + log v)``, and a round is
    ``log v <- log v - log sum_i Q_i``. Only ``v`` is kept and exchanged, ``K`` values a
    round, and logarithms keep small columns. ``c = -temp log v``.

    Args:
        rows: ``(n, d)`` bottleneck vectors of this rank.
        layer: makes logits ``z``, ``K`` wide, of them.
        temp: temperature, > 0.
        rounds: of columns, then rows; 0 gives ``c = 0``.
        all_reduce: sums a tensor over ranks, in place; None for one process.
        chunk_bytes: see :func:`densessl.losses.chunks.rows_at_once`.

    Returns:
        ``(K,)``, float32 or wider.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(dtype)
        log_v = torch.zeros(_width(rows, layer), dtype=dtype, device=rows.device)
        for _ in range(rounds):
            columns = torch.zeros_like(log_v)
            for part in _chunks(rows, len(log_v), chunk_bytes):
                columns += (layer(part) / temp + log_v).softmax(-1).sum(0)
            if all_reduce is not None:
                all_reduce(columns)
            log_v -= columns.clamp_min(torch.finfo(dtype).tiny).log()
    return -temp * log_v


@torch.no_grad()
def assigned_counts(
    rows: Tensor, layer: Layer, center: Tensor, *, chunk_bytes: int | None = None
) -> Tensor:
    """``(K,)`` long, how many rows have each prototype as their most probable one."""
    counts = torch.zeros(len(center), dtype=torch.long, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for part in _chunks(rows.to(center.dtype), len(center), chunk_bytes):
            best = (layer(part) - center).argmax(-1)
            counts.index_add_(0, best, torch.ones_like(best))  # bincount would wait
    return counts


def mean_prediction(
    rows: Tensor, layer: Layer, temp: float, *, chunk_bytes: int | None = None
) -> Tensor:
    """``p = mean over rows of softmax(z / temp)``, ``(K,)``, with its gradient.

    The backward pass makes each chunk's logits again instead of keeping them.

    Args:
        rows: ``(n, d)`` bottleneck vectors, n > 0.
        layer: makes logits ``z`` of them.
        temp: temperature, > 0.
        chunk_bytes: see :func:`sinkhorn_center`.
    """

    def total(part: Tensor) -> Tensor:
        return (layer(part) / temp).softmax(-1).sum(0)

    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(dtype)
        parts = [
            checkpoint(total, part, use_reentrant=False, preserve_rng_state=False)
            for part in _chunks(rows, _width(rows, layer), chunk_bytes)
        ]
        return torch.stack(parts).sum(0) / len(rows)


def entropy(p: Tensor) -> Tensor:
    """``-sum_k p_k log p_k`` in nats; LOCA's me-max adds its negative to the loss.

    Probabilities below the smallest normal number count as that number in the
    logarithm, so that the gradient stays finite.
    """
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def _width(rows: Tensor, layer: Layer) -> int:
    with torch.no_grad():  # torch's counter of products takes no view of a graph here
        return layer(rows[:1].detach()).shape[-1]


def _chunks(rows: Tensor, width: int, chunk_bytes: int | None) -> tuple[Tensor, ...]:
    return rows.split(rows_at_once(rows, width, chunk_bytes))
