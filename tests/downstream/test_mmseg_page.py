"""docs/downstream_mmseg.md: its commands name what is there, its snippets do it."""

import re
import shlex
from argparse import ArgumentParser, Namespace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT

PAGE = ROOT / 'docs/downstream_mmseg.md'
TEXT = PAGE.read_text()
COMMANDS = re.findall(r'tools/downstream\.py mmseg (.+)', TEXT)
SNIPPETS = re.findall(r'```python\n(.+?)```', TEXT, re.DOTALL)


def parse(command: str) -> Namespace:
    """As MMSegmentation's train.py and test.py read it."""
    parser = ArgumentParser()
    parser.add_argument('script', choices=['train', 'test'])
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--work-dir')
    parser.add_argument('--launcher', choices=['none', 'pytorch'])
    parser.add_argument('--cfg-options', nargs='+', default=[])
    return parser.parse_args(shlex.split(command))


@pytest.mark.parametrize('command', COMMANDS)
def test_command_names_a_config_and_its_options(command):
    pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    from mmengine.config import Config

    args = parse(command)
    assert (args.checkpoint is None) == (args.script == 'train')
    cfg = Config.fromfile(ROOT / args.config)
    given = [option.split('=', 1)[0] for option in args.cfg_options]
    for option in given:
        if option not in ('randomness.seed', 'train_dataloader.dataset.indices'):
            node = cfg
            for key in option.split('.'):
                node = node[int(key)] if key.isdigit() else node
                assert key.isdigit() or key in node, option
                node = node if key.isdigit() else node[key]
    if args.checkpoint:
        steps = re.search(r'iter_(\d+)\.pth', args.checkpoint)[1]
        assert int(steps) == cfg.train_cfg.max_iters


def test_switches_of_the_page_are_those_of_the_configs():
    pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    from mmengine.config import Config

    cfg = Config.fromfile(ROOT / 'configs/downstream/mmseg/upernet_vit-s16_ade20k.py')
    assert cfg.model.backbone.with_cls_token and cfg.model.backbone.final_norm
    assert cfg.model.backbone.patch_size == cfg.model.neck[0].patch_size == 16
    for methods, cls_token, norm in re.findall(
        r'^\| ([\w, ]+) \| `(True|False)`[^|]*\| `(True|False)`', TEXT, re.MULTILINE
    ):
        for method in re.findall(r'SelfPatch|LOCA|MoBY|DenseDINO|(?<!e)DINO', methods):
            if method == 'MoBY' and 'SelfPatch' in methods:
                method = 'selfpatch_moby'
            base = ROOT / f'configs/_base_/models/{method.lower()}_vit.py'
            ours = Config.fromfile(base).model.backbone
            assert str(ours.get('cls_token', True)) == cls_token, method
            assert str(ours.get('final_norm', True)) == norm, method


def run(snippet: str, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    exec(snippet, {})


def save(path: Path, content: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), content)


def test_kitti_is_prepared(tmp_path, monkeypatch):
    (snippet,) = [s for s in SNIPPETS if 'data/kitti' in s]
    labels = np.array([0, 7, 8, 9, 24, 26, 33, 29], np.uint8)
    for i in range(8):
        save(tmp_path / f'data/kitti/training/semantic/{i}_10.png', labels[None])
        picture = np.full((1, 8, 3), 30 * i, np.uint8)
        save(tmp_path / f'data/kitti/training/image_2/{i}_10.png', picture)
    run(snippet, tmp_path, monkeypatch)
    root = tmp_path / 'data/kitti'
    assert len(list(root.glob('images/train/*.png'))) == 6
    assert {p.stem for p in root.glob('annotations/val/*.png')} == {'3_10', '7_10'}
    mask = cv2.imread(str(root / 'annotations/val/3_10.png'), cv2.IMREAD_UNCHANGED)
    # void, road, sidewalk, parking, person, car, bicycle, caravan
    assert mask[0].tolist() == [255, 0, 1, 255, 11, 13, 18, 255]
    assert (cv2.imread(str(root / 'images/val/3_10.png')) == 90).all()


def test_suim_is_prepared(tmp_path, monkeypatch):
    (snippet,) = [s for s in SNIPPETS if 'data/suim' in s]
    red_green_blue = [  # water, diver, plant, wreck, robot, reef, fish, floor
        *((0, 0, 0), (0, 0, 255), (0, 255, 0), (0, 255, 255)),
        *((255, 0, 0), (255, 0, 255), (255, 255, 0), (255, 255, 255)),
    ]
    mask = np.array(red_green_blue, np.uint8)[None, :, ::-1]
    for part in ('train_val', 'TEST'):
        save(tmp_path / f'data/suim/{part}/masks/d_r_1_.bmp', mask)
        save(tmp_path / f'data/suim/{part}/images/d_r_1_.jpg', mask)
    run(snippet, tmp_path, monkeypatch)
    for split in ('train', 'val'):
        path = tmp_path / f'data/suim/annotations/{split}/d_r_1_.png'
        found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert found.tolist() == [list(range(8))]
        assert (tmp_path / f'data/suim/images/{split}/d_r_1_.jpg').is_file()


def test_table_of_sets_is_the_configs(monkeypatch):
    pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    from mmengine.config import Config, utils

    # else 50 files of mmseg are read for each base
    monkeypatch.setattr(utils, 'load', cache(utils.load))
    rows = re.findall(
        r'^\| `(\w+)` \| ([\d,]+) \| (\d+) x (\d+) \| (\d+)[^|]*\| `([^`]+)`',
        TEXT,
        re.MULTILINE,
    )
    assert len(rows) == 11
    for data, steps, height, width, classes, root in rows:
        cfg = Config.fromfile(
            ROOT / f'configs/downstream/mmseg/linear_vit-s16_{data}.py'
        )
        assert int(steps.replace(',', '')) == cfg.train_cfg.max_iters
        assert (int(height), int(width)) == cfg.crop_size
        assert int(classes) == cfg.model.decode_head.num_classes
        dataset = cfg.val_dataloader.dataset
        assert dataset.data_root.rstrip('/') == root
