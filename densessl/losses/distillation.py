"""Cross-entropy from a teacher to a student over ``K`` prototypes, in chunks.

Both sides come as unit-length bottleneck vectors and the weight of the last, linear
layer. The logits, ``K`` wide, exist for a few images at a time only, and the gradient
is computed in the same pass, so that memory does not grow with rows x ``K``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 8 * 2**20


class Distillation(NamedTuple):
    """Result of :func:`distillation_loss`; scalars, in nats.

    Attributes:
        loss: weighted cross-entropy, the term to minimise.
        teacher_entropy: mean entropy of the teacher's rows, weighted like the loss.
        kl: mean divergence of the student from the teacher,
            ``loss / sum(weights) - teacher_entropy``. Both monitors are detached.
    """

    loss: Tensor
    teacher_entropy: Tensor
    kl: Tensor


def distillation_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    weights: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> Distillation:
    """Weighted mean over images of ``H(P_t, P_s)``.

    ``L = (1/B) sum_b sum_(r,q) w[r,q] H(P_t[b,q], P_s[b,r])`` with
    ``H(p, q) = -sum_k p_k log q_k``, ``P_s = softmax(W_s u / tau_s)`` and
    ``P_t = softmax((W_t u - c) / tau_t)`` (DINO, arXiv:2104.14294, Eqs. 1-3; SelfPatch,
    CVPR 2022, Eqs. 1 and 7). Computed in float32 or wider, also under autocast.

    Args:
        student: ``(B, R, d)``, ``R`` rows an image: its views, or its tokens.
        student_weight: ``(K, d)`` weight of the student's last layer.
        teacher: ``(B, Q, d)``, no gradient flows into it.
        teacher_weight: ``(K, d)``.
        center: ``(K,)`` centre of the teacher's logits.
        weights: ``(R, Q)``, what each pair of rows counts, or ``(R,)`` where row ``r``
            pairs with row ``r`` of the teacher alone (``R == Q``).
        student_temp: temperature of the student, > 0.
        teacher_temp: temperature of the teacher, > 0.
        chunk_bytes: bound on one tensor of logits; at least one image is taken.

    Raises:
        ValueError: shapes disagree.
    """
    images, rows, width = student.shape
    queries = teacher.shape[1]
    expected = (rows, queries) if weights.ndim == 2 else (rows,)
    if (
        tuple(weights.shape) != expected
        or (weights.ndim == 1 and rows != queries)
        or teacher.shape != (images, queries, width)
        or student_weight.shape != teacher_weight.shape
        or center.shape != teacher_weight.shape[:1]
    ):
        raise ValueError(
            f'distillation_loss: shapes disagree: student {tuple(student.shape)}, '
            f'teacher {tuple(teacher.shape)}, weights {tuple(weights.shape)}, last '
            f'layers {tuple(student_weight.shape)} and {tuple(teacher_weight.shape)}, '
            f'centre {tuple(center.shape)}'
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    row_bytes = max(rows, queries) * student_weight.shape[0] * dtype.itemsize
    with torch.autocast(student.device.type, enabled=False):
        loss, entropy = _ChunkedCrossEntropy.apply(
            student.to(dtype),
            student_weight.to(dtype),
            teacher.detach().to(dtype),
            teacher_weight.detach().to(dtype),
            center.to(dtype),
            weights.to(dtype),
            student_temp,
            teacher_temp,
            max(1, chunk_bytes // row_bytes),
        )
        kl = loss.detach() / weights.sum() - entropy
    return Distillation(loss, entropy, kl)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of images.

    For a scalar loss the gradient of the logits, ``(n_r P_s - sum_q w P_t) / tau_s``
    with ``n_r = sum_q w[r,q]``, needs nothing of what comes later but a factor; it is
    therefore taken while the chunk's probabilities are at hand.
    """

    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        center: Tensor,
        weights: Tensor,
        student_temp: float,
        teacher_temp: float,
        images_per_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        need_rows, need_weight = ctx.needs_input_grad[:2]
        images = student.shape[0]
        mass = weights.sum(1) if weights.ndim == 2 else weights  # n_r, (R,)
        query_mass = weights.sum(0) if weights.ndim == 2 else weights  # (Q,)
        shift = -center / teacher_temp
        loss = student.new_zeros(())
        entropy = student.new_zeros(())
        grad_rows = torch.empty_like(student) if need_rows else None
        grad_weight = torch.zeros_like(student_weight) if need_weight else None

        for start in range(0, images, images_per_chunk):
            part = slice(start, start + images_per_chunk)
            scaled = student[part] / student_temp  # (b, R, d)
            log_p = _log_softmax(scaled @ student_weight.T)  # (b, R, K)
            log_t = teacher[part] / teacher_temp @ teacher_weight.T  # (b, Q, K)
            log_t = _log_softmax(log_t.add_(shift))
            target = log_t.exp()
            entropy -= _row_dot(target, log_t) @ query_mass
            del log_t
            if weights.ndim == 2:
                loss -= (torch.bmm(log_p, target.mT).sum(0) * weights).sum()
            else:
                loss -= _row_dot(log_p, target) @ weights
            if not (need_rows or need_weight):
                continue
            grad = log_p.exp_().mul_(mass[:, None])
            if weights.ndim == 2:
                pairs = weights.expand(len(target), -1, -1)
                grad.baddbmm_(pairs, target, alpha=-1)
            else:
                grad.sub_(target.mul_(weights[:, None]))
            if need_rows:
                grad_rows[part] = grad @ student_weight
            if need_weight:
                grad_weight.addmm_(grad.flatten(0, 1).T, scaled.flatten(0, 1))

        if need_rows:
            grad_rows /= images * student_temp
        if need_weight:
            grad_weight /= images
        ctx.save_for_backward(grad_rows, grad_weight)
        entropy = entropy / (images * weights.sum())
        ctx.mark_non_differentiable(entropy)
        return loss / images, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _grad_entropy: Tensor):
        grads = [None if g is None else g * grad_loss for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None, None, None


def _log_softmax(logits: Tensor) -> Tensor:
    """``log_softmax`` over the last axis that writes into ``logits``."""
    return torch.log_softmax(logits, -1, out=logits)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum_k a[b, r, k] b[b, r, k]`` summed over images, ``(R,)``, without a copy."""
    return torch.einsum('brk,brk->br', a, b).sum(0)
