"""Runs of LOCA: collapse is told, positions are learned, resuming is exact."""

import json
import shutil

import pytest
import torch
from conftest import ROOT

from densessl.engine.launch import main

SMALL = f"""
_base_ = ['{ROOT}/configs/quickstart/loca_vit_demo.py']
model = dict(
    backbone=dict(arch=dict(embed_dims=32, depth=1, num_heads=2), drop_path_rate=0.2),
    heads=dict(
        position=dict(num_heads=2),
        cluster=dict(out_dims=32, projector=dict(hidden_dims=32, bottleneck_dims=16)),
    ),
)
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(length=16), dataset=dict(length=16)
)
train_cfg = dict(max_epochs=3)
default_hooks = dict(
    logger=dict(interval=1),
    health=dict(interval=1),
    checkpoint=dict(interval=1, keep=0),
    report=dict(probe=False, size=48, pictures=2),
)
"""


@pytest.fixture
def config(tmp_path):
    """3 epochs of 4 steps on 16 demo scenes; patches are dropped and runs drawn."""
    path = tmp_path / 'loca.py'
    path.write_text(SMALL)
    return path


def test_resume_is_exact(config, tmp_path):
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert main([str(config), '--work-dir', str(whole)]) == 0
    part.mkdir()
    shutil.copy(whole / 'step_00000004.pth', part)
    assert main([str(config), '--work-dir', str(part), '--resume']) == 0
    one, other = (
        torch.load(f / 'step_00000012.pth', weights_only=True) for f in (whole, part)
    )
    early = torch.load(whole / 'step_00000004.pth', weights_only=True)['state_dict']
    for key, value in one['state_dict'].items():
        assert value.equal(other['state_dict'][key]), key
    key = 'heads.position.predictor.weight'
    assert not one['state_dict'][key].equal(early[key])


def test_position_head_joins_a_run_without(config, tmp_path, capfd):
    folder = tmp_path / 'run'
    options = ['--work-dir', str(folder)]
    alone = ['--cfg-options', 'model.heads.position=None', 'train_cfg.max_epochs=3']
    assert main([str(config), *options, *alone]) == 0
    for path in folder.glob('step_*[28].pth'):
        path.unlink()  # go on from step 4
    assert main([str(config), *options, '--resume']) == 2
    assert 'has no head position' in capfd.readouterr().err
    assert main([str(config), *options, '--resume', '--add-heads']) == 0
    state = torch.load(folder / 'step_00000012.pth', weights_only=True)['state_dict']
    assert 'heads.position.predictor.weight' in state


def monitors(folder, key):
    """Values of a monitor, step by step."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    lines = map(json.loads, path.read_text().splitlines())
    return [line[key] for line in lines if key in line]


@pytest.mark.slow  # 4 of the quickstart's 9 epochs: a minute on 2 free cores
def test_the_quickstart_learns_positions(tmp_path):
    folder = tmp_path / 'run'
    command = [f'{ROOT}/configs/quickstart/loca_vit_demo.py', '--work-dir', str(folder)]
    options = ['train_cfg.max_epochs=4', 'default_hooks.report.probe=False']
    assert main([*command, '--seed', '0', '--cfg-options', *options]) == 0
    accuracy = monitors(folder, 'position/accuracy')  # means of 20 steps
    assert accuracy[0] < 2 / 64
    assert sum(accuracy[-5:]) / 5 > 5 / 64  # without the reference: 2 / 64


COLLAPSE = [
    *('model.heads.position=None', 'model.heads.cluster.teacher_temp=0.05'),
    *('train_cfg.max_epochs=40', 'default_hooks.schedule.base_batch_size=4'),
    'default_hooks.schedule.warmup_epochs=0',
]


@pytest.mark.parametrize('off', [True, False])
def test_collapse_without_sinkhorn_and_me_max_is_told(config, tmp_path, capfd, off):
    options = [*COLLAPSE, 'default_hooks.checkpoint.interval=100']
    if off:
        options += [
            'model.heads.cluster.sinkhorn=0',
            'model.heads.cluster.me_max=False',
        ]
    folder = tmp_path / 'run'
    arguments = [str(config), '--work-dir', str(folder), '--cfg-options', *options]
    assert main(arguments) == 0
    log = ''.join(capfd.readouterr())
    assert ("the clusters of head 'cluster' collapse" in log) == off
    used = monitors(folder, 'cluster/used_prototypes')[-1]
    assert used == 1 if off else used > 8
