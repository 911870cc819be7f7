"""A healthy run has nothing to look at; each planted fault of pictures is found."""
# ruff: noqa: F811 - fixtures are imported by name

import re
import shutil

import cv2
import numpy as np
import pytest
from doctor_setup import (  # noqa: F401
    PICTURES,
    assert_found,
    doctor,
    examine,
    lines,
    need,
    off,
    pictures,
    small,
    write_noise,
)

from densessl.doctor import step


def test_healthy_setup(small, pictures, tmp_path):
    arguments = [small, '--data', pictures, '--work-dir', tmp_path / 'run']
    ran = doctor(*arguments, '--cfg-options', 'train_dataloader.num_workers=1')
    assert not off(ran.stdout), ran.stdout
    assert ran.returncode == 0 and not ran.stderr
    assert f'images from {PICTURES} pictures' in ran.stdout
    assert not (tmp_path / 'run').exists()  # looked at only


def few(folder, count=20, **options):
    for i in range(count):
        write_noise(folder / f'{i}.jpg', i, **options)


def some_broken(folder):
    few(folder, 50)
    for name in ('7.jpg', '30.jpg'):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])


def one_broken(folder):
    few(folder, 150)
    (folder / '3.jpg').write_bytes(b'')


def copies(folder):
    few(folder)
    shutil.copy(folder / '3.jpg', folder / 'copy.jpg')


def one_grey(folder):
    few(folder)
    write_noise(folder / 'grey.png', 99, mean=(120,))


def all_grey(folder):
    few(folder, mean=(120,))


def one_of_bands(folder):
    tifffile = pytest.importorskip('tifffile')
    few(folder)
    bands = np.random.default_rng(0).integers(0, 2**16, (64, 64, 5), dtype=np.uint16)
    tifffile.imwrite(
        folder / 'bands.tif', bands, photometric='minisblack', planarconfig='contig'
    )


def constant(folder):
    for i in range(20):
        image = np.full((64, 64, 3), 200, np.uint8)
        image[..., 0], image[0, 0, 1:] = 7, i
        cv2.imwrite(str(folder / f'{i}.png'), image)


BROKEN = 'delete them'
DATA_FAULTS = {
    'an empty folder': (lambda folder: None, ('fail', 'data', 'no picture', 'give')),
    'few pictures': (few, ('warn', 'pictures', '20 in', '--init-from')),
    'truncated pictures': (
        some_broken,
        ('fail', 'broken pictures', '2 of 50', '7.jpg', 'cut off', BROKEN),
    ),
    'one empty file of many': (
        one_broken,
        ('warn', 'broken pictures', '1 of 150', '3.jpg', 'empty', BROKEN),
    ),
    'a copy': (copies, ('warn', 'duplicates', '1 of 21', 'copy.jpg', 'keep one')),
    'grey among colours': (
        one_grey,
        ('warn', 'channels', '20 of 3 x 8 bits, 1 of 1 x 8 bits', 'convert'),
    ),
    'grey throughout': (
        all_grey,
        ('warn', 'channels', '20 of 1 x 8 bits', 'pictures.*'),
    ),
    'bands that are no colours': (
        one_of_bands,
        ('fail', 'channels', 'bands.tif', '5 channels', 'pictures.channels=5'),
    ),
    'a constant channel': (
        constant,
        ('fail', 'statistics', 'channel 2 is constant', 'leave it out'),
    ),
    'smaller than the views': (
        lambda folder: few(folder, side=30),
        ('warn', 'shorter sides', '100% are smaller than views of 32', 'smaller size'),
    ),
    'darker than the config says': (
        lambda folder: few(folder, mean=(20, 20, 20)),
        ('warn', 'statistics', 'set model.data_preprocessor=', 'mean=['),
    ),
}


@pytest.mark.parametrize('fault', DATA_FAULTS)
def test_fault_of_the_pictures(fault, tmp_path, examine):
    how, wanted = DATA_FAULTS[fault]
    folder = tmp_path / 'pictures'
    folder.mkdir()
    how(folder)
    out = examine(folder=folder, code=int(wanted[0] == 'fail'))
    assert_found(out, *wanted)


def test_remedy_of_the_statistics_helps(tmp_path, examine, small):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    few(folder, mean=(20, 20, 20))
    out = examine(folder=folder, code=0)
    key, value = re.search(r'set model\.(\w+)=(dict\(.+\)) in', out).groups()
    path = tmp_path / 'own.py'
    path.write_text(f"_base_ = ['{small}']\nmodel = dict({key}={value})\n")
    out = examine(folder=None, arguments=[path, '--data', folder], code=0)
    assert 'ok    statistics' in out


def test_folder_of_other_channels_without_a_config(tmp_path, examine, small):
    rng = np.random.default_rng(0)
    for i in range(20):
        picture = rng.integers(0, 5000, (64, 64, 5), dtype=np.uint16)
        np.save(tmp_path / f'{i}.npy', picture)
    out = examine(folder=None, arguments=['--data', tmp_path], code=0)
    options = re.search(r'--cfg-options (.+)', out).group(1)
    assert 'pictures.channels=5 pictures.bits=16' in options
    # what it prints is what a config needs
    arguments = [small, '--data', tmp_path, '--cfg-options', *options.split()]
    out = examine(folder=None, arguments=arguments, code=0)
    assert {x.text.split()[0] for x in off(out)} == {'pictures'}  # 20 are few
    mixed = rng.integers(0, 5000, (64, 64, 4), dtype=np.uint16)
    np.save(tmp_path / 'mixed.npy', mixed)
    out = examine(folder=None, arguments=arguments)
    assert_found(out, 'fail', 'channels', 'mixed.npy', '4 channels', 'convert')
    out = examine(folder=None, arguments=['--data', tmp_path])
    assert_found(out, 'fail', 'channels', '20 of 5 x 16', '1 of 4 x 16', 'convert')


def test_a_preset_is_fitted_and_examined_as_a_config_is(examine, pictures):
    arguments = ['--preset', 'cpu', '--data', pictures]
    out = examine(folder=None, arguments=arguments, code=0)
    assert 'preset cpu (' in out and '32 images a step' in out
    levels = {x.text.split()[0]: x.level for x in lines(out)}
    assert levels['config'] == levels['steps'] == 'ok'
    assert 'configs/presets/cpu.py is read to the last key' in out


def test_missing_folder(examine, tmp_path):
    out = examine(folder=tmp_path / 'nowhere')
    assert_found(out, 'fail', 'data', 'nowhere')


def test_slow_reading(examine, need, monkeypatch):
    greedy = dict(need.__dict__, seconds_per_image=1e-6)
    monkeypatch.setattr(step, 'measure', lambda *_: step.StepNeed(**greedy))
    out = examine(code=0)
    assert_found(out, 'warn', 'read speed', '1000000.0 taken', 'store pictures smaller')
