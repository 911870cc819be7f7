"""Sinkhorn-Knopp and me-max against matrices in float64."""

import math

import pytest
import torch

from densessl.losses import assigned_counts, entropy, mean_prediction, sinkhorn_center


def plain_sinkhorn(logits, temp, rounds):
    """Columns, then rows of the matrix itself, as LOCA states it."""
    q = (logits.double() / temp).softmax(1)
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def unit_logits(n, k, width=8, seed=0):
    """Cosines of rows with prototypes, as a projector gives them."""
    g = torch.Generator().manual_seed(seed)
    rows, layer = (torch.randn(m, width, generator=g) for m in (n, k))
    return torch.nn.functional.normalize(rows), torch.nn.functional.normalize(layer)


@pytest.mark.parametrize('rounds', [0, 1, 3, 10])
@pytest.mark.parametrize('temp', [0.05, 0.5])
def test_center_gives_the_matrix_of_the_algorithm(rounds, temp):
    rows, layer = unit_logits(50, 7)
    expected = plain_sinkhorn(rows @ layer.T, temp, rounds)
    center = sinkhorn_center(rows, lambda x: x @ layer.T, temp, rounds)
    found = ((rows @ layer.T - center) / temp).softmax(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    if rounds == 0:
        assert center.eq(0).all()


def test_rows_sum_to_one_and_columns_become_equal():
    rows, layer = unit_logits(60, 6)
    center = sinkhorn_center(rows, lambda x: x @ layer.T, 0.05, 300)
    q = ((rows @ layer.T - center) / 0.05).softmax(1)
    torch.testing.assert_close(q.sum(1), torch.ones(60))
    torch.testing.assert_close(q.sum(0), torch.full((6,), 10.0), rtol=1e-3, atol=0)
    plain = (rows @ layer.T / 0.05).softmax(1).sum(0)
    assert plain.max() / plain.min() > 2  # far from equal without


def test_equal_rows_are_spread_evenly():
    # all rows prefer one prototype: every target becomes uniform
    rows = torch.eye(4)[:1].expand(30, -1)
    center = sinkhorn_center(rows, lambda x: x, 0.05)
    torch.testing.assert_close(
        ((rows - center) / 0.05).softmax(1), torch.full((30, 4), 0.25)
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_also_under_autocast(dtype):
    torch.manual_seed(0)
    rows = (100 * torch.randn(40, 5)).to(dtype)  # +-6000 after the temperature
    with torch.autocast('cpu', torch.bfloat16):
        center = sinkhorn_center(rows, lambda x: x, 0.05)
        assert center.dtype == torch.float32 and center.isfinite().all()
        p = mean_prediction(rows, lambda x: x, 0.05)
    assert p.dtype == torch.float32 and math.isclose(p.sum(), 1, rel_tol=1e-5)


def test_chunks_and_ranks_make_no_difference():
    rows, layer = unit_logits(37, 6)
    rows, layer = rows.double(), layer.double()
    whole = sinkhorn_center(rows, lambda x: x @ layer.T, 0.05)
    one_row = dict(chunk_bytes=6 * 8)
    chunked = sinkhorn_center(rows, lambda x: x @ layer.T, 0.05, **one_row)
    torch.testing.assert_close(chunked, whole)

    # a rank with the first 20 rows; the others' sums come by the callable
    others, state = rows[20:], torch.zeros(6).double()

    def add_others(columns):
        columns += (others @ layer.T / 0.05 + state).softmax(1).sum(0)
        state.sub_(columns.log())

    shared = sinkhorn_center(
        rows[:20], lambda x: x @ layer.T, 0.05, all_reduce=add_others
    )
    torch.testing.assert_close(shared, whole)


def test_counts_of_the_most_probable():
    rows, layer = unit_logits(50, 7)
    center = torch.linspace(-0.3, 0.3, 7)
    q = ((rows @ layer.T - center) / 0.05).softmax(1)
    expected = [int((q.argmax(1) == k).sum()) for k in range(7)]
    for chunk in (None, 7 * 4 * 3):
        found = assigned_counts(rows, lambda x: x @ layer.T, center, chunk_bytes=chunk)
        assert found.tolist() == expected


@pytest.mark.parametrize('chunk_bytes', [None, 1, 7 * 8 * 4])
def test_mean_prediction_with_its_gradients(chunk_bytes):
    rows, layer = (x.double().requires_grad_() for x in unit_logits(13, 7))
    p = mean_prediction(rows, lambda x: x @ layer.T, 0.1, chunk_bytes=chunk_bytes)
    expected = (rows @ layer.T / 0.1).softmax(1).mean(0)
    torch.testing.assert_close(p, expected)
    wanted = torch.autograd.grad(-(expected * expected.log()).sum(), (rows, layer))
    found = torch.autograd.grad(entropy(p), (rows, layer))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_entropy_of_known_distributions():
    uniform = torch.full((8,), 0.125)
    assert math.isclose(entropy(uniform), math.log(8), rel_tol=1e-6)
    point = torch.eye(8)[0].requires_grad_()
    value = entropy(point)
    value.backward()
    assert value == 0 and point.grad.isfinite().all()
