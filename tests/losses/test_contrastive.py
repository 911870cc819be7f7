"""InfoNCE against closed forms and loops, in float64."""

import math

import pytest
import torch

from densessl.losses import info_nce


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def loop(query, key, negatives, temp, meets=lambda b, n: True):
    """The mean over the queries, one exponential after the other."""
    total = 0.0
    for b, (q, k) in enumerate(zip(query, key, strict=True)):
        positive = math.exp(float(q @ k) / temp)
        others = [
            math.exp(float(q @ negative) / temp)
            for n, negative in enumerate(negatives)
            if meets(b, n)
        ]
        total -= math.log(positive / (positive + sum(others)))
    return total / len(query)


def test_equal_similarities_cost_the_log_of_their_number():
    query = torch.eye(8, dtype=torch.float64)[:3]
    others = torch.eye(8, dtype=torch.float64)[3:]  # at right angles to all queries
    result = info_nce(query, others[:3], others, 0.2)
    assert float(result.loss) == pytest.approx(math.log(1 + 5), rel=1e-12)
    assert result.accuracy == 0  # a tie is no success


@pytest.mark.parametrize('temp', [0.07, 0.2, 1.0])
def test_equals_the_equation(temp):
    query, key, queue = rows(5, 6), rows(5, 6, seed=1), rows(9, 6, seed=2)
    result = info_nce(query, key, queue, temp)
    assert float(result.loss) == pytest.approx(loop(query, key, queue, temp), rel=1e-12)
    best = (query @ queue.T).amax(1)
    assert result.accuracy == ((query * key).sum(1) > best).double().mean()


def test_gradient_is_the_closed_form():
    # dL / dq = (sum over all keys of their share x key - the positive) / (tau B)
    query, key, queue = rows(4, 6).requires_grad_(), rows(4, 6, seed=1), rows(7, 6)
    info_nce(query, key, queue, 0.2).loss.backward()
    for b in range(4):
        keys = torch.cat([key[b : b + 1], queue])
        share = (keys @ query[b].detach() / 0.2).softmax(0)
        expected = (share @ keys - key[b]) / (0.2 * 4)
        torch.testing.assert_close(query.grad[b], expected)


def test_only_allowed_negatives_count():
    query, key, queue = rows(4, 6), rows(4, 6, seed=1), rows(7, 6, seed=2)
    allowed = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    result = info_nce(query, key, queue, 0.2, allowed)
    expected = loop(query, key, queue, 0.2, lambda b, n: allowed[b, n])
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    none = info_nce(query, key, queue, 0.2, torch.zeros_like(allowed))
    assert none.loss == 0 and none.accuracy == 1


def test_sets_of_queries_are_averaged():
    query, key, queue = rows(3, 4, 6), rows(3, 4, 6, seed=1), rows(3, 7, 6, seed=2)
    expected = [loop(*part, 0.2) for part in zip(query, key, queue, strict=True)]
    result = info_nce(query, key, queue, 0.2)
    assert float(result.loss) == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_is_made_in_float32_under_autocast():
    query, key, queue = rows(4, 6), rows(4, 6, seed=1), rows(7, 6, seed=2)
    low = [x.bfloat16() for x in (query, key, queue)]
    with torch.autocast('cpu', torch.bfloat16):
        result = info_nce(*low, 0.01)
    assert result.loss.dtype == torch.float32
    exact = info_nce(*(x.double() for x in low), 0.01).loss
    torch.testing.assert_close(result.loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shapes', [((2, 4), (3, 4), (5, 4)), ((2, 4), (2, 4), (5, 3))])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match='are not'):
        info_nce(*(torch.zeros(shape) for shape in shapes))
