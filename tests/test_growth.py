"""How times grow: the fit against powers, and a measurement of a small network."""

import math

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config

from densessl.benchmark import growth
from densessl.benchmark import main as command
from densessl.benchmark.growth import AXES, fit_exponent, measure_growth
from densessl.benchmark.step import demo_batch
from densessl.errors import DenseSSLError

SIZES = dict(batch=(1, 3), views=(1, 2), prototypes=(32, 64), tokens=(32, 48))


@given(st.floats(-3, 3), st.floats(1e-6, 1e6))
def test_a_power_is_found(power, factor):
    sizes = [1, 3, 4, 10]
    seconds = [factor * size**power for size in sizes]
    assert fit_exponent(sizes, seconds) == pytest.approx(power, abs=1e-9)


def test_least_squares_by_hand():  # logs 0, 1, 2 -> 0, 3, 3: slope 3 / 2
    e = math.e
    assert fit_exponent([1, e, e**2], [1, e**3, e**3]) == pytest.approx(1.5)


def test_what_stays_the_same_lowers_the_exponent():
    sizes = [1, 2, 4, 8]
    assert 0 < fit_exponent(sizes, [5 + n for n in sizes]) < 1
    assert fit_exponent(sizes, [n + n**2 for n in sizes]) > 1.05


@pytest.mark.parametrize(
    ('sizes', 'seconds'), [([2], [1]), ([2, 2], [1, 1]), ([1, 2], [0, 1])]
)
def test_no_line_through_that(sizes, seconds):
    with pytest.raises(ValueError, match='two sizes or more'):
        fit_exponent(sizes, seconds)


def test_what_is_measured_is_what_grows(small_config, monkeypatch):
    steps = []

    def remember(cfg, batch_size):
        out_dims = [head['out_dims'] for head in cfg.model.heads.values()]
        shapes = [
            tuple(x.shape) for x in demo_batch(cfg, batch_size)['inputs'].values()
        ]
        steps.append((shapes, set(out_dims)))
        return set_up(cfg, batch_size)

    set_up = growth.set_up
    monkeypatch.setattr(growth, 'set_up', remember)
    cfg = Config.fromfile(small_config)
    found = list(measure_growth(cfg, SIZES, steps=1))
    assert [one.axis for one in found] == list(SIZES) == list(AXES)
    assert [one.sizes for one in found] == [(1, 3), (1, 2), (32, 64), (16, 36)]
    assert all(second > 0 for one in found for second in one.seconds)
    usual = [(1, 2, 3, 32, 32), (1, 2, 3, 24, 24)]
    assert [shapes for shapes, _ in steps] == [
        usual,
        [(3, *shape[1:]) for shape in usual],
        [usual[0], (1, 1, 3, 24, 24)],
        usual,
        *[usual] * 2,
        usual,
        [(1, 2, 3, 48, 48), usual[1]],
    ]
    assert [dims for _, dims in steps] == [*[{64, 32}] * 4, {32}, {64}, *[{64, 32}] * 2]


def test_command(small_config, monkeypatch, capsys):
    monkeypatch.setattr(growth, 'AXES', dict(batch=(1, 2)))
    assert command.main(['growth', str(small_config), '--steps', '1']) == 0
    out = capsys.readouterr().out
    assert out.startswith('batch ') and 'exponent' in out and ', 2: ' in out
    assert command.main(['growth', 'no/config.py']) == 2
    assert 'no such file' in capsys.readouterr().err


def test_a_config_without_prototypes():
    cfg = Config.fromfile(ROOT / 'configs/methods/dino_vit-s16.py')
    cfg.model.heads = dict(position=dict(type='PositionHead'))
    with pytest.raises(DenseSSLError, match='position have no out_dims'):
        list(measure_growth(cfg, dict(prototypes=(1, 2))))
