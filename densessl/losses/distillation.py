"""Cross-entropy from a teacher to a student over ``K`` prototypes, in chunks.

Both sides come as bottleneck vectors and the last, weight-normalised layer. The logits,
``K`` wide, exist for a few rows at a time only, and the gradient is computed in the
same pass, so that memory does not grow with rows x ``K``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import rows_at_once


class LastLayer(Protocol):
    """A weight-normalised layer without bias, ``W = g v / |v|`` row by row.

    Attributes:
        weight_v: ``(K, d)`` directions.
        weight_g: ``(K, 1)`` lengths.
    """

    weight_v: Tensor
    weight_g: Tensor


class Distillation(NamedTuple):
    """Result of :func:`distillation_loss`; scalars, in nats.

    Attributes:
        loss: weighted cross-entropy, the term to minimise.
        teacher_entropy: mean entropy of the teacher's rows, weighted like the loss.
        kl: mean divergence of the student from the teacher,
            ``loss / sum(weights) - teacher_entropy``. Both monitors are detached, and
            zero where no row has a partner.
    """

    loss: Tensor
    teacher_entropy: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Pairs:
    """The teacher rows that each student row is compared with.

    Rows lie image by image, and a row's partners belong to its own image.

    Attributes:
        weight: ``(n, T)``, what each pair counts in the loss; 0 for no pair.
        index: ``(n, T)`` long, the partners among all teacher rows; None where row
            ``r`` has row ``r`` as its only one (``T == 1``, ``m == n``).
        rows: how many student rows each image has, ``sum(rows) == n``.
        queries: how many teacher rows each image has, ``sum(queries) == m``.
    """

    weight: Tensor
    index: Tensor | None
    rows: list[int]
    queries: list[int]

    @classmethod
    def shared(cls, weights: Tensor, images: int) -> Pairs:
        """The same in every image, averaged over images.

        Args:
            weights: ``(R, Q)``, each student row with each teacher row.
            images: number of images ``B``; ``n = B R`` and ``m = B Q``.
        """
        rows, queries = weights.shape
        start = torch.arange(images, device=weights.device) * queries
        partner = torch.arange(queries, device=weights.device)
        index = (start[:, None, None] + partner).expand(-1, rows, -1)
        return cls(
            (weights / images).repeat(images, 1),
            index.flatten(0, 1),
            [rows] * images,
            [queries] * images,
        )

    @classmethod
    def aligned(cls, weights: Tensor, images: int) -> Pairs:
        """Row ``r`` with row ``r``, averaged over images; ``weights`` ``(R,)``."""
        weight = (weights / images).repeat(images)[:, None]
        return cls(weight, None, [len(weights)] * images, [len(weights)] * images)

    @classmethod
    def matched(
        cls, index: Tensor, weights: Tensor, queries: int
    ) -> tuple[Pairs, Tensor, Tensor]:
        """Partners of each image's own, averaged over images; the idle rows dropped.

        Args:
            index: ``(B, R, T)`` long, partners among the image's teacher rows.
            weights: ``(B, R, T)``.
            queries: teacher rows ``Q`` an image.

        Returns:
            The pairs, and which rows they are about, those with a weight: ``(n,)`` of
            the ``B R`` rows and ``(m,)`` of the ``B Q``, long, in their order. The
            first image's first row stays in any case.
        """
        kept = weights.sum(2) > 0
        used = weights.new_zeros(len(weights), queries)
        used = used.scatter_add_(1, index.flatten(1), weights.flatten(1)) > 0
        kept[0, 0] = True  # a graph, even of nothing
        used[0].index_fill_(0, index[0, 0, :1], True)
        counts = used.sum(1)
        # a GPU is waited for once, here, and not for each set of rows
        rows, used_rows = torch.stack([kept.sum(1), counts]).tolist()
        kept = kept.flatten().nonzero_static(size=sum(rows)).squeeze(1)
        # where each teacher row went, and for an empty pair any row of its image
        place = (used.flatten().cumsum(0) - 1).unflatten(0, used.shape)
        partner = place.gather(1, index.flatten(1)).unflatten(1, index.shape[1:])
        first = (counts.cumsum(0) - counts)[:, None, None]
        partner = torch.where(weights > 0, partner, first)
        used = used.flatten().nonzero_static(size=sum(used_rows)).squeeze(1)
        pairs = cls(
            (weights / len(weights)).flatten(0, 1).index_select(0, kept),
            partner.flatten(0, 1).index_select(0, kept),
            rows,
            used_rows,
        )
        return pairs, kept, used

    def chunks(self, max_rows: int) -> Iterator[tuple[slice, slice]]:
        """Whole images, at least one, with at most ``max_rows`` rows of either side."""
        start, end = [0, 0], [0, 0]
        for counts in zip(self.rows, self.queries, strict=True):
            grown = [e + n for e, n in zip(end, counts, strict=True)]
            if (
                start != end
                and max(grown[0] - start[0], grown[1] - start[1]) > max_rows
            ):
                yield slice(start[0], end[0]), slice(start[1], end[1])
                start = end
            end = grown
        if end[0] > start[0]:
            yield slice(start[0], end[0]), slice(start[1], end[1])


def distillation_loss(
    student: Tensor,
    student_layer: LastLayer,
    teacher: Tensor,
    teacher_layer: LastLayer,
    center: Tensor,
    pairs: Pairs,
    *,
    student_temp: float,
    teacher_temp: float,
    chunk_bytes: int | None = None,
) -> Distillation:
    """Weighted sum over pairs of rows of ``H(P_t, P_s)``.

    ``L = sum_(r,t) w[r,t] H(P_t[index[r,t]], P_s[r])`` with
    ``H(p, q) = -sum_k p_k log q_k``, ``P_s = softmax(W_s u / tau_s)`` and
    ``P_t = softmax((W_t u - c) / tau_t)`` (DINO, arXiv:2104.14294, Eqs. 1-3; SelfPatch,
    CVPR 2022, Eqs. 1 and 7; EsViT, arXiv:2106.09785, Eqs. 2-3). Computed in float32 or
    wider, also under autocast. There a GPU's tensor cores multiply (TF32: factors with
    10 bits behind the point, sums in float32); without autocast they do not.

    Args:
        student: ``(n, d)`` rows: views or tokens, image by image.
        student_layer: the student's last layer, ``K`` outputs.
        teacher: ``(m, d)``, image by image; no gradient flows into it.
        teacher_layer: the teacher's last layer; no gradient flows into it.
        center: ``(K,)`` centre of the teacher's logits.
        pairs: which rows are compared, and what each pair counts.
        student_temp: temperature of the student, > 0.
        teacher_temp: temperature of the teacher, > 0.
        chunk_bytes: bound on one tensor of logits (the teacher's: at least those of one
            image); see :func:`densessl.losses.chunks.rows_at_once`.

    Raises:
        ValueError: shapes disagree.
    """
    v_s, v_t = student_layer.weight_v, teacher_layer.weight_v
    if (
        len(student) != len(pairs.weight)
        or len(student) != sum(pairs.rows)
        or len(teacher) != sum(pairs.queries)
        or teacher.shape[1:] != student.shape[1:]
        or v_s.shape != v_t.shape
        or center.shape != v_t.shape[:1]
    ):
        raise ValueError(
            f'distillation_loss: shapes disagree: student {tuple(student.shape)}, '
            f'teacher {tuple(teacher.shape)}, pairs {tuple(pairs.weight.shape)} of '
            f'{sum(pairs.rows)} and {sum(pairs.queries)} rows, last layers '
            f'{tuple(v_s.shape)} and {tuple(v_t.shape)}, centre {tuple(center.shape)}'
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    max_rows = rows_at_once(student.to(dtype), len(v_s), chunk_bytes)
    device = student.device.type
    tf32 = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False), _products_in_tf32(tf32):
        loss, entropy = _ChunkedCrossEntropy.apply(
            student.to(dtype),
            v_s.to(dtype),
            student_layer.weight_g.to(dtype),
            teacher.detach().to(dtype),
            v_t.detach().to(dtype),
            teacher_layer.weight_g.detach().to(dtype),
            center.to(dtype),
            pairs,
            student_temp,
            teacher_temp,
            max_rows,
        )
        # mean over pairs; without any pair all three are zero
        mass = pairs.weight.sum().clamp_min(torch.finfo(pairs.weight.dtype).tiny)
        entropy = entropy / mass
        kl = loss.detach() / mass - entropy
    return Distillation(loss, entropy, kl)


@contextmanager
def _products_in_tf32(wanted: bool) -> Iterator[None]:
    """Within, a GPU's float32 products may use its tensor cores."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = 'tf32'
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and all gradients in one pass over chunks of rows.

    With ``mixed[r] = sum_t w[r,t] P_t[index[r,t]]`` the loss is ``-<mixed, log P_s>``.
    For a scalar loss the gradient of the logits, ``(n_r P_s - mixed) / tau_s`` with
    ``n_r = sum_t w[r,t]``, needs nothing of what comes later but a factor; it is
    therefore taken while the chunk's probabilities are at hand.

    Logits are ``s_k <v_k, u>`` with ``s = g / |v|``. With ``A = grad^T u`` the gradient
    of row ``k`` is ``<A_k, v_k> / |v_k|`` for ``g`` and, its part along ``v`` removed,
    ``s_k (A_k - <A_k, v_k> v_k / |v_k|^2)`` for ``v``.
    """

    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        v_s: Tensor,
        g_s: Tensor,
        teacher: Tensor,
        v_t: Tensor,
        g_t: Tensor,
        center: Tensor,
        pairs: Pairs,
        student_temp: float,
        teacher_temp: float,
        max_rows: int,
    ) -> tuple[Tensor, Tensor]:
        need_rows, need_v, need_g = ctx.needs_input_grad[:3]
        weight, index = pairs.weight.to(student.dtype), pairs.index
        mass = weight.sum(1)  # n_r
        query_mass = mass
        if index is not None:
            query_mass = weight.new_zeros(len(teacher))
            query_mass.index_add_(0, index.flatten(), weight.flatten())
        norm = v_s.norm(dim=1).clamp_min(1e-12)
        scale = g_s.squeeze(1) / norm / student_temp
        norm_t = v_t.norm(dim=1).clamp_min(1e-12)
        scale_t = g_t.squeeze(1) / norm_t / teacher_temp
        shift = -center / teacher_temp
        loss = student.new_zeros(())
        entropy = student.new_zeros(())
        grad_rows = torch.zeros_like(student) if need_rows else None
        along_rows = torch.empty_like(v_s) if need_v or need_g else None  # A
        beta = 0  # the first product overwrites what the memory held

        for rows, queries in pairs.chunks(max_rows):
            log_t = (teacher[queries] @ v_t.T).mul_(scale_t).add_(shift)  # (q, K)
            log_t = _log_softmax(log_t)
            target = log_t.exp()
            log_t.mul_(query_mass[queries, None])
            entropy -= torch.dot(target.flatten(), log_t.flatten())
            del log_t
            for start in range(rows.start, rows.stop, max_rows):
                part = slice(start, min(start + max_rows, rows.stop))
                log_p = _log_softmax((student[part] @ v_s.T).mul_(scale))  # (r, K)
                if index is None:
                    mixed = target[part.start - rows.start : part.stop - rows.start]
                    mixed.mul_(weight[part])
                else:
                    mixed = F.embedding_bag(
                        index[part] - queries.start,
                        target,
                        mode='sum',
                        per_sample_weights=weight[part],
                    )
                loss -= torch.dot(log_p.flatten(), mixed.flatten())
                if not (need_rows or need_v or need_g):
                    continue
                # the gradient's negative, in one pass
                mixed.addcmul_(log_p.exp_(), mass[part, None], value=-1)
                if along_rows is not None:
                    along_rows.addmm_(mixed.T, student[part], beta=beta, alpha=-1)
                    beta = 1
                if need_rows:
                    torch.mm(mixed.mul_(scale), v_s, out=grad_rows[part])
        if need_rows:
            grad_rows.neg_()

        ctx.save_for_backward(v_s, norm, scale)
        ctx.student_temp = student_temp
        ctx.grads = grad_rows, along_rows
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _grad_entropy: Tensor):
        if ctx.grads is None:
            raise RuntimeError(
                'distillation_loss: a second backward pass; compute the loss again'
            )
        # Worked on in place and given away: no second K x d at the memory's peak.
        (grad_rows, grad_v), ctx.grads = ctx.grads, None
        grad_g = None
        if grad_v is not None:
            v, norm, scale = ctx.saved_tensors
            grad_g = v.new_empty(len(v))
            _through_norm_(grad_v, v, norm, scale * grad_loss, grad_g)
            grad_g = grad_g[:, None] * (grad_loss / ctx.student_temp)
        if grad_rows is not None:
            grad_rows *= grad_loss
        return grad_rows, grad_v, grad_g, *[None] * 8


def _through_norm_(
    along: Tensor, v: Tensor, norm: Tensor, scale: Tensor, inner: Tensor
) -> None:
    """Turn ``A`` into the gradient of ``v`` in place; ``inner`` takes <A, v> / |v|."""
    rows = 4096 if v.device.type == 'cpu' else len(v)  # that stay in a CPU's cache
    tensors = (t.split(rows) for t in (along, v, norm, scale, inner))
    for a, direction, length, s, dot in zip(*tensors, strict=True):
        torch.div(_row_dot(a, direction), length, out=dot)
        a.addcmul_((dot / length)[:, None], direction, value=-1).mul_(s[:, None])


def _log_softmax(logits: Tensor) -> Tensor:
    """``log_softmax`` over the last axis that writes into ``logits``."""
    return torch.log_softmax(logits, -1, out=logits)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum_k a[r, k] b[r, k]``, ``(r,)``, without a copy."""
    return torch.einsum('rk,rk->r', a, b)
