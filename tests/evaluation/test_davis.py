from __future__ import annotations

import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densessl.errors import DenseSSLError
from densessl.evaluation.davis import (
    Video,
    boundary_measure,
    contour,
    measure_video,
    read_mask,
    read_videos,
    region_similarity,
    write_mask,
)

SHAPE = (100, 150)  # diagonal 180.3 px: a tolerance of ceil(1.44) = 2 px
NONE = np.zeros(SHAPE, bool)


def columns(count: int, shape=SHAPE) -> np.ndarray:
    """Everything left of a vertical line."""
    return np.tile(np.arange(shape[1]) < count, (shape[0], 1))


def square(top: int, left: int, side: int = 20) -> np.ndarray:
    mask = NONE.copy()
    mask[top : top + side, left : left + side] = True
    return mask


# J


def test_j_of_shifted_squares_is_the_overlap_over_the_union():
    assert region_similarity(square(10, 10), square(10, 10)) == 1
    assert region_similarity(square(10, 10), square(10, 20)) == 200 / 600
    assert region_similarity(square(10, 10), square(20, 20)) == 100 / 700
    assert region_similarity(square(10, 10), square(10, 30)) == 0
    assert region_similarity(square(10, 10), square(15, 15, 10)) == 100 / 400


def test_j_of_empty_masks():
    assert region_similarity(NONE, NONE) == 1
    assert region_similarity(NONE, square(0, 0)) == 0
    assert region_similarity(square(0, 0), NONE) == 0


# F


@pytest.mark.parametrize(('shift', 'f'), [(0, 1), (1, 1), (2, 1), (3, 0), (-2, 1)])
def test_f_of_a_shifted_line_falls_at_the_tolerance(shift, f):
    assert boundary_measure(columns(50 + shift), columns(50)) == f


def test_f_weighs_precision_and_recall():
    pred = columns(50)
    pred[50:] = False  # a corner: 50 px down, 50 px across, one of them shared
    precision, recall = 52 / 99, 52 / 100  # two more px on either line are near
    expected = 2 * precision * recall / (precision + recall)
    assert boundary_measure(pred, columns(50)) == pytest.approx(expected)
    assert boundary_measure(columns(50), pred) == pytest.approx(expected)


def test_f_where_there_is_no_contour():
    assert boundary_measure(NONE, NONE) == 1
    assert boundary_measure(~NONE, ~NONE) == 1  # a full mask has none either
    assert boundary_measure(NONE, square(5, 5)) == 0
    assert boundary_measure(square(5, 5), NONE) == 0


def test_contour_runs_on_the_near_side_and_not_along_the_edge():
    expected = np.zeros((5, 6), bool)
    expected[:4, 3] = True  # px of the mask whose right one is outside ...
    expected[3, :4] = True  # ... or whose lower one is
    mask = np.zeros((5, 6), bool)
    mask[:4, :4] = True
    np.testing.assert_array_equal(contour(mask), expected)
    np.testing.assert_array_equal(contour(~mask), expected)


def brute_force_f(pred: np.ndarray, true: np.ndarray, tolerance: float) -> float:
    """From the nearest distance of each pixel of a contour, one after the other."""

    def line(mask):
        h, w = mask.shape
        found = []
        for y in range(h):
            for x in range(w):
                below, right = min(y + 1, h - 1), min(x + 1, w - 1)
                others = mask[y, right], mask[below, x], mask[below, right]
                if any(other != mask[y, x] for other in others):
                    found.append((y, x))
        return found

    def share(ones, others):
        near = [min(math.dist(one, other) for other in others) for one in ones]
        return sum(distance <= reach for distance in near) / len(near)

    reach = math.ceil(tolerance * math.sqrt(true.shape[0] ** 2 + true.shape[1] ** 2))
    ours, theirs = line(pred), line(true)
    if not ours or not theirs:
        return float(not ours and not theirs)
    precision, recall = share(ours, theirs), share(theirs, ours)
    if precision + recall == 0:
        return 0
    return 2 * precision * recall / (precision + recall)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.sampled_from([0.008, 0.1, 0.15, 0.3]),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_f_is_that_of_nearest_distances(height, width, tolerance, density, seed):
    rng = np.random.default_rng(seed)
    pred, true = (
        cv2.resize(
            (rng.random((4, 4)) < density).astype(np.uint8),
            (width, height),
            interpolation=cv2.INTER_NEAREST,
        )
        > 0
        for _ in range(2)
    )
    expected = brute_force_f(pred, true, tolerance)
    assert boundary_measure(pred, true, tolerance) == pytest.approx(expected)


# Masks


def test_masks_keep_their_numbers_and_get_davis_s_colours(tmp_path):
    mask = np.array([[0, 1, 2], [3, 8, 255]], np.uint8)
    path = tmp_path / 'video/00000.png'
    write_mask(path, mask)
    np.testing.assert_array_equal(read_mask(path, 2017), mask % 255)  # 255 is void
    np.testing.assert_array_equal(read_mask(path, 2016), mask > 0)
    with Image.open(path) as picture:
        assert picture.mode == 'P'
        colours = np.array(picture.convert('RGB'))
    expected = [[0, 0, 0], [128, 0, 0], [0, 128, 0]], [[128, 128, 0], [64, 0, 0]]
    np.testing.assert_array_equal(colours[0], expected[0])
    np.testing.assert_array_equal(colours[1, :2], expected[1])


def test_masks_of_2016_may_be_black_and_white(tmp_path):
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    for name, picture in dict(
        grey=Image.fromarray(mask),
        bits=Image.fromarray(mask).convert('1'),
        rgb=Image.fromarray(mask).convert('RGB'),
    ).items():
        picture.save(tmp_path / f'{name}.png')
        found = read_mask(tmp_path / f'{name}.png', 2016)
        np.testing.assert_array_equal(found, mask > 0, name)
    with pytest.raises(DenseSSLError, match='kind RGB has no object numbers'):
        read_mask(tmp_path / 'rgb.png', 2017)


# Videos


def dataset(root: Path, year: int = 2017, frames: int = 4) -> Path:
    """Two videos of 2 x 3 px; each mask is the number of its frame."""
    (root / f'ImageSets/{year}').mkdir(parents=True)
    (root / f'ImageSets/{year}/val.txt').write_text('dog\ncat\n')
    for name in ('cat', 'dog'):
        folder = root / 'JPEGImages/480p' / name
        folder.mkdir(parents=True)
        for i in range(frames):
            Image.new('RGB', (3, 2)).save(folder / f'{i:05d}.jpg')
            mask = np.full((2, 3), i + 1, np.uint8)
            write_mask(root / 'Annotations/480p' / name / f'{i:05d}.png', mask)
    return root


def test_videos_come_in_the_list_s_order(tmp_path):
    first, second = read_videos(dataset(tmp_path), 2017)
    assert (first.name, second.name) == ('dog', 'cat')
    stems = [f'{i:05d}' for i in range(4)]
    assert [path.stem for path in first.frames] == stems
    assert [path.stem for path in first.masks] == stems
    (tmp_path / 'Annotations/480p/dog/00003.png').unlink()  # the last one is not used
    assert read_videos(tmp_path, 2017)[0] == first


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        ('ImageSets/2017/val.txt', 'val.txt: No such file.*ImageSets'),
        ('JPEGImages/480p/cat/*', r'video cat: 0 frame\(s\).*three are needed'),
        ('JPEGImages/480p/cat/0000[1-3]*', r'video cat: 1 frame\(s\)'),
        ('Annotations/480p/dog/00000*', 'video dog: the first annotation is missing'),
        ('Annotations/480p/dog/00002*', 'video dog: an annotation is missing.*00002'),
    ],
)
def test_wrong_folders_end_in_one_line(tmp_path, damage, words):
    for path in dataset(tmp_path).glob(damage):
        path.unlink()
    with pytest.raises(DenseSSLError, match=words) as error:
        read_videos(tmp_path, 2017)
    assert '\n' not in str(error.value)


def test_the_wrong_year_and_an_empty_list_end_in_one_line(tmp_path):
    dataset(tmp_path, 2016)
    with pytest.raises(DenseSSLError, match=r'there is .*2016/val.txt, of another'):
        read_videos(tmp_path, 2017)
    (tmp_path / 'ImageSets/2016/val.txt').write_text('\n')
    with pytest.raises(DenseSSLError, match='names no video'):
        read_videos(tmp_path, 2016)


def test_an_unreadable_mask_ends_in_one_line(tmp_path):
    path = tmp_path / '00000.png'
    path.write_bytes(b'no picture')
    with pytest.raises(DenseSSLError, match='cannot be read') as error:
        read_mask(path, 2017)
    assert '\n' not in str(error.value)


def test_measures_are_means_by_object_without_first_and_last_frame(tmp_path):
    truth, found = tmp_path / 'truth', tmp_path / 'found'
    names = [f'{i:05d}.png' for i in range(4)]
    # object 1 is left of the line; object 2 is a square; 3 comes later and is left out
    for i, name in enumerate(names):
        mask = np.where(square(30, 80), 2, columns(40)).astype(np.uint8)
        mask[90:, 90:] = 3 * (i > 0)
        write_mask(truth / name, mask)
    lines = (99, 40, 60, 99)  # J 1 and 40 / 60, F 1 and 0; of what counts
    for line, name in zip(lines, names, strict=True):
        mask = np.where(square(30, 90), 2, columns(line)).astype(np.uint8)
        write_mask(found / name, mask)
    video = Video('v', tuple(map(Path, names)), tuple(truth / n for n in names))
    one, two = measure_video(video, found, 2017)
    assert (one['video'], one['object'], two['object']) == ('v', 1, 2)
    assert one['J_m'] == pytest.approx((1 + 40 / 60) / 2)
    assert one['J_r'] == 1
    assert one['F_m'] == 0.5 and one['F_r'] == 0.5
    assert two['J_m'] == pytest.approx(200 / 600) and two['J_r'] == 0
    assert two['F_m'] == pytest.approx(boundary_measure(square(30, 90), square(30, 80)))
    (single,) = measure_video(video, found, 2016)  # all objects are one
    assert single['J_m'] < one['J_m']
    write_mask(found / names[1], np.zeros((3, 3), np.uint8))
    with pytest.raises(DenseSSLError, match=r'00001.png is \(100, 150\)'):
        measure_video(video, found, 2017)


def test_real_annotations_agree_with_themselves():
    shared = Path(__file__).parents[2].parent / 'shared' / 'data'
    root = Path(os.environ.get('DENSESSL_TEST_DATA', shared)) / 'davis2016'
    if not root.is_dir():
        pytest.skip(f'needs DAVIS 2016 in {root}; set DENSESSL_TEST_DATA to its parent')
    video = read_videos(root, 2016)[0]
    first = read_mask(video.masks[0], 2016)
    assert first.shape == (480, 854) and set(np.unique(first)) == {0, 1}
    assert region_similarity(first > 0, first > 0) == 1
    assert boundary_measure(first > 0, first > 0) == 1
    moved = np.roll(first, 5, axis=1) > 0  # below the tolerance of 8 px
    assert 0.8 < region_similarity(moved, first > 0) < 1
    assert boundary_measure(moved, first > 0) > 0.99
