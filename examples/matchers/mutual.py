"""A matcher of one's own: similarity matches that hold both ways."""

import torch
import torch.nn.functional as F

from densessl.models.matchers import Matcher, Matches, ViewTokens
from densessl.registry import TASK_UTILS


@TASK_UTILS.register_module()
class MutualMatcher(Matcher):
    """Nearest neighbours by features; they count where each is the other's nearest."""

    def __call__(self, student: ViewTokens, teacher: ViewTokens) -> Matches:
        """Match the tokens of ``v`` student views with those of one teacher view."""
        with torch.autocast(student.tokens.device.type, enabled=False):
            ours = F.normalize(student.tokens.float(), dim=-1)  # (B, v, N, D)
            theirs = F.normalize(teacher.tokens.float(), dim=-1)  # (B, 1, M, D)
            similarity = ours @ theirs.mT  # (B, v, N, M)
        index = similarity.argmax(-1)  # (B, v, N), the nearest of the teacher's
        back = similarity.argmax(-2)  # (B, v, M), the nearest of the student's
        own = torch.arange(index.shape[-1], device=index.device)
        return Matches(index, back.gather(-1, index) == own)
