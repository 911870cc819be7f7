"""A transformer block whose queries attend to other tokens."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn


class CrossAttentionBlock(nn.Module):
    """Cross-attention and an MLP of ratio 4, pre-norm, each with a residual.

    Args:
        embed_dims: width ``D``.
        num_heads: attention heads; they divide ``D``.
        alike: the queries' projection starts as this many times the keys', so that
            tokens attend to what looks like them; 0 draws it apart.
    """

    def __init__(self, embed_dims: int, num_heads: int, alike: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = nn.LayerNorm(embed_dims, eps=1e-6)
        self.norm_kv = nn.LayerNorm(embed_dims, eps=1e-6)
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = Mlp(embed_dims, 4 * embed_dims)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # as in LOCA's code; 0.02 hardly attends
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        if alike:
            self.q.weight.data.copy_(alike * self.kv.weight.data[:embed_dims])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``x`` ``(B, M, D)`` after attending to ``context`` ``(B, n, D)``.

        With ``n = 0`` the attention adds its bias alone.
        """
        query = self._heads(self.q(self.norm_q(x)))
        key, value = map(self._heads, self.kv(self.norm_kv(context)).chunk(2, -1))
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
