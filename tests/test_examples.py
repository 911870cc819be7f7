"""The examples work as their page says."""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

from densessl.engine.checkpoint import list_runs
from densessl.interop import load_backbone, save_backbone
from densessl.models.matchers import ViewTokens, build_matcher
from densessl.registry import MODELS

PAGE = ROOT / 'docs/matchers.md'


def test_page_shows_the_example_as_it_is():
    (block,) = re.findall(r'```python\n(.+?)```', PAGE.read_text(), re.DOTALL)
    assert block == (ROOT / 'examples/matchers/mutual.py').read_text()


def test_page_is_short():
    assert len(PAGE.read_text().splitlines()) <= 60


@pytest.fixture
def matcher(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'examples/matchers')
    importlib.import_module('mutual')  # registers it, once a process
    return build_matcher('MutualMatcher')


def test_mutual_matches_are_those_of_the_loops(matcher):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 12, 4, generator=generator)
    teacher = torch.randn(2, 1, 20, 4, generator=generator)
    index, valid = matcher(ViewTokens(student, (3, 4)), ViewTokens(teacher, (4, 5)))
    assert index.shape == valid.shape == (2, 3, 12)
    for b in range(2):
        for v in range(3):
            cosine = [
                [float(torch.cosine_similarity(s, t, dim=0)) for t in teacher[b, 0]]
                for s in student[b, v]
            ]
            for n in range(12):
                best = max(range(20), key=lambda m: cosine[n][m])
                back = max(range(12), key=lambda k: cosine[k][best])
                assert index[b, v, n] == best
                assert valid[b, v, n] == (back == n)
    assert 0 < valid.float().mean() < 1


def test_a_view_matches_itself_mutually(matcher):
    view = ViewTokens(torch.randn(1, 1, 9, 4), (3, 3))
    index, valid = matcher(view, view)
    assert index[0, 0].tolist() == list(range(9)) and valid.all()


def test_command_of_the_page_trains(tmp_path):
    (command,) = re.findall(r'`(PYTHONPATH=.+?)`', PAGE.read_text())
    setting, python, *arguments = shlex.split(command)
    assert python == 'python'
    name, _, folder = setting.partition('=')
    # as after an installation: the package is found, and nothing else of the root
    (tmp_path / 'installed').mkdir()
    (tmp_path / 'installed/densessl').symlink_to(ROOT / 'densessl')
    paths = os.pathsep.join([folder, str(tmp_path / 'installed')])
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0',
        'train_dataloader.sampler.length=4',
        'model.backbone.arch.embed_dims=16',
        'default_hooks.report.probe=False',
        'default_hooks.report.size=64',
        'default_hooks.logger.interval=1',
    ]
    work_dir = tmp_path / 'run'
    arguments += ['--work-dir', str(work_dir), '--cfg-options', *options]
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {name: paths, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [path.name for path in list_runs(work_dir)] == ['step_00000002.pth']
    log = result.stdout + result.stderr
    losses = [float(x) for x in re.findall(r'loss_region: ([\d.]+)', log)]
    assert len(losses) == 2 and min(losses) > 0


@pytest.fixture
def camvid(tmp_path):
    """Bright and dark halves are classes 0 and 1: any features tell them."""
    image = np.zeros((96, 120, 3), np.uint8)
    image[:, 60:] = 255
    labels = np.repeat([[0, 1]], 96, 0).repeat(60, 1).astype(np.uint8)
    labels[:4] = 11
    for part in ('train', 'val'):
        for kind, content in (('images', image), ('annotations', labels)):
            folder = tmp_path / 'camvid' / kind / part
            folder.mkdir(parents=True)
            ending = 'jpg' if kind == 'images' else 'png'
            for i in range(4):
                cv2.imwrite(str(folder / f'{i}.{ending}'), content)
    return tmp_path / 'camvid'


def test_camvid_segmentation_reads_classes_that_features_tell(
    camvid, tmp_path, monkeypatch, capsys
):
    config = dict(
        type='VisionTransformer',
        arch=dict(embed_dims=16, depth=1, num_heads=2),
        patch_size=16,
        img_size=64,
    )
    work_dir = tmp_path / 'run'
    work_dir.mkdir()
    save_backbone(
        work_dir / 'backbone.safetensors',
        MODELS.build(config),
        config,
        mean=[127.0] * 3,
        std=[60.0] * 3,
        steps=0,
    )
    module = runpy.run_path(str(ROOT / 'examples/camvid_segmentation.py'))
    argv = ['camvid_segmentation.py', str(camvid), str(work_dir)]
    monkeypatch.setattr(sys, 'argv', argv)
    module['main']()
    words = capsys.readouterr().out
    scores = [float(x) for x in re.findall(r'trained ([\d.]+)%', words)]
    assert len(scores) == 2 and min(scores) > 95


def test_camvid_supervised_learns_what_the_labels_say(
    camvid, tmp_path, monkeypatch, capsys
):
    """The loss falls, and the file starts a run."""
    monkeypatch.syspath_prepend(ROOT / 'examples')
    module = runpy.run_path(str(ROOT / 'examples/camvid_supervised.py'))
    config = tmp_path / 'small.py'
    config.write_text(
        "model = dict(backbone=dict(type='VisionTransformer', patch_size=16, "
        'arch=dict(embed_dims=16, depth=1, num_heads=2)))'
    )
    out = tmp_path / 'start.safetensors'
    argv = [
        'camvid_supervised.py',
        str(camvid),
        str(config),
        str(out),
        '--epochs',
        '60',
    ]
    monkeypatch.setattr(sys, 'argv', argv)
    module['main']()
    first, last = map(float, re.findall(r'loss ([\d.]+)', capsys.readouterr().out))
    assert first > 1.5 and last < 0.5 * first
    assert load_backbone(out).embed_dims == 16


@pytest.mark.parametrize(
    ('folders', 'message'),
    [
        ((), 'there is no train/*.png in'),
        (('train',), 'it or its mask'),
    ],
)
def test_camvid_folder_says_what_is_missing(
    tmp_path, monkeypatch, capsys, folders, message
):
    module = runpy.run_path(str(ROOT / 'examples/camvid_folder.py'))
    for folder in folders:
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / 'a.png'), np.zeros((8, 8, 3), np.uint8))
    words = ['camvid_folder.py', str(tmp_path), str(tmp_path / 'out')]
    monkeypatch.setattr(sys, 'argv', words)
    assert module['main']() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and message in line and '; ' in line
