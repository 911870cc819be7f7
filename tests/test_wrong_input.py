"""Errors a user can cause: one line with the thing and the remedy, exit code 2."""

import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, build_model, train

import densessl
from densessl.engine.checkpoint import load_newest_run, write_atomically
from densessl.engine.launch import main
from densessl.errors import DenseSSLError
from densessl.interop import save_backbone


@pytest.fixture(autouse=True)
def no_logging_errors(monkeypatch):
    # Loggers of earlier runs in this process still hold pytest's closed streams.
    monkeypatch.setattr('logging.raiseExceptions', False)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        image = rng.integers(0, 256, (60, 80, 3), np.uint8)
        cv2.imwrite(str(folder / f'{i}.jpg'), image)
    return folder


def error_of(capfd, *arguments) -> str:
    """The one line that a command line ends in."""
    code = main([str(a) for a in arguments])
    lines = capfd.readouterr().err.strip().splitlines()
    assert code == 2
    errors = [line for line in lines if line.startswith('error: ')]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    assert 'Traceback' not in '\n'.join(lines)
    return errors[0]


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['model.heads.selfpatch.top_k=9'], ['k=9', '8 neighbours', 'lower top_k']),
        (['model.heads.view.type=VeiwHead'], ['VeiwHead', 'registry']),
        (['model.heads.view.out_dim=64'], ['out_dim', 'unexpected keyword']),
        (
            ['train_dataloder.batch_size=4'],
            ["no 'train_dataloder'", 'train_dataloader'],
        ),
        (['tain_cfg=1'], ["nothing reads the key 'tain_cfg'", "'train_cfg'"]),
        (
            ['train_dataloader.batch_size=64'],
            ['smaller than one step', 'lower batch_size'],
        ),
        (['model.backbone.patch_size=7'], ['not a multiple', 'patch_size=7']),
        (['optim_wrapper.precision=fp8'], ["precision='fp8'", 'bf16']),
        (['model.teacher_momentum=0.01'], ['share of the old teacher']),
        (['model.heads.selfpatch.loss_weight=-1'], ['loss_weight: end=-1']),
        (
            [
                'model.heads.selfpatch.loss_weight._delete_=True',
                'model.heads.selfpatch.loss_weight.start=1',
            ],
            ['loss_weight: found dict(start)', 'give end'],
        ),
        (
            [
                'model.heads.selfpatch.loss_weight._delete_=True',
                'model.heads.selfpatch.loss_weight.end=1',
                'model.heads.selfpatch.loss_weight.start_epoch=3',
            ],
            ['start_epoch=3 never comes', 'the run has 3 epochs'],
        ),
        (
            [
                'model.heads.selfpatch.top_k=adaptive',
                'model.heads.selfpatch.window=all',
            ],
            ["'adaptive' looks at a window"],
        ),
    ],
)
def test_settings(capfd, small_config, tmp_path, options, words):
    line = error_of(
        capfd, small_config, '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    for word in words:
        assert word in line


def test_missing_config(capfd):
    assert 'no such file' in error_of(capfd, 'configs/nothing.py')


def test_custom_import_that_is_not_there(capfd, small_config, tmp_path):
    with open(small_config, 'a') as file:
        file.write("custom_imports = dict(imports=['no_such_matcher'])\n")
    line = error_of(capfd, small_config, '--work-dir', tmp_path / 'run')
    assert 'no_such_matcher' in line and 'PYTHONPATH' in line


def test_missing_and_empty_folder(capfd, small_config, tmp_path):
    work = ('--work-dir', tmp_path / 'w')
    line = error_of(capfd, small_config, '--data', tmp_path / 'nowhere', *work)
    assert 'nowhere' in line
    (tmp_path / 'empty').mkdir()
    line = error_of(capfd, small_config, '--data', tmp_path / 'empty', *work)
    assert 'empty' in line and 'picture' in line


def test_view_size_the_patch_does_not_divide(capfd, small_config, tmp_path):
    text = small_config.read_text().replace('size=24', 'size=20')
    small_config.write_text(text)
    line = error_of(capfd, small_config, '--work-dir', tmp_path / 'w')
    assert '20x20 px is not a multiple of patch_size=8' in line


def test_view_too_small_for_the_neighbourhood(capfd, small_config, tmp_path):
    text = small_config.read_text().replace('size=24', 'size=8')
    small_config.write_text(text)
    line = error_of(capfd, small_config, '--work-dir', tmp_path / 'w')
    assert '1x1 grid' in line and 'enlarge the crop' in line


def test_one_image_batches_train(small_config, tmp_path):
    # A centre exists, so a batch of one is no special case.
    options = ['train_dataloader.batch_size=1', 'train_cfg.max_epochs=1']
    code = main(
        [
            str(small_config),
            '--work-dir',
            str(tmp_path / 'w'),
            '--cfg-options',
            *options,
        ]
    )
    assert code == 0 and (tmp_path / 'w/step_00000016.pth').exists()


def test_pictures_smaller_than_a_crop_train(small_config, pictures, tmp_path):
    cv2.imwrite(str(pictures / 'small.png'), np.zeros((1, 5, 3), np.uint8))
    work = tmp_path / 'w'
    code = main([str(small_config), '--data', str(pictures), '--work-dir', str(work)])
    assert code == 0 and (work / 'features.png').exists()


def test_broken_pictures_stop_the_run_by_name(capfd, small_config, pictures, tmp_path):
    (pictures / 'broken.jpg').write_bytes(b'no picture')
    line = error_of(
        capfd, small_config, '--data', pictures, '--work-dir', tmp_path / 'w'
    )
    assert '1 of 9 pictures are broken' in line and 'broken.jpg' in line
    options = ['--cfg-options', 'default_hooks.broken.max_broken=0.5']
    work = ('--work-dir', tmp_path / 'w2')
    result = train(small_config, '--data', pictures, *work, *options)
    assert 'broken.jpg; another picture took its place' in result.stdout + result.stderr


def test_work_dir_that_cannot_be_made(capfd, small_config):
    line = error_of(capfd, small_config, '--work-dir', small_config / 'below_a_file')
    assert 'below_a_file cannot be made' in line and '--work-dir' in line


def test_work_dir_that_holds_a_run(capfd, small_config, tmp_path):
    (tmp_path / 'step_00000004.pth').write_bytes(b'')
    line = error_of(capfd, small_config, '--work-dir', tmp_path)
    assert 'holds a run' in line and '--resume' in line


def test_resume_with_nothing_there(capfd, small_config, tmp_path):
    line = error_of(capfd, small_config, '--work-dir', tmp_path, '--resume')
    assert 'no checkpoint to go on from' in line


def test_resume_and_init_from_refuse_each_others_files(capfd, small_config, tmp_path):
    first = tmp_path / 'first'
    one_epoch = ['--cfg-options', 'train_cfg.max_epochs=1']
    assert main([str(small_config), '--work-dir', str(first), *one_epoch]) == 0
    capfd.readouterr()
    run, weights = first / 'step_00000004.pth', first / 'backbone.safetensors'
    work = ('--work-dir', tmp_path / 'second')
    line = error_of(capfd, small_config, *work, '--resume', weights)
    assert 'weights only' in line and f'--init-from {weights}' in line
    line = error_of(capfd, small_config, *work, '--init-from', run)
    assert 'checkpoint of a run' in line and 'backbone.safetensors' in line
    line = error_of(capfd, small_config, *work, '--init-from', weights, '--resume', run)
    assert 'exclude each other' in line
    plain = tmp_path / 'plain.pth'
    torch.save(dict(state_dict={}), plain)
    line = error_of(capfd, small_config, *work, '--resume', plain)
    assert 'no checkpoint of a densessl run' in line
    line = error_of(capfd, small_config, *work, '--resume', tmp_path / 'no.pth')
    assert 'does not exist' in line

    other = [*one_epoch, 'model.backbone.arch.depth=3']
    line = error_of(capfd, small_config, *work, '--init-from', weights, *other)
    assert 'another architecture' in line and 'missing (blocks.2.' in line
    line = error_of(capfd, small_config, *work, '--resume', run, *other)
    assert 'another architecture' in line and 'missing (backbone.blocks.2.' in line
    line = error_of(
        capfd, small_config, *work, '--resume', run, '--seed', 5, *one_epoch
    )
    assert 'seed 0' in line and '--seed 0' in line
    batch = [*one_epoch, 'train_dataloader.batch_size=2']
    line = error_of(capfd, small_config, *work, '--resume', run, *batch)
    assert '4 steps an epoch of 4 images' in line

    args = ['--init-from', str(weights), *one_epoch, 'optim_wrapper.optimizer.lr=0.0']
    assert main([str(small_config), '--work-dir', str(tmp_path / 'third'), *args]) == 0
    loaded = densessl.load_backbone(weights)
    after = densessl.load_backbone(tmp_path / 'third/backbone.safetensors')
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, msg=name)


def test_full_device_loses_nothing(tmp_path):
    # A limit on the size of files acts like a full device, for this process only.
    code = """
import resource, sys
from pathlib import Path
from densessl.engine.checkpoint import write_atomically
from densessl.errors import DenseSSLError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), lambda p: p.write_bytes(b'1' * 5000))
except DenseSSLError as error:
    print(error)
"""
    path = tmp_path / 'step_00000001.pth'
    path.write_bytes(b'good')
    result = subprocess.run(
        [sys.executable, '-c', code, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert f'cannot write {path}: File too large' in result.stdout
    assert 'earlier files are intact' in result.stdout
    assert path.read_bytes() == b'good' and list(tmp_path.iterdir()) == [path]


def test_no_space_left_is_said_in_words(tmp_path):
    if not shutil.which('dd'):
        pytest.skip('needs dd')

    def write(path):
        with open('/dev/full', 'wb') as device:
            device.write(b'1' * 5000)

    with pytest.raises(DenseSSLError, match='no space left on the device'):
        write_atomically(tmp_path / 'file', write)
    assert not list(tmp_path.iterdir())


def test_only_unreadable_checkpoints(tmp_path):
    (tmp_path / 'step_00000004.pth').write_bytes(b'half')
    with pytest.raises(DenseSSLError, match='none of its 1 can be read'):
        load_newest_run(tmp_path)


def test_non_finite_loss_stops_names_and_keeps(small_config, tmp_path):
    options = [
        'optim_wrapper.optimizer.lr=1e30',
        'default_hooks.schedule.warmup_epochs=0',
    ]
    work = tmp_path / 'w'
    result = train(
        small_config, '--work-dir', work, '--cfg-options', *options, check=False
    )
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith('error: step ') and 'loss_' in line
    (incident,) = (work / 'incidents').iterdir()
    assert str(incident) in line
    state = torch.load(incident, weights_only=True)
    assert len(state['paths']) == 4 and state['kind'] == 'densessl-incident'


def test_loading_a_backbone(tmp_path):
    path = tmp_path / 'backbone.safetensors'
    with pytest.raises(DenseSSLError, match='no such file'):
        densessl.load_backbone(path)
    path.write_bytes(b'text')
    with pytest.raises(DenseSSLError, match='not a safetensors file'):
        densessl.load_backbone(path)
    from safetensors.torch import save_file

    save_file({'weight': torch.zeros(1)}, path)
    with pytest.raises(DenseSSLError, match='did not write'):
        densessl.load_backbone(path)


def test_backbone_file_gives_the_same_features(tmp_path):
    from conftest import model_config

    model = build_model()
    path = tmp_path / 'backbone.safetensors'
    config = model_config()['backbone']
    save_backbone(
        path, model.teacher.backbone, config, mean=[1, 2, 3], std=[4, 5, 6], steps=7
    )
    backbone = densessl.load_backbone(path)
    images = torch.randn(2, 3, 32, 32)
    expected = model.teacher.backbone.eval()(images).patches
    assert backbone(images).patches.equal(expected)
    assert (backbone.mean, backbone.std) == ([1, 2, 3], [4, 5, 6])
    assert not backbone.training
    # the file's description is plain JSON that any reader of safetensors can show
    header = path.read_bytes()
    length = int.from_bytes(header[:8], 'little')
    about = json.loads(header[8 : 8 + length])['__metadata__']
    assert json.loads(about['config']) == config and about['steps'] == '7'
