"""Synchronised batch norm against torch's, in one process and in two."""

import copy
import os

import pytest
import torch
from torch import nn

from densessl.errors import DenseSSLError
from densessl.models.batch_norm import BatchNormMLP, SyncBatchNorm

CHANNELS = 5
SHARES = (3, 5)  # rows of each of two ranks


def batches(count=3, dtype=torch.float64, shift=2.0):
    generator = torch.Generator().manual_seed(0)
    shape = (count, sum(SHARES), CHANNELS)
    return (shift + torch.randn(shape, generator=generator).double()).to(dtype)


def layer(kind, dtype=torch.float64):
    norm = kind(CHANNELS).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        values = torch.rand(CHANNELS, generator=generator).double()
        parameter.data = values.to(dtype)
    return norm


def run(norm, forward, x):
    """Outputs and input gradients of several batches, then gradients and buffers."""
    found = []
    for batch in x:
        batch = batch.clone().requires_grad_()
        out = forward(batch)
        out.sin().sum().backward()
        found += [out.detach(), batch.grad]
    # a copy: the state is that of tensors which go on changing
    return found, [norm.weight.grad, norm.bias.grad], copy.deepcopy(norm.state_dict())


@pytest.mark.parametrize(
    ('dtype', 'shift', 'tolerance'),
    [(torch.float64, 2.0, 1e-9), (torch.float32, 2.0, 2e-5)],
)
def test_one_process_equals_torch(dtype, shift, tolerance):
    x = batches(dtype=dtype, shift=shift)
    ours, plain = layer(SyncBatchNorm, dtype), layer(nn.BatchNorm1d, dtype)
    # the path of several ranks, with one
    result, expected = run(ours, ours.over_ranks, x), run(plain, plain, x)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_keeps_its_digits_far_from_zero():
    norm, exact = (layer(SyncBatchNorm, d) for d in (torch.float32, torch.float64))
    for n in (norm, exact):
        n.running_mean += 1000
    x = batches(1, torch.float32, shift=1000.0)[0]
    out = norm.over_ranks(x)
    # squares about 0 would have lost all but one digit of the variance
    torch.testing.assert_close(
        out.double(), exact.over_ranks(x.double()), rtol=0, atol=1e-4
    )


def test_evaluation_uses_running_statistics_and_keeps_them():
    norm, x = layer(SyncBatchNorm), batches(1)[0]
    norm(x)
    state = copy.deepcopy(norm.eval().state_dict())
    expected = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight + norm.bias)
    torch.testing.assert_close(norm.state_dict(), state, rtol=0, atol=0)


def test_batch_of_one_row():
    norm = layer(SyncBatchNorm)
    with pytest.raises(DenseSSLError, match='one row has no spread; raise batch_size'):
        norm(batches(1)[0, :1])
    norm.eval()(batches(1)[0, :1])


def test_under_autocast_trains():
    mlp = BatchNormMLP(CHANNELS, 7, 4)
    with torch.autocast('cpu', torch.bfloat16):
        out = mlp(batches(1, torch.float32)[0])
        over_ranks = SyncBatchNorm(4).over_ranks(out)
    assert out.dtype == over_ranks.dtype == torch.bfloat16
    over_ranks.float().sin().sum().backward()
    assert all(p.grad.isfinite().all() for p in mlp.parameters())


def worker(rank, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1')
    torch.set_num_threads(1)
    store = f'file://{folder}/store'
    torch.distributed.init_process_group('gloo', store, rank=rank, world_size=2)
    norm = layer(SyncBatchNorm)
    result = run(norm, norm, batches().split(SHARES, 1)[rank])
    torch.save(result, f'{folder}/rank_{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_two_processes_equal_one_with_all_rows(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f'rank_{r}.pt') for r in range(2)]
    plain = layer(nn.BatchNorm1d)
    found, grads, state = run(plain, plain, batches())
    for i, expected in enumerate(found):
        joined = torch.cat([rank[0][i] for rank in ranks])
        torch.testing.assert_close(joined, expected)
    for i, expected in enumerate(grads):  # DDP's part: it adds, then divides
        torch.testing.assert_close(sum(rank[1][i] for rank in ranks), expected)
    for rank in ranks:
        torch.testing.assert_close(rank[2], state)
