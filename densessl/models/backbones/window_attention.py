"""Swin's block and window attention, without work on what is thrown away."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from .openmmlab import ShiftWindowMSA, SwinBlock
from .stochastic_depth import Kept
from .windows import attend_in_windows, from_windows, to_windows, window_layout

_CPU_BYTES = 24 * 2**20  # of one tensor


class LeanSwinBlock(SwinBlock):
    """MMPretrain's; samples that a drop path drops do not go through the branch."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The block's output.

        Args:
            x: ``(B, H * W, C)``.
            hw_shape: ``(H, W)``.
        """
        width = self.ffn.feedforward_channels  # of the widest tensor of either branch
        kept = Kept.draw(self.attn.drop, x)
        attend = partial(self.attn, hw_shape=hw_shape)
        x = kept.add(x, in_parts(attend, kept.of(self.norm1(x)), width))
        kept = Kept.draw(self.ffn.dropout_layer, x)
        return kept.add(x, in_parts(self.ffn.layers, kept.of(self.norm2(x)), width))


def in_parts(branch: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """``branch(x)``, some samples after the others where memory would be fetched anew.

    A CPU's allocator asks the system for each tensor of more than 32 MiB and gives it
    back at once, and to fetch such memory takes as long as to multiply into it.

    Args:
        branch: treats samples apart.
        x: ``(B, N, C)``.
        width: channels of the widest tensor within the branch.
    """
    if x.device.type != 'cpu':
        return branch(x)
    samples = max(1, _CPU_BYTES // (x.shape[1] * width * x.itemsize))
    if samples >= len(x):
        return branch(x)
    return torch.cat([branch(part) for part in x.split(samples)])


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
        side, msa = self.window_size, self.w_msa
        shift = self.shift_size if min(hw_shape) != side or self.pad_small_map else 0
        layout = window_layout(tuple(hw_shape), side, shift, query.device)
        if layout.holes is None:  # one width of channels to bring in order, not three
            qkv = msa.qkv(to_windows(query, layout))
        else:
            qkv = msa.qkv(query)
            bias = None if msa.qkv.bias is None else msa.qkv.bias.to(qkv.dtype)
            qkv = to_windows(qkv, layout, bias)
        bias = self._bias()[None]
        if shift:
            filled = tuple(-(-length // side) * side for length in hw_shape)
            bias = bias + _shift_mask(filled, side, shift, query.device)
        windows = qkv.unflatten(1, (-1, side**2)).flatten(0, 1)
        x = attend_in_windows(windows.unflatten(-1, (3, msa.num_heads, -1)), bias)
        x = x.flatten(2).unflatten(0, (len(query), -1)).flatten(1, 2)
        return msa.proj(from_windows(x, layout))

    def _bias(self) -> Tensor:
        """Relative position bias, ``(heads, N, N)``."""
        msa = self.w_msa
        count = self.window_size**2
        index = msa.relative_position_index.flatten()
        bias = msa.relative_position_bias_table.index_select(0, index)
        return bias.view(count, count, -1).permute(2, 0, 1)


@lru_cache(maxsize=64)
def _shift_mask(
    hw_shape: tuple[int, int], side: int, shift: int, device: torch.device
) -> Tensor:
    """Minus infinity between parts that a shift brought together, ``(nW, 1, N, N)``.

    MMPretrain has -100 there. Its exponential is a denormal number, which products of
    matrices on a CPU take many times as long for, and which changes no sum.
    """
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        mask = ShiftWindowMSA.get_attn_mask(hw_shape, side, shift, device=device)
        return mask.masked_fill_(mask != 0, float('-inf'))[:, None]
