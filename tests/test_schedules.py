"""Schedules at their first, middle and last step, written out by hand."""

import math

import pytest

from densessl.engine.hooks.schedule import learning_rate
from densessl.errors import DenseSSLError
from densessl.schedules import Progress, Temperature, cosine


def test_cosine():
    assert cosine(0.996, 1.0, 0, 100) == pytest.approx(0.996, abs=1e-15)
    assert cosine(0.996, 1.0, 50, 100) == pytest.approx(0.998, abs=1e-15)
    assert cosine(0.996, 1.0, 25, 100) == pytest.approx(
        1 - 0.004 * (1 + math.cos(math.pi / 4)) / 2
    )
    assert cosine(0.996, 1.0, 100, 100) == 1.0


def test_temperature():
    warm = Temperature.of(dict(start=0.04, end=0.07, warmup_epochs=30))
    assert warm.at(Progress(0, 1000, 10)) == 0.04
    assert warm.at(Progress(150, 1000, 10)) == pytest.approx(0.055)
    assert warm.at(Progress(300, 1000, 10)) == 0.07
    assert Temperature.of(0.04).at(Progress(7, 1000, 10)) == 0.04
    with pytest.raises(DenseSSLError, match='greater than 0'):
        Temperature.of(0.0)


def test_learning_rate_is_dinos_table():
    # DINO builds linspace(0, peak, warmup) followed by a cosine over the rest.
    peak, end, warmup, total = 2e-3, 1e-6, 10, 100
    table = [peak * i / (warmup - 1) for i in range(warmup)]
    table += [
        end + 0.5 * (peak - end) * (1 + math.cos(math.pi * i / (total - warmup)))
        for i in range(total - warmup)
    ]
    ours = [
        learning_rate(peak, end, warmup, Progress(i, total, 10)) for i in range(total)
    ]
    assert ours == pytest.approx(table, rel=1e-12)
    assert learning_rate(peak, end, 0, Progress(0, total, 10)) == peak


def test_learning_rate_as_the_product_of_warm_up_and_cosine():
    peak, end, warmup, total = 1e-3, 1e-5, 15, 100
    for i in range(total):
        wave = end + 0.5 * (peak - end) * (1 + math.cos(math.pi * i / total))
        expected = wave * min(i / (warmup - 1), 1)
        found = learning_rate(peak, end, warmup, Progress(i, total, 10), product=True)
        assert found == pytest.approx(expected, rel=1e-12)
    assert learning_rate(peak, end, 0, Progress(0, total, 10), product=True) == peak
