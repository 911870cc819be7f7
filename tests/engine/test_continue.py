"""Going on from trained weights: what is frozen stays, what resumes is exact."""

import copy

import pytest
import torch
from conftest import ROOT, build_model, optim_wrapper, views
from mmengine.config import Config

from densessl.engine.launch import load_config, main, parse_args
from densessl.errors import DenseSSLError
from densessl.interop import load_backbone, save_backbone
from densessl.registry import MODELS
from densessl.schedules import Progress

CONTINUED = sorted((ROOT / 'configs/methods/continue').glob('*.py'))
FROZEN = ('backbone.', 'teacher.backbone.')


@pytest.fixture(autouse=True)
def no_logging_errors(monkeypatch):
    # Loggers of earlier runs in this process still hold pytest's closed streams.
    monkeypatch.setattr('logging.raiseExceptions', False)


def backbone_of(state):
    return {k: v for k, v in state.items() if k.startswith(FROZEN)}


def test_a_frozen_backbone_stays_bit_for_bit_and_then_moves():
    """Steps of half an epoch each; frozen for one epoch, and then no longer."""
    model = build_model(freeze_backbone_epochs=1, teacher_momentum=0.9, accumulate=2)
    for parameter in model.teacher.backbone.parameters():  # as authors' files have them
        parameter.data.add_(0.01)
    wrapper = optim_wrapper(model, lr=0.1)  # AdamW with weight decay
    start, names = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    for step in range(3):
        model.progress = Progress(step, 8, 2)
        before = copy.deepcopy(model.state_dict())
        model.train_step(views(seed=step), wrapper)
        now = model.state_dict()
        moved = {key for key, value in now.items() if not value.equal(before[key])}
        frozen = backbone_of(start)
        if step < 2:
            assert all(now[key].equal(value) for key, value in frozen.items())
        else:
            assert frozen.keys() <= moved
        assert {k for k in now if k.startswith(('neck.', 'teacher.neck.'))} <= moved
        assert 'projectors.view.mlp.0.weight' in moved
        assert 'teacher.projectors.selfpatch.mlp.4.bias' in moved
        for name, parameter in names.items():  # Adam has counted no frozen step
            if name.startswith('backbone.'):
                count = wrapper.optimizer.state[parameter].get('step', 0)
                assert count == max(0, step - 1), name


def test_without_a_warm_up_the_first_step_moves_the_backbone():
    model = build_model()
    start = copy.deepcopy(model.backbone.state_dict())
    model.progress = Progress(0, 8, 2)
    model.train_step(views(), optim_wrapper(model, lr=0.1))
    now = model.backbone.state_dict()
    assert not any(value.equal(start[key]) for key, value in now.items())


@pytest.mark.parametrize('epochs', [-1, 4, 4.5])
def test_a_backbone_that_would_never_be_trained(epochs):
    model = build_model(freeze_backbone_epochs=epochs)
    model.progress = Progress(0, 8, 2)
    with pytest.raises(DenseSSLError, match=r'of a run of 4 epochs; give 0 or more'):
        model.train_step(views(), optim_wrapper(model))


@pytest.fixture(scope='module')
def continued(tmp_path_factory):
    """A config of 3 epochs of 4 steps that is frozen for 6 steps, and its weights."""
    from conftest import small_config

    folder = tmp_path_factory.mktemp('continued')
    small = small_config.__wrapped__(folder)
    path = folder / 'continued.py'
    path.write_text(
        f"""
_base_ = ['{small}']
model = dict(freeze_backbone_epochs=1.5, teacher_momentum=0.9)
optim_wrapper = dict(layer_decay=0.5)
train_dataloader = dict(num_workers=0)
default_hooks = dict(
    checkpoint=dict(interval_steps=2),
    probe=dict(
        segmentation='demo', guard='warn', interval=1, max_share=1e9,
        size=32, train_pictures=6, val_pictures=4,
    ),
)
"""
    )
    cfg = Config.fromfile(path).model
    torch.manual_seed(7)
    weights = folder / 'start.safetensors'
    norm = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    save_backbone(weights, MODELS.build(cfg.backbone), cfg.backbone, **norm)
    assert run(path, folder / 'whole', '--init-from', weights) == 0
    return path, weights, folder / 'whole'


def run(config, work_dir, *arguments) -> int:
    return main([str(config), '--work-dir', *map(str, (work_dir, *arguments))])


def load(folder, step):
    return torch.load(folder / f'step_{step:08d}.pth', weights_only=True)


def test_the_teacher_is_the_start_until_the_warm_up_is_over(continued):
    _, weights, folder = continued
    start = load_backbone(weights).state_dict()
    for step in (2, 4, 6, 8):
        state = load(folder, step)['state_dict']
        for key, value in start.items():
            for prefix in FROZEN:
                assert state[prefix + key].equal(value) == (step <= 6), (step, key)


@pytest.mark.parametrize('step', [4, 6, 8])
def test_resumed_across_the_warm_up_equals_uninterrupted(continued, tmp_path, step):
    """From within the warm-up, from its end, and from after it."""
    config, _, whole = continued
    resumed = tmp_path / 'resumed'
    source = whole / f'step_{step:08d}.pth'
    assert run(config, resumed, '--resume', source) == 0
    expected, got = load(whole, 12), load(resumed, 12)
    for key, value in expected['state_dict'].items():
        assert value.equal(got['state_dict'][key]), key
    one, other = (x['optim_wrapper']['optimizer'] for x in (expected, got))
    assert one['param_groups'] == other['param_groups']
    assert one['state'].keys() == other['state'].keys()
    for number, values in one['state'].items():
        for name, value in values.items():
            assert value.equal(other['state'][number][name])


def test_the_start_is_scored_and_kept(continued):
    _, _, folder = continued
    log = next(folder.glob('2*/2*.log')).read_text()
    assert log.index('probe before the first step') < log.index('Epoch(train)')
    assert 'probe after epoch 3' in log


def test_resuming_with_other_groups_is_refused(continued, tmp_path, capfd):
    config, _, whole = continued
    source = whole / 'step_00000004.pth'
    plain = ('--cfg-options', 'optim_wrapper.layer_decay=1')
    assert run(config, tmp_path / 'x', '--resume', source, *plain) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert 'has 8 groups' in error and 'layer_decay on or off' in error
    # a factor of its own is taken: it is a setting, not a state
    steeper = ('--cfg-options', 'optim_wrapper.layer_decay=0.25')
    assert run(config, tmp_path / 'y', '--resume', source, *steeper) == 0
    groups = load(tmp_path / 'y', 12)['optim_wrapper']['optimizer']['param_groups']
    rates = [group['lr'] / groups[0]['lr'] for group in groups]
    assert rates == pytest.approx([1, 1, *(0.25, 0.25), *(1 / 16,) * 2, *(1 / 64,) * 2])


def test_heads_join_a_continued_run(continued, tmp_path):
    """Their weights go into the groups that are there, at the whole rate."""
    config, _, _ = continued
    options = ('model.heads.selfpatch=None', 'default_hooks.probe.segmentation=None')
    alone = tmp_path / 'alone'
    assert run(config, alone, '--cfg-options', *options) == 0
    source = alone / 'step_00000004.pth'
    assert run(config, tmp_path / 'x', '--resume', source, '--add-heads') == 0
    first, last = load(alone, 4)['optim_wrapper'], load(tmp_path / 'x', 12)
    groups = last['optim_wrapper']['optimizer']['param_groups']
    before = first['optimizer']['param_groups']
    sizes = [[len(group['params']) for group in part] for part in (before, groups)]
    assert sizes[0][2:] == sizes[1][2:] and sizes[0][0] < sizes[1][0]
    assert 'projectors.selfpatch.mlp.0.weight' in last['state_dict']


@pytest.mark.parametrize('path', CONTINUED, ids=lambda path: path.stem)
def test_the_recipe_is_gentle(path):
    """Against the method's own: what guards the weights is there."""
    cfg = load_config(parse_args([str(path)]))
    assert 0 < cfg.model.freeze_backbone_epochs < cfg.train_cfg.max_epochs
    assert cfg.model.teacher_momentum > 0.996
    assert cfg.optim_wrapper.optimizer.lr <= 5e-4 / 5
    assert 0.5 < cfg.optim_wrapper.layer_decay < 1
    probe = cfg.default_hooks.probe
    assert probe.guard == 'warn' and probe.segmentation
    assert len(path.read_text().splitlines()) <= 50
