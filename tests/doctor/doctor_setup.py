"""What tests of the doctor share: its lines, a healthy config and healthy pictures."""

import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

from densessl.doctor import config, machine, main, step
from densessl.registry import MODELS

PICTURES = 1000
Line = namedtuple('Line', 'level text')


def lines(out: str) -> list[Line]:
    found = [re.fullmatch(r'(ok|warn|fail) +(.+)', line) for line in out.splitlines()]
    return [Line(*match.groups()) for match in found if match]


def off(out: str) -> list[Line]:
    """Lines that are not ok; whether a version was run differs between machines."""
    return [x for x in lines(out) if x.level != 'ok' and 'which was run' not in x.text]


def assert_found(out: str, level: str, name: str, *words: str) -> None:
    (line,) = [x for x in off(out) if x.text.startswith(f'{name} ')]
    assert line.level == level
    for word in words:
        assert word in line.text, line.text


def doctor(*arguments, site: Path | None = None, **options):
    """``tools/doctor.py`` in a process; with ``site``, of its packages alone."""
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(site or ROOT)}
    command = [sys.executable, *(['-S'] if site else []), f'{ROOT}/tools/doctor.py']
    ran = subprocess.run(
        [*command, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert 'Traceback' not in ran.stdout + ran.stderr
    return ran


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    """Noise about ImageNet's mean with its deviation, each picture another one."""
    folder = tmp_path_factory.mktemp('pictures')
    for i in range(PICTURES):
        write_noise(folder / f'{i:04d}.jpg', i)
    return folder


def write_noise(path: Path, seed: int, mean=(123, 116, 103), side: int = 64) -> None:
    rng = np.random.default_rng(seed)
    image = np.array(mean) + rng.normal(0, 57, (side, side, 1))  # as bright in all
    image = image.clip(0, 255).astype(np.uint8)[..., ::-1].squeeze()
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 100])


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> Path:
    """A config whose step takes moments."""
    path = tmp_path_factory.mktemp('config') / 'small.py'
    path.write_text(
        f"""
_base_ = ['{ROOT}/configs/quickstart/selfpatch_vit-t8_demo.py']
model = dict(
    backbone=dict(arch=dict(embed_dims=32, depth=2, num_heads=2), img_size=32),
    neck=dict(num_heads=2),
)
_views = [
    dict(role='global', count=2, size=32, scale=(0.4, 1.0)),
    dict(role='local', count=2, size=24, scale=(0.05, 0.4)),
]
train_dataloader = dict(
    batch_size=4, dataset=dict(pipeline=[dict(type='MultiCrop', views=_views)])
)
"""
    )
    return path


@pytest.fixture(scope='module')
def need(small):
    """What a step takes; measured once for the tests of other things."""
    cfg = config.load(str(small))
    return step.measure(cfg, MODELS.build(cfg.model))


@pytest.fixture
def examine(small, pictures, need, tmp_path, monkeypatch, capsys):
    """Runs the command line with the healthy config and pictures, or others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step, 'measure', lambda cfg, model: need)
    monkeypatch.setattr(machine, 'cores', lambda: 2.0)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)

    def run(*options, folder: Path | None = pictures, arguments=(), code=1) -> str:
        words = [str(small), '--data', str(folder)] if folder else []
        words += ['--cfg-options', *options] if options else []
        assert main.main([*words, *map(str, arguments)]) == code, capsys.readouterr()
        captured = capsys.readouterr()
        assert 'Traceback' not in captured.out + captured.err
        return captured.out

    return run


def group(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace('_', '.', 1)).write_text(content)
    return folder
