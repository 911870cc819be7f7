"""Planted faults of configs and of the machine."""
# ruff: noqa: F811 - fixtures are imported by name

import ast
import os
import re
import shlex
import shutil
from collections import namedtuple

import pytest
import torch
from conftest import ROOT
from doctor_setup import (  # noqa: F401
    assert_found,
    examine,
    group,
    need,
    off,
    pictures,
    small,
)

from densessl.doctor import machine, main

PAGE = ROOT / 'docs/doctor.md'

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


def test_control_group_of_few_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(
        machine, 'CGROUP', group(tmp_path / 'a', cpu_max='50000 100000')
    )
    assert machine.cores() == 0.5
    monkeypatch.setattr(machine, 'CGROUP', group(tmp_path / 'b', cpu_max='max 100000'))
    assert machine.cores() == len(os.sched_getaffinity(0))


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


def test_page_lists_every_check():
    """Names in the page's table are those that lines can begin with."""
    page = PAGE.read_text()
    table = page.split('## Checks and remedies\n')[1].split('\n## ')[0]
    listed = set(re.findall(r'^\| `([^`]+)` \|', table, re.MULTILINE))
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
    assert len(commands) == 5
    for command in commands:
        path = main.parse(shlex.split(command)).config
        assert path is None or (ROOT / path).is_file()
