"""Schedules at their first, middle and last step, written out by hand."""

import math

import pytest

from densessl.engine.hooks.schedule import learning_rate
from densessl.errors import DenseSSLError
from densessl.schedules import LossWeight, Progress, Temperature, cosine


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


def test_loss_weight():
    late = LossWeight.of(dict(end=0.8, start_epoch=2, fade_epochs=4))
    assert late.moves
    expected = {0: 0, 19: 0, 20: 0, 30: 0.2, 45: 0.5, 59: 0.78, 60: 0.8, 99: 0.8}
    for step, weight in expected.items():
        assert late.at(Progress(step, 100, 10)) == pytest.approx(weight)
    jump = LossWeight.of(dict(end=3, start_epoch=1.5))
    assert [jump.at(Progress(s, 100, 10)) for s in (14, 15)] == [0, 3]
    for constant in (LossWeight.of(0.1), LossWeight.of(dict(end=0.1))):
        assert not constant.moves
        assert constant.at(Progress(0, 1, 1)) == constant.at(Progress(7, 9, 3)) == 0.1
    assert not LossWeight.of(dict(end=0, start_epoch=3)).moves


@pytest.mark.parametrize(
    ('value', 'words'),
    [
        (-0.1, 'end=-0.1; give a number of 0 or more'),
        (float('nan'), 'end=nan'),
        ('high', "end='high'"),
        (dict(end=1, start_epoch=-1), 'start_epoch=-1'),
        (dict(end=1, fade_epochs=None), 'fade_epochs=None'),
        (dict(start_epoch=1), r'found dict\(start_epoch\); give end'),
        (dict(end=1, begin=2), r'found dict\(end, begin\); give end'),
    ],
)
def test_wrong_loss_weights(value, words):
    with pytest.raises(DenseSSLError, match=f'^loss_weight: .*{words}') as caught:
        LossWeight.of(value)
    assert '\n' not in str(caught.value)


def test_loss_weight_that_never_starts():
    late = LossWeight.of(dict(end=1.0, start_epoch=10))
    assert late.at(Progress(0, 101, 10)) == 0
    with pytest.raises(DenseSSLError, match=r'start_epoch=10 never comes.* 9 epochs'):
        late.at(Progress(0, 90, 10))


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
