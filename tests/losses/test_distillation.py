"""The chunked loss against equations written out independently in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from densessl.losses import Pairs, distillation, distillation_loss


class Layer(NamedTuple):
    weight_v: Tensor
    weight_g: Tensor


def leaves_of(args) -> tuple[Tensor, Tensor, Tensor]:
    return args['student'], *args['student_layer']


def plain_loss(student, own, teacher, other, center, pairs, tau_s, tau_t) -> Tensor:
    """The papers' equation with explicit loops over rows and their partners."""
    w_s, w_t = (g * v / v.norm(dim=1, keepdim=True) for v, g in (own, other))
    log_p = ((student @ w_s.T) / tau_s).log_softmax(-1)
    target = ((teacher @ w_t.T - center) / tau_t).softmax(-1).detach()
    total = 0.0
    for r, weights in enumerate(pairs.weight):
        for t, weight in enumerate(weights):
            q = r if pairs.index is None else pairs.index[r, t]
            total = total - weight * (target[q] * log_p[r]).sum()
    return total


KINDS = ('shared', 'aligned', 'matched')


def problem(
    images=3, rows=4, queries=2, width=5, outputs=7, dtype=torch.float64, kind='shared'
):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    if kind == 'shared':
        weights = torch.rand(rows, queries, generator=g, dtype=dtype)
        pairs = Pairs.shared(weights, images)
    elif kind == 'aligned':
        queries = rows
        pairs = Pairs.aligned(torch.rand(rows, generator=g, dtype=dtype), images)
    else:
        # two partners a row, a third of the pairs empty, one image without any
        index = torch.randint(0, queries, (images, rows, 2), generator=g)
        weights = torch.rand(images, rows, 2, generator=g, dtype=dtype)
        weights[torch.rand(images, rows, 2, generator=g) < 0.3] = 0
        weights[1] = 0
        pairs, kept, used = Pairs.matched(index, weights, queries)
    student = random(images, rows, width)
    teacher = random(images, queries, width)
    return dict(
        student=student.flatten(0, 1)[kept if kind == 'matched' else slice(None)]
        .clone()
        .requires_grad_(),
        student_layer=Layer(
            random(outputs, width).requires_grad_(), random(outputs, 1).requires_grad_()
        ),
        teacher=teacher.flatten(0, 1)[used if kind == 'matched' else slice(None)],
        teacher_layer=Layer(random(outputs, width), random(outputs, 1)),
        center=random(outputs),
        pairs=pairs,
    )


TEMPS = dict(student_temp=0.3, teacher_temp=0.2)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('chunk_bytes', [1, 500, 2**20])
def test_equals_the_equation_and_its_gradient(kind, chunk_bytes):
    args = problem(kind=kind)
    leaves = leaves_of(args)
    expected = plain_loss(*args.values(), *TEMPS.values())
    expected_grads = torch.autograd.grad(expected, leaves)
    result = distillation_loss(**args, **TEMPS, chunk_bytes=chunk_bytes)
    grads = torch.autograd.grad(2.5 * result.loss, leaves)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, 2.5 * want, rtol=1e-10, atol=1e-12)


def test_matched_pairs_are_those_with_a_weight():
    index = torch.tensor([[[0, 3], [1, 2]], [[2, 2], [0, 1]], [[0, 0], [0, 0]]])
    weights = torch.tensor(
        [[[0, 0.5], [0, 0]], [[0.25, 0.5], [0, 0.125]], [[0.0, 0], [0, 0]]]
    ).double()
    pairs, kept, used = Pairs.matched(index, weights, queries=4)
    assert kept.tolist() == [0, 2, 3]  # of 2 rows an image
    # image 0: 3 is matched, 0 stays in any case; image 1: 1 and 2
    assert used.tolist() == [0, 3, 5, 6]  # of 4
    assert (pairs.rows, pairs.queries) == ([1, 2, 0], [2, 2, 0])
    torch.testing.assert_close(3 * pairs.weight, weights.flatten(0, 1)[kept])
    full = pairs.weight > 0
    assert pairs.index[full].tolist() == [1, 3, 3, 2]


def test_nothing_to_compare_costs_nothing():
    index = torch.zeros(2, 3, 1, dtype=torch.long)
    pairs, kept, used = Pairs.matched(index, torch.zeros(2, 3, 1).double(), 4)
    args = problem(images=2, rows=3, queries=4)
    args['student'] = args['student'].detach()[kept]
    args['student'].requires_grad_()
    args['teacher'] = args['teacher'][used]
    args['pairs'] = pairs
    result = distillation_loss(**args, **TEMPS)
    result.loss.backward()
    assert (result.loss, result.kl, result.teacher_entropy) == (0, 0, 0)
    assert args['student'].grad.eq(0).all()
    assert args['student_layer'].weight_v.grad.eq(0).all()


def test_no_logits_of_rows_without_a_partner(monkeypatch):
    rows = []
    softmax = torch.log_softmax

    def count(logits, *args, **kwargs):
        rows.append(len(logits))
        return softmax(logits, *args, **kwargs)

    monkeypatch.setattr(torch, 'log_softmax', count)
    args = problem(images=4, rows=50, queries=20, kind='matched')
    distillation_loss(**args, **TEMPS, chunk_bytes=60 * 7 * 8)  # 60 rows: an image
    teacher, student = rows[::2], rows[1::2]
    assert sum(student) == len(args['student']) < 4 * 50
    assert sum(teacher) == len(args['teacher']) < 4 * 20
    assert len(student) == 3  # images, one of them without a match


def test_chunked_equals_unchunked_in_float32():
    args = problem(images=8, rows=10, width=16, outputs=501, dtype=torch.float32)
    leaves = leaves_of(args)
    whole = distillation_loss(**args, **TEMPS).loss
    parts = distillation_loss(**args, **TEMPS, chunk_bytes=1).loss
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(parts, leaves),
        torch.autograd.grad(whole, leaves),
        strict=True,
    ):
        assert (a - b).norm() / b.norm() < 5e-6  # rounding


def test_flat_student_costs_log_k():  # H(p, uniform) = log K whatever p is
    args = problem(outputs=16)
    args['student_layer'] = Layer(torch.randn(16, 5).double(), torch.zeros(16, 1))
    args['pairs'] = Pairs.shared(torch.full((4, 2), 1 / 8).double(), 3)
    result = distillation_loss(**args, **TEMPS)
    assert math.isclose(result.loss.item(), math.log(16), rel_tol=1e-12)


def test_equal_branches_leave_only_entropy():
    args = problem(kind='aligned')
    args['teacher'] = args['student'].detach()
    args['teacher_layer'] = Layer(*(x.detach() for x in args['student_layer']))
    args['center'] = torch.zeros_like(args['center'])
    args['pairs'] = Pairs.aligned(torch.full((4,), 0.25, dtype=torch.float64), 3)
    result = distillation_loss(**args, student_temp=0.2, teacher_temp=0.2)
    assert abs(result.kl) < 1e-12
    torch.testing.assert_close(result.loss, result.teacher_entropy)
    # at equal temperatures the gradient of the rows vanishes as well
    (grad,) = torch.autograd.grad(result.loss, args['student'])
    assert grad.abs().max() < 1e-12


def test_single_pair_gradient_of_the_logits():
    # dL/dz = (softmax(z / tau) - p) / tau, seen through an identity last layer
    z = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    eye = Layer(torch.eye(6).double(), torch.ones(6, 1).double())
    t = torch.randn(1, 6, dtype=torch.float64)
    one = Pairs.aligned(torch.ones(1, dtype=torch.float64), 1)
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


@pytest.mark.parametrize('mixed', [True, False])
def test_tensor_cores_multiply_under_autocast_alone(mixed, monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []
    log_softmax = distillation._log_softmax

    def watched(logits):
        seen.append(matmul.fp32_precision)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return log_softmax(logits)

    monkeypatch.setattr(distillation, '_log_softmax', watched)
    before = matmul.fp32_precision
    args = problem(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=mixed):
        distillation_loss(**args, **TEMPS)
        assert matmul.fp32_precision == before
        with pytest.raises(KeyboardInterrupt):
            distillation_loss(**args, **TEMPS)
    assert seen == ['tf32' if mixed else before] * 3 and before != 'tf32'
    assert matmul.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif('not torch.cuda.is_available()', reason='needs a CUDA device')
def test_loss_on_tensor_cores_is_close():
    args = problem(images=4, rows=64, width=256, outputs=4096, dtype=torch.float32)
    expected = distillation_loss(**args, **TEMPS).loss
    moved = {
        key: value.cuda() if torch.is_tensor(value) else value
        for key, value in args.items()
    }
    for side in ('student_layer', 'teacher_layer'):
        moved[side] = Layer(*(x.detach().cuda() for x in args[side]))
    pairs = args['pairs']
    moved['pairs'] = Pairs(
        pairs.weight.cuda(), pairs.index.cuda(), pairs.rows, pairs.queries
    )
    with torch.autocast('cuda', dtype=torch.bfloat16):
        loss = distillation_loss(**moved, **TEMPS).loss
    torch.testing.assert_close(loss.cpu(), expected, rtol=2e-3, atol=0)


def test_shapes_that_disagree_are_named():
    args = problem()
    args['pairs'] = Pairs.shared(torch.ones(3, 2), 3)
    with pytest.raises(ValueError, match='shapes disagree'):
        distillation_loss(**args, **TEMPS)


def test_frozen_weight_needs_no_gradient():
    args = problem()
    args['student_layer'] = Layer(*(x.detach() for x in args['student_layer']))
    distillation_loss(**args, **TEMPS).loss.backward()
    assert args['student'].grad.abs().sum() > 0


def test_a_second_backward_is_refused():
    args = problem()
    loss = distillation_loss(**args, **TEMPS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='second backward'):
        loss.backward()
