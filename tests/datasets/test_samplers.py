from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.hooks import DistSamplerSeedHook
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

from densessl.datasets.samplers import EpochSampler, GlobalBatchSampler
from densessl.errors import DenseSSLError


class Roots(Dataset):
    """A dataset whose samples are their keys; with weights it has roots."""

    def __init__(self, *sizes: int, weights=None):
        self.root_sizes = list(sizes)
        self.weights = weights

    def __len__(self):
        return sum(self.root_sizes)

    def __getitem__(self, key):
        return tuple(key)


def epoch_keys(sampler, epoch, start=0):
    sampler.set_epoch(epoch, start)
    return [tuple(key) for key in sampler]


def steps(sampler, batch_size, rank, world_size, epoch=0, step=0, drop_last=True):
    batches = GlobalBatchSampler(sampler, batch_size, drop_last, rank, world_size)
    batches.set_position(epoch, step)
    return [[tuple(key) for key in batch] for batch in batches]


sizes = st.integers(1, 60)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 5)


@given(size=sizes, seed=seeds, epoch=epochs)
def test_an_epoch_is_a_permutation_with_its_positions(size, seed, epoch):
    keys = epoch_keys(EpochSampler(Roots(size), seed), epoch)
    assert [(e, p) for e, p, _ in keys] == [(epoch, p) for p in range(size)]
    assert sorted(index for *_, index in keys) == list(range(size))


@given(
    steps_an_epoch=st.integers(1, 5),
    rest=st.integers(0, 100),
    batch=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=seeds,
)
def test_ranks_and_steps_make_up_the_order(steps_an_epoch, rest, batch, world, seed):
    rest %= batch * world
    size = steps_an_epoch * batch * world + rest
    sampler = EpochSampler(Roots(size), seed)
    order = epoch_keys(sampler, 3)
    ranks = [steps(sampler, batch, rank, world, epoch=3) for rank in range(world)]
    assert [len(rank) for rank in ranks] == [steps_an_epoch] * world
    joined = [key for parts in zip(*ranks, strict=True) for key in chain(*parts)]
    assert joined == order[: size - rest]


@given(size=st.integers(12, 80), world=st.sampled_from([2, 3, 4, 6]), seed=seeds)
def test_a_step_is_the_same_for_any_number_of_processes(size, world, seed):
    sampler = EpochSampler(Roots(size), seed)
    one = steps(sampler, 12, 0, 1, epoch=1)
    ranks = [steps(sampler, 12 // world, rank, world, epoch=1) for rank in range(world)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == one


@given(size=sizes, start=st.integers(0, 60), epoch=epochs)
def test_a_start_gives_the_tail_of_the_epoch(size, start, epoch):
    sampler = EpochSampler(Roots(size), seed=7)
    assert epoch_keys(sampler, epoch, start) == epoch_keys(sampler, epoch)[start:]
    assert len(sampler) == size


@given(step=st.integers(0, 5))
def test_a_resumed_run_sees_the_steps_that_were_left(step):
    sampler = EpochSampler(Roots(43), seed=1)
    whole = steps(sampler, 4, rank=1, world_size=2, epoch=2)
    assert len(whole) == 5
    assert steps(sampler, 4, 1, 2, epoch=2, step=step) == whole[step:]


def test_order_depends_on_seed_and_epoch_only():
    orders = [
        tuple(index for *_, index in epoch_keys(EpochSampler(Roots(50), seed), epoch))
        for seed in (0, 1, None)
        for epoch in (0, 1)
    ]
    assert orders[4:] == orders[:2]  # no seed counts as 0
    assert len(set(orders)) == 4


def test_places_of_a_picture_are_uniform():  # chi-square: mean 15, deviation 5.5
    size, epochs = 16, 800
    sampler = EpochSampler(Roots(size), seed=3)
    counts = np.zeros(size)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts[np.flatnonzero(sampler.order() == 5)] += 1
    expected = epochs / size
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 5 * 5.5


def test_without_shuffle_the_order_is_the_dataset_s():
    sampler = EpochSampler(Roots(5), shuffle=False)
    assert [index for *_, index in epoch_keys(sampler, 4)] == [0, 1, 2, 3, 4]


@settings(max_examples=50)
@given(
    roots=st.lists(st.tuples(sizes, st.floats(0.1, 10)), min_size=1, max_size=4),
    length=st.integers(400, 500),
    epoch=epochs,
    shuffle=st.booleans(),
)
def test_weights_are_shares_of_the_images_seen(roots, length, epoch, shuffle):
    root_sizes, weights = zip(*roots, strict=True)
    data = Roots(*root_sizes, weights=weights)
    keys = epoch_keys(EpochSampler(data, 5, shuffle, length), epoch)
    assert len(keys) == length
    ends = np.cumsum(root_sizes)
    drawn = Counter(int(np.searchsorted(ends, i, side='right')) for *_, i in keys)
    for root, weight in enumerate(weights):
        assert abs(drawn[root] - length * weight / sum(weights)) < 1


@given(root_sizes=st.tuples(st.integers(2, 9), st.integers(2, 90)), seed=seeds)
def test_no_picture_comes_again_before_its_root_is_through(root_sizes, seed):
    sampler = EpochSampler(Roots(*root_sizes, weights=[1, 1]), seed)
    seen: Counter[int] = Counter()
    for epoch in range(6):
        seen.update(index for *_, index in epoch_keys(sampler, epoch))
        for first, size in ((0, root_sizes[0]), (root_sizes[0], root_sizes[1])):
            times = [seen[first + i] for i in range(size)]
            assert max(times) - min(times) <= 1


def test_roots_are_mixed_within_an_epoch():
    indices = [
        i for *_, i in epoch_keys(EpochSampler(Roots(50, 50, weights=[1, 1])), 0)
    ]
    changes = sum((a < 50) != (b < 50) for a, b in pairwise(indices))
    assert changes > 30  # 49.5 expected of a random mix, 1 without


def test_roots_of_one_size_walk_in_orders_of_their_own():
    keys = epoch_keys(EpochSampler(Roots(50, 50, weights=[1, 1]), length=50), 0)
    drawn = {index for *_, index in keys}
    assert {i for i in drawn if i < 50} != {i - 50 for i in drawn if i >= 50}


def test_a_long_epoch_repeats_pictures_evenly():
    keys = epoch_keys(EpochSampler(Roots(7), length=20), 0)
    counts = Counter(index for *_, index in keys)
    assert sorted(counts.values()) == [2, 3, 3, 3, 3, 3, 3]


@given(size=st.integers(3, 40), batch=st.integers(1, 5), world=st.integers(1, 3))
def test_the_last_short_step_is_shared_by_all(size, batch, world):
    sampler = EpochSampler(Roots(size))
    ranks = [steps(sampler, batch, r, world, drop_last=False) for r in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    last = [len(rank[-1]) for rank in ranks]
    assert min(last) >= 1
    assert max(last) - min(last) <= 1
    joined = [key for parts in zip(*ranks, strict=True) for key in chain(*parts)]
    left_out = size % (batch * world) if size % (batch * world) < world else 0
    assert joined == epoch_keys(sampler, 0)[: size - left_out]


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda: EpochSampler(Roots(0)), '0 pictures'),
        (lambda: EpochSampler(Roots(3), length=0), 'length > 0'),
        (lambda: EpochSampler(Roots(5, 5, weights=[1e-3, 1])), 'root 0'),
        (
            lambda: GlobalBatchSampler(EpochSampler(Roots(7)), 4, True, 0, 2),
            r'7 images .* 8 \(batch_size=4 x 2 processes\); lower batch_size',
        ),
        (
            lambda: GlobalBatchSampler(EpochSampler(Roots(1)), 4, False, 0, 2),
            'lower batch_size',
        ),
        (lambda: GlobalBatchSampler(EpochSampler(Roots(7)), 0), 'batch_size=0'),
        (lambda: steps(EpochSampler(Roots(9)), 2, 0, 1, epoch=1, step=5), '4 steps'),
    ],
)
def test_wrong_input_ends_in_one_line(make, words):
    with pytest.raises(DenseSSLError, match=words) as error:
        make()
    assert '\n' not in str(error.value)


def test_iterators_keep_the_epoch_they_began_with():
    batches = GlobalBatchSampler(EpochSampler(Roots(8)), 4, rank=0, world_size=1)
    prefetching = iter(batches)
    batches.set_position(1)
    assert {key.epoch for batch in prefetching for key in batch} == {0}


@pytest.mark.parametrize('num_workers', [0, 2])
def test_loader_follows_positions_and_mmengine_s_epoch_hook(num_workers):
    batches = GlobalBatchSampler(EpochSampler(Roots(20)), 4, rank=0, world_size=1)
    loader = DataLoader(
        Roots(20),
        batch_sampler=batches,
        collate_fn=list,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    assert len(loader) == 5
    assert list(loader) == steps(batches.sampler, 4, 0, 1)
    runner = SimpleNamespace(train_loop=SimpleNamespace(dataloader=loader), epoch=3)
    DistSamplerSeedHook().before_train_epoch(runner)
    assert list(loader) == steps(EpochSampler(Roots(20)), 4, 0, 1, epoch=3)
    DistSamplerSeedHook().before_train_epoch(runner)
    batches.set_position(3, step=2)  # the loop's word comes last
    assert list(loader) == steps(EpochSampler(Roots(20)), 4, 0, 1, epoch=3)[2:]


def test_mmengine_builds_both_from_a_config():
    config = {
        'dataset': Roots(10),
        'sampler': {'type': 'EpochSampler', 'shuffle': False},
        'batch_sampler': {'type': 'GlobalBatchSampler'},
        'collate_fn': list,
        'batch_size': 4,
        'num_workers': 0,
    }
    with DefaultScope.overwrite_default_scope('densessl'):
        loader = Runner.build_dataloader(config, seed=11)
    assert loader.batch_sampler.sampler.seed == 11
    assert list(loader) == [
        [(0, 4 * s + i, 4 * s + i) for i in range(4)] for s in (0, 1)
    ]
