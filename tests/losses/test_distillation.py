"""The chunked loss against equations written out independently in float64."""

import math

import pytest
import torch
from torch import Tensor

from densessl.losses import distillation_loss


def plain_loss(student, w_s, teacher, w_t, center, weights, tau_s, tau_t) -> Tensor:
    """The papers' equation with explicit loops over images and pairs of rows."""
    total = 0.0
    for u, v in zip(student, teacher, strict=True):
        log_p = ((u @ w_s.T) / tau_s).log_softmax(-1)
        target = ((v @ w_t.T - center) / tau_t).softmax(-1).detach()
        if weights.ndim == 1:
            weights = torch.diag(weights)
        for r in range(len(log_p)):
            for q in range(len(target)):
                total = total - weights[r, q] * (target[q] * log_p[r]).sum()
    return total / len(student)


def problem(images=3, rows=4, queries=2, width=5, outputs=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    args = dict(
        student=random(images, rows, width).requires_grad_(),
        student_weight=random(outputs, width).requires_grad_(),
        teacher=random(images, queries, width),
        teacher_weight=random(outputs, width),
        center=random(outputs),
        weights=torch.rand(rows, queries, generator=g, dtype=dtype),
    )
    return args


TEMPS = dict(student_temp=0.3, teacher_temp=0.2)


@pytest.mark.parametrize('one_to_one', [False, True])
@pytest.mark.parametrize('chunk_bytes', [1, 500, 2**20])
def test_equals_the_equation_and_its_gradient(one_to_one, chunk_bytes):
    args = problem(queries=4 if one_to_one else 2)
    if one_to_one:
        args['weights'] = args['weights'][:, 0].contiguous()
    leaves = args['student'], args['student_weight']
    expected = plain_loss(*args.values(), *TEMPS.values())
    expected_grads = torch.autograd.grad(expected, leaves)
    result = distillation_loss(**args, **TEMPS, chunk_bytes=chunk_bytes)
    grads = torch.autograd.grad(2.5 * result.loss, leaves)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, 2.5 * want, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    args = problem()
    rest = {k: v for k, v in args.items() if k not in ('student', 'student_weight')}

    def loss(student, student_weight):
        return distillation_loss(student, student_weight, **rest, **TEMPS).loss

    assert torch.autograd.gradcheck(loss, (args['student'], args['student_weight']))


def test_chunked_equals_unchunked_in_float32():
    args = problem(images=8, rows=10, width=16, outputs=501, dtype=torch.float32)
    leaves = args['student'], args['student_weight']
    whole = distillation_loss(**args, **TEMPS).loss
    parts = distillation_loss(**args, **TEMPS, chunk_bytes=1).loss
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(parts, leaves),
        torch.autograd.grad(whole, leaves),
        strict=True,
    ):
        assert (a - b).norm() / b.norm() < 1e-6


def test_flat_student_costs_log_k():  # H(p, uniform) = log K whatever p is
    args = problem(outputs=16)
    args['student_weight'] = torch.zeros_like(args['student_weight'])
    args['weights'] = args['weights'] / args['weights'].sum()
    result = distillation_loss(**args, **TEMPS)
    assert math.isclose(result.loss.item(), math.log(16), rel_tol=1e-12)


def test_equal_branches_leave_only_entropy():
    args = problem(queries=4)
    args['teacher'] = args['student'].detach()
    args['teacher_weight'] = args['student_weight'].detach()
    args['center'] = torch.zeros_like(args['center'])
    args['weights'] = torch.full((4,), 0.25, dtype=torch.float64)
    result = distillation_loss(**args, student_temp=0.2, teacher_temp=0.2)
    assert abs(result.kl) < 1e-12
    torch.testing.assert_close(result.loss, result.teacher_entropy)
    # at equal temperatures the gradient of the rows vanishes as well
    (grad,) = torch.autograd.grad(result.loss, args['student'])
    assert grad.abs().max() < 1e-12


def test_single_pair_gradient_of_the_logits():
    # dL/dz = (softmax(z / tau) - p) / tau, seen through an identity last layer
    z = torch.randn(1, 1, 6, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(6, dtype=torch.float64)
    t = torch.randn(1, 1, 6, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    loss = distillation_loss(z, eye, t, eye, torch.zeros(6).double(), one, **TEMPS).loss
    loss.backward()
    p = (t / TEMPS['teacher_temp']).softmax(-1)
    q = (z.detach() / TEMPS['student_temp']).softmax(-1)
    torch.testing.assert_close(z.grad, (q - p) / TEMPS['student_temp'])


def test_large_logits_stay_finite():
    args = problem(dtype=torch.float32)
    args['student'] = (args['student'].detach() * 1e4).requires_grad_()
    args['teacher'] = args['teacher'] * 1e4
    result = distillation_loss(**args, **TEMPS)
    result.loss.backward()
    assert result.loss.isfinite() and args['student'].grad.isfinite().all()


def test_computes_in_float32_under_autocast():
    args = problem(images=2, rows=4, width=64, outputs=512, dtype=torch.float32)
    expected = distillation_loss(**args, **TEMPS).loss
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = distillation_loss(**args, **TEMPS).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_shapes_that_disagree_are_named():
    args = problem()
    args['weights'] = args['weights'][:, :1]
    with pytest.raises(ValueError, match='shapes disagree'):
        distillation_loss(**args, **TEMPS)


def test_frozen_weight_needs_no_gradient():
    args = problem()
    args['student_weight'] = args['student_weight'].detach()
    distillation_loss(**args, **TEMPS).loss.backward()
    assert args['student'].grad.abs().sum() > 0
