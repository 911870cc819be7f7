"""How student tokens are matched, in a few numbers that show a collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl.models.matchers import ViewTokens


class MatchMonitor:
    """Collects the monitors of :class:`RegionHead` over pairs of views.

    Args:
        target: the teacher's views.
    """

    def __init__(self, target: ViewTokens) -> None:
        images, targets, tokens, _ = target.tokens.shape
        device = target.tokens.device
        self.histogram = torch.zeros(
            images, targets, tokens, dtype=torch.long, device=device
        )
        self.has_places = False
        # tokens, those inside, sums of distance, of its square, of the square by chance
        self.sums = torch.zeros(5, dtype=torch.double, device=device)

    def add(
        self,
        i: int,
        student: ViewTokens,
        teacher: ViewTokens,
        index: Tensor,
        counted: Tensor,
        other: Tensor,
    ) -> None:
        """Take note of the matches ``(B, v, N)`` with teacher view ``i``.

        Args:
            i: which of the teacher's views.
            student: ``v`` views.
            teacher: the view.
            index: matched tokens of ``teacher``.
            counted: which matches count.
            other: ``(v,)``, which of the student's views are not this one.
        """
        counts = torch.zeros_like(self.histogram[:, i])
        counts.scatter_add_(1, index.flatten(1), counted.flatten(1).long())
        self.histogram[:, i] += counts
        if student.geometry is None:
            return
        self.has_places = True
        # places in the teacher's view, in its tokens: (B, v, N, 2) and (M, 2)
        height, width = teacher.grid
        centers = student.geometry.token_centers(student.grid)
        inside = teacher.geometry.contains(centers) & other[:, None]
        x, y = teacher.geometry.to_view(centers).unbind(-1)
        ours = torch.stack([x * width, y * height], -1)
        place = torch.arange(height * width, device=index.device)
        theirs = torch.stack([place % width, place // width], -1) + 0.5
        square = (ours - theirs[index]).square().sum(-1)
        # dealt out at random, the same matches: E|a - b|^2 with a and b independent
        share = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
        theirs = theirs.double()
        mean, mean_square = share @ theirs, share @ theirs.square().sum(1)
        chance = ours.square().sum(-1) + mean_square[:, None, None]
        chance = chance - 2 * (ours @ mean[:, None, :, None]).squeeze(-1)
        total = other.sum() * (index.shape[0] * index.shape[2])
        self.sums += torch.stack(
            [
                total.double(),
                inside.sum().double(),
                (square.sqrt() * inside).sum().double(),
                (square * inside).sum().double(),
                (chance * inside).sum().double(),
            ]
        )

    def values(self) -> dict[str, Tensor]:
        """The monitors; those of places only where views have a geometry."""
        share = self.histogram / self.histogram.sum(-1, keepdim=True).clamp_min(1)
        matched = self.histogram.any(-1)
        perplexity = torch.special.entr(share).sum(-1).exp() * matched
        found = dict(match_perplexity=perplexity.sum() / matched.sum().clamp_min(1))
        total, inside, distance, square, chance = self.sums
        if self.has_places:
            some = inside.clamp_min(1)
            found['overlap'] = inside / total.clamp_min(1)
            found['match_distance'] = distance / some
            found['match_locality'] = 1 - square / chance.clamp_min(1e-12)
        return found
