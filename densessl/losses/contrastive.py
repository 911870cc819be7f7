"""Contrast of a query with its key and with negatives; no collectives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Contrast(NamedTuple):
    """What :func:`info_nce` finds.

    Attributes:
        loss: scalar, in nats, float32 or wider; the mean over the queries.
        accuracy: scalar, the share of queries that are nearer to their key than to
            every negative; detached.
    """

    loss: Tensor
    accuracy: Tensor


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    temp: float = 0.2,
    allowed: Tensor | None = None,
) -> Contrast:
    """``mean_b -log(e(q_b, k_b) / (e(q_b, k_b) + sum_n e(q_b, n)))``.

    InfoNCE (MoCo, arXiv:1911.05722, Eq. 1), with ``e(q, k) = exp(q . k / tau)``. Rows
    count as they are: of unit length, products are cosines. Leading dimensions are sets
    of queries, each with its own negatives.

    Args:
        query: ``(..., B, d)``.
        key: ``(..., B, d)``, the positive of each query.
        negatives: ``(..., K, d)``, for MoBY the queue.
        temp: temperature tau > 0.
        allowed: ``(B, K)`` bool, which negatives a query meets; None for all.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if query.shape != key.shape or (
        (*query.shape[:-2], query.shape[-1])
        != (*negatives.shape[:-2], negatives.shape[-1])
    ):
        raise ValueError(
            f'info_nce: queries {tuple(query.shape)}, keys {tuple(key.shape)} and '
            f'negatives {tuple(negatives.shape)} are not (B, d), (B, d) and (K, d)'
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = (x.to(dtype) for x in (query, key, negatives))
        positive = (query * key).sum(-1, keepdim=True)  # (..., B, 1)
        others = query @ negatives.transpose(-1, -2)  # (..., B, K)
        if allowed is not None:
            others = others.masked_fill(~allowed, float('-inf'))
        logits = torch.cat([positive, others], -1) / temp
        loss = (logits.logsumexp(-1) - logits[..., 0]).mean()
    with torch.no_grad():
        nearest = (positive > others).all(-1).to(dtype).mean()
    return Contrast(loss, nearest)
