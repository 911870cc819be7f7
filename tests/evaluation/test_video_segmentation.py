from __future__ import annotations

import csv
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor, VideoSegmentation
from densessl.evaluation.davis import read_mask, read_videos, write_mask
from densessl.evaluation.label_propagation import hard_labels, propagate_labels
from densessl.evaluation.video_segmentation import frame_size
from densessl.models.features import Tokens
from densessl.registry import EVALUATORS

# Propagation


def brute_force(query, context, labels, radius, top_k, temperature):
    """One token after the other, against all tokens of all frames."""
    h, w, _ = query.shape
    found = torch.zeros(h, w, labels.shape[-1], dtype=labels.dtype)
    for y in range(h):
        for x in range(w):
            near = [
                (float(query[y, x] @ frame[v, u]), label[v, u])
                for frame, label in zip(context, labels, strict=True)
                for v in range(max(0, y - radius), min(h, y + radius + 1))
                for u in range(max(0, x - radius), min(w, x + radius + 1))
            ]
            last = sorted((c for c, _ in near), reverse=True)[:top_k][-1]
            chosen = [(math.exp(c / temperature), v) for c, v in near if c >= last]
            total = sum(weight for weight, _ in chosen)
            found[y, x] = sum(weight * label for weight, label in chosen) / total
    return found


def features(*shape, exact=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    if exact:  # lengths and cosines are exact, and most of them are equal to others
        return torch.randint(0, 2, (*shape, 4), generator=g).double() - 0.5
    drawn = torch.randn(*shape, 6, generator=g, dtype=torch.float64)
    return nn.functional.normalize(drawn, dim=-1)


@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize(
    ('grid', 'frames', 'radius', 'top_k'),
    [
        ((1, 1), 1, 12, 5),
        ((5, 7), 2, 1, 5),
        ((13, 25), 1, 3, 5),  # several tiles, in both directions
        ((24, 12), 2, 0, 5),  # tiles without a rest; only its own place
        ((14, 13), 2, 50, 1),
        ((6, 14), 2, 2, 1000),  # all of the window
    ],
)
def test_labels_are_those_of_a_dense_comparison(grid, frames, radius, top_k, exact):
    query, context = (
        features(*grid, exact=exact),
        features(frames, *grid, exact=exact, seed=1),
    )
    labels = features(frames, *grid, seed=2).abs()
    found = propagate_labels(query, context, labels, radius=radius, top_k=top_k)
    expected = brute_force(query, context, labels, radius, top_k, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_temperature_and_length_one_are_in_the_weights():
    query = torch.tensor([[[1.0, 0.0]]]).double()
    context = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
    context = context.view(2, 1, 1, 2)
    labels = torch.eye(2).double().view(2, 1, 1, 2)
    for temperature in (0.1, 1.0, 1e-4):
        found = propagate_labels(query, context, labels, temperature=temperature)
        share = 1 / (1 + math.exp(-0.4 / temperature))
        assert found[0, 0, 0].item() == pytest.approx(share, abs=1e-12)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_memory_does_not_grow_with_the_square_of_the_grid():
    sizes = {}
    for width in (48, 192):
        query, context = features(48, width), features(2, 48, width, seed=1)
        labels = context[..., :2].abs()
        with Largest() as largest:
            propagate_labels(query, context, labels, radius=3)
        sizes[width] = largest.numel
    tile = 12 * 12 * 2 * (12 + 2 * 3) ** 2
    assert sizes[48] == sizes[192] == tile < (48 * 48) ** 2 / 10


def test_scores_become_classes_by_rank_within_each_class():
    labels = torch.zeros(2, 4, 3)
    labels[..., 0] = 1
    labels[:, 2, 1] = 0.4  # never above the background, yet the most that class 1 has
    labels[:, 2, 0] = 0.6
    labels[..., 2] = 0.5  # the same everywhere says nothing
    assert hard_labels(labels, (2, 4)).tolist() == [[0, 0, 1, 0]] * 2
    ramp = torch.tensor([0.0, 1.0]).expand(1, 2)
    both = torch.stack([1 - ramp, ramp], -1)
    assert hard_labels(both, (4, 8)).tolist() == [[0] * 4 + [1] * 4] * 4


def test_frame_sizes():
    assert frame_size((480, 854), 480, 16) == (480, 832)
    assert frame_size((1080, 1920), 480, 8) == (480, 832)
    assert frame_size((854, 480), 480, 8) == (832, 480)
    assert frame_size((480, 910), 480, 14) == (476, 896)
    assert frame_size((480, 911), 480, 32) == (480, 896)
    with pytest.raises(
        DenseSSLError, match='480x854 px at height=8 have no patch of 16'
    ):
        frame_size((480, 854), 8, 16)


# The protocol

COLOURS = np.array([[90, 90, 90], [230, 30, 30], [30, 230, 30], [30, 30, 230]])


class ColourLabels(nn.Module):
    """Features are the label of an object, told by its colour."""

    patch_size = 8

    def forward(self, images):
        maps = nn.functional.avg_pool2d(images, self.patch_size)
        away = maps.flatten(2).mT[:, :, None] - torch.tensor(COLOURS)
        label = away.square().sum(-1).argmin(-1)
        return Tokens(nn.functional.one_hot(label, 4).float(), tuple(maps.shape[2:]))


class Noise(nn.Module):
    """Features of a pixel are random; or not numbers."""

    patch_size = 1

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.generator, self.scale = torch.Generator().manual_seed(0), scale

    def forward(self, images):
        b, _, h, w = images.shape
        drawn = torch.randn(b, h * w, 16, generator=self.generator)
        return Tokens(self.scale * drawn, (h, w))


def plain(backbone) -> FeatureExtractor:
    return FeatureExtractor(backbone, (0.0,) * 3, (1.0,) * 3)


def bands(shift: int, size=(48, 128)) -> np.ndarray:
    """Three objects of the picture's height, 16 to 32 px wide, at some place."""
    mask = np.zeros(size, np.uint8)
    for number, (left, right) in enumerate([(8, 24), (24, 56), (72, 88)], 1):
        mask[:, left + shift : right + shift] = number
    return mask


def dataset(root: Path, masks: list[np.ndarray], year: int = 2017) -> Path:
    """DAVIS's layout: pictures in the colours of their masks."""
    (root / f'ImageSets/{year}').mkdir(parents=True)
    (root / f'ImageSets/{year}/val.txt').write_text('bands\n')
    frames = root / 'JPEGImages/480p/bands'
    frames.mkdir(parents=True)
    for i, mask in enumerate(masks):
        colours = COLOURS[mask].astype(np.uint8)
        cv2.imwrite(str(frames / f'{i:05d}.jpg'), colours[:, :, ::-1])
        path = root / f'Annotations/480p/bands/{i:05d}.png'
        if year == 2017:
            write_mask(path, mask)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.where(mask > 0, 255, 0))
    return root


@pytest.mark.parametrize('year', [2016, 2017])
def test_features_that_tell_the_object_segment_without_a_mistake(tmp_path, year):
    truth = [bands(8 * i) for i in range(5)]
    data, out = dataset(tmp_path / 'davis', truth, year), tmp_path / 'out'
    out.mkdir()
    scores = VideoSegmentation(year=year, height=48).run(
        plain(ColourLabels()), data, out
    )
    assert scores.metrics == dict.fromkeys(('J&F_m', 'J_m', 'J_r', 'F_m', 'F_r'), 1)
    assert next(iter(scores.metrics)) == 'J&F_m'
    assert scores.settings['num_objects'] == (3 if year == 2017 else 1)
    assert scores.settings['num_frames'] == 5 and scores.settings['patch_size'] == 8
    for i, mask in enumerate(truth):
        path = out / f'predictions/bands/{i:05d}.png'
        expected = mask if year == 2017 else mask > 0
        np.testing.assert_array_equal(read_mask(path, 2017), expected)
        assert Image.open(path).mode == 'P'
    assert scores.pictures == [out / 'bands.png']
    sheet = np.array(Image.open(out / 'bands.png'))
    assert sheet.shape == (2 * (18 + 120), 4 * 320, 3)  # frames 0 to 3, twice
    np.testing.assert_array_equal(sheet[18:138], sheet[156:])  # predicted, annotated
    rows = list(csv.DictReader((out / 'objects.csv').open()))
    assert [row['video'] for row in rows] == ['bands'] * len(rows)
    assert all(float(row['J_m']) == 1 for row in rows)


def test_masks_are_resized_with_the_frames(tmp_path):
    """At half the height: 24 x 64 px in the backbone, masks in full size."""
    truth = [bands(8 + 16 * i) for i in range(3)]
    data = dataset(tmp_path, truth)
    protocol, (video,) = VideoSegmentation(height=24), read_videos(data, 2017)
    for found, expected in zip(
        protocol.segment(plain(ColourLabels()), video), truth, strict=True
    ):
        assert found.shape == (48, 128) and found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_random_features_score_chance(tmp_path):
    rng = np.random.default_rng(0)
    truth = [rng.integers(0, 2, (16, 64), np.uint8) for _ in range(6)]
    data, out = dataset(tmp_path / 'davis', truth), tmp_path / 'out'
    out.mkdir()
    protocol = VideoSegmentation(height=16, num_previous=0, radius=64, top_k=1)
    scores = protocol.run(plain(Noise()), data, out)
    # halves that know nothing of each other: a quarter both, three quarters either
    assert scores.metrics['J_m'] == pytest.approx(1 / 3, abs=0.03)


def test_previous_frames_count_and_the_oldest_are_forgotten(tmp_path):
    """Each frame has a colour nearest to that of the frame before."""
    seen = []

    class Angle(nn.Module):
        patch_size = 8

        def forward(self, images):
            seen.append(len(seen))
            angle = torch.tensor(0.3 * seen[-1])
            h, w = (side // 8 for side in images.shape[2:])
            patch = torch.stack([angle.cos(), angle.sin()]).expand(1, h * w, 2)
            return Tokens(patch, (h, w))

    data = dataset(tmp_path, [bands(0)] * 6)
    (video,) = read_videos(data, 2017)
    contexts = []

    def spy(query, context, labels, **options):
        contexts.append(torch.atan2(context[:, 0, 0, 1], context[:, 0, 0, 0]) / 0.3)
        return propagate_labels(query, context, labels, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('densessl.evaluation.video_segmentation.propagate_labels', spy)
        list(
            VideoSegmentation(height=48, num_previous=2).segment(plain(Angle()), video)
        )
    frames = [each.round().int().tolist() for each in contexts]
    assert frames == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        ('one frame', r'video bands: 1 frame\(s\).*three are needed'),
        ('no first mask', 'the first annotation is missing'),
        ('no list', 'val.txt: No such file'),
        ('empty first mask', '00000.png marks no object'),
        ('small masks', r'00000.jpg is \(48, 128\) and its mask \(24, 64\)'),
        (
            'small frame',
            r'00001.jpg is \(24, 64\) and the first annotation \(48, 128\)',
        ),
        ('small mask', r'mask 00001.png is \(24, 64\) and its frame \(48, 128\)'),
        ('broken frame', "cannot read '.*00001.jpg'"),
    ],
)
def test_wrong_data_end_in_one_line(tmp_path, damage, words):
    data = dataset(tmp_path / 'davis', [bands(0)] * 4)
    frames, masks = (
        data / each / '480p/bands' for each in ('JPEGImages', 'Annotations')
    )
    small = bands(0)[::2, ::2]
    if damage == 'one frame':
        for path in sorted(frames.iterdir())[1:]:
            path.unlink()
    elif damage == 'no first mask':
        (masks / '00000.png').unlink()
    elif damage == 'no list':
        (data / 'ImageSets/2017/val.txt').unlink()
    elif damage == 'empty first mask':
        write_mask(masks / '00000.png', 0 * bands(0))
    elif damage == 'small masks':
        write_mask(masks / '00000.png', small)
    elif damage == 'small frame':
        cv2.imwrite(str(frames / '00001.jpg'), small)
    elif damage == 'small mask':
        write_mask(masks / '00001.png', small)
    elif damage == 'broken frame':
        (frames / '00001.jpg').write_bytes(b'\xff\xd8 cut off')
    (tmp_path / 'out').mkdir()
    with pytest.raises(DenseSSLError, match=words) as error:
        VideoSegmentation(height=48).run(plain(ColourLabels()), data, tmp_path / 'out')
    assert '\n' not in str(error.value)


def test_features_that_are_no_numbers_end_in_one_line(tmp_path):
    (video,) = read_videos(dataset(tmp_path, [bands(0)] * 3), 2017)
    segment = VideoSegmentation(height=48).segment(plain(Noise(math.nan)), video)
    with pytest.raises(DenseSSLError, match=r'features of .*00000.jpg are not finite'):
        list(segment)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(year=2018), 'year=2018 is unknown; use 2016 or 2017'),
        (dict(top_k=0), 'top_k=0 is too small; give 1'),
        (dict(radius=-1), 'radius=-1 is too small; give 0'),
        (dict(temperature=0), 'temperature=0 is not above 0'),
    ],
)
def test_wrong_settings_end_in_one_line(options, words):
    with pytest.raises(DenseSSLError, match=words):
        VideoSegmentation(**options)


def test_the_config_has_the_published_setting():
    cfg = Config.fromfile(ROOT / 'configs/evaluation/video_segmentation.py')
    assert EVALUATORS.build(cfg.protocol) == VideoSegmentation(
        year=2017, height=480, num_previous=7, radius=12, top_k=5, temperature=0.1
    )
