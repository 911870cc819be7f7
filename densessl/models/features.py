"""What rooms hand to each other: a backbone's tokens, a branch's view features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """Output of a backbone for ``B`` images of one size.

    Attributes:
        patches: ``(B, N, D)`` patch tokens in raster order.
        grid: ``(h, w)``, rows and columns of the patch grid; ``h * w == N`` unless
            tokens were dropped.
        cls: ``(B, D)`` class token, or None for a backbone without one.
        references: ``(B, M, D)`` reference tokens that were handed in, or None.
    """

    patches: Tensor
    grid: tuple[int, int]
    cls: Tensor | None = None
    references: Tensor | None = None


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
        kept: ``(v, B, N)`` raster index of each token, for roles that lost patches.
        references: ``(v, B, M, D)`` reference tokens, for roles that carry them.
        places: where the views of a role stand among all views of the batch.
    """

    pooled: Tensor
    tokens: dict[str, Tensor]
    grids: dict[str, tuple[int, int]]
    neck: nn.Module
    projectors: dict[str, nn.Module] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    references: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, slice] = field(default_factory=dict)

    def by_image(self, roles: Iterable[str] | None = None) -> Tensor:
        """Tokens of the views of some roles, or of all, ``(B, M, D)``."""
        roles = self.tokens if roles is None else roles
        return torch.cat([by_image(self.tokens[role]) for role in roles], 1)

    def pooled_of(self, role: str) -> Tensor:
        """Representations of the views of a role, ``(v, B, D)``."""
        counts = [len(tokens) for tokens in self.tokens.values()]
        return self.pooled.split(counts)[list(self.tokens).index(role)]


def by_image(tokens: Tensor) -> Tensor:
    """``(v, B, N, D)`` -> ``(B, v * N, D)``."""
    return tokens.transpose(0, 1).flatten(1, 2)
