from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted import COLOURS, stripes, write, write_split

from densessl.errors import DenseSSLError
from densessl.evaluation.segmentation_folder import (
    LabelledFolder,
    check_masks,
    mask_pairs,
    paired,
    read_mask,
)


def _open(data, split='train', size=(32, 48), num_classes=3, ignore=()):
    read = partial(read_mask, num_classes=num_classes, ignore=ignore)
    return LabelledFolder(mask_pairs(data, split), size, read)


@pytest.fixture
def voc(tmp_path):
    """Three pictures: one with a fine mask, one with a coarse one, one with both."""
    for stem in 'abc':
        write(tmp_path / f'JPEGImages/{stem}.jpg', np.zeros((8, 8, 3), np.uint8))
    for folder, stems in (('SegmentationClass', 'ac'), ('SegmentationClassAug', 'bc')):
        for stem in stems:
            write(tmp_path / folder / f'{stem}.png', np.zeros((8, 8), np.uint8))
    lists = tmp_path / 'ImageSets/Segmentation'
    lists.mkdir(parents=True)
    (lists / 'train.txt').write_text('a\n')
    (lists / 'trainaug.txt').write_text('b\na\nc\n')
    (lists / 'none.txt').write_text('\n')
    return tmp_path


def test_voc_s_lists_choose_pictures_and_the_finer_mask(voc):
    def names(split):
        return [(p.stem, m.parent.name) for p, m in mask_pairs(voc, split)]

    assert names('train') == [('a', 'SegmentationClass')]
    assert names('trainaug') == [
        ('a', 'SegmentationClass'),
        ('b', 'SegmentationClassAug'),
        ('c', 'SegmentationClass'),
    ]


def test_samples_are_the_files_in_order(tmp_path):
    samples = list(stripes(19, 0))  # more than are read ahead
    for i, (image, mask) in enumerate(samples):
        write(tmp_path / f'images/train/{i:03d}.png', image)
        write(tmp_path / f'annotations/train/{i:03d}.png', mask)
    folder = _open(tmp_path)
    assert len(folder) == 19
    for i, (image, mask) in enumerate(folder):
        np.testing.assert_array_equal(image, samples[i][0])
        np.testing.assert_array_equal(mask, samples[i][1])
        np.testing.assert_array_equal(folder[i][1], mask)


def test_progress_of_a_pass_is_shown(tmp_path, capsys):
    write_split(tmp_path, 'train', stripes(3, 0))
    list(_open(tmp_path))
    assert 'pictures: 3/3' in capsys.readouterr().err


@pytest.mark.parametrize('size', [(16, 16), (10, 50), (64, 96), (448, 448)])
def test_resizing_keeps_what_lies_at_the_centres(tmp_path, size):
    ((image, mask),) = stripes(1, 0)
    write_split(tmp_path, 'train', [(image, mask)])
    small, labels = _open(tmp_path, size=size)[0]
    assert small.shape == (*size, 3) and labels.shape == size
    for y in range(size[0]):
        for x in range(0, size[1], 7):
            row, column = ((i + 0.5) * n for i, n in ((y, 32), (x, 48)))
            assert labels[y, x] == mask[int(row / size[0]), int(column / size[1])]
    alike = (small == COLOURS[labels]).all(2)  # but for pixels on an edge
    assert alike.mean() > 0.6


def test_fewer_pixels_are_means_of_areas(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    write_split(tmp_path, 'train', [(image, np.zeros((32, 48), np.uint8))])
    small, _ = _open(tmp_path, size=(8, 12))[0]
    means = image.reshape(8, 4, 12, 4, 3).mean((1, 3))
    np.testing.assert_allclose(small, means, atol=0.51)


def test_palette_masks_are_read_as_class_numbers(tmp_path):
    mask = np.array([[0, 1, 2, 255]], np.uint8)
    image = Image.fromarray(mask, 'L').convert('P')
    image.putdata(mask.flatten().tolist())
    image.putpalette(bytes(range(256)) * 3)
    image.save(tmp_path / 'm.png')
    assert Image.open(tmp_path / 'm.png').mode == 'P'
    np.testing.assert_array_equal(read_mask(tmp_path / 'm.png', 3), mask)


def test_ignored_labels_become_255(tmp_path):
    write(tmp_path / 'm.png', np.array([[0, 1, 11, 255]], np.uint8))
    found = read_mask(tmp_path / 'm.png', 2, ignore=[11])
    np.testing.assert_array_equal(found, [[0, 1, 255, 255]])
    write(tmp_path / 'wide.png', np.array([[0, 300, 1]], np.uint16))
    found = read_mask(tmp_path / 'wide.png', 2, ignore=[300])
    np.testing.assert_array_equal(found, [[0, 255, 1]])


def _spoilt(data: Path, what: str) -> None:
    masks = data / 'annotations/train'
    {
        'unpaired mask': lambda: (data / 'images/train/p01.png').unlink(),
        'unpaired picture': lambda: (masks / 'p00.png').unlink(),
        'no masks': lambda: [path.unlink() for path in masks.iterdir()],
        'no folder': lambda: masks.rename(data / 'elsewhere'),
        'size': lambda: write(masks / 'p01.png', np.zeros((8, 8), np.uint8)),
        'label': lambda: write(masks / 'p01.png', np.full((32, 48), 9, np.uint8)),
        'colours': lambda: write(masks / 'p01.png', np.zeros((32, 48, 3), np.uint8)),
        'broken mask': lambda: (masks / 'p01.png').write_bytes(b'no picture'),
        'broken picture': lambda: (data / 'images/train/p01.png').write_bytes(b''),
        'twice': lambda: write(data / 'images/train/p01.jpg', COLOURS[None]),
    }[what]()


@pytest.mark.parametrize(
    ('what', 'found'),
    [
        ('unpaired mask', "1 stems are in one of them only, such as 'p01'"),
        ('unpaired picture', "1 stems are in one of them only, such as 'p00'"),
        ('no masks', 'annotations/train: no file that ends in png'),
        ('no folder', 'annotations/train: no such folder'),
        ('size', r'p01.png: labels of 8x8 px, and the picture p01.png has 32x48'),
        ('label', r'p01.png: label 9 is outside 0\.\.2 \(and 255, ignored\)'),
        ('colours', r'p01.png: has colours \(mode RGB\)'),
        ('broken mask', 'p01.png: not a picture'),
        ('broken picture', 'p01.png'),
        ('twice', 'p01.* has the same stem'),
    ],
)
def test_wrong_folders_are_told_in_one_line(tmp_path, what, found):
    write_split(tmp_path, 'train', stripes(3, 0))
    _spoilt(tmp_path, what)
    with pytest.raises(DenseSSLError, match=found) as caught:
        list(_open(tmp_path))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('split', 'found'),
    [
        ('val', 'val.txt: no such list; there are: none, train, trainaug'),
        ('none', 'none.txt: no stem in it'),
        ('train', 'train.txt names a, but there is no .*SegmentationClass/a.png'),
        ('trainaug', 'trainaug.txt names b, but there is no .*JPEGImages/b.jpg'),
    ],
)
def test_wrong_voc_folders_are_told_in_one_line(voc, split, found):
    if split == 'train':
        (voc / 'SegmentationClass/a.png').unlink()
    (voc / 'JPEGImages/b.jpg').unlink()
    with pytest.raises(DenseSSLError, match=found) as caught:
        mask_pairs(voc, split)
    assert '\n' not in str(caught.value)


def test_a_class_without_pixels_is_told(tmp_path):
    write_split(tmp_path, 'train', stripes(3, 0))
    folder = _open(tmp_path, num_classes=4)
    with pytest.raises(DenseSSLError, match=r'train masks \(3\): no pixel of class d;'):
        check_masks(folder, 'abcd', 'train')
    check_masks(_open(tmp_path), 'abc', 'train')


def test_a_small_class_counts_at_full_size(tmp_path):
    ((image, mask),) = stripes(1, 0)
    mask[0, 0] = 3  # lost at 8x12
    write_split(tmp_path, 'train', [(image, mask)])
    check_masks(_open(tmp_path, size=(8, 12), num_classes=4), 'abcd', 'train')


def test_pairs_come_in_the_order_of_their_stems(tmp_path):
    for stem in ('b', 'a', 'c'):
        write(tmp_path / f'x/{stem}.png', COLOURS[None])
        write(tmp_path / f'y/{stem}.png', COLOURS[None, :, 0])
    pairs = paired(tmp_path / 'x', tmp_path / 'y', ('png',))
    assert [(p.parent.name + p.stem, m.parent.name + m.stem) for p, m in pairs] == [
        ('xa', 'ya'),
        ('xb', 'yb'),
        ('xc', 'yc'),
    ]
