"""Chunks of logits follow the memory that is free; losses do not."""

import pytest
import torch
from test_distillation import TEMPS, leaves_of, problem

from densessl.losses import chunks, distillation_loss

MiB = 2**20


@pytest.mark.parametrize(
    ('free', 'expected'),
    [
        (None, 16 * MiB),
        (2**40, 16 * MiB),
        (128 * MiB, 16 * MiB),
        (128 * MiB - 1, 8 * MiB),
        (40 * MiB, 4 * MiB),
        (8 * MiB, MiB),
        (0, MiB),
    ],
)
def test_chunks_are_halved_until_eight_fit(monkeypatch, free, expected):
    monkeypatch.setattr(chunks, 'free_bytes', lambda device: free)
    assert chunks.bytes_at_once(torch.device('cpu')) == expected
    rows = torch.zeros(5, 7, dtype=torch.float64)
    assert chunks.rows_at_once(rows, 1024) == expected // (1024 * 8)
    assert chunks.rows_at_once(rows, 1024, chunk_bytes=9 * 8192) == 9
    assert chunks.rows_at_once(rows, 2**40) == 1


def test_gpu_chunks(monkeypatch):
    device = torch.device('cuda', 0)
    said = dict(
        mem_get_info=(1500 * MiB, 8192 * MiB),
        memory_reserved=4000 * MiB,
        memory_allocated=3600 * MiB,
    )
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert chunks.free_bytes(device) == 1900 * MiB  # 400 are torch's, and unused
    assert chunks.bytes_at_once(device) == 128 * MiB
    said = (1700 * MiB, 8192 * MiB)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: said)
    assert chunks.bytes_at_once(device) == 256 * MiB


def test_free_memory_of_this_machine():
    free = chunks.free_bytes(torch.device('cpu'))
    if free is None:
        pytest.skip('no /proc/meminfo')
    with open('/proc/meminfo') as lines:
        total = 1024 * int(next(lines).split()[1])
    assert MiB < free < total
    assert chunks.free_bytes(torch.device('meta')) is None


def test_loss_and_gradients_with_hardly_any_memory(monkeypatch):
    args = problem(images=8, rows=10, width=16, outputs=501, dtype=torch.float32)
    leaves, found = leaves_of(args), []
    monkeypatch.setattr(chunks, 'LEAST_CHUNK_BYTES', 1)
    counts = []
    whole = chunks.rows_at_once

    def count(*arguments):
        counts.append(whole(*arguments))
        return counts[-1]

    monkeypatch.setattr('densessl.losses.distillation.rows_at_once', count)
    for free in (None, 8 * 4096):  # all at once, and two rows of 501
        monkeypatch.setattr(chunks, 'free_bytes', lambda device, free=free: free)
        loss = distillation_loss(**args, **TEMPS).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert counts[0] > 80 and counts[1] == 2
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() / b.norm() < 5e-6  # rounding
