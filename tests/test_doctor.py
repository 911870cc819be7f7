"""Planted faults: the doctor finds each, names its remedy, and finds none elsewhere."""

import ast
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from densessl.datasets import collate_views
from densessl.doctor import config, machine, main, step
from densessl.doctor.check import Check
from densessl.doctor.versions import FAMILIES, NEEDED, PYTHON, TESTED, fits
from densessl.errors import DenseSSLError
from densessl.registry import MODELS

PAGE = ROOT / 'docs/doctor.md'
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


# Environments: folders of planted packages in the place of all that is installed.


def plant(site: Path, packages: dict[str, str], without: tuple[str, ...] = ()) -> Path:
    """Distributions without code, and the folders of the OpenMMLab packages."""
    folders = {name: key for key, names in FAMILIES.items() for name in names}
    for name, version in packages.items():
        info = site / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir(parents=True)
        (info / 'METADATA').write_text(f'Name: {name}\nVersion: {version}\n')
        files = [f'{info.name}/METADATA']
        if (folder := folders.get(name)) and folder not in without:
            (site / folder).mkdir(exist_ok=True)
            (site / folder / '__init__.py').touch()
            files.append(f'{folder}/__init__.py')
        (info / 'RECORD').write_text(''.join(f'{file},,\n' for file in files))
    return site


def healthy_packages() -> dict[str, str]:
    whole = {**dict.fromkeys(NEEDED, '99.0'), **TESTED[0], 'setuptools': '81.0.0'}
    whole.pop('Python')
    return whole


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


ENVIRONMENT_FAULTS = {
    'setuptools without pkg_resources': (
        dict(change={'setuptools': '84.0.0'}),
        ('fail', 'setuptools', 'pkg_resources', "'setuptools>=77.0.3,<82'"),
    ),
    'a package is missing': (
        dict(change={'timm': None}),
        ('fail', 'timm', 'not installed', "pip install 'timm>=1.0.20'"),
    ),
    'torch is too old': (
        dict(change={'torch': '2.4.1+cpu'}),
        ('fail', 'torch', '2.4.1+cpu', "pip install 'torch>=2.11'"),
    ),
    'no mmcv at all': (
        dict(change={'mmcv-lite': None}),
        ('fail', 'mmcv', "pip install 'mmcv-lite>=2.0.0,<2.2.0'"),
    ),
    'mmcv is too new': (
        dict(change={'mmcv-lite': '2.2.0'}),
        ('fail', 'mmcv-lite', 'refuse 2.2', "'mmcv-lite>=2.0.0,<2.2.0'"),
    ),
    'mmcv beside mmcv-lite': (
        dict(change={'mmcv': '2.1.0'}),
        ('fail', 'mmcv', 'mmcv-lite and mmcv at once', 'pip uninstall -y mmcv-lite mm'),
    ),
    'a fork beside its original': (
        dict(change={'onedl-mmengine': '0.10.12'}),
        ('fail', 'mmengine', 'at once', 'pip uninstall -y mmengine onedl-mmengine'),
    ),
    'a fork among stock packages': (
        dict(change={'mmcv-lite': None, 'onedl-mmcv': '2.3.6'}),
        ('warn', 'forks', 'onedl-mmcv beside', 'either the forks or the stock'),
    ),
    'a folder that no package owns': (
        dict(orphan='mmdet'),
        ('fail', 'mmdet', 'no package owns it', 'delete the folder'),
    ),
    'compiled ops of another mmcv': (
        dict(file='mmcv/_ext.cpython-311-x86_64-linux-gnu.so'),
        ('fail', 'mmcv', '_ext', 'left behind', 'delete the folder'),
    ),
    'a package without its files': (
        dict(without=('mmpretrain',)),
        ('fail', 'mmpretrain', 'has lost its files', 'pip install mmpretrain'),
    ),
}


@pytest.fixture(scope='module')
def healthy_site(tmp_path_factory):
    return plant(tmp_path_factory.mktemp('site'), healthy_packages())


def test_healthy_environment_but_for_the_imports(healthy_site):
    found = off(doctor(site=healthy_site).stdout)
    assert [line.text.split(':')[0] for line in found] == [
        'import numpy ModuleNotFoundError'  # planted packages hold no code
    ]


@pytest.mark.parametrize('fault', ENVIRONMENT_FAULTS)
def test_fault_of_the_environment(fault, tmp_path):
    how, wanted = ENVIRONMENT_FAULTS[fault]
    packages = {**healthy_packages(), **how.get('change', {})}
    packages = {name: version for name, version in packages.items() if version}
    plant(tmp_path, packages, how.get('without', ()))
    if 'orphan' in how:
        (tmp_path / how['orphan']).mkdir()
        (tmp_path / how['orphan'] / '_ext.so').touch()
    if 'file' in how:
        (tmp_path / how['file']).touch()
    ran = doctor(site=tmp_path)
    assert_found(ran.stdout, *wanted)
    assert len(off(ran.stdout)) == 2  # and numpy, see above
    assert ran.returncode == 1


def test_version_that_was_not_run(tmp_path):
    plant(tmp_path, {**healthy_packages(), 'torch': '2.16.1'})
    out = doctor(site=tmp_path).stdout
    assert 'warn  torch 2.16.1 (tested: 2.15.0): if something fails, try 2.15.0' in out


def test_import_that_fails_is_one_line(tmp_path):
    plant(tmp_path, healthy_packages())
    (tmp_path / 'numpy.py').write_text(
        "raise OSError('libx.so.3: no such file\\nmore')"
    )
    ran = doctor(site=tmp_path)
    wanted = 'OSError: libx.so.3: no such file', '--force-reinstall --no-deps numpy'
    assert_found(ran.stdout, 'fail', 'import', *wanted)
    assert ran.returncode == 1 and not ran.stderr
    assert 'shared memory' in ran.stdout  # the rest goes on


def test_transformers_that_densessl_works_around(tmp_path):
    plant(tmp_path, {**healthy_packages(), 'transformers': '5.23.0'})
    folder = tmp_path / 'transformers'
    folder.mkdir()
    (folder / '__init__.py').touch()
    (folder / 'modeling_utils.py').write_text('def other(): ...')
    (line,) = [x for x in lines(doctor(site=tmp_path).stdout) if 'transf' in x.text]
    assert line.level == 'ok' and 'densessl leaves these out' in line.text
    (folder / 'modeling_utils.py').write_text('def apply_chunking_to_forward(): ...')
    (line,) = [x for x in lines(doctor(site=tmp_path).stdout) if 'transf' in x.text]
    assert line.text == 'transformers 5.23.0'


def test_limit_of_open_files(healthy_site):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    out = doctor(site=healthy_site, preexec_fn=limit).stdout
    assert_found(out, 'fail', 'open files', '64 allowed', 'ulimit -Hn')


# The machine, a config and pictures.


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


def test_missing_folder(examine, tmp_path):
    out = examine(folder=tmp_path / 'nowhere')
    assert_found(out, 'fail', 'data', 'nowhere')


CONFIG_FAULTS = {
    'a key that nothing reads': ('tain_cfg=1', ('fail', 'config', "'train_cfg'")),
    'a key of the loop': (
        'train_cfg.max_epoch=3',
        ('fail', 'config', "'train_cfg.max_epoch'", 'max_epochs'),
    ),
    'a key of the loader': (
        'train_dataloader.num_worker=2',
        ('fail', 'config', "'train_dataloader.num_worker'", 'num_workers'),
    ),
    'a key of the environment': (
        'env_cfg.cudnn_benchmrk=True',
        ('fail', 'config', "'env_cfg.cudnn_benchmrk'", 'cudnn_benchmark'),
    ),
    'a key of a hook': (
        'default_hooks.checkpoint.intervals=2',
        ('fail', 'config', 'default_hooks.checkpoint', 'intervals', 'correct'),
    ),
    'a type that is not there': (
        'model.heads.view.type=VeiwHead',
        ('fail', 'config', 'VeiwHead', 'correct the config'),
    ),
    'a batch greater than the folder': (
        'train_dataloader.batch_size=4000',
        ('fail', 'data', 'smaller than one step', 'greater length'),
    ),
    'a batch that does not split': (
        'model.accumulate=3',
        ('fail', 'steps', 'does not split', 'batch_size=6'),
    ),
    'a few long steps': (
        'train_dataloader.batch_size=500',
        ('warn', 'steps', '4 an epoch', 'sampler.length=50000'),
    ),
    'more workers than cores': (
        'train_dataloader.num_workers=9',
        ('warn', 'CPU', '2 cores for 1 x 9 workers', 'num_workers=2'),
    ),
}


@pytest.mark.parametrize('fault', CONFIG_FAULTS)
def test_fault_of_the_config(fault, examine):
    option, wanted = CONFIG_FAULTS[fault]
    out = examine(option, code=int(wanted[0] == 'fail'))
    assert_found(out, *wanted)
    assert len(off(out)) == 1


def test_work_dir_with_a_run(examine, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/step_00000062.pth').touch()
    out = examine(arguments=['--work-dir', tmp_path / 'run'], code=0)
    assert_found(out, 'warn', 'work dir', 'step_00000062.pth', '--resume')


@pytest.mark.parametrize(
    ('place', 'wanted'),
    [
        ('/dev/shm', ('fail', 'shared memory', '--shm-size=1g')),
        ('', ('fail', 'disk', 'keep=1')),
    ],
)
def test_full_device(examine, monkeypatch, place, wanted):
    usage = namedtuple('usage', 'total used free')
    real = shutil.disk_usage

    def full(path):
        shared = str(path) == '/dev/shm'
        return usage(2**40, 2**40, 1024) if shared == bool(place) else real(path)

    monkeypatch.setattr(shutil, 'disk_usage', full)
    if not machine.SHARED_MEMORY.exists():
        pytest.skip('no /dev/shm here')
    assert_found(examine(), *wanted)


def test_work_dir_that_cannot_be_written(examine, monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)  # root may write all
    out = examine(arguments=['--work-dir', tmp_path / 'run'])
    assert_found(out, 'fail', 'disk', 'cannot be written', '--work-dir')


def test_too_many_threads(examine, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 64)
    assert_found(examine(code=0), 'warn', 'CPU', '64 threads', 'OMP_NUM_THREADS=2')


def group(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace('_', '.', 1)).write_text(content)
    return folder


def test_control_group_of_few_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(
        machine, 'CGROUP', group(tmp_path / 'a', cpu_max='50000 100000')
    )
    assert machine.cores() == 0.5
    monkeypatch.setattr(machine, 'CGROUP', group(tmp_path / 'b', cpu_max='max 100000'))
    assert machine.cores() == len(os.sched_getaffinity(0))


def test_little_memory(small, tmp_path, monkeypatch):
    """Half of what a step takes: the split that is named fits, its divisor does not."""
    cfg = config.load(str(small), options=['train_dataloader.batch_size=64'])
    held = config.loading(cfg, 1)
    need = step.measure(cfg, MODELS.build(cfg.model))
    limit = int(0.5 * need.peak_bytes(64))
    folder = group(
        tmp_path / 'group',
        memory_max=str(limit + 1000),
        memory_current='2000',
        memory_stat='inactive_file 1000\n',
    )
    monkeypatch.setattr(machine, 'CGROUP', folder)
    assert machine.free_memory() == limit
    need = step.measure(cfg, MODELS.build(cfg.model))
    assert need.free_bytes == limit
    (check,) = step.check_memory(need, cfg, held)
    assert check.level == 'fail'
    parts = int(re.match(r'set model.accumulate=(\d+) or low_', check.remedy).group(1))
    cfg.model.accumulate = parts
    assert next(step.check_memory(need, cfg, held)).level == 'ok'
    cfg.model.accumulate = parts // 2
    assert next(step.check_memory(need, cfg, held)).level != 'ok'


def test_step_that_does_not_fit(small, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')

    cfg = config.load(str(small))
    model = MODELS.build(cfg.model)
    monkeypatch.setattr(model, 'train_step', full)
    with pytest.raises(DenseSSLError, match=r'1 images does not fit.*accumulate'):
        step.measure(cfg, model)


def test_slow_reading(examine, need, monkeypatch):
    greedy = dict(need.__dict__, seconds_per_image=1e-6)
    monkeypatch.setattr(step, 'measure', lambda *_: step.StepNeed(**greedy))
    out = examine(code=0)
    assert_found(out, 'warn', 'read speed', '1000000.0 taken', 'store pictures smaller')


GPU_FAULTS = {
    'torch without CUDA': (
        dict(cuda=None),
        ('fail', 'GPU', 'built for the CPU alone', 'pytorch.org'),
    ),
    'a driver that is too old': (
        dict(cuda='13.0'),
        ('fail', 'GPU', 'CUDA 13.0 finds none', 'update the driver'),
    ),
    'a busy GPU': (
        dict(cuda='13.0', free=[70, 10]),
        ('warn', 'GPU', 'busy', '10.0 of 80.0 GiB', 'CUDA_VISIBLE_DEVICES'),
    ),
}


@pytest.mark.parametrize('fault', GPU_FAULTS)
def test_fault_of_the_gpus(fault, monkeypatch):
    """Of torch's answers, as no test can plant a GPU."""
    how, (level, name, *words) = GPU_FAULTS[fault]
    free = how.get('free', [])
    if free:
        free[0] = 79
    answers = dict(
        is_available=lambda: bool(free),
        device_count=lambda: len(free),
        is_bf16_supported=lambda including_emulation: True,
        mem_get_info=lambda i: (free[i] * 2**30, 80 * 2**30),
        get_device_name=lambda i: 'A card',
    )
    for function, answer in answers.items():
        monkeypatch.setattr(torch.cuda, function, answer)
    monkeypatch.setattr(torch.version, 'cuda', how['cuda'])
    monkeypatch.setattr(machine, 'nvidia_driver', lambda: True)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    checks = list(machine.check_gpus())
    assert [check.level for check in checks] == ['ok'] * (len(free) - 1) + [level]
    assert checks[-1].name.startswith(name)
    assert all(word in str(checks[-1]) for word in words)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(machine, 'nvidia_driver', lambda: False)
    assert [check.level for check in machine.check_gpus()] == ['ok']


# What the checks stand on.


def test_check_has_a_remedy_or_is_ok():
    for level, remedy in (('ok', 'do'), ('warn', ''), ('fail', '')):
        with pytest.raises(ValueError, match='remedy'):
            Check(level, 'a', 'b', remedy)


def test_versions_are_those_of_setup_py():
    tree = ast.parse((ROOT / 'setup.py').read_text())
    text = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert PYTHON in text
    for package, bounds in NEEDED.items():
        assert package + bounds in text
    asked = [
        s for s in text if isinstance(s, str) and re.fullmatch(r'[\w-]+[<>]=.+', s)
    ]
    known = NEEDED | main.packages.OPTIONAL
    for requirement in asked:
        package, bounds = re.fullmatch(r'([\w-]+)(.+)', requirement).groups()
        assert package == 'ruff' or known[package] == bounds
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and isinstance(node.values[0], ast.Set):
            families = [{e.value for e in value.elts} for value in node.values]
            assert families == [
                set(FAMILIES[k]) for k in ('mmengine', 'mmcv', 'mmpretrain')
            ]
            break
    else:
        raise AssertionError('setup.py names no families')


def test_versions_are_those_of_the_readme():
    section = (ROOT / 'README.md').read_text().split('## What was run\n')[1]
    head, _, *rows = (x for x in section.split('\n## ')[0].splitlines() if x[:1] == '|')
    names, *table = [
        [c.strip() for c in r.strip('|').split('|')] for r in (head, *rows)
    ]
    for row, tested in zip(table, TESTED, strict=True):
        shown = dict(zip(names, row, strict=True))
        shown.pop('on')
        package, shown[package] = shown.pop('mmcv').split()
        assert shown == tested


@pytest.mark.parametrize(
    ('version', 'needed', 'result'),
    [
        ('82.0.0', '>=77.0.3,<82', False),
        ('81.9', '>=77.0.3,<82', True),
        ('77.0.3', '>=77.0.3,<82', True),
        ('77.0.2', '>=77.0.3', False),
        ('2.9.1+cu128', '>=2.11', False),
        ('2.11.0', '>=2.11', True),
        ('2.11', '>=2.11.0', True),
        ('1', '', True),
    ],
)
def test_version_ranges(version, needed, result):
    assert fits(version, needed) is result


def test_living_bytes_are_counted():
    layer = nn.Linear(1000, 500, bias=False)  # 2 MB
    counter = step.LiveBytes(layer.parameters())
    x = torch.zeros(100, 1000)
    with counter:
        y = layer(x)  # 100 x 500 floats
        assert counter.live == 4 * (500_000 + 50_000)
        z = y.view(-1)[:10]  # no new memory
        y = None
        assert counter.live == 4 * (500_000 + 50_000)
        z = None
        assert counter.live == 4 * 500_000
        layer(x).sum().backward()
        assert counter.live == 4 * 1_000_000  # the gradient stays
        y = torch.empty(300_000), torch.empty(700_000)
        del y
    assert z is None and counter.live == 4 * 1_000_000
    assert counter.peak == 4 * 2_000_000


MEASURED = """
import json, resource, sys, torch
from densessl.doctor import config, step
from densessl.registry import MODELS
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
path, batch, *options = sys.argv[1:]
cfg = config.load(path, options=options)
model, before = MODELS.build(cfg.model), peak()
model.accumulate = 1
wrapper = step._optim_wrapper(cfg, model)
step._set_progress(model, cfg)
samples = config.noise_samples(cfg, 4)
for size in (2, int(batch)):
    step._step(model, wrapper, samples, size, step.LiveBytes([]))
print(json.dumps(peak() - before))
"""


def test_need_of_a_step_is_what_the_process_then_takes():
    """Resident memory of a process that takes such steps; within a factor of 1.3."""
    path = f'{ROOT}/configs/quickstart/selfpatch_vit-t8_demo.py'
    batch = 96
    cfg = config.load(path)
    model = MODELS.build(cfg.model)
    there = sum(p.numel() * 4 for p in model.parameters())
    estimate = step.measure(cfg, model).peak_bytes(batch) - there
    command = [sys.executable, '-W', 'ignore', '-c', MEASURED, path, str(batch)]
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    measured = json.loads(ran.stdout.splitlines()[-1])
    assert measured > 200 * 2**20  # what else a process does drowns in it
    assert measured / 1.3 < estimate < measured * 1.3


def test_disk_need_is_the_size_of_the_checkpoints(small, tmp_path, need):
    cfg = config.load(str(small))
    model = MODELS.build(cfg.model)
    wrapper = step._optim_wrapper(cfg, model)
    step._set_progress(model, cfg)
    batch = collate_views(config.noise_samples(cfg, 4))
    model.train_step(batch, wrapper)
    state = dict(state_dict=model.state_dict(), optim_wrapper=wrapper.state_dict())
    torch.save(state, tmp_path / 'step.pth')
    size = (tmp_path / 'step.pth').stat().st_size
    assert need.checkpoint_bytes == pytest.approx(size, rel=0.1)
    assert config.disk_need(cfg, 10) == (40, '4 checkpoints of 0 MiB')
    cfg.default_hooks.checkpoint.keep = 0  # all: 9 epochs, every 4th and the last
    assert config.disk_need(cfg, 10)[0] == 40


def test_batch_norm_is_measured_on_two_pictures(tmp_path):
    path = ROOT / 'configs/quickstart/selfpatch-moby_vit_demo.py'
    cfg = config.load(str(path))
    need = step.measure(cfg, MODELS.build(cfg.model))
    assert 0 < need.image_bytes < need.first_bytes


def test_several_processes_share_memory_and_hold_gradients_twice(small, need):
    cfg = config.load(str(small))
    assert need.peak_bytes(4, 1, 2) - need.peak_bytes(4) == need.gradient_bytes
    one, two = (config.loading(cfg, n) for n in (1, 2))
    assert two.shared_bytes == 2 * one.shared_bytes
    # 2 x 32 x 32 + 2 x 24 x 24 px of 3 bytes, 4 pictures; 1 worker with 2 batches
    assert one.shared_bytes == 3 * 4 * 3 * (2 * 32 * 32 + 2 * 24 * 24)


def test_page_lists_every_check():
    """Names in the page's table are those that lines can begin with."""
    page = PAGE.read_text()
    listed = set(re.findall(r'^\| `([^`]+)` \|', page, re.MULTILINE))
    names = set()
    for module in ('packages', 'machine', 'config', 'step', 'data'):
        tree = ast.parse((ROOT / f'densessl/doctor/{module}.py').read_text())
        for node in ast.walk(tree):
            called = isinstance(node, ast.Call) and getattr(node.func, 'id', '')
            place = {'Check': 1, 'failure': 0}.get(called)
            if place is not None and isinstance(node.args[place], ast.Constant):
                names.add(node.args[place].value)
    assert names <= listed
    assert listed - names == {'Python', 'import', 'step', 'data'}
    commands = re.findall(r'^python tools/doctor\.py(.*)$', page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        path = main.parse(shlex.split(command)).config
        assert path is None or (ROOT / path).is_file()
