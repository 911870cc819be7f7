"""Swin's block and window attention, without work on what is thrown away."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .openmmlab import ShiftWindowMSA, SwinBlock
from .stochastic_depth import Kept


class LeanSwinBlock(SwinBlock):
    """MMPretrain's; samples that a drop path drops do not go through the branch."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The block's output.

        Args:
            x: ``(B, H * W, C)``.
            hw_shape: ``(H, W)``.
        """
        kept = Kept.draw(self.attn.drop, x)
        x = kept.add(x, self.attn(kept.of(self.norm1(x)), hw_shape))
        kept = Kept.draw(self.ffn.dropout_layer, x)
        return kept.add(x, self.ffn.layers(kept.of(self.norm2(x))))


class LeanShiftWindowMSA(ShiftWindowMSA):
    """MMPretrain's, with its parameters and its outputs.

    A map is filled up with zeros until windows divide it, and the filling takes part in
    attention. Its queries, keys and values are the bias of their projection, whatever
    the input, and what it attends to is thrown away. So the projections see the true
    tokens alone: on a 3 x 3 map in 7 x 7 windows that is 9 of 49.
    """

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attended tokens; the drop path is left to the block.

        Args:
            query: ``(B, H * W, C)``.
            hw_shape: ``(H, W)``.
        """
        height, width = hw_shape
        side, msa = self.window_size, self.w_msa
        shift = self.shift_size if min(hw_shape) != side or self.pad_small_map else 0
        fill = (-height % side, -width % side)

        qkv = F.linear(query, msa.qkv.weight).unflatten(1, hw_shape)
        if any(fill):
            qkv = F.pad(qkv, (0, 0, 0, fill[1], 0, fill[0]))
        if msa.qkv.bias is not None:
            qkv = qkv + msa.qkv.bias.to(qkv.dtype)
        if shift:
            qkv = qkv.roll((-shift, -shift), (1, 2))
        rows, columns = (n // side for n in qkv.shape[1:3])
        qkv = qkv.reshape(len(query), rows, side, columns, side, 3, msa.num_heads, -1)
        # 3, B, rows, columns, heads, side, side, d
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)

        weights = (q * msa.scale) @ k.mT  # B * windows, heads, N, N
        weights = weights + self._bias(weights.dtype)
        if shift:
            mask = _shift_mask((rows * side, columns * side), side, shift, query.device)
            weights = weights.unflatten(0, (-1, rows * columns)) + mask.to(
                weights.dtype
            )
            weights = weights.flatten(0, 1)
        x = weights.softmax(-1) @ v  # B * windows, heads, N, d

        x = x.unflatten(2, (side, side)).unflatten(0, (-1, rows, columns))
        x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        x = x[:, :height, :width].flatten(1, 2)
        return msa.proj(x)

    def _bias(self, dtype: torch.dtype) -> Tensor:
        """Relative position bias, ``(heads, N, N)``."""
        msa = self.w_msa
        count = self.window_size**2
        bias = msa.relative_position_bias_table[msa.relative_position_index.flatten()]
        return bias.view(count, count, -1).permute(2, 0, 1).to(dtype)


@lru_cache(maxsize=64)
def _shift_mask(
    hw_shape: tuple[int, int], side: int, shift: int, device: torch.device
) -> Tensor:
    """MMPretrain's mask between parts a shift brought together, ``(nW, 1, N, N)``."""
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        mask = ShiftWindowMSA.get_attn_mask(hw_shape, side, shift, device=device)
        return mask[:, None]
