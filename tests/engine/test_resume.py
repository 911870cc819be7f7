"""Kill a run, go on with it, and get the weights of a run that was left alone."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, train

from densessl.engine.checkpoint import list_runs

# The trainer, killed at a chosen point.
KILLED = """
import os, signal, sys, torch
from densessl.engine import launch, loop
point, step = sys.argv[1], int(sys.argv[2])
save, run_iter = torch.save, loop.TrainLoop.run_iter

def save_half(state, file):
    if point == 'save' and state['steps'] == step:
        file.write(b'0' * 5000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)

def stop_before(self, idx, batch):
    if point == 'epoch' and self.iter == step:
        os.kill(os.getpid(), signal.SIGKILL)
    run_iter(self, idx, batch)

torch.save, loop.TrainLoop.run_iter = save_half, stop_before
sys.exit(launch.main(sys.argv[3:]))
"""
SAVE_OFTEN = ('--cfg-options', 'default_hooks.checkpoint.interval_steps=2')


def train_and_kill(point, step, *arguments):
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', KILLED, point, str(step), *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]


def final(work_dir):
    return torch.load(work_dir / 'step_00000012.pth', weights_only=True)


def assert_same_run(one, other):
    """Bit-equal model, optimiser and scaler."""
    flat_one, flat_other = {}, {}
    for state, flat in ((one, flat_one), (other, flat_other)):
        for part in ('state_dict', 'optim_wrapper'):
            flatten(state[part], part, flat)
    assert flat_one.keys() == flat_other.keys()
    for key, value in flat_one.items():
        equal = value.equal(flat_other[key]) if torch.is_tensor(value) else None
        assert value == flat_other[key] if equal is None else equal, key


def flatten(value, name, flat):
    if isinstance(value, dict):
        for key, item in value.items():
            flatten(item, f'{name}.{key}', flat)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            flatten(item, f'{name}.{i}', flat)
    else:
        flat[name] = value


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """Final state of a run of 3 epochs x 4 steps, with drop path and 2 workers."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    config = make_config(folder)
    train(config, '--work-dir', folder / 'run')
    return config, final(folder / 'run')


def make_config(folder):
    from conftest import small_config

    return small_config.__wrapped__(folder)


@pytest.mark.parametrize(
    ('point', 'step', 'left'),
    [
        ('epoch', 6, 'step_00000004.pth'),  # in the middle of epoch 1
        ('save', 8, 'step_00000004.pth'),  # while epoch 1's checkpoint is written
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    uninterrupted, tmp_path, point, step, left
):
    config, expected = uninterrupted
    train_and_kill(point, step, config, '--work-dir', tmp_path)
    assert list_runs(tmp_path)[-1].name == left
    train(config, '--work-dir', tmp_path, '--resume')
    assert_same_run(final(tmp_path), expected)


def test_resume_within_an_epoch_and_past_a_truncated_checkpoint(
    uninterrupted, tmp_path
):
    config, expected = uninterrupted
    train_and_kill('epoch', 11, config, '--work-dir', tmp_path, *SAVE_OFTEN)
    *_, previous, newest = list_runs(tmp_path)
    assert (previous.name, newest.name) == ('step_00000008.pth', 'step_00000010.pth')
    newest.write_bytes(newest.read_bytes()[:-2000])
    result = train(config, '--work-dir', tmp_path, '--resume', *SAVE_OFTEN)
    assert 'step_00000010.pth cannot be read' in result.stderr + result.stdout
    assert 'resumed' in result.stderr + result.stdout
    assert_same_run(final(tmp_path), expected)


def test_resume_from_the_middle_of_an_epoch_replays_nothing(uninterrupted, tmp_path):
    config, expected = uninterrupted
    train_and_kill('epoch', 7, config, '--work-dir', tmp_path, *SAVE_OFTEN)
    log = train(config, '--work-dir', tmp_path, '--resume', *SAVE_OFTEN)
    lines = (log.stderr + log.stdout).splitlines()
    steps = [
        line.split('[')[2].split('/')[0].strip() for line in lines if '(train)' in line
    ]
    assert steps == ['3', '4', '1', '2', '3', '4']  # epoch 1 goes on at its third step
    assert_same_run(final(tmp_path), expected)


def test_other_seed_gives_other_weights(uninterrupted, tmp_path):
    config, expected = uninterrupted
    train(config, '--work-dir', tmp_path, '--seed', 1)
    mine = final(tmp_path)['state_dict']
    assert not mine['backbone.pos_embed'].equal(
        expected['state_dict']['backbone.pos_embed']
    )


def test_queues_and_statistics_resume_exactly(tmp_path):
    config = make_config(tmp_path)
    text = config.read_text().replace(
        'selfpatch_vit-t8_demo', 'selfpatch-moby_vit_demo'
    )
    projector = 'projector=dict(hidden_dims=32, bottleneck_dims=16)'
    assert text.count(projector) == 2
    text = text.replace(projector, 'hidden_dims=32')
    config.write_text(text.replace('view=dict(', 'view=dict(queue_length=6, '))
    train(config, '--work-dir', tmp_path / 'whole')
    train_and_kill('epoch', 6, config, '--work-dir', tmp_path / 'parts')
    train(config, '--work-dir', tmp_path / 'parts', '--resume')
    whole = final(tmp_path / 'whole')
    assert_same_run(final(tmp_path / 'parts'), whole)
    assert whole['state_dict']['heads.view.enqueued'] == 4 * 12
    assert whole['state_dict']['heads.view.queue'].shape == (2, 6, 64)
