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
from densessl.benchmark.step import (
    DTYPES,
    PHASES,
    StepTimes,
    count_gflop,
    demo_batch,
    measure_plain_step,
    measure_step,
)
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
        torch.manual_seed(step)
        loss = fast.train_step(views(seed=step), wrapper)['loss']
        torch.manual_seed(step)
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


SWIN = dict(
    type='SwinTransformer',
    arch=dict(embed_dims=16, depths=[1, 2], num_heads=[1, 2]),
    img_size=32,
    window_size=4,
)
CLASS_TOKEN = model_config()['backbone'] | dict(cls_token=True, final_norm=True)


@pytest.mark.parametrize('backbone', [SWIN, CLASS_TOKEN])
def test_plain_and_fast_steps_agree_with_stochastic_depth(backbone):
    """Where ours leaves out samples and tokens, the plain one has them all."""
    options = region_config('similarity', backbone=backbone | dict(drop_path_rate=0.5))
    if backbone is CLASS_TOKEN:
        options['neck'] = dict(type='ClassTokenNeck')
        del options['heads']['region']
    assert_steps_agree(**options)


def test_measured_step_has_all_phases(small_config):
    cfg = Config.fromfile(small_config)
    times = measure_step(cfg, 2, steps=1, warmup=1)
    phases = sum(times.milliseconds[phase] for phase in PHASES)
    assert all(times.milliseconds[phase] > 0 for phase in PHASES)
    assert 0.2 < phases / times.milliseconds['step'] < 5  # two different steps
    assert 0 < times.fixed_gib < times.peak_gib
    assert 0.1 < times.base_gib <= times.peak_gib  # equal after larger tests
    assert times.above_gib <= times.peak_gib - times.base_gib
    assert times.gflop > 0 and 0 < times.share < 1
    seconds = times.milliseconds['step'] / 1e3
    assert times.images_per_second == pytest.approx(2 / seconds)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_plain_formulation_has_the_precision_of_the_config(
    precision, small_config, monkeypatch
):
    seen = []

    def loss(self, data):
        linear = self.model.backbone.blocks[0].mlp.fc1
        seen.append(linear(data['inputs']['global'].new_ones(1, 1, 32)).dtype)
        return plain_loss(self, data)

    plain_loss = PlainStep.loss
    monkeypatch.setattr(PlainStep, 'loss', loss)
    cfg = Config.fromfile(small_config)
    cfg.optim_wrapper.precision = precision
    times = measure_plain_step(cfg, 2, steps=1, warmup=1)
    assert set(seen) == {DTYPES[precision]}
    assert times.settings['precision'] == precision


def test_bf16_loss_is_close_to_the_plain_one():
    fast, plain = (build_model() for _ in range(2))
    wrapper = optim_wrapper(fast, precision='bf16')
    fast.progress = plain.progress = Progress(4, 20, 4)
    loss = fast.train_step(views(), wrapper)['loss']
    step = PlainStep(plain, optim_wrapper(plain).optimizer, dtype=torch.bfloat16).step
    torch.testing.assert_close(loss, step(views()), rtol=0.01, atol=0)


def test_products_are_counted():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    c = torch.zeros(3, 7)
    once = 2 * 3 * 5 * 7 / 1e9
    assert count_gflop(lambda: a @ b) == pytest.approx(once)
    assert count_gflop(lambda: c.addmm_(a, b)) == pytest.approx(once)
    assert count_gflop(lambda: torch.mm(a, b, out=c)) == pytest.approx(once)
    assert count_gflop(lambda: a + a) == 0


def test_inputs_have_the_views_of_the_config():
    cfg = Config.fromfile(ROOT / 'configs/methods/selfpatch_vit-s16.py')
    shapes = {role: tuple(x.shape) for role, x in demo_batch(cfg, 3)['inputs'].items()}
    assert shapes == {'global': (3, 2, 3, 224, 224), 'local': (3, 8, 3, 96, 96)}


def assert_parts_add_up(out):
    """Peaks are state, process and the rest."""
    pattern = (
        r'([0-9.]+) GiB peak: ([0-9.]+) .* state, ([0-9.]+) .*, (-?[0-9.]+) on top'
    )
    found = [list(map(float, parts)) for parts in re.findall(pattern, out)]
    assert len(found) == out.count('GiB peak')
    assert all(p[0] == pytest.approx(sum(p[1:]), abs=0.03) for p in found)


def test_sides_and_their_ratios(small_config, monkeypatch, capsys):
    memory = {
        'densessl': 2.5,
        'densessl, low memory': 1.5,
        'densessl, compiled': 2.5,
        'plain formulation': 4.5,
    }

    def in_turns(commands, rounds):
        assert [' '.join(words[1:]) for words in commands.values()] == [
            '--batch-size 2 --steps 3',
            '--low-memory --batch-size 2 --steps 3',
            '--compile --batch-size 2 --steps 3',
            '--plain --batch-size 2 --steps 3',
        ]
        assert rounds == 5
        return {
            name: StepTimes(1.0, dict(step=10 * peak), peak, 0.3, 0.2, 4 * peak, 800.0)
            for name, peak in memory.items()
            if name in commands
        }

    monkeypatch.setattr(command.step, 'in_turns', in_turns)
    arguments = ['step', str(small_config), '--batch-size', '2', '--steps', '3']
    arguments += ['--rounds', '5', '--low-memory', '--compile', '--reference']
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert_parts_add_up(out)
    # 4 GFLOP in 10 ms are 400 a second
    assert out.count('at 0.50 of the rate of a large product (800 GFLOP/s)') == 4
    ratios = [re.findall(r'([0-9.]+) times', line) for line in out.splitlines()]
    # on top: 1 / 2 and 4 / 2 GiB
    assert list(filter(None, ratios)) == [
        ['0.60'] * 2 + ['0.50'],
        ['1.00'] * 3,
        ['1.80'] * 2 + ['2.00'],
    ]


@pytest.mark.parametrize('switch', ['low_memory', 'compile'])
def test_switches_are_measured(small_config, monkeypatch, capsys, switch):
    seen = []
    monkeypatch.setattr(
        command.step,
        'measure_step',
        lambda cfg, *args: seen.append(cfg) or measure_step(cfg, *args),
    )
    arguments = ['step', str(small_config), '--batch-size', '2', '--steps', '1']
    flag = f'--{switch.replace("_", "-")}'
    assert command.main([*arguments, flag]) == command.main(arguments) == 0
    assert [cfg.model.get(switch, False) for cfg in seen] == [True, False]


def test_command_prints_both(small_config, capfd):
    arguments = ['step', str(small_config), '--batch-size', '2', '--steps', '1']
    arguments += ['--rounds', '1', '--against', str(small_config), '--reference']
    arguments += ['--cfg-options', 'model.average_losses=True']
    assert command.main(arguments) == 0
    out = capfd.readouterr().out
    titles = ('densessl (', f'{small_config} (', 'plain formulation (')
    assert [out.index(title) for title in titles] == sorted(map(out.index, titles))
    assert out.count('images/s') == 3 and out.count('times its memory on top') == 2
    assert_parts_add_up(out)
    steps = [float(x) for x in re.findall(r'step +([0-9.]+) ms', out)]
    ratios = [float(x) for x in re.findall(r'([0-9.]+) times the step', out)]
    assert ratios == pytest.approx([s / steps[0] for s in steps[1:]], abs=0.01)
    assert command.main([*arguments, '--against', 'no/config.py']) == 2
    assert 'no such file' in capfd.readouterr().err
    assert command.main([*arguments[:2], '--cfg-options', 'modle.no=1']) == 2
    assert 'modle' in capfd.readouterr().err
    assert command.main(['data', 'no/config.py']) == 2
    assert 'no such file' in capfd.readouterr().err
