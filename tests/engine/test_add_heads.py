"""A region head joins the training of a view-only run."""

import pytest
import torch
from conftest import ROOT

from densessl.engine.launch import main


@pytest.fixture
def configs(tmp_path):
    """View task alone, and with either matching: 3 epochs of 4 steps, a small Swin."""
    text = f"""
_base_ = ['{ROOT}/configs/quickstart/glsd_swin_demo.py']
_small = dict(out_dims=32, projector=dict(hidden_dims=16, bottleneck_dims=8))
model = dict(
    backbone=dict(
        arch=dict(embed_dims=8, depths=[2], num_heads=[2]),
        img_size=32,
        window_size=4,
        drop_path_rate=0.2,
    ),
    heads=dict(view=_small, region=dict(matching=MATCHING, **_small)),
)
_views = [dict(role='global', count=2, size=32, scale=(0.25, 1.0))]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(length=16),
    dataset=dict(length=16, size=48, pipeline=[dict(type='MultiCrop', views=_views)]),
)
train_cfg = dict(max_epochs=3)
default_hooks = dict(
    logger=dict(interval=1),
    health=dict(interval=1),
    checkpoint=dict(interval=1, keep=0),
    report=dict(probe=False, size=48, pictures=2),
)
"""
    matchings = dict(view=None, both='geometric', alike='similarity')
    for name, matching in matchings.items():
        config = text.replace('MATCHING', repr(matching))
        (tmp_path / f'{name}.py').write_text(config)
    return tmp_path


def run(folder, config, work_dir, *arguments):
    arguments = [
        str(folder / f'{config}.py'),
        '--work-dir',
        str(folder / work_dir),
        *arguments,
    ]
    return main([*map(str, arguments)])


def load(path):
    return torch.load(path, weights_only=True)


def test_region_head_joins_a_view_only_run(configs, capfd):
    assert run(configs, 'view', 'first') == 0
    start = configs / 'first/step_00000004.pth'
    old = load(start)
    assert not any('region' in key for key in old['state_dict'])
    capfd.readouterr()

    assert run(configs, 'both', 'refused', '--resume', start) == 2
    error = capfd.readouterr().err
    assert 'has no head region' in error and '--add-heads' in error
    assert run(configs, 'both', 'second', '--resume', start, '--add-heads') == 0
    log = capfd.readouterr()
    assert 'new heads: region; projectors, centres and optimiser' in log.out + log.err

    new = load(configs / 'second/step_00000008.pth')
    assert {k for k in new['state_dict'] if 'region' not in k} == set(old['state_dict'])
    # Adam counts the steps of each parameter: 8, and 4 of the new head
    by_name = steps_by_name(configs, new)
    for name, steps in by_name.items():
        last_layer = name.endswith(('weight_v', 'weight_g'))
        view_last = last_layer and 'view' in name  # rested in epoch 0
        assert steps == (4 if 'region' in name or view_last else 8), name


def steps_by_name(folder, state):
    from densessl.engine.launch import build_runner, load_config, parse_args

    arguments = [str(folder / 'both.py'), '--work-dir', str(folder / 'names')]
    runner = build_runner(load_config(parse_args(arguments)))
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    names = {id(p): n for n, p in runner.model.named_parameters()}
    ordered = [
        names[id(p)] for g in wrapper.optimizer.param_groups for p in g['params']
    ]
    found = state['optim_wrapper']['optimizer']['state']
    assert set(found) == set(range(len(ordered)))
    for i, name in enumerate(ordered):  # moments are of their own parameter's shape
        assert found[i]['exp_avg'].shape == state['state_dict'][name].shape
    return {name: int(found[i]['step']) for i, name in enumerate(ordered)}


def test_everything_else_goes_on_exactly(configs):
    """A new head of weight 0 changes nothing for the others."""
    assert run(configs, 'view', 'first') == 0
    start = configs / 'first/step_00000004.pth'
    weightless = ('--cfg-options', 'model.heads.region.loss_weight=0.0')
    assert (
        run(configs, 'both', 'second', '--resume', start, '--add-heads', *weightless)
        == 0
    )
    expected = load(configs / 'first/step_00000012.pth')['state_dict']
    got = load(configs / 'second/step_00000012.pth')['state_dict']
    for key, value in expected.items():
        assert value.equal(got[key]), key


@pytest.mark.parametrize('config', ['both', 'alike'])
def test_the_run_with_the_new_head_resumes_exactly(configs, config):
    assert run(configs, 'view', 'first') == 0
    start = configs / 'first/step_00000004.pth'
    often = ('--cfg-options', 'default_hooks.checkpoint.interval_steps=2')
    assert run(configs, config, 'whole', '--resume', start, '--add-heads', *often) == 0
    middle = configs / 'whole/step_00000006.pth'  # within the second epoch
    assert run(configs, config, 'rest', '--resume', middle) == 0
    whole, rest = (load(configs / f'{d}/step_00000012.pth') for d in ('whole', 'rest'))
    for key, value in whole['state_dict'].items():
        assert value.equal(rest['state_dict'][key]), key


def test_add_heads_without_resume_is_refused(configs, capfd):
    assert run(configs, 'both', 'x', '--add-heads') == 2
    assert '--resume STEP_PTH' in capfd.readouterr().err
