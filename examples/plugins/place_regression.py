"""An objective of one's own: a token regresses the token at its place elsewhere."""

import torch.nn.functional as F
from torch import nn

from densessl.models.heads import Head
from densessl.models.matchers import ViewTokens, build_matcher
from densessl.registry import MODELS


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Projector or predictor."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


@MODELS.register_module()
class PlaceRegressionHead(Head):
    """``L = mean over matched tokens m of 2 - 2 cos(q(g_s(f_m)), g_t(f_n(m)))``.

    ``n(m)`` is the token of another view of ``role`` that lies nearest in the picture;
    the predictor ``q`` is the student's alone (BYOL's loss, arXiv:2006.07733, Eq. 2).
    """

    needs_geometry = True

    def __init__(self, embed_dims, *, role='global', hidden_dims=256, **options):
        super().__init__(**options)  # loss_weight
        self.role = role
        self.teacher_roles = self.student_roles = (role,)
        self.sizes = (embed_dims, hidden_dims)
        self.predictor = mlp(*self.sizes)
        self.matcher = build_matcher('geometric')

    def build_projector(self):
        """One for the student; the teacher gets a copy, which follows it."""
        return mlp(*self.sizes)

    def loss(self, student, teacher, geometry, name):
        """Scalars: the loss, and the share of tokens that are matched."""
        places, grid = geometry[:, student.places[self.role]], student.grids[self.role]
        ours = student.tokens[self.role].transpose(0, 1)  # (B, v, N, D)
        theirs = teacher.tokens[self.role].transpose(0, 1)
        own, other = student.projectors[name], teacher.projectors[name]
        predicted, target = self.predictor(own(ours)).float(), other(theirs).detach()
        total, matched, count = 0.0, 0, 0
        for i in range(ours.shape[1]):
            rest = [v for v in range(ours.shape[1]) if v != i]
            index, valid = self.matcher(
                ViewTokens(ours[:, rest].detach(), grid, places[:, rest]),
                ViewTokens(theirs[:, [i]], grid, places[:, [i]]),
            )  # (B, v - 1, N): tokens of view i, and whether they count
            rows = index.flatten(1)[..., None].expand(-1, -1, target.shape[-1])
            partner = target[:, i].gather(1, rows).unflatten(1, index.shape[1:])
            cosine = F.cosine_similarity(predicted[:, rest], partner.float(), dim=-1)
            total = total + ((2 - 2 * cosine) * valid).sum()
            matched, count = matched + valid.sum(), count + valid.numel()
        return dict(loss=total / matched.clamp_min(1), matched=matched / count)
