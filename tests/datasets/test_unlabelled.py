from __future__ import annotations

import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from densessl.datasets import unlabelled
from densessl.datasets.collate import collate_views
from densessl.datasets.image_io import LoadImage
from densessl.datasets.samplers import EpochSampler, GlobalBatchSampler
from densessl.datasets.unlabelled import UnlabelledImages, balanced_subset
from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry

LOAD = [{'type': 'LoadImage'}]


def paint(root: Path, *names: str, value: int = 0) -> None:
    """Write 4x6 px pictures; value tells them apart."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = np.full((4, 6, 3), value + number, np.uint8)
        path.write_bytes(cv2.imencode('.png', picture)[1].tobytes())


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'')


def found(dataset: UnlabelledImages, root: Path) -> list[str]:
    return [os.path.relpath(dataset.path(index), root) for index in range(len(dataset))]


def test_every_picture_at_any_depth_is_found_in_order(tmp_path):
    names = ['b.JPEG', 'a/x.jpg', 'a/y.TIF', 'a/deep/er/z.webp', 'ü ber/1 2.png']
    touch(tmp_path, *names, '.hidden/a.jpg', 'a/._x.jpg', 'a/notes.txt', 'jpg', '.jpg')
    touch(tmp_path, 'folder.png/in.bmp', 'a/film.gif', 'a/x.jpg.part')
    data = UnlabelledImages(str(tmp_path))
    by_bytes = sorted([*names, 'folder.png/in.bmp'], key=str.encode)
    assert found(data, tmp_path) == by_bytes


def test_what_is_passed_over_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(unlabelled, 'print_log', lambda text, logger: said.append(text))
    touch(tmp_path, 'a.jpg', 'b.gif', 'c/d.gif', 'README')
    unlabelled.UnlabelledImages(str(tmp_path))
    assert said == [
        f"data folder '{tmp_path}': 1 pictures (passed over by their endings: 3 files, "
        '2 .gif, 1 bare)'
    ]


def test_links_are_followed_once(tmp_path):
    root, other = tmp_path / 'root', tmp_path / 'other'
    touch(root, 'real/a.jpg')
    touch(other, 'b.jpg', 'sub/c.jpg')
    (root / 'alias').symlink_to(root / 'real')  # sorts first, yet the real folder wins
    (root / 'loop').symlink_to(root)
    (root / 'out').symlink_to(other)
    (other / 'back').symlink_to(root / 'real')
    (root / 'self').symlink_to(root / 'self')
    (root / 'gone.jpg').symlink_to(tmp_path / 'nowhere.jpg')
    (root / 'file.jpg').symlink_to(other / 'b.jpg')
    data = UnlabelledImages(str(root))
    assert found(data, root) == [
        *('file.jpg', 'gone.jpg', 'out/b.jpg', 'out/sub/c.jpg', 'real/a.jpg')
    ]


def test_list_file_takes_paths_with_blanks_comments_and_columns(tmp_path):
    root = tmp_path / 'data'
    names = ['b c.jpg', 'a.png', 'my.jpg old/d.JPG', 'x.jpg', 'e.jpg', 'b c.jpg']
    paint(root, *names, 'my.jpg')  # the last one stands for nothing in the list
    names.append('gone.jpg')
    listing = tmp_path / 'list.txt'
    listing.write_bytes(
        b'\xef\xbb\xbf# the training part\r\n\r\nb c.jpg\r\na.png 12 0.5\r\n'
        b'my.jpg old/d.JPG\t3\n  \nx.jpg  labels/x.png\ne.jpg,2\n b c.jpg \n'
        b'gone.jpg masks/gone.png\n'
    )
    data = UnlabelledImages(str(root), str(listing))
    assert found(data, root) == names


def test_list_file_paths_may_start_anywhere(tmp_path):
    root, beside = tmp_path / 'data', tmp_path / 'lists'
    paint(root, 'seq/1.jpg')
    paint(beside, 'near.jpg')
    listing = beside / 'list.txt'

    def path_of(line: str) -> str:
        listing.write_text(line + '\n')
        return UnlabelledImages(str(root), str(listing)).path(0)

    assert os.path.samefile(path_of('near.jpg'), beside / 'near.jpg')
    assert os.path.samefile(path_of('/seq/1.jpg 5'), root / 'seq/1.jpg')  # as DAVIS
    assert path_of(str(root / 'seq/1.jpg')) == str(root / 'seq/1.jpg')


def test_roots_keep_their_pictures_weights_and_lists(tmp_path):
    paint(tmp_path / 'a', '1.png', '2.png')
    paint(tmp_path / 'b', '1.png', '2.png', '3.png')
    (tmp_path / 'list.txt').write_text('3.png\n1.png\n')
    data = UnlabelledImages(
        [str(tmp_path / 'a'), str(tmp_path / 'b')],
        [None, str(tmp_path / 'list.txt')],
        weights=[1, 3],
    )
    assert found(data, tmp_path) == ['a/1.png', 'a/2.png', 'b/3.png', 'b/1.png']
    assert (data.root_sizes, data.weights) == ([2, 2], [1, 3])
    keys = list(EpochSampler(data, length=400))
    assert sum(key.index < 2 for key in keys) == 100


@pytest.fixture
def tree(tmp_path) -> Path:
    """Four classes, 40 + 40 + 40 + 3 pictures, one of them deeper."""
    for label in 'abc':
        touch(tmp_path, *(f'{label}/{i}.jpg' for i in range(39)), f'{label}/deep/x.jpg')
    touch(tmp_path, 'few/0.jpg', 'few/1.jpg', 'few/2.jpg')
    return tmp_path


@pytest.mark.parametrize(
    ('fraction', 'per_class'),
    [
        (0.001, [1, 1, 1, 1]),  # at least one
        (0.05, [1, 1, 2, 2]),  # round(6.15) = 6 over 4 classes
        (0.2, [3, 7, 7, 8]),  # round(24.6) = 25, and `few` has but 3
        (1, [3, 40, 40, 40]),
    ],
)
def test_fraction_is_balanced_over_the_classes(tree, fraction, per_class):
    data = UnlabelledImages(str(tree), fraction=fraction)
    counts = Counter(name.split('/')[0] for name in found(data, tree))
    assert sorted(counts.values()) == per_class
    assert found(data, tree) == sorted(found(data, tree))


def test_fraction_depends_on_names_and_seed_alone(tree):
    names = [name.encode() for name in found(UnlabelledImages(str(tree)), tree)]
    chosen = balanced_subset(names, 0.2, seed=4, root='here')
    assert balanced_subset(names[::-1], 0.2, 4, 'there') == chosen[::-1]
    assert chosen == [
        os.fsencode(n)
        for n in found(UnlabelledImages(str(tree), fraction=0.2, seed=4), tree)
    ]
    assert chosen != balanced_subset(names, 0.2, 5, 'here')


def test_smaller_fractions_are_part_of_greater_ones(tree):
    subsets = [
        set(found(UnlabelledImages(str(tree), fraction=f), tree))
        for f in (0.01, 0.02, 0.05, 0.1, 0.2)
    ]
    assert all(a <= b for a, b in pairwise(subsets))
    assert len(subsets[0]) < len(subsets[-1])


def test_any_class_may_give_one_more():
    names = [b'%c/%d.jpg' % (label, i) for label in b'abc' for i in range(10)]
    subsets = [balanced_subset(names, 4 / 30, seed, '') for seed in range(20)]
    most = {Counter(n[:1] for n in kept).most_common(1)[0] for kept in subsets}
    assert most == {(b'a', 2), (b'b', 2), (b'c', 2)}


def test_a_class_picks_its_pictures_uniformly():  # chi-square: mean 9, deviation 4.2
    names = [b'only/%d.jpg' % i for i in range(10)]
    kept = Counter(
        name for seed in range(1000) for name in balanced_subset(names, 0.3, seed, '')
    )
    assert sum((kept[n] - 300) ** 2 / 300 for n in names) < 9 + 5 * 4.2


def test_a_sample_follows_from_its_key(tmp_path):
    paint(tmp_path, 'a.png', 'b.png', value=50)

    def draw(results):
        return {**results, 'drawn': results['rng'].random()}

    data = UnlabelledImages(str(tmp_path), seed=9, pipeline=[*LOAD, draw])
    sample = data[3, 14, 1]
    assert sample['path'] == str(tmp_path / 'b.png')
    assert data[1]['drawn'] == data[0, 1, 1]['drawn']  # a plain index is a key too
    np.testing.assert_array_equal(sample['img'], np.full((4, 6, 3), 51, np.uint8))
    assert sample['drawn'] == np.random.default_rng((9, 3, 14)).random()
    assert sample['broken'] == []
    other = UnlabelledImages(str(tmp_path), seed=8, pipeline=[*LOAD, draw])
    assert other[3, 14, 1]['drawn'] != sample['drawn']


def test_a_broken_picture_is_replaced_from_its_root_and_named(tmp_path):
    paint(tmp_path / 'a', *(f'{i}.png' for i in range(5)))
    paint(tmp_path / 'b', *(f'{i}.png' for i in range(5)))
    (tmp_path / 'a/2.png').write_bytes(b'no picture')
    roots = [str(tmp_path / 'a'), str(tmp_path / 'b')]
    data = UnlabelledImages(roots, pipeline=LOAD)
    substitutes = set()
    for position in range(60):
        sample = data[0, position, 2]
        assert set(sample['broken']) == {str(tmp_path / 'a/2.png')}
        assert sample['path'] == data[0, position, 2]['path']
        substitutes.add(os.path.relpath(sample['path'], tmp_path))
    assert substitutes == {'a/0.png', 'a/1.png', 'a/3.png', 'a/4.png'}


def test_sixteen_failures_in_a_row_stop(tmp_path):
    touch(tmp_path, 'a.jpg', 'b.jpg')
    with pytest.raises(DenseSSLError, match=r'16 pictures .* in a row') as error:
        UnlabelledImages(str(tmp_path), pipeline=LOAD)[0, 0, 0]
    assert str(tmp_path) in str(error.value)


def test_other_errors_are_not_hidden(tmp_path):
    paint(tmp_path, 'a.png')

    def fail(results):
        raise OSError('disk on fire')

    with pytest.raises(OSError, match='disk on fire'):
        UnlabelledImages(str(tmp_path), pipeline=[LoadImage(), fail])[0, 0, 0]


def cut(results):
    """A stand-in for MultiCrop: two random 2x2 px views, one role."""
    rng, image = results['rng'], results['img']
    y, x = rng.integers(0, 3, 2), rng.integers(0, 5, 2)
    views = [image[a : a + 2, b : b + 2] for a, b in zip(y, x, strict=True)]
    return {
        'path': results['path'],
        'inputs': {'global': torch.from_numpy(np.stack(views).transpose(0, 3, 1, 2))},
        'geometry': ViewGeometry.from_lists(
            [(b, a, 2, 2) for a, b in zip(y, x, strict=True)],
            [False, False],
            [(2, 2)] * 2,
            [image.shape[:2]] * 2,
        ),
    }


def test_workers_give_what_one_process_gives(tmp_path):
    paint(tmp_path, *(f'{i}.png' for i in range(11)))
    (tmp_path / '4.png').write_bytes(b'')

    def epochs(num_workers):
        data = UnlabelledImages(str(tmp_path), pipeline=[*LOAD, cut])
        batches = GlobalBatchSampler(EpochSampler(data), 5, rank=0, world_size=1)
        loader = DataLoader(
            data,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate_views,
            persistent_workers=num_workers > 0,
        )
        for epoch, step in ((0, 0), (1, 0), (1, 1)):
            batches.set_position(epoch, step)
            yield from loader

    alone, spread = list(epochs(0)), list(epochs(2))
    assert len(alone) == len(spread) == 5
    for one, other in zip(alone, spread, strict=True):
        assert one['paths'] == other['paths']
        assert one['broken'] == other['broken']
        assert torch.equal(one['inputs']['global'], other['inputs']['global'])
        assert torch.equal(one['geometry'].box, other['geometry'].box)
    assert alone[3]['paths'] == alone[4]['paths']  # the resumed step
    assert any(batch['broken'] for batch in alone)
    assert not torch.equal(alone[0]['geometry'].box, alone[2]['geometry'].box)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({'data_root': 'nowhere'}, "'nowhere' does not exist; give"),
        ({'data_root': 'set.zip'}, r'is no folder; .* \(unpack an archive first\)'),
        ({'data_root': 'films'}, r'no picture \(.* 2 files, 2 \.mp4\); give one with'),
        ({'data_root': []}, 'names 0 folders'),
        ({'data_root': ['a', 'films']}, "'films' holds no picture"),
        (
            {'data_root': ['a', 'b'], 'list_file': 'list.txt'},
            '2 folders and .* 1 files',
        ),
        ({'data_root': ['a', 'b'], 'weights': [1]}, 'must be 2 positive numbers'),
        ({'data_root': ['a', 'b'], 'weights': [1, 0]}, 'must be 2 positive numbers'),
        ({'data_root': 'a', 'list_file': 'none.txt'}, 'No such file .* check its path'),
        ({'data_root': 'a', 'list_file': 'odd.txt'}, r"line 2: 'header' names no"),
        ({'data_root': 'a', 'list_file': 'lost.txt'}, 'none of the first 1 pictures'),
        ({'data_root': 'a', 'list_file': 'empty.txt'}, 'holds no picture'),
        ({'data_root': 'a', 'fraction': 10}, r'10 % is fraction=0\.1'),
        ({'data_root': 'a', 'fraction': 0.1}, "'1.jpg' lies directly in 'a'"),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, 'a/1.jpg', 'b/1.jpg', 'films/1.mp4', 'films/2.mp4', 'set.zip')
    for name, text in {
        'list.txt': '1.jpg',
        'odd.txt': '1.jpg\nheader\n',
        'lost.txt': 'lost.jpg',
        'empty.txt': '# nothing\n',
    }.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DenseSSLError, match=words) as error:
        UnlabelledImages(**arguments)
    assert '\n' not in str(error.value)


def test_a_real_folder_trains_as_it_is():
    shared = Path(__file__).parents[2].parent / 'shared' / 'data'
    root = Path(os.environ.get('DENSESSL_TEST_DATA', shared)) / 'camvid/images/train'
    if not root.is_dir():
        pytest.skip(f'needs CamVid in {root}; set DENSESSL_TEST_DATA to its parent')
    views = [
        {'role': 'global', 'size': 64, 'scale': (0.4, 1), 'count': 2},
        {'role': 'local', 'size': 32, 'scale': (0.05, 0.4), 'count': 3},
    ]
    pipeline = [
        {'type': 'LoadImage', 'lazy': True},
        {'type': 'MultiCrop', 'views': views},
    ]
    data = UnlabelledImages(str(root), pipeline=pipeline)
    assert len(data) == 367
    batches = GlobalBatchSampler(EpochSampler(data), 8, rank=0, world_size=1)
    batches.set_position(0, len(batches) - 1)
    (batch,) = DataLoader(data, batch_sampler=batches, collate_fn=collate_views)
    shapes = {role: tuple(stack.shape) for role, stack in batch['inputs'].items()}
    assert shapes == {'global': (8, 2, 3, 64, 64), 'local': (8, 3, 3, 32, 32)}
    assert batch['geometry'].source.unique(dim=1).tolist() == [[[360, 480]]] * 8
    assert batch['broken'] == []
