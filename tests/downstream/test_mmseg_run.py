"""Fine-tuning in MMSegmentation, by its own script, from weights that were exported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

pytest.importorskip('mmseg', reason='MMSegmentation is not installed')

from densessl.interop.backbone import save_backbone
from densessl.interop.export import export
from densessl.registry import MODELS

CONFIG = 'configs/downstream/mmseg/camvid_small_semantic-fpn_vit-t8.py'
DATA = Path(os.environ.get('DENSESSL_TEST_DATA', ROOT.parent / 'shared/data'))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """The quickstarts' ViT, exported; the file and its fingerprint."""
    folder = tmp_path_factory.mktemp('exported')
    config = dict(
        type='VisionTransformer',
        arch=dict(embed_dims=96, depth=3, num_heads=3),
        patch_size=8,
        img_size=64,
        cls_token=False,
    )
    torch.manual_seed(3)
    backbone = MODELS.build(config)
    for parameter in backbone.parameters():  # norms and biases too leave their start
        parameter.data += 0.02 * torch.randn_like(parameter)
    ours = folder / 'backbone.safetensors'
    save_backbone(ours, backbone, config, mean=[0.0] * 3, std=[255.0] * 3)
    done = export(str(ours), folder / 'mmseg.pth', 'mmseg')
    return done.path, done.fingerprint


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """CamVid's layout: upper halves are sky, lower ones road, a strip is void."""
    root = tmp_path_factory.mktemp('camvid')
    rng = np.random.default_rng(0)
    for split, count in (('train', 6), ('val', 2)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.full((90, 120), 3, np.uint8)
            mask[:45], mask[40:50] = 0, 11
            noise = rng.integers(0, 90, (90, 120, 3), dtype=np.uint8)
            image = noise + np.where(mask == 0, 160, 0)[..., None].astype(np.uint8)
            cv2.imwrite(str(root / f'images/{split}/{i}.jpg'), image)
            cv2.imwrite(str(root / f'annotations/{split}/{i}.png'), mask)
    return root


def fine_tune(root, work_dir, *options, iters=4):
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    command = [
        *(sys.executable, ROOT / 'tools/downstream.py', 'mmseg', 'train'),
        *(ROOT / CONFIG, '--work-dir', work_dir, '--cfg-options'),
        *(f'{loader}.dataset.data_root={root}' for loader in loaders),
        *(f'train_cfg.{key}={iters}' for key in ('max_iters', 'val_interval')),
        *('train_dataloader.batch_size=2', 'default_hooks.logger.interval=1'),
        *options,
    ]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.run(
        [str(part) for part in command],
        env=env,
        cwd=work_dir.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_run_starts_from_the_exported_weights(exported, pictures, tmp_path):
    path, fingerprint = exported
    options = (f'load_from={path}', 'randomness.seed=0')
    run = fine_tune(pictures, tmp_path / 'run', *options)
    assert run.returncode == 0, run.stderr[-3000:]
    output = run.stdout + run.stderr
    said = re.search(r'backbone has the 42 tensors of (\S+), fingerprint (\w+)', output)
    assert said.groups() == (str(path), fingerprint)
    losses = [float(x) for x in re.findall(r'  loss: ([\d.]+)', output)]
    assert len(losses) == 4 and all(np.isfinite(losses))
    assert re.search(r'Iter\(val\) \[2/2\].*mIoU: [\d.]+', output)
    # classes without a pixel, true or predicted, have no score
    assert re.search(r'\|\s+nan\s+\|\s+nan', output), output[-2000:]

    trained = torch.load(tmp_path / 'run/iter_4.pth', weights_only=False)['state_dict']
    start = torch.load(path, weights_only=True)['state_dict']
    assert start.keys() == {key for key in trained if key.startswith('backbone.')}
    moved = [not torch.equal(trained[key], start[key]) for key in start]
    assert sum(moved) >= len(moved) - 1  # a class token that is not used stays


@pytest.mark.slow
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (  # their ViT takes these names only without the prefix
            (
                'model.backbone.init_cfg.type=Pretrained',
                'model.backbone.init_cfg.checkpoint={}',
            ),
            'nothing was loaded: give the file by load_from',
        ),
        (
            ('load_from={}', 'model.backbone.final_norm=False'),
            '2 of the file are not in the model (ln1.weight, ln1.bias)',
        ),
        (
            ('load_from={}', 'model.backbone.img_size=(128, 128)'),
            '1 have another shape (pos_embed)',
        ),
    ],
)
def test_run_from_other_weights_ends_in_one_line(
    exported, pictures, tmp_path, options, message
):
    path, _ = exported
    options = [option.format(path) for option in options]
    run = fine_tune(pictures, tmp_path / 'run', *options)
    assert run.returncode == 2, run.stderr[-3000:]
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f'error: {path}, exported for mmseg: ') and message in last
    assert 'Iter(train)' not in run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / 'camvid').is_dir(), reason='needs CamVid, see DENSESSL_TEST_DATA'
)
def test_losses_fall_on_camvid(exported, tmp_path):
    path, fingerprint = exported
    options = (
        f'load_from={path}',
        'randomness.seed=0',
        'optim_wrapper.optimizer.lr=0.01',
    )
    run = fine_tune(DATA / 'camvid', tmp_path / 'run', *options, iters=20)
    output = run.stdout + run.stderr
    assert run.returncode == 0, run.stderr[-3000:]
    assert fingerprint in output
    losses = [float(x) for x in re.findall(r'  loss: ([\d.]+)', output)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    (miou,) = re.findall(r'mIoU: ([\d.]+)', output)
    assert 100 / 11 / 11 < float(miou) < 100
