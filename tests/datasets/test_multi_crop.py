from __future__ import annotations

import dataclasses
import io

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from PIL import Image

from densessl.benchmark.data import build_pipeline, measure, run, write_noise_jpegs
from densessl.datasets.image_io import JpegImage, LoadImage, open_image_bytes
from densessl.datasets.transforms import MultiCrop, ViewRecipe
from densessl.datasets.transforms.multi_crop import (
    draw_box,
    resize_crop,
    shrink_towards,
)
from densessl.errors import DenseSSLError
from densessl.registry import TRANSFORMS

PLAIN = {'jitter': 0.0, 'grayscale': 0.0}
PAPER = [
    {'role': 'global', 'size': 224, 'scale': (0.25, 1.0), 'blur': 1.0},
    {'role': 'global', 'size': 224, 'scale': (0.25, 1.0), 'blur': 0.1, 'solarize': 0.2},
    {'role': 'local', 'size': 96, 'scale': (0.05, 0.25), 'count': 8, 'blur': 0.5},
]


def cut(image, views, seed=0):
    crop = MultiCrop(views=views)
    return crop({'img': image, 'rng': np.random.default_rng(seed)})


def coordinates(height, width):
    """A picture whose red is 2 x and whose green is 2 y at every pixel's centre."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8)


def places(geometry, index):
    """Source x and y of view ``index``'s pixel centres, by a loop over pixels."""
    x, y, w, h = geometry.box[index].tolist()
    rows, columns = geometry.size[index].tolist()
    found = np.empty((rows, columns, 2))
    for i in range(rows):
        for j in range(columns):
            along = (j + 0.5) / columns
            if geometry.flip[index]:
                along = 1 - along
            found[i, j] = x + along * w, y + (i + 0.5) / rows * h
    return found


def photo(height, width):
    coarse = np.random.default_rng(3).integers(0, 256, (7, 9, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, 'JPEG', quality=95)
    return open_image_bytes(stream.getvalue(), 'x.jpg')


def test_shapes_roles_and_order():
    results = cut(photo(360, 480), PAPER)
    inputs, geometry = results['inputs'], results['geometry']
    assert list(inputs) == ['global', 'local']
    assert inputs['global'].shape == (2, 3, 224, 224)
    assert inputs['local'].shape == (8, 3, 96, 96)
    assert all(views.dtype == torch.uint8 for views in inputs.values())
    assert geometry.size.tolist() == [[224, 224]] * 2 + [[96, 96]] * 8
    assert geometry.source.tolist() == [[360, 480]] * 10
    area = geometry.box[:, 2:].prod(dim=1) / (360 * 480)
    assert (area[:2] > 0.245).all() and (area[2:] < 0.255).all()
    crop = MultiCrop(views=PAPER)
    assert (crop.num_views, crop.roles) == (10, {'global': 2, 'local': 8})
    assert [view.blur for view in crop.views] == [1.0, 0.1] + [0.5] * 8


@pytest.mark.parametrize('flip', [0.0, 0.5, 1.0])
def test_content_agrees_with_geometry(flip):
    # A straight ramp stays straight under a resampling that is centred right, but for
    # the crop's border, where the filter's window is cut.
    shared = {'flip': flip, **PLAIN}
    views = [
        {'role': 'a', 'size': 48, 'scale': (0.3, 1.0), 'count': 3, **shared},
        {'role': 'b', 'size': (20, 31), 'scale': (0.05, 0.3), 'count': 4, **shared},
        {'role': 'c', 'size': (90, 70), 'scale': (0.1, 0.4), 'count': 3, **shared},
    ]
    for seed in range(4):
        results = cut(coordinates(100, 125), views, seed)
        pictures = [view for stack in results['inputs'].values() for view in stack]
        for index, picture in enumerate(pictures):
            wanted = 2 * places(results['geometry'], index)
            found = picture[:2].permute(1, 2, 0).numpy()
            edge = (slice(6, -6),) * 2
            assert np.abs(found - wanted)[edge].max() < 1.6  # levels, 0.8 px
            assert np.abs((found - wanted)[edge].mean()) < 0.6
            assert not picture[2].any()


@pytest.mark.parametrize(
    ('flip', 'low', 'high'), [(0, 0, 0), (0.5, 430, 570), (1, 1000, 1000)]
)
def test_flip_rate(flip, low, high):
    view = {'role': 'a', 'size': 4, 'scale': (0.5, 1), 'count': 1000, **PLAIN}
    flips = cut(photo(9, 9), [{**view, 'flip': flip}])['geometry'].flip
    assert low <= int(flips.sum()) <= high


@pytest.mark.parametrize(
    ('box', 'size'),
    [
        ((3, 5, 60, 50), (96, 96)),  # larger
        ((0, 0, 160, 120), (50, 64)),  # smaller
        ((20, 1, 130, 40), (64, 64)),  # smaller one way, larger the other
        ((7, 0, 1, 120), (30, 30)),
        ((0, 9, 160, 1), (30, 300)),
        ((11, 12, 1, 1), (5, 6)),
        ((9, 8, 30, 20), (20, 30)),  # as it is
    ],
)
def test_resampling_agrees_with_pillow(box, size):
    image = photo(120, 160)
    x, y, w, h = box
    crop = Image.fromarray(image[y : y + h, x : x + w])
    wanted = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    found = resize_crop(image, box, size)
    assert np.abs(found - wanted).max() <= 2
    assert found.flags.c_contiguous


def test_photometry_is_applied_to_each_view():
    shared = {'size': 32, 'scale': (0.5, 1.0), **PLAIN}
    views = [
        {'role': 'plain', **shared},
        {'role': 'inverted', 'solarize': 1.0, 'solarize_threshold': 0, **shared},
        {'role': 'gray', **shared, 'grayscale': 1.0},
    ]
    results = cut(photo(80, 90), views)
    plain, inverted, gray = (stack[0].numpy() for stack in results['inputs'].values())
    assert (gray[0] == gray[1]).all() and (gray[0] == gray[2]).all()
    assert (plain[0] != plain[1]).any()
    assert plain.mean() + inverted.mean() == pytest.approx(255, abs=25)


@pytest.mark.parametrize('scale', [(0.25, 1.0), (0.05, 0.25)])
@pytest.mark.parametrize('shape', [(360, 480), (300, 300), (100, 900)])
def test_crops_are_distributed_as_torchvision_draws_them(scale, shape):
    transforms = pytest.importorskip('torchvision.transforms')
    rng, count, ratio = np.random.default_rng(0), 3000, (3 / 4, 4 / 3)
    ours = np.array([draw_box(*shape, scale, ratio, rng) for _ in range(count)])
    blank = torch.empty(3, *shape)
    draw = transforms.RandomResizedCrop.get_params
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([draw(blank, scale, ratio) for _ in range(count)])
    theirs = theirs[:, [1, 0, 3, 2]]  # i, j, h, w

    def measures(boxes):
        x, y, w, h = boxes.astype(float).T
        return [w * h, w / h, x + w / 2, y + h / 2, w, h]

    for mine, other in zip(measures(ours), measures(theirs), strict=True):
        grid = np.union1d(mine, other)
        shares = [
            np.searchsorted(np.sort(values), grid, side='right') / count
            for values in (mine, other)
        ]
        # Two-sample Kolmogorov-Smirnov: p = 1e-4 for 3000 draws each at 0.057.
        assert np.abs(shares[0] - shares[1]).max() < 0.057


def test_area_is_uniform_and_ratio_log_uniform():
    rng = np.random.default_rng(0)
    boxes = [draw_box(4000, 4000, (0.1, 0.4), (0.5, 2), rng) for _ in range(3000)]
    _, _, w, h = np.array(boxes, float).T
    for value, low, high in (
        (w * h / 4000**2, 0.1, 0.4),
        (np.log2(w / h), -1, 1),
    ):
        shares = np.sort((value - low) / (high - low))
        assert np.abs(shares - np.linspace(0, 1, 3000)).max() < 0.036  # p = 0.001
    assert abs(np.corrcoef(w * h, np.log(w / h))[0, 1]) < 0.07


@settings(deadline=None, max_examples=200)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    ratio=st.tuples(st.floats(0.1, 1), st.floats(1, 10)),
    seed=st.integers(0, 2**32),
)
def test_a_crop_is_never_empty_nor_outside(height, width, low, high, ratio, seed):
    scale = (min(low, high), max(low, high))
    rng = np.random.default_rng(seed)
    x, y, w, h = draw_box(height, width, scale, ratio, rng)
    assert w >= 1 and h >= 1
    assert 0 <= x <= width - w
    assert 0 <= y <= height - h


def test_fallback_is_the_largest_centred_crop():
    rng = np.random.default_rng(0)
    assert draw_box(300, 10, (0.9, 1.0), (3 / 4, 4 / 3), rng) == (0, 143, 10, 13)
    assert draw_box(10, 300, (0.9, 1.0), (3 / 4, 4 / 3), rng) == (143, 0, 13, 10)


@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (2, 3), (40, 30)])
def test_small_and_thin_pictures(size):
    results = cut(photo(*size), PAPER)
    assert results['inputs']['global'].shape == (2, 3, 224, 224)
    assert results['geometry'].box[:, 2:].min() >= 1


def test_every_edge_can_be_reached():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box(8, 9, (0.2, 0.5), (1, 1), rng) for _ in range(500)])
    ends = boxes[:, :2] + boxes[:, 2:]
    assert boxes[:, :2].min(axis=0).tolist() == [0, 0]
    assert ends.max(axis=0).tolist() == [9, 8]


def test_large_jpegs_are_decoded_small():
    image = photo(1200, 1600)
    views = [{'role': 'a', 'size': 64, 'scale': (0.2, 1.0), 'count': 4, **PLAIN}]
    steps, draw = [], JpegImage.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            JpegImage, 'decode', lambda self, r=1: steps.append(r) or draw(self, r)
        )
        lazy = cut(jpeg(image), views)
    assert steps == [8]  # the smallest crop is about 460 px wide
    geometry = lazy['geometry']
    assert geometry.source.tolist() == [[1200, 1600]] * 4
    assert not (geometry.box % 8).any()
    eager = cut(np.asarray(jpeg(image)), views)
    assert (geometry.box - eager['geometry'].box).abs().max() < 8
    assert torch.equal(geometry.flip, eager['geometry'].flip)
    for index, view in enumerate(lazy['inputs']['a']):
        box = geometry.box[index].int().tolist()
        wanted = resize_crop(image, box, (64, 64)).astype(int)
        if geometry.flip[index]:
            wanted = wanted[:, ::-1]
        # The box lies exactly where the geometry says: half a px off costs more.
        assert np.abs(view.permute(1, 2, 0).numpy() - wanted).mean() < 1.0


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(16, 3000),
    width=st.integers(16, 3000),
    orientation=st.sampled_from([1, 6]),
    seed=st.integers(0, 2**32),
)
def test_small_decoding_never_makes_a_view_larger(height, width, orientation, seed):
    image = JpegImage(b'', 'x', height, width, orientation)
    crop, steps = MultiCrop(views=PAPER), []
    rng = np.random.default_rng(seed)
    boxes = crop.draw_boxes(height, width, rng)
    sides = [view.size[0] for view in crop.views]
    least = min(min(w, h) / s for (_, _, w, h), s in zip(boxes, sides, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JpegImage, 'decode', lambda _, step: steps.append(step))
        _, cut, step = crop._decode(image, boxes)
    assert steps == [step] and not (cut % step).any()
    assert step == 1 or least >= step  # each view has its own resolution
    if orientation == 1:
        assert step == 8 or least < 2 * step  # and no smaller decoding would have
    assert (boxes - cut).max() < step and (boxes >= cut).all()


def test_one_demanding_crop_keeps_the_full_size():
    image = photo(300, 400)
    views = [
        {'role': 'a', 'size': 16, 'scale': (0.5, 1.0), 'count': 3, **PLAIN},
        {'role': 'b', 'size': 200, 'scale': (0.5, 1.0), **PLAIN},
    ]
    lazy, eager = cut(jpeg(image), views), cut(np.asarray(jpeg(image)), views)
    assert torch.equal(lazy['geometry'].box, eager['geometry'].box)
    for role in 'ab':
        assert torch.equal(lazy['inputs'][role], eager['inputs'][role])


def test_a_generator_decides_everything():
    image = photo(90, 120)
    first, again, other = (cut(image, PAPER, seed) for seed in (5, 5, 6))
    for role in ('global', 'local'):
        assert torch.equal(first['inputs'][role], again['inputs'][role])
        assert not torch.equal(first['inputs'][role], other['inputs'][role])
    assert torch.equal(first['geometry'].box, again['geometry'].box)
    np.testing.assert_array_equal(image, photo(90, 120))


def test_mean_and_spread_agree_with_torchvision(tmp_path):
    pytest.importorskip('torchvision')
    from densessl.benchmark.data import torchvision_reference

    path = write_noise_jpegs(tmp_path, count=1)[0]
    views = [
        {'role': 'a', 'size': 48, 'scale': (0.3, 1.0), 'blur': 0.5, 'count': 300},
    ]
    ours = cut(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), views)
    reference = torchvision_reference(MultiCrop(views=views).views)
    with torch.random.fork_rng():
        theirs = torch.stack(reference(str(path), 0)).float()
    ours = ours['inputs']['a'].float()
    for statistic in (
        lambda x: x.mean(dim=(1, 2, 3)),  # brightness
        lambda x: x.std(dim=(1, 2, 3)),  # contrast
        lambda x: x.std(dim=1).mean(dim=(1, 2)),  # colour
        lambda x: x.diff(dim=-1).abs().mean(dim=(1, 2, 3)),  # sharpness
    ):
        a, b = statistic(ours), statistic(theirs)
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        assert abs(a.mean() - b.mean()) < 4 * error + 0.3  # Pillow cuts decimals off
        assert 0.75 < a.std() / b.std() < 1.33


def test_subclass_draws_its_own_crops():
    class Quarters(MultiCrop):
        def draw_boxes(self, height, width, rng):
            half = np.array([width // 2, height // 2])
            return np.array([[*(half * (k % 2, k // 2)), *half] for k in range(4)])

    view = {'role': 'a', 'size': (3, 4), 'scale': (0.1, 1), 'count': 4, 'flip': 0.0}
    image = photo(6, 8)
    crop = Quarters(views=[{**view, **PLAIN}])
    results = crop({'img': image, 'rng': np.random.default_rng(0)})
    quarters = results['inputs']['a'].permute(0, 2, 3, 1).numpy()
    rebuilt = np.vstack([np.hstack(quarters[:2]), np.hstack(quarters[2:])])
    np.testing.assert_array_equal(rebuilt, image)


OVERLAPPING = [
    {'role': 'global', 'size': 32, 'scale': (0.25, 1.0), 'count': 2, **PLAIN},
    {'role': 'local', 'size': 32, 'scale': (0.05, 0.25), 'count': 4, **PLAIN},
]


def pixels_in_common(a, b, height, width):
    """By painting both boxes on a canvas."""
    both = np.zeros((2, height, width), bool)
    for canvas, (x, y, w, h) in zip(both, (a, b), strict=True):
        canvas[int(y) : int(y + h), int(x) : int(x + w)] = True
    return int(both.all(0).sum())


def assert_overlaps(boxes, height, width, bounds=(0.02, 0.01), targets=2):
    """Bounds of the picture's area, at most what the global views share."""
    for v in range(1, len(boxes)):
        bound = bounds[v >= targets] * height * width
        first, *rest = boxes[: min(v, targets)]
        room = pixels_in_common(first, rest[0] if rest else first, height, width)
        for other in (first, *rest):
            found = pixels_in_common(boxes[v], other, height, width)
            assert found >= min(bound, room)


@pytest.mark.parametrize(
    'size', [(60, 80), (1, 1), (2, 3), (1, 300), (300, 1), (7, 90), (200, 12)]
)
@pytest.mark.parametrize('tries', [0, 20])
@pytest.mark.parametrize('bounds', [(0.02, 0.01), (0.3, 0.01)])
def test_views_overlap_by_the_bound(size, tries, bounds):
    crop = MultiCrop(OVERLAPPING, min_overlap=bounds, overlap_tries=tries)
    image = photo(*size)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        boxes = crop({'img': image, 'rng': rng})['geometry'].box
        assert boxes[:, 2:].min() >= 1
        assert_overlaps(boxes.tolist(), *size, bounds)


def test_bound_is_needed_and_shrinking_is_the_exception():
    loose, shrunk = 0, {0: 0, 20: 0}
    for seed in range(200):
        boxes = cut(photo(60, 80), OVERLAPPING, seed)['geometry'].box.tolist()
        try:
            assert_overlaps(boxes, 60, 80)
        except AssertionError:
            loose += 1
        for tries in shrunk:
            crop = MultiCrop(OVERLAPPING, (0.02, 0.01), overlap_tries=tries)
            sample = crop({'img': photo(60, 80), 'rng': np.random.default_rng(seed)})
            shrunk[tries] += sample['shrunk']
    assert loose > 20
    assert shrunk[20] == 0 < shrunk[0] >= loose


def test_redrawn_views_are_those_that_happen_to_overlap():
    # The same as throwing away the pairs that overlap too little.
    views = [{'role': 'a', 'size': 4, 'scale': (0.1, 0.2), 'count': 2, **PLAIN}]
    crop = MultiCrop(views, (0.05, 0.05), overlap_tries=1000)
    rng = np.random.default_rng(0)
    kept = []
    while len(kept) < 1500:
        boxes = crop.draw_boxes(90, 120, rng)
        if pixels_in_common(*boxes, 90, 120) >= 0.05 * 90 * 120:
            kept.append(boxes)
    ours = [
        crop._keep_overlap(crop.draw_boxes(90, 120, rng), 90, 120, rng)[0]
        for _ in range(1500)
    ]
    # given the first crop, that is: compare where the second lies in it
    for axis in (0, 1):
        a, b = (
            np.sort([(s[axis] - f[axis]) / f[axis + 2] for f, s in pairs])
            for pairs in (kept, ours)
        )
        grid = np.union1d(a, b)
        shares = [np.searchsorted(x, grid, side='right') / 1500 for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < 0.08


def test_shrinking_ends_at_what_the_fixed_boxes_share():
    fixed = [(0, 0, 10, 10), (5, 5, 10, 10)]  # (5, 5), 5 x 5
    assert shrink_towards((90, 90, 8, 8), fixed, 25) == (5, 5, 5, 5)
    box = shrink_towards((12, 12, 8, 8), fixed, 1)
    assert all(pixels_in_common(box, other, 120, 120) >= 1 for other in fixed)
    assert box != (5, 5, 5, 5)


def test_bound_holds_on_the_grid_of_a_small_decode():
    views = [{'role': 'a', 'size': 16, 'scale': (0.05, 0.1), 'count': 4, **PLAIN}]
    crop = MultiCrop(views, (0.001, 0.001))
    picture = jpeg(photo(480, 640))
    reduced = 0
    for seed in range(60):
        sample = crop({'img': picture, 'rng': np.random.default_rng(seed)})
        boxes = sample['geometry'].box
        reduced += not bool((boxes % 4).any())
        for v in range(1, 4):
            found = pixels_in_common(boxes[0], boxes[v], 480, 640)
            assert found >= 0.001 * 480 * 640
    assert reduced > 20


def test_a_bound_that_holds_anyway_changes_nothing():
    views = [{'role': 'global', 'size': 32, 'scale': (0.6, 1.0), 'count': 3}]
    crop = MultiCrop(views, min_overlap=(1e-9, 1e-9))
    image = photo(40, 40)
    for seed in range(5):
        plain = cut(image, views, seed)
        bound = crop({'img': image, 'rng': np.random.default_rng(seed)})
        assert bound['shrunk'] == 0
        assert torch.equal(plain['geometry'].box, bound['geometry'].box)
        assert torch.equal(plain['inputs']['global'], bound['inputs']['global'])


@pytest.mark.parametrize(
    ('bounds', 'message'),
    [
        ((0.02, 0.3), r"min_overlap=0.3 .* cannot be met by views of role 'local'"),
        ((0, 0.01), 'give two shares'),
        ((0.01,), 'give two shares'),
        (0.01, 'give two shares'),
        ((0.01, 1.5), 'give two shares'),
    ],
)
def test_overlaps_that_cannot_be(bounds, message):
    with pytest.raises(DenseSSLError, match=message) as caught:
        MultiCrop(OVERLAPPING, min_overlap=bounds)
    assert '\n' not in str(caught.value)


def test_overlap_of_a_single_view():
    with pytest.raises(DenseSSLError, match='single view'):
        MultiCrop([GOOD], min_overlap=(0.02, 0.01))


GOOD = {'role': 'global', 'size': 32, 'scale': (0.4, 1.0)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'solarise': 0.2}, "unknown key 'solarise'; did you mean 'solarize'"),
        ({'colour': 1}, "unknown key 'colour'"),
        ({'scale': (0.4, 1.2)}, r'scale=\(0.4, 1.2\); give .* <= 1'),
        ({'scale': (0.5, 0.4)}, 'scale='),
        ({'scale': (0, 0.4)}, 'scale='),
        ({'scale': 0.4}, 'scale='),
        ({'scale': (float('nan'), 1.0)}, 'scale='),
        ({'ratio': (4 / 3, 3 / 4)}, 'ratio='),
        ({'flip': 1.5}, 'flip=1.5; give a share'),
        ({'blur': -0.1}, 'blur='),
        ({'grayscale': None}, 'grayscale='),
        ({'blur_sigma': (0, 2)}, 'blur_sigma='),
        ({'jitter_strength': (0.4, 0.4, 0.2)}, 'jitter_strength='),
        ({'jitter_strength': (0.4, 0.4, 0.2, 0.6)}, 'hue <= 0.5'),
        ({'solarize_threshold': 300}, 'solarize_threshold='),
        ({'size': 0}, 'size='),
        ({'size': 32.5}, 'size='),
        ({'size': (32, 32, 3)}, 'size='),
        ({'count': 0}, 'count='),
        ({'role': ''}, 'role='),
    ],
)
def test_bad_recipes_say_so_in_one_line(change, message):
    with pytest.raises(DenseSSLError, match=message) as caught:
        MultiCrop(views=[{**GOOD, **change}])
    assert '\n' not in str(caught.value)


def test_bad_sets_of_recipes():
    with pytest.raises(DenseSSLError, match="'scale' is missing"):
        MultiCrop(views=[{'role': 'a', 'size': 3}])
    with pytest.raises(DenseSSLError, match='empty'):
        MultiCrop(views=[])
    with pytest.raises(DenseSSLError, match='sizes'):
        MultiCrop(views=[GOOD, {**GOOD, 'size': 64}])
    with pytest.raises(DenseSSLError, match='list them together'):
        MultiCrop(views=[GOOD, {**GOOD, 'role': 'local'}, GOOD])


def test_config_and_dataclass_give_the_same():
    recipe = ViewRecipe('global', 32, (0.4, 1.0))
    built = TRANSFORMS.build(
        {'type': 'MultiCrop', 'views': [{**GOOD, 'scale': [0.4, 1.0]}]}
    )
    assert built.recipes == (recipe,)
    assert recipe.size == (32, 32)
    larger = dataclasses.replace(recipe, size=(48, 64))
    assert MultiCrop([larger]).views[0].size == (48, 64)


def test_benchmark_measures_both(tmp_path):
    pytest.importorskip('torchvision')
    threads = torch.get_num_threads(), cv2.getNumThreads()
    pipeline = [{'type': 'MultiCrop', 'views': [GOOD]}]
    speed = run({'pipeline': pipeline}, seconds=0.2)
    assert speed.ratio > 1
    assert speed.images_per_second > 20 and speed.num_images >= 5
    write_noise_jpegs(tmp_path, count=2)
    assert measure(pipeline, tmp_path, seconds=0.1) > 20
    assert (torch.get_num_threads(), cv2.getNumThreads()) == threads


def test_benchmark_names_what_is_missing(tmp_path):
    pipeline = [{'type': 'MultiCrop', 'views': [GOOD]}]
    with pytest.raises(DenseSSLError, match='no picture'):
        measure(pipeline, tmp_path)
    with pytest.raises(DenseSSLError, match='no config file'):
        build_pipeline('nowhere.py')
    with pytest.raises(DenseSSLError, match=r'train_dataloader\.dataset\.pipeline'):
        build_pipeline({'train_dataloader': None})


def test_benchmark_finds_the_pipeline(tmp_path):
    pipeline = [{'type': 'MultiCrop', 'views': [GOOD]}]
    config = {'train_dataloader': {'dataset': {'pipeline': pipeline}}}
    file = tmp_path / 'config.py'
    file.write_text(f'train_dataloader = {config["train_dataloader"]}')
    whole = [{'type': 'LoadImage', 'lazy': True}, *pipeline]
    for source in (config, str(file), Config.fromfile(file), pipeline, whole):
        load, crop = build_pipeline(source)
        assert isinstance(load, LoadImage) and load.lazy == (source is whole)
        assert crop.recipes == (ViewRecipe('global', 32, (0.4, 1.0)),)
