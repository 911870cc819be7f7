from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from densessl.datasets.collate import BrokenImageMonitor, collate_views
from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.registry import FUNCTIONS


def make_sample(number: int, local_px: int = 4, num_views: int = 3) -> dict:
    """Two global views of 6x6 px and one local view, filled with telling values."""
    rng = np.random.default_rng(number)
    views = {'global': (2, 3, 6, 6), 'local': (num_views - 2, 3, local_px, local_px)}
    boxes = rng.uniform(1, 9, (num_views, 4))
    return {
        'inputs': {
            role: torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
            for role, shape in views.items()
        },
        'geometry': ViewGeometry.from_lists(
            boxes, boxes[:, 0] > 5, [(6, 6)] * num_views, [(9, 9 + number)] * num_views
        ),
        'path': f'{number}.jpg',
        'broken': [f'{number}-{i}.jpg' for i in range(number)],
        'rng': rng,
    }


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return make_sample(index)


def test_transforms_need_not_track_places():
    samples = [make_sample(i) for i in range(2)]
    for sample in samples:
        del sample['geometry']
    batch = collate_views(samples)
    assert batch['geometry'] is None and batch['inputs']['global'].shape[0] == 2
    with pytest.raises(DenseSSLError, match='and 3 geometries'):
        collate_views([samples[0], make_sample(2)])


@pytest.mark.parametrize('num_workers', [0, 1])
def test_batch_holds_each_sample_in_its_place(num_workers):
    loader = DataLoader(
        Samples(), batch_size=4, collate_fn=collate_views, num_workers=num_workers
    )
    (batch,) = loader
    assert set(batch) == {'inputs', 'geometry', 'paths', 'broken'}
    assert list(batch['inputs']) == ['global', 'local']
    assert batch['geometry'].shape == (4, 3)
    for number in range(4):
        sample = make_sample(number)
        for role, views in sample['inputs'].items():
            assert torch.equal(batch['inputs'][role][number], views)
        for field in ('box', 'flip', 'size', 'source'):
            stacked = getattr(batch['geometry'], field)[number]
            assert torch.equal(stacked, getattr(sample['geometry'], field))
    assert batch['paths'] == ['0.jpg', '1.jpg', '2.jpg', '3.jpg']
    assert batch['broken'] == [
        *('1-0.jpg', '2-0.jpg', '2-1.jpg', '3-0.jpg', '3-1.jpg', '3-2.jpg')
    ]
    assert all(v.is_shared() == bool(num_workers) for v in batch['inputs'].values())


@pytest.mark.parametrize('other', [{'local_px': 5}, {'num_views': 4}])
def test_samples_of_other_sizes_are_named(other):
    with pytest.raises(
        DenseSSLError, match=r"'0\.jpg' gives .* '7\.jpg' gives"
    ) as error:
        collate_views([make_sample(0), make_sample(7, **other)])
    assert '\n' not in str(error.value)


def test_samples_of_other_roles_are_named():
    other = make_sample(7)
    del other['inputs']['local']
    with pytest.raises(DenseSSLError, match='local'):
        collate_views([make_sample(0), other])


def test_a_config_finds_the_function():
    assert FUNCTIONS.get('collate_views') is collate_views


def reads_until_stop(share: float, monitor: BrokenImageMonitor, reads: int, seed=0):
    """Reads before the monitor stops a run with this share of broken pictures."""
    broken = np.random.default_rng(seed).random(reads) < share
    for number, failed in enumerate(broken):
        try:
            monitor.update(int(not failed), [f'{number}.jpg'] if failed else [])
        except DenseSSLError:
            return number + 1
    return None


@pytest.mark.parametrize('seed', range(20))
def test_five_percent_stop_early_and_half_a_percent_never(seed):
    assert reads_until_stop(0.05, BrokenImageMonitor(0.01), 20_000, seed) < 1000
    assert reads_until_stop(0.005, BrokenImageMonitor(0.01), 20_000, seed) is None


def test_a_few_broken_pictures_at_the_start_of_a_big_folder_pass():
    monitor = BrokenImageMonitor(num_images=1_000_000)
    assert monitor.update(0, ['a', 'b', 'c', 'd']) == ['a', 'b', 'c', 'd']
    with pytest.raises(DenseSSLError, match=r'5 of the first 5 pictures read'):
        monitor.update(0, ['e'])  # 100 reads with 1 % allow 1 + 3 * 1 = 4


def test_the_limit_grows_with_the_reads():  # n = 10,000: 100 + 3 * 10 may fail
    monitor = BrokenImageMonitor()
    monitor.update(9_870, [])
    monitor.update(0, [str(i) for i in range(130)])
    with pytest.raises(DenseSSLError, match=r'131 of the first 10001 .*1\.31%'):
        monitor.update(0, ['more'])


def test_with_the_number_of_pictures_known_the_share_is_exact():
    monitor = BrokenImageMonitor(0.01, num_images=300)
    for epoch in range(5):  # the same three, again and again: 1 % of 300
        assert monitor.update(300, ['a', 'b', 'c']) == (['a', 'b', 'c'], [])[epoch > 0]
    assert (monitor.reads, monitor.failures) == (1515, 15)
    with pytest.raises(DenseSSLError) as error:
        monitor.update(1, ['d'])
    assert str(error.value) == (
        "4 of 300 pictures are broken (1.33%, max_broken is 1.00%), such as 'a', 'b', "
        "'c'; mend or delete them, or raise max_broken"
    )


def test_limits_of_the_share():
    assert BrokenImageMonitor(1.0, 3).update(0, ['a', 'b', 'c'] * 99) == ['a', 'b', 'c']
    with pytest.raises(DenseSSLError):
        BrokenImageMonitor(0).update(100_000, ['a'])
    with pytest.raises(DenseSSLError, match=r'1 % is max_broken=0\.01'):
        BrokenImageMonitor(5)
