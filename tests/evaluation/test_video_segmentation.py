from __future__ import annotations

import csv
import math
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from PIL import Image
from torch import nn

from densessl.engine.launch import read_config
from densessl.errors import DenseSSLError
from densessl.evaluation import Correspondence, FeatureExtractor, VideoSegmentation
from densessl.evaluation.davis import read_mask, read_videos, write_mask
from densessl.evaluation.label_propagation import propagate_labels
from densessl.evaluation.loading import load_extractor
from densessl.evaluation.main import CONFIG_KEYS, parse_args
from densessl.evaluation.video_segmentation import frame_size
from densessl.models.features import Tokens
from densessl.registry import EVALUATORS


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


@pytest.mark.parametrize(
    ('title', 'kind'),
    [('Video segmentation', VideoSegmentation), ('Correspondence', Correspondence)],
)
def test_commands_of_the_page_build(title, kind, monkeypatch):
    page = (ROOT / 'docs/evaluation.md').read_text()
    block = page.split(f'\n## {title}\n')[1].split('\n## ')[0]
    found = re.findall(r'^python tools/evaluate\.py (.+)$', block, re.MULTILINE)
    assert len(found) >= 4
    monkeypatch.chdir(ROOT)
    for command in found:
        args = parse_args(shlex.split(command))
        cfg = read_config(args.config, args.cfg_options, CONFIG_KEYS)
        assert type(EVALUATORS.build(cfg.protocol)) is kind
        if args.checkpoint.startswith('untrained:'):
            load_extractor(args.checkpoint)
