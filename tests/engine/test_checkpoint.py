"""Checkpoints in other hands."""

import pytest
import torch
from conftest import build_model, model_config

from densessl.engine.checkpoint import write_atomically
from densessl.errors import DenseSSLError
from densessl.interop import load_strictly
from densessl.registry import MODELS


@pytest.mark.parametrize('prefix', ['backbone.', 'teacher.backbone.'])
def test_mmengines_pretrained_loads_student_and_teacher(tmp_path, prefix):
    model = build_model()
    with torch.no_grad():
        model.teacher.backbone.pos_embed.add_(1)
    path = tmp_path / 'step_00000001.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    init = dict(type='Pretrained', checkpoint=str(path), prefix=prefix)
    backbone = MODELS.build(model_config()['backbone'] | dict(init_cfg=init))
    backbone.init_weights()
    source = model.teacher.backbone if prefix.startswith('teacher') else model.backbone
    for name, value in source.state_dict().items():
        assert backbone.state_dict()[name].equal(value), name


def test_init_cfg_of_a_config_reaches_student_and_teacher(tmp_path):
    first = build_model(seed=1)
    path = tmp_path / 'step_00000001.pth'
    torch.save(dict(state_dict=first.state_dict()), path)
    init = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    backbone = model_config()['backbone'] | dict(init_cfg=init)
    second = build_model(seed=2, backbone=backbone)
    second.init_weights()
    for part in (second.backbone, second.teacher.backbone):
        for name, value in first.backbone.state_dict().items():
            assert part.state_dict()[name].equal(value), name


def test_strict_loading_changes_nothing_when_it_refuses():
    layer = torch.nn.Linear(2, 3)
    before = layer.weight.clone()
    state = dict(weight=torch.ones(3, 2), extra=torch.ones(1))
    with pytest.raises(
        DenseSSLError, match=r'1 missing \(bias\); 1 unexpected \(extra'
    ):
        load_strictly(layer, state, 'file')
    with pytest.raises(DenseSSLError, match=r'weight \(2, 2\) for \(3, 2\)'):
        load_strictly(layer, dict(weight=torch.ones(2, 2), bias=torch.ones(3)), 'file')
    assert layer.weight.equal(before)


def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')

    def write(partial):
        partial.write_text('half')
        raise OSError(28, 'No space left on device')

    with pytest.raises(DenseSSLError, match='no space left on the device'):
        write_atomically(path, write)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda partial: partial.write_text('new'))
    assert path.read_text() == 'new'


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(DenseSSLError, match=r'cannot write .*directory.*MiB free'):
        write_atomically(tmp_path / 'file' / 'below' / 'x', lambda partial: None)
