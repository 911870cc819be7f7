"""What a step is said to take, against what it takes."""
# ruff: noqa: F811 - fixtures are imported by name

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from doctor_setup import group, need, small  # noqa: F401
from torch import nn

from densessl import memory
from densessl.datasets import collate_views
from densessl.doctor import config, step
from densessl.errors import DenseSSLError
from densessl.losses.chunks import free_bytes
from densessl.registry import MODELS


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
    monkeypatch.setattr(memory, 'CGROUP', folder)
    assert memory.free_memory() == free_bytes(torch.device('cpu')) == limit
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
import json, re, sys, torch
from pathlib import Path
from densessl.doctor import config, step
from densessl.registry import MODELS
status = Path('/proc/self/status')  # ru_maxrss begins with that of the parent
peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])
path, batch, *options = sys.argv[1:]
cfg = config.load(path, options=options)
model = MODELS.build(cfg.model)
model.accumulate = 1
wrapper = step._optim_wrapper(cfg, model)
step._set_progress(model, cfg)
samples = config.noise_samples(cfg, 4)
peaks = []
for size in (2, int(batch)):
    step._step(model, wrapper, samples, size, step.LiveBytes([]))
    peaks.append(peak())
print(json.dumps(peaks[1] - peaks[0]))
"""


def test_need_of_a_step_is_what_the_process_then_takes():
    """Resident memory of a process, from 2 pictures to 96; within a factor of 1.5."""
    path = f'{ROOT}/configs/quickstart/selfpatch_vit-t8_demo.py'
    batch = 96
    cfg = config.load(path)
    model = MODELS.build(cfg.model)
    need = step.measure(cfg, model)
    estimate = need.peak_bytes(batch) - need.peak_bytes(2)
    command = [sys.executable, '-W', 'ignore', '-c', MEASURED, path, str(batch)]
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    measured = json.loads(ran.stdout.splitlines()[-1])
    print(f'{measured / 2**20:.0f} MiB, foretold {estimate / 2**20:.0f}')
    assert measured > 200 * 2**20  # what else a process does drowns in it
    assert measured / 1.5 < estimate < measured * 1.5


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
