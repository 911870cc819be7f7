"""Two gloo processes with half the batch each equal one with the whole batch."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    build_model,
    keep_gradients,
    loca_config,
    moby_config,
    model_config,
    optim_wrapper,
    point_config,
    region_config,
    views,
)

from densessl.engine.distributed import DistributedDataParallel
from densessl.schedules import Progress

pytestmark = pytest.mark.dist
STEPS = 3


def run_steps(model, forward, part, accumulate=1):
    """Log, gradients of the last step, and final weights of a few steps."""
    wrapper = optim_wrapper(model, lr=0.1, kind='SGD')
    grads = keep_gradients(model, wrapper)
    logs = []
    for i in range(STEPS):
        model.progress = Progress(i + 4, 20, 4)
        torch.manual_seed(i)  # what is drawn once for all images: the same on all ranks
        data = views(batch=8, seed=i)
        data['inputs'] = {role: x[part] for role, x in data['inputs'].items()}
        data['geometry'] = data['geometry'][part]
        logs.append(model.train_step(data, wrapper, forward=forward))
    return logs, grads, copy.deepcopy(model.state_dict())


def worker(rank, folder, options):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1'
    )
    torch.set_num_threads(1)
    store = f'file://{folder}/store'
    torch.distributed.init_process_group('gloo', store, rank=rank, world_size=2)
    model = build_model(**options)
    ddp = DistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
    part = slice(4 * rank, 4 * rank + 4)
    torch.save(run_steps(model, ddp, part), f'{folder}/rank_{rank}.pt')
    torch.distributed.destroy_process_group()


def assert_same_weights(ranks, grads, state):
    """Gradients of the last step and weights of each rank are those given."""
    for rank in ranks:
        for name, grad in grads.items():
            error = (rank[1][name] - grad).norm() / (grad.norm() + 1e-6)
            assert error < 1e-5 or grad.norm() < 1e-6, (name, error)
        for name, value in state.items():
            torch.testing.assert_close(
                rank[2][name], value, rtol=1e-5, atol=1e-6, msg=name
            )


@pytest.mark.parametrize(
    'options',
    [
        dict(accumulate=1),
        dict(accumulate=2),
        region_config('geometric', accumulate=2),
        region_config('similarity'),
        point_config(sampling='grid', content=True),
        dict(freeze_backbone_epochs=1.5),  # steps 4 and 5 of 4 an epoch, not 6
        dict(low_memory=True, accumulate=2),
        dict(compile=True),
    ],
    ids=[
        'selfpatch',
        'selfpatch-parts',
        'geometric-parts',
        'similarity',
        'points',
        'frozen',
        'low-memory-parts',
        'compiled',
    ],
)
def test_two_processes_equal_one(tmp_path, options):
    torch.multiprocessing.spawn(worker, (str(tmp_path), options), nprocs=2)
    model = build_model(**options | dict(accumulate=1, low_memory=False, compile=False))
    logs, grads, state = run_steps(model, model, slice(None))
    ranks = [torch.load(tmp_path / f'rank_{r}.pt') for r in range(2)]
    (dense,) = set(model.heads) - {'view'}
    for step in range(STEPS):
        for key in ('loss', 'loss_view', f'loss_{dense}', f'{dense}/center_norm'):
            mean = sum(rank[0][step][key] for rank in ranks) / 2
            torch.testing.assert_close(mean, logs[step][key], rtol=1e-5, atol=1e-6)
    assert_same_weights(ranks, grads, state)
    assert not state['heads.view.center'].eq(0).all()


@pytest.mark.parametrize(('late', 'frozen'), [('selfpatch', 1.5), ('view', 0)])
def test_a_head_that_rests_at_first_on_two_processes(tmp_path, late, frozen):
    """Steps 4, 5 and 6 of 4 an epoch: it rests, rests, and has half its weight.

    Without the view head nothing trains the neck's blocks, and DDP would wait. Beside a
    backbone that is frozen in the first two steps, and one that is not.
    """
    heads = model_config()['heads']
    heads[late]['loss_weight'] = dict(end=0.8, start_epoch=1.25, fade_epochs=0.5)
    options = dict(heads=heads, freeze_backbone_epochs=frozen)
    torch.multiprocessing.spawn(worker, (str(tmp_path), options), nprocs=2)
    model = build_model(**options)
    logs, grads, state = run_steps(model, model, slice(None))
    ranks = [torch.load(tmp_path / f'rank_{r}.pt') for r in range(2)]
    weights = [float(log[f'{late}/weight']) for log in logs]
    assert weights == pytest.approx([0, 0, 0.4])
    for step in range(STEPS):
        for rank in ranks:
            assert rank[0][step].keys() == logs[step].keys()
        assert (f'loss_{late}' in logs[step]) == (step == 2)
        mean = sum(rank[0][step]['loss'] for rank in ranks) / 2
        torch.testing.assert_close(mean, logs[step]['loss'], rtol=1e-5, atol=1e-6)
    assert_same_weights(ranks, grads, state)


@pytest.mark.parametrize('average', ['query', 'token'])
def test_sinkhorn_and_me_max_are_those_of_all_ranks(tmp_path, average):
    options = loca_config()
    for head in options['heads'].values():
        head.update(average=average)
    torch.multiprocessing.spawn(worker, (str(tmp_path), options), nprocs=2)
    model = build_model(**options)
    logs, grads, state = run_steps(model, model, slice(None))
    ranks = [torch.load(tmp_path / f'rank_{r}.pt') for r in range(2)]
    for step in range(STEPS):
        for key in ('loss', 'loss_position', 'loss_cluster', 'cluster/cross_entropy'):
            mean = sum(rank[0][step][key] for rank in ranks) / 2
            torch.testing.assert_close(mean, logs[step][key], rtol=1e-5, atol=1e-6)
        for rank in ranks:  # the same on each rank, not on average only
            entropy = rank[0][step]['cluster/prediction_entropy']
            torch.testing.assert_close(
                entropy, logs[step]['cluster/prediction_entropy']
            )
    assert_same_weights(ranks, grads, state)


def worker_in_double(rank, folder, options):
    torch.set_default_dtype(torch.float64)
    worker(rank, folder, options)


@pytest.mark.parametrize('negatives', [False, True])
def test_queues_keys_and_statistics_are_those_of_all_ranks(tmp_path, double, negatives):
    # in float64: batch norm on the nearly equal views of noise magnifies rounding
    options = moby_config(patch=dict(negatives=negatives))
    torch.multiprocessing.spawn(worker_in_double, (str(tmp_path), options), nprocs=2)
    model = build_model(**options)
    logs, grads, state = run_steps(model, model, slice(None))
    ranks = [torch.load(tmp_path / f'rank_{r}.pt') for r in range(2)]
    keys = ['loss', 'loss_view', 'loss_selfpatch', 'view/accuracy', 'selfpatch/cosine']
    for step in range(STEPS):
        for key in keys + ['selfpatch/accuracy'] * negatives:
            mean = sum(rank[0][step][key] for rank in ranks) / 2
            torch.testing.assert_close(mean, logs[step][key], rtol=1e-9, atol=1e-9)
    assert_same_weights(ranks, grads, state)
    for rank in ranks:  # steps of 8 keys went round a queue of 10
        assert rank[2]['heads.view.enqueued'] == 8 * STEPS
    first, second = (rank[2]['heads.view.queue'] for rank in ranks)
    assert first.equal(second)


def test_dist_train_script_starts_two_processes(small_config, tmp_path):
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PORT': '29617'}
    env['PATH'] = f'{Path(sys.executable).parent}:{env["PATH"]}'
    result = subprocess.run(
        [
            *('bash', str(ROOT / 'tools/dist_train.sh'), str(small_config), '2'),
            *('--work-dir', str(tmp_path / 'run')),
            *('--cfg-options', 'train_dataloader.batch_size=2'),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert '2 process(es), 2 images each' in result.stdout + result.stderr
    state = torch.load(tmp_path / 'run/step_00000012.pth', weights_only=True)
    assert state['global_batch'] == 4 and state['steps'] == 12
