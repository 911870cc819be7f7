"""What rooms hand to each other: a backbone's tokens, a branch's view features."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """Output of a backbone for ``B`` images of one size.

    Attributes:
        patches: ``(B, N, D)`` patch tokens in raster order.
        grid: ``(h, w)``, rows and columns of the patch grid; ``h * w == N`` unless
            tokens were dropped.
        cls: ``(B, D)`` class token, or None for a backbone without one.
        extra: ``(B, M, D)`` extra tokens that were handed in, or None.
    """

    patches: Tensor
    grid: tuple[int, int]
    cls: Tensor | None = None
    extra: Tensor | None = None


@dataclass(frozen=True)
class ViewFeatures:
    """What one branch, student or teacher, says of the views of a batch.

    Views come in the recipe's order; a branch may have seen only the roles that
    were asked of it (the teacher of DINO sees the global views alone).

    Attributes:
        pooled: ``(V, B, D)``, one representation per view the branch has seen.
        tokens: per role ``(v, B, N, D)`` patch tokens as the backbone gave them.
        grids: per role ``(h, w)``.
        neck: the branch's own neck, for normalising or aggregating tokens.
        projectors: the branch's own projectors, by head name.
    """

    pooled: Tensor
    tokens: dict[str, Tensor]
    grids: dict[str, tuple[int, int]]
    neck: nn.Module
    projectors: dict[str, nn.Module] = field(default_factory=dict)
