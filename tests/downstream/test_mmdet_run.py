"""Exported backbones fine-tuned by MMDetection's own scripts, through the launcher."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from densessl.datasets.demo_coco import main as write_coco
from densessl.interop.export import export

pytest.importorskip('mmdet', reason='MMDetection is not installed')
pytestmark = pytest.mark.slow

SHORT = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=2',
    'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with demo scenes in COCO format and two exported backbones."""
    home = tmp_path_factory.mktemp('home')
    coco = home / 'data/demo_coco'
    assert write_coco(['--out', str(coco), '--train', '6', '--val', '3']) == 0
    quickstart = ROOT / 'configs/quickstart'
    vit = home / 'vit_demo.py'
    vit.write_text(
        f"_base_ = ['{quickstart}/loca_vit_demo.py']\n"
        'model = dict(backbone=dict(arch=dict(depth=4)))\n'
    )
    for name, config in (('swin', quickstart / 'glsd_swin_demo.py'), ('vit', vit)):
        export(f'untrained:{config}', home / f'{name}.pth', 'mmdet')
    return home


def run(home, script: str, net: str, *arguments) -> subprocess.CompletedProcess:
    config = ROOT / f'configs/downstream/mmdet/demo_mask-rcnn_{net}.py'
    tool = ROOT / 'tools/downstream.py'
    command = [sys.executable, tool, 'mmdet', script, config, *arguments]
    return subprocess.run(
        [*map(str, command)],
        cwd=home,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=900,
    )


def scores(output: str) -> list[str]:
    return re.findall(r'coco/(bbox|segm)_mAP: (\d\.\d+)', output)


@pytest.mark.parametrize('net', ['swin', 'vit'])
def test_exported_backbone_trains_and_is_scored(home, net):
    weights = f'load_from={home / net}.pth'
    result = run(home, 'train', net, '--cfg-options', *SHORT, weights)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 'backbone has the' in result.stdout + result.stderr
    steps = re.findall(r'Iter\(train\).* loss: (\d+\.\d+)', result.stdout)
    assert len(steps) == 2 and all(0.5 < float(step) < 20 for step in steps)
    trained = scores(result.stdout)
    assert [kind for kind, _ in trained] == ['bbox', 'segm']
    checkpoint = home / f'work_dirs/demo_mask-rcnn_{net}/iter_2.pth'
    result = run(home, 'test', net, checkpoint, '--cfg-options', *SHORT[5:])
    assert result.returncode == 0, result.stderr[-3000:]
    assert scores(result.stdout) == trained


@pytest.mark.parametrize('net', ['swin', 'vit'])
def test_init_cfg_takes_the_file_too(home, net):
    prefix = [] if net == 'swin' else ['model.backbone.init_cfg.prefix=backbone.']
    weights = [
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={home / net}.pth',
    ]
    options = [*SHORT, *weights, *prefix, 'train_cfg.val_interval=9']
    result = run(home, 'train', net, '--cfg-options', *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 'backbone has the' in result.stdout + result.stderr


def test_another_network_is_refused_in_one_line(home):
    weights = f'load_from={home}/swin.pth'
    result = run(home, 'train', 'vit', '--cfg-options', *SHORT, weights)
    assert result.returncode == 2, result.stderr[-3000:]
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith('error: ') and f'{home}/swin.pth' in line
    assert 'Traceback' not in result.stderr
