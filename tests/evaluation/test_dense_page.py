"""The commands of the page's sections on segmentation and depth run."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from planted import write

from densessl.evaluation.main import main
from densessl.interop import save_backbone
from densessl.registry import MODELS

PAGE = ROOT / 'docs/evaluation.md'
SECTIONS = (
    'Linear segmentation',
    'Localisation or classification',
    'K-means segmentation',
    'Depth',
)
SIZE = (16, 48)


def _commands() -> list[str]:
    text, found = PAGE.read_text(), set()
    for title in SECTIONS:
        block = text.split(f'\n## {title}\n')[1].split('\n## ')[0]
        found |= set(re.findall(r'^python tools/evaluate\.py (.+)$', block, re.M))
    return sorted(found)


def _mask(num_classes: int) -> np.ndarray:
    return (np.arange(SIZE[0] * SIZE[1]) % num_classes).reshape(SIZE).astype(np.uint8)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with the configs, data and runs that the commands name."""
    home = tmp_path_factory.mktemp('home')
    (home / 'configs').symlink_to(ROOT / 'configs')
    rng = np.random.default_rng(0)
    voc = home / 'data/VOCdevkit/VOC2012'
    lists = voc / 'ImageSets/Segmentation'
    lists.mkdir(parents=True)
    for split, name in (('train', 'trainaug'), ('val', 'val')):
        stems = [f'{split}{i}' for i in range(3)]
        (lists / f'{name}.txt').write_text('\n'.join(stems))
        for stem in stems:
            image = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
            write(voc / f'JPEGImages/{stem}.jpg', image)
            write(voc / f'SegmentationClass/{stem}.png', _mask(21))
            depth = rng.integers(256, 9999, SIZE).astype(np.uint16)
            for data, kind, labels in (
                ('camvid', 'annotations', _mask(12)),
                ('segmentation', 'annotations', _mask(2)),
                ('depth', 'depth', depth),
            ):
                write(home / f'data/{data}/images/{split}/{stem}.png', image)
                write(home / f'data/{data}/{kind}/{split}/{stem}.png', labels)
    torch.manual_seed(0)
    config = dict(
        type='VisionTransformer',
        arch=dict(embed_dims=16, depth=3, num_heads=2),
        patch_size=8,
        img_size=32,
    )
    about = dict(mean=[127.0] * 3, std=[60.0] * 3, steps=0)
    file = home / 'work_dirs/selfpatch_vit-t8_demo/backbone.safetensors'
    file.parent.mkdir(parents=True)
    save_backbone(file, MODELS.build(config), config, **about)
    (home / 'work_dirs/camvid').mkdir()
    shutil.copy(file, home / 'work_dirs/camvid')
    return home


def test_the_page_has_a_command_for_each_protocol():
    configs = {command.split()[0].split('/')[-1] for command in _commands()}
    assert configs == {
        f'{name}.py'
        for name in (
            'linear_segmentation',
            'linear_segmentation_voc',
            'linear_segmentation_camvid',
            'localisation',
            'kmeans_segmentation',
            'kmeans_segmentation_camvid',
            'depth',
        )
    }


@pytest.mark.parametrize('command', _commands())
def test_command_of_the_page_runs(home, command, monkeypatch, capsys):
    """At a small size, one epoch; a small ViT in place of timm's."""
    monkeypatch.chdir(home)
    words = shlex.split(command)
    if words[1].startswith('timm:'):
        words[1] = 'work_dirs/selfpatch_vit-t8_demo/backbone.safetensors'
    if '--cfg-options' not in words:
        words.append('--cfg-options')
    words += ['protocol.size=[16,48]']
    if 'depth' in words[0]:
        words += ['protocol.epochs=1']
    elif 'kmeans' in words[0]:
        words += ['protocol.num_clusters=5']
    else:
        words += ['protocol.head.epochs=1']
    assert main([*words, '--device', 'cpu']) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert re.search(r'^(\w+)\s+\d', printed, re.M), printed
    assert 'metrics.json' in printed and '.png' in printed
