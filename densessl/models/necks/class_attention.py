"""SelfPatch's aggregator: class-attention blocks and a LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from densessl.models.backbones.vision_transformer import init_linear
from densessl.models.features import Tokens
from densessl.registry import MODELS

from .pooling import Neck, gather_patches


class ClassAttentionBlock(nn.Module):
    """A class token attends to itself and to patches (CaiT, arXiv:2103.17239, 2.2).

    Pre-norm, MLP of ratio 4, no LayerScale; only the token changes.

    Args:
        embed_dims: width ``D``.
        num_heads: attention heads.
    """

    def __init__(self, embed_dims: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = Mlp(embed_dims, 4 * embed_dims)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """``token`` ``(B, 1, D)`` after attending to ``patches`` ``(B, N, D)``."""
        x = self.norm1(torch.cat([token, patches], 1))
        keys, values = self._split_heads(self.kv(x), 2)
        (query,) = self._split_heads(self.q(x[:, :1]), 1)
        out = F.scaled_dot_product_attention(query, keys, values)
        return self._finish(token, out.transpose(1, 2).flatten(2))

    def forward_sets(
        self, token: Tensor, patches: Tensor, index: Tensor, valid: Tensor
    ) -> Tensor:
        """The same for a set of patches a token: what ``forward`` gives set by set.

        LayerNorm, keys and values are functions of one patch, so they are computed once
        a patch and gathered, not once a member of a set.

        Args:
            token: ``(B, M, D)``, one token a set.
            patches: ``(B, N, D)``.
            index: ``(B, M, k)``.
            valid: ``(B, M, k)`` bool.
        """
        own = self.norm1(token)
        query = self.q(own).unflatten(-1, (self.num_heads, -1))  # (B, M, heads, c)
        own_key, own_value = (
            self.kv(own).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        )
        keys_values = gather_patches(self.kv(self.norm1(patches)), index)
        keys, values = keys_values.unflatten(-1, (2, self.num_heads, -1)).unbind(3)
        scale = query.shape[-1] ** -0.5
        scores = torch.einsum('bmhc,bmkhc->bmkh', query * scale, keys)
        scores = scores.masked_fill(~valid[..., None], float('-inf'))
        own_score = (query * scale * own_key).sum(-1)[:, :, None]  # (B, M, 1, heads)
        share = torch.cat([own_score, scores], 2).softmax(2)
        out = share[:, :, 0, :, None] * own_value
        out = out + torch.einsum('bmkh,bmkhc->bmhc', share[:, :, 1:], values)
        return self._finish(token, out.flatten(2))

    def _split_heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        x = x.unflatten(-1, (count, self.num_heads, -1))
        return x.permute(2, 0, 3, 1, 4).unbind(0)  # count x (B, heads, N, c)

    def _finish(self, token: Tensor, attended: Tensor) -> Tensor:
        token = token + self.proj(attended)
        return token + self.mlp(self.norm2(token))


@MODELS.register_module()
class ClassAttentionNeck(Neck):
    """Aggregator ``h`` of SelfPatch (CVPR 2022, Sec. 3.2): a learned token, two blocks.

    ``y = h(all patches)`` is the view's representation, ``y^(i) = h(positives of i)``
    the target of a patch. The LayerNorm at its end also normalises the patch tokens
    before the patch projector, as in the authors' code.

    Args:
        embed_dims: width ``D``; given by the algorithm.
        num_heads: attention heads; by default one for every 64 channels, at least 1.
        depth: number of blocks.
    """

    def __init__(
        self, embed_dims: int, num_heads: int | None = None, depth: int = 2
    ) -> None:
        super().__init__()
        num_heads = num_heads or max(1, embed_dims // 64)
        self.token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dims, num_heads) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.token, std=0.02)

    def pool(self, tokens: Tokens) -> Tensor:
        """``y = h(f_1 .. f_N)``, ``(B, D)``."""
        token = self.token.expand(len(tokens.patches), -1, -1)
        for block in self.blocks:
            token = block(token, tokens.patches)
        return self.norm(token[:, 0])

    def normalize(self, patches: Tensor) -> Tensor:
        """The LayerNorm of the aggregator on patch tokens."""
        return self.norm(patches)

    def aggregate(self, patches: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """``y^(i) = h({f_j, j in positives of i})``; see :meth:`Neck.aggregate`."""
        token = self.token.expand(*index.shape[:2], -1)
        for block in self.blocks:
            token = block.forward_sets(token, patches, index, valid)
        return self.norm(token)
