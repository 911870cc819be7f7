"""The plain formulation is an oracle of the fast one; the benchmark times both."""

import re
import sys

import pytest
import torch
from conftest import (
    ROOT,
    build_model,
    model_config,
    optim_wrapper,
    region_config,
    views,
)
from mmengine.config import Config

from densessl.benchmark import main as command
from densessl.benchmark.step import PHASES, demo_batch, measure_step
from densessl.schedules import Progress

sys.path.insert(0, str(ROOT / 'benchmarks/reference'))
from plain import PlainStep


def assert_steps_agree(**options):
    """Three steps of our model and of the plain formulation, from the same start."""
    fast, plain = (build_model(**options) for _ in range(2))
    wrapper = optim_wrapper(fast, kind='SGD', lr=0.02)
    reference = PlainStep(plain, optim_wrapper(plain, kind='SGD', lr=0.02).optimizer)
    for step in range(3):
        fast.progress = plain.progress = Progress(step + 4, 20, 4)
        loss = fast.train_step(views(seed=step), wrapper)['loss']
        expected = reference.step(views(seed=step))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(
            value, plain.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize('border', ['wrap', 'clip'])
def test_plain_and_fast_steps_agree(border):
    heads = model_config()['heads']
    heads['selfpatch'].update(border=border, top_k=3)
    assert_steps_agree(heads=heads)


@pytest.mark.parametrize('matching', ['similarity', 'geometric'])
@pytest.mark.parametrize('average', [True, False])
def test_plain_and_fast_steps_agree_on_regions(matching, average):
    options = region_config(matching, average_losses=average)
    options['heads']['view'].update(loss_weight=0.7)
    assert_steps_agree(**options)


def test_measured_step_has_all_phases(small_config):
    times = measure_step(Config.fromfile(small_config), 2, steps=1, warmup=1)
    phases = sum(times.milliseconds[phase] for phase in PHASES)
    assert all(times.milliseconds[phase] > 0 for phase in PHASES)
    assert 0.2 < phases / times.milliseconds['step'] < 5  # two different steps
    assert 0 < times.fixed_gib < times.peak_gib
    seconds = times.milliseconds['step'] / 1e3
    assert times.images_per_second == pytest.approx(2 / seconds)


def test_inputs_have_the_views_of_the_config():
    cfg = Config.fromfile(ROOT / 'configs/methods/selfpatch_vit-s16.py')
    shapes = {role: tuple(x.shape) for role, x in demo_batch(cfg, 3)['inputs'].items()}
    assert shapes == {'global': (3, 2, 3, 224, 224), 'local': (3, 8, 3, 96, 96)}


def test_command_prints_both(small_config, capfd):
    arguments = ['step', str(small_config), '--batch-size', '2', '--steps', '1']
    arguments += ['--rounds', '1', '--against', str(small_config), '--reference']
    arguments += ['--cfg-options', 'model.average_losses=True']
    assert command.main(arguments) == 0
    out = capfd.readouterr().out
    titles = ('densessl (', f'{small_config} (', 'plain formulation (')
    assert [out.index(title) for title in titles] == sorted(map(out.index, titles))
    assert out.count('images/s') == 3 and 'GiB peak' in out
    steps = [float(x) for x in re.findall(r'step +([0-9.]+) ms', out)]
    ratios = [float(x) for x in re.findall(r'([0-9.]+) times the step', out)]
    assert ratios == pytest.approx([s / steps[0] for s in steps[1:]], abs=0.01)
    assert command.main([*arguments, '--against', 'no/config.py']) == 2
    assert 'no such file' in capfd.readouterr().err
    assert command.main([*arguments[:2], '--cfg-options', 'modle.no=1']) == 2
    assert 'modle' in capfd.readouterr().err
    assert command.main(['data', 'no/config.py']) == 2
    assert 'no such file' in capfd.readouterr().err
