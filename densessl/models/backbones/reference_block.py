"""A transformer block that also carries tokens which nobody attends to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class ReferenceBlock(Block):
    """timm's block; its weights also serve reference tokens (DenseDINO, IJCAI 2023).

    A reference token attends to the patches and to itself, and nobody else attends to
    it. So it needs no mask: the ordinary tokens go through timm's own operations, in
    the same shapes as without, and the few queries of the references go apart.
    """

    def with_references(
        self, x: Tensor, references: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """The block's output for both kinds of tokens.

        Args:
            x: ``(B, T, D)`` ordinary tokens; the output equals ``forward(x)``.
            references: ``(B, M, D)``.
            first: the first token of ``x`` that references attend to; 1 skips a class
                token.
        """
        attn = self.attn
        queries, keys, values = self._qkv(x)
        own = self._qkv(references)
        out = F.scaled_dot_product_attention(queries, keys, values)
        seen = attend_apart(*own, keys[:, :, first:], values[:, :, first:])
        residuals = [attn.proj(y.transpose(1, 2).flatten(2)) for y in (out, seen)]
        residuals = _drop_path(self.drop_path1, *residuals)
        x, references = x + residuals[0], references + residuals[1]
        residuals = [self.mlp(self.norm2(y)) for y in (x, references)]
        residuals = _drop_path(self.drop_path2, *residuals)
        return x + residuals[0], references + residuals[1]

    def attention(self, x: Tensor) -> Tensor:
        """Attention weights of ordinary tokens ``(B, T, D)``: ``(B, heads, T, T)``."""
        queries, keys, _ = self._qkv(x)
        return (queries * self.attn.scale @ keys.mT).softmax(-1)

    def reference_attention(self, x: Tensor, references: Tensor, first: int) -> Tensor:
        """Attention weights of references ``(B, heads, M, N + 1)``, their own last.

        Args:
            x: ``(B, T, D)`` ordinary tokens.
            references: ``(B, M, D)``.
            first: as in ``with_references``; ``N = T - first``.
        """
        queries, own_keys, _ = self._qkv(references)
        return shares_apart(queries, own_keys, self._qkv(x)[1][:, :, first:])

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.attn.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def attend_apart(
    queries: Tensor, own_keys: Tensor, own_values: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Attention of each query to ``N`` shared tokens and to its own.

    Args:
        queries: ``(B, heads, M, c)``.
        own_keys: ``(B, heads, M, c)``, query ``m`` sees the ``m``-th alone.
        own_values: likewise.
        keys: ``(B, heads, N, c)``.
        values: likewise.

    Returns:
        ``(B, heads, M, c)``.
    """
    share = shares_apart(queries, own_keys, keys)
    return share[..., :-1] @ values + share[..., -1:] * own_values


def shares_apart(queries: Tensor, own_keys: Tensor, keys: Tensor) -> Tensor:
    """Weights of `attend_apart`: ``(B, heads, M, N + 1)``, the query's own last."""
    queries = queries * queries.shape[-1] ** -0.5
    own = (queries * own_keys).sum(-1, keepdim=True)
    return torch.cat([queries @ keys.mT, own], -1).softmax(-1)


def _drop_path(path: nn.Module, *residuals: Tensor) -> tuple[Tensor, ...]:
    """Apply timm's drop path, the same images dropped from each of ``residuals``."""
    if not (path.training and getattr(path, 'drop_prob', 0)):
        return residuals
    scale = path(residuals[0].new_ones(len(residuals[0]), 1, 1))
    return tuple(residual * scale for residual in residuals)
