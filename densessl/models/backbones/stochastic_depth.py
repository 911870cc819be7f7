"""Stochastic depth that spends nothing on the samples it drops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Kept(NamedTuple):
    """The samples of a batch that a residual branch counts for.

    ``x + path(branch(norm(x)))`` reads ``kept.add(x, branch(kept.of(norm(x))))`` with
    ``kept = Kept.draw(path, x)``. On a CPU the branch sees the samples that stay and no
    others; it must treat samples apart (no batch norm). Another device would have to be
    waited for before it were known how many stay: there all go through the branch, and
    a factor of 0 takes away those that are dropped.

    Attributes:
        index: ``(n,)`` places of the samples in the batch, at least one, so that a
            gradient reaches the branch; None for all.
        scale: factor of the residual, ``1 / (1 - rate)``; ``(B, 1, 1)``, 0 for samples
            that are dropped, where all go through; None for 1.
    """

    index: Tensor | None = None
    scale: float | Tensor | None = None

    @classmethod
    def draw(cls, path: nn.Module, x: Tensor, fixed: bool = False) -> Kept:
        """What a drop path of timm or MMCV keeps of ``x`` ``(B, ...)``.

        It is drawn as ``path`` itself draws it, and from the same generator.

        Args:
            path: the module; any other one drops nothing.
            x: the batch.
            fixed: whether all samples go through on a CPU too, as compiled code wants
                it, whose shapes do not change.
        """
        rate = getattr(path, 'drop_prob', 0)
        if not (path.training and rate):
            return cls()
        scale = path(x.new_ones(len(x), 1, 1))
        if fixed or x.device.type != 'cpu':
            return cls(None, scale)
        index = scale.flatten().nonzero().flatten()
        if len(index) == len(x):
            return cls(None, 1 / (1 - rate))
        if not len(index):
            return cls(index.new_zeros(1), 0.0)
        return cls(index, 1 / (1 - rate))

    def of(self, x: Tensor) -> Tensor:
        """The kept samples of ``x`` ``(B, ...)``."""
        return x if self.index is None else x.index_select(0, self.index)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``x`` ``(B, N, D)`` plus, where it counts, the scaled ``(n, N, D)``."""
        if self.index is not None:
            return x.index_add(0, self.index, residual.to(x.dtype), alpha=self.scale)
        return x + (residual if self.scale is None else residual * self.scale)
