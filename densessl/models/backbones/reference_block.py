"""A transformer block that does no more than is asked for, and carries references."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from densessl.models.mlp import norm_linear

from .stochastic_depth import Kept


class ReferenceBlock(Block):
    """timm's block; its weights also serve reference tokens (DenseDINO, IJCAI 2023).

    A reference token attends to the patches and to itself, and nobody else attends to
    it. So it needs no mask: the ordinary tokens go through timm's own operations, in
    the same shapes as without, and the few queries of the references go apart.

    Samples that a drop path drops do not go through the branch; and where the first
    tokens alone are asked for, the others have keys and values and nothing else.
    """

    compiled = False  # whether torch.compile makes what is called in training

    def forward(
        self,
        x: Tensor,
        rows: int | None = None,
        references: Tensor | None = None,
        first: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The block's output, with references that of both kinds of tokens.

        Args:
            x: ``(B, T, D)`` ordinary tokens; references do not change their output.
            rows: how many tokens, the first, are asked for; None for all.
            references: ``(B, M, D)`` or None.
            first: the first token of ``x`` that references attend to; 1 skips a class
                token.

        Returns:
            ``(B, rows, D)``, or ``(B, T, D)``; with references also ``(B, M, D)``.
        """
        compiled = self.compiled and self.training
        paths = self.drop_path1, self.drop_path2
        kept = [Kept.draw(path, x, compiled) for path in paths]
        run = _compiled() if compiled else ReferenceBlock._run
        return run(self, x, *kept, rows, references, first)

    def _run(self, x, kept: Kept, later: Kept, rows, references, first):
        queries, keys, values = self._qkv(kept.of(x), rows)
        out = F.scaled_dot_product_attention(queries, keys, values)
        x = kept.add(x[:, :rows], self._project(out))
        if references is None:
            return later.add(x, self.mlp(later.of(x), self.norm2))
        own = self._qkv(kept.of(references))
        seen = attend_apart(*own, keys[:, :, first:], values[:, :, first:])
        references = kept.add(references, self._project(seen))
        x, references = (
            later.add(y, self.mlp(later.of(y), self.norm2)) for y in (x, references)
        )
        return x, references

    def attention(self, x: Tensor) -> Tensor:
        """Attention weights of ordinary tokens ``(B, T, D)``: ``(B, heads, T, T)``."""
        queries, keys, _ = self._qkv(x)
        return (queries * self.attn.scale @ keys.mT).softmax(-1)

    def reference_attention(self, x: Tensor, references: Tensor, first: int) -> Tensor:
        """Attention weights of references ``(B, heads, M, N + 1)``, their own last.

        Args:
            x: ``(B, T, D)`` ordinary tokens.
            references: ``(B, M, D)``.
            first: as in ``forward``; ``N = T - first``.
        """
        queries, own_keys, _ = self._qkv(references)
        keys = self._qkv(x)[1]
        return shares_apart(queries, own_keys, keys[:, :, first:])

    def _project(self, out: Tensor) -> Tensor:
        return self.attn.proj(out.transpose(1, 2).flatten(2))

    def _qkv(self, x: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first tokens, keys and values of all, of ``norm1(x)``."""
        attn = self.attn
        layer, heads = attn.qkv, (attn.num_heads, -1)
        if rows is None:
            qkv = norm_linear(x, self.norm1, layer).unflatten(-1, (3, *heads))
            queries, keys, values = (part.transpose(1, 2) for part in qkv.unbind(2))
        else:
            x = self.norm1(x)
            parts = [x.shape[-1], 2 * x.shape[-1]]
            weights, biases = layer.weight.split(parts), layer.bias.split(parts)
            queries = F.linear(x[:, :rows], weights[0], biases[0])
            queries = queries.unflatten(-1, heads).transpose(1, 2)
            keys_values = F.linear(x, weights[1], biases[1]).unflatten(-1, (2, *heads))
            keys, values = (part.transpose(1, 2) for part in keys_values.unbind(2))
        # identities, where whoever draws attention listens
        return attn.q_norm(queries), attn.k_norm(keys), values


@cache
def _compiled() -> Callable:
    return torch.compile(ReferenceBlock._run, dynamic=False)


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
