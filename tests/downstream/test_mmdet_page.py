"""docs/downstream_mmdet.md: its commands take effect, its lines are what is printed."""

import re
import shlex
from argparse import ArgumentParser

import pytest
from conftest import ROOT
from mmengine.config import Config

from densessl.datasets.demo_coco import main as write_coco
from densessl.errors import DenseSSLError
from densessl.interop import mmcv_ops

TEXT = (ROOT / 'docs/downstream_mmdet.md').read_text()
FINE_TUNING = re.findall(r'tools/downstream\.py mmdet (.+)', TEXT)


@pytest.mark.parametrize('command', FINE_TUNING)
def test_command_takes_effect(command):
    pytest.importorskip('mmdet', reason='MMDetection is not installed')
    parser = ArgumentParser()
    parser.add_argument('script', choices=['train', 'test'])
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--launcher', choices=['none', 'pytorch'])
    parser.add_argument('--work-dir')
    parser.add_argument('--cfg-options', nargs='+', default=[])
    args = parser.parse_args(shlex.split(command))
    assert (args.checkpoint is None) == (args.script == 'train')
    cfg = Config.fromfile(ROOT / args.config)
    for option in args.cfg_options:
        key, value = option.split('=', 1)
        node = cfg
        for part in key.split('.'):
            part = int(part) if isinstance(node, list) else part
            assert isinstance(node, list) or part in node, key
            node = node[part]
        assert str(node) != value, f'{option}: the config has it already'


def test_demo_data_of_the_page_are_those_of_the_configs(tmp_path, monkeypatch):
    pytest.importorskip('mmdet', reason='MMDetection is not installed')
    (command,) = re.findall(r'python tools/demo_coco\.py (.+)', TEXT)
    monkeypatch.chdir(tmp_path)
    few = [*shlex.split(command), '--train=2', '--val=1', '--size=32']
    assert write_coco(few) == 0
    cfg = Config.fromfile(ROOT / 'configs/downstream/mmdet/demo_mask-rcnn_swin.py')
    for loader, count in ((cfg.train_dataloader, 2), (cfg.val_dataloader, 1)):
        root = tmp_path / loader.dataset.data_root
        assert (root / loader.dataset.ann_file).is_file()
        assert len(list((root / loader.dataset.data_prefix.img).iterdir())) == count
    assert (tmp_path / cfg.val_evaluator.ann_file).is_file()


def test_refusal_is_the_line_of_the_page():
    (line,) = re.findall(r'error: (mmcv op (\w+): .+)', TEXT)
    with pytest.raises(DenseSSLError) as refused:
        getattr(mmcv_ops._StandIn(), line[1])()
    assert str(refused.value) == line[0]
