"""The hook that tells whether fine-tuning starts from the exported weights."""

import logging
from itertools import count

import pytest
import torch
from conftest import build_model, model_config
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel, BaseModule
from mmengine.runner import Runner
from torch import nn

from densessl.errors import DenseSSLError
from densessl.interop.backbone import save_backbone
from densessl.interop.downstream import allow_checkpoints
from densessl.interop.fingerprint import fingerprint

NUMBERS = count()
SAID: list[str] = []


class Backbone(BaseModule):
    """Layers with and without running statistics; starts as ``init_cfg`` says."""

    def __init__(self, dims=4, init_cfg=None):
        super().__init__(init_cfg)
        self.layers = nn.Sequential(
            nn.Linear(3, dims), nn.BatchNorm1d(dims), nn.Linear(dims, dims)
        )


class Model(BaseModel):
    def __init__(self, **options):
        super().__init__()
        self.backbone = Backbone(**options)
        self.head = nn.Linear(self.backbone.layers[0].out_features, 1)

    def forward(self, x, mode='loss'):
        return dict(loss=self.head(self.backbone.layers(x)).square().mean())

    def train_step(self, data, optim_wrapper):
        loss = self(torch.stack(data))['loss']
        optim_wrapper.update_params(loss)
        return dict(loss=loss)


class Overwrite(Hook):
    """What the hook is there to find: weights that change after loading."""

    def __init__(self, key):
        self.key = key

    def before_train(self, runner):
        with torch.no_grad():
            runner.model.backbone.state_dict()[self.key].add_(1)


class Listen(logging.Handler):
    def emit(self, record):
        SAID.append(record.getMessage())


def export(path, backbone, **meta):
    state = backbone.state_dict()
    about = dict(format='densessl-export', target='mmseg', fingerprint='')
    about |= dict(fingerprint=fingerprint(state)) | meta
    prefixed = {f'backbone.{key}': value for key, value in state.items()}
    torch.save(dict(state_dict=prefixed, meta=about), path)
    return str(path)


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(1)
    backbone = Backbone()
    return export(tmp_path / 'exported.pth', backbone), backbone


@pytest.fixture
def fine_tune(tmp_path, monkeypatch):
    monkeypatch.setattr('logging.raiseExceptions', False)  # closed streams of pytest
    SAID.clear()

    def run(load_from=None, *, model=None, hooks=(), iters=1, resume=False, **options):
        torch.manual_seed(2)
        runner = Runner(
            model=model or Model(**options),
            work_dir=str(tmp_path / 'work_dir'),
            train_dataloader=dict(
                batch_size=2,
                dataset=[torch.randn(3) for _ in range(8)],
                sampler=dict(type='InfiniteSampler'),
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(by_epoch=False, max_iters=iters),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            default_hooks=dict(
                checkpoint=dict(
                    type='mmengine.CheckpointHook', interval=1, by_epoch=False
                )
            ),
            custom_hooks=[dict(type='densessl.WeightFingerprintHook'), *hooks],
            load_from=load_from,
            resume=resume,
            default_scope='densessl',
            experiment_name=f'run {next(NUMBERS)}',
            cfg=Config(),
        )
        listener = Listen()
        runner.logger.addHandler(listener)
        try:
            runner.train()
        finally:
            runner.logger.removeHandler(listener)
        return runner

    return run


def said(words: str) -> str:
    (line,) = [line for line in SAID if words in line]
    return line


def test_fingerprint_is_printed_when_the_weights_are_there(fine_tune, exported):
    path, backbone = exported
    fine_tune(path)
    line = said(', fingerprint ')
    assert path in line and 'the 9 tensors' in line
    assert fingerprint(backbone.state_dict()) in line


def test_file_of_init_cfg_is_compared_too(fine_tune, exported):
    path, backbone = exported
    pretrained = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    for init_cfg in (pretrained, [pretrained]):
        SAID.clear()
        model = Model(init_cfg=init_cfg)
        fine_tune(model=model)
        assert fingerprint(backbone.state_dict()) in said(', fingerprint ')


def test_file_that_was_not_loaded_ends_the_run(fine_tune, exported):
    model = Model(init_cfg=dict(type='Pretrained', checkpoint=exported[0]))  # no prefix
    with pytest.raises(DenseSSLError, match='of 9 tensors 4 differ') as error:
        fine_tune(model=model)  # the norm's five start alike
    assert 'nothing was loaded: give the file by load_from' in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'key',
    ['layers.0.weight', 'layers.1.running_var', 'layers.1.num_batches_tracked'],
)
def test_one_tensor_that_was_overwritten_ends_the_run(fine_tune, exported, key):
    with pytest.raises(DenseSSLError) as error:
        fine_tune(exported[0], hooks=[Overwrite(key)])
    assert f'of 9 tensors 1 differ ({key})' in str(error.value)
    assert 'init_weights or another hook overwrote' in str(error.value)
    assert '\n' not in str(error.value)


def test_another_width_ends_the_run(fine_tune, exported):
    with pytest.raises(DenseSSLError, match=r'8 have another shape.*width') as error:
        fine_tune(exported[0], dims=5)
    assert '\n' not in str(error.value)


def test_other_names_end_the_run(fine_tune, tmp_path):
    other = nn.ModuleDict(dict(blocks=nn.Linear(3, 4)))
    path = export(tmp_path / 'other.pth', other)
    with pytest.raises(DenseSSLError) as error:
        fine_tune(path)
    assert '2 of the file are not in the model (blocks.weight' in str(error.value)
    assert '9 of the model are not in the file (layers.0.weight' in str(error.value)
    assert 'compare its type' in str(error.value)


def test_file_that_changed_after_the_export_ends_the_run(fine_tune, tmp_path):
    path = export(tmp_path / 'changed.pth', Backbone(), fingerprint='0' * 64)
    with pytest.raises(DenseSSLError, match=r'noted 0{12}.*export it again'):
        fine_tune(path)


def test_random_weights_are_named(fine_tune):
    fine_tune()
    assert said('backbone').startswith('backbone starts from random weights')


def test_files_of_others_are_not_checked(fine_tune, tmp_path):
    path = tmp_path / 'theirs.pth'
    for contents in (dict(state_dict=Model().state_dict()), Model().state_dict()):
        SAID.clear()
        torch.save(contents, path)
        fine_tune(str(path))
        assert 'not checked' in said('no export of densessl')


def test_resumed_run_is_left_alone(fine_tune, exported):
    fine_tune(exported[0], iters=2)
    SAID.clear()
    allow_checkpoints()
    runner = fine_tune(iters=3, resume=True)
    assert runner.iter == 3
    assert any('resumed' in line for line in SAID)
    assert not any('backbone' in line for line in SAID)


def test_missing_file_is_one_line(fine_tune, tmp_path):
    with pytest.raises(DenseSSLError, match='no such file'):
        fine_tune(str(tmp_path / 'nowhere.pth'))


def test_whole_run_is_refused(fine_tune, tmp_path):
    path = tmp_path / 'step_00000372.pth'
    torch.save(dict(kind='densessl-run', state_dict=build_model().state_dict()), path)
    with pytest.raises(DenseSSLError, match='whole densessl run') as error:
        fine_tune(str(path))
    assert f'convert.py export {path} OUT.pth --to mmseg' in str(error.value)


def test_backbone_in_our_names_is_refused(fine_tune, tmp_path):
    path = tmp_path / 'backbone.safetensors'
    model = build_model()
    save_backbone(
        path, model.backbone, model_config()['backbone'], mean=[0] * 3, std=[1] * 3
    )
    for options in (
        dict(load_from=str(path)),
        dict(init_cfg=dict(type='Pretrained', checkpoint=str(path))),
    ):
        with pytest.raises(DenseSSLError, match=r'export the backbone.*--to mmseg'):
            fine_tune(**options)
