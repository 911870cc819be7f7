from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from PIL import Image
from torch import nn

from densessl.datasets.demo_scenes import DemoScenes
from densessl.errors import DenseSSLError
from densessl.evaluation import Correspondence, FeatureExtractor
from densessl.evaluation.correspondence import match_mirrored
from densessl.evaluation.labelled import CentreCrops
from densessl.models.features import Tokens
from densessl.registry import EVALUATORS

GRID = (4, 4)


class Ranks(nn.Module):
    """Features say how dark a patch is among those of its picture, and nothing else.

    Brightness, contrast and grey leave that as it is.
    """

    patch_size = 8

    def forward(self, images):
        maps = nn.functional.avg_pool2d(images.mean(1), self.patch_size)
        ranks = maps.flatten(1).argsort().argsort()
        return Tokens(nn.functional.one_hot(ranks).float(), tuple(maps.shape[1:]))


class Noise(nn.Module):
    """Random features, of the same scale everywhere."""

    patch_size = 8

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.generator, self.scale = torch.Generator().manual_seed(0), scale

    def forward(self, images):
        h, w = (side // 8 for side in images.shape[2:])
        drawn = torch.randn(len(images), h * w, 8, generator=self.generator)
        return Tokens(self.scale * drawn, (h, w))


class Scripted(nn.Module):
    """Gives what it was told, call by call: view 1, view 2."""

    patch_size = 8

    def __init__(self, *answers) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, images):
        return Tokens(self.answers.pop(0).expand(len(images), -1, -1), GRID)


def extractor(backbone) -> FeatureExtractor:
    return FeatureExtractor(backbone, (0.0,) * 3, (1.0,) * 3, batch_size=3)


def mosaics(folder, count: int):
    """Grey pictures of 32 px with 16 patches, each of a brightness of its own."""
    rng = np.random.default_rng(0)
    for i in range(count):
        levels = rng.permutation(np.linspace(40, 120, 16)).reshape(4, 4)
        picture = levels.round().astype(np.uint8).repeat(8, 0).repeat(8, 1)
        path = folder / f'{i % 2}/{i:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture)
    return folder


def small(**options) -> Correspondence:
    return Correspondence(resize=32, crop=32, **options)


def test_features_that_tell_the_content_match_without_a_mistake(tmp_path):
    data, out = mosaics(tmp_path / 'data', 7), tmp_path / 'out'
    out.mkdir()
    scores = small(num_drawn=2).run(extractor(Ranks()), data, out)
    assert scores.metrics == dict(
        accuracy_top10=1, distance_tokens_top10=0, accuracy_all=1, distance_tokens_all=0
    )
    assert next(iter(scores.metrics)) == 'accuracy_top10'
    assert scores.settings['num_pictures'] == 7 and scores.settings['grid'] == GRID
    names = ['matches_000_000.png', 'matches_001_002.png']
    assert scores.pictures == [out / name for name in names]
    assert sorted(path.name for path in out.iterdir()) == names
    sheet = np.array(Image.open(out / names[0]))
    assert sheet.shape == (2 * (18 + 32 + 8), 2 * 32 + 24 + 8, 3)


def test_random_features_score_chance(tmp_path):
    data = mosaics(tmp_path / 'data', 250)
    scores = small(num_drawn=0).run(extractor(Noise()), data, tmp_path)
    places = [(r, c) for r in range(4) for c in range(4)]
    away = np.mean([math.dist(a, b) for a in places for b in places])
    assert scores.metrics['accuracy_all'] == pytest.approx(1 / 16, abs=0.02)
    assert scores.metrics['accuracy_top10'] == pytest.approx(1 / 16, abs=0.02)
    assert scores.metrics['distance_tokens_all'] == pytest.approx(away, abs=0.1)
    assert scores.metrics['distance_tokens_top10'] == pytest.approx(away, abs=0.1)
    assert not scores.pictures


def test_the_most_similar_pairs_are_scored_apart(tmp_path):
    """Ten tokens are certain and right; six are not, and take the first of them."""
    certain = torch.eye(16)[:10]
    ours = torch.cat([certain, torch.eye(16)[15:].expand(6, 16)])
    vague = torch.eye(16)[15] + torch.eye(16)[14]
    mirrored = torch.cat([certain, vague.expand(6, 16)])
    mirror = torch.arange(16).view(4, 4).flip(1).flatten()
    backbone = Scripted(ours, mirrored[mirror])
    data = mosaics(tmp_path / 'data', 1)
    scores = small().run(extractor(backbone), data, tmp_path).metrics
    assert scores['accuracy_top10'] == 1 and scores['distance_tokens_top10'] == 0
    # tokens 10 to 15; of equals the first one: right of the middle in view 2's row 2,
    # where tokens 10 and 11 of view 1 stand mirrored, is column 0
    true = [(2, 1), (2, 0), (3, 3), (3, 2), (3, 1), (3, 0)]
    away = [math.dist(place, (2, 0)) for place in true]
    assert scores['accuracy_all'] == pytest.approx(11 / 16)
    assert scores['distance_tokens_all'] == pytest.approx(sum(away) / 16)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32))
def test_matches_are_those_of_a_loop(h, w, batch, seed):
    g = torch.Generator().manual_seed(seed)
    ours, theirs = (
        torch.randn(batch, h * w, 3, generator=g, dtype=torch.float64) for _ in range(2)
    )
    found = match_mirrored(ours, theirs, (h, w))
    for b in range(batch):
        for token in range(h * w):
            cosines = [
                float(ours[b, token] @ each / ours[b, token].norm() / each.norm())
                for each in theirs[b]
            ]
            best = int(np.argmax(cosines))
            row, column = divmod(token, w)
            true = row, w - 1 - column
            assert found.index[b, token] == best
            assert found.similarity[b, token].item() == pytest.approx(cosines[best])
            expected = math.dist(divmod(best, w), true)
            assert found.distance[b, token].item() == pytest.approx(expected)


def test_views_are_the_centre_and_its_mirror_image_in_grey(tmp_path):
    (path,) = DemoScenes(size=64).write_folder(tmp_path, range(1))
    crops = CentreCrops([path], 48, 32)
    first, second = Correspondence(jitter=(0, 0, 0, 0)).views(crops, 0)
    assert first.shape == second.shape == (32, 32, 3)
    np.testing.assert_array_equal(first, crops[0].permute(1, 2, 0))
    grey = cv2.cvtColor(first, cv2.COLOR_RGB2GRAY)[:, ::-1]
    np.testing.assert_array_equal(second, np.stack([grey] * 3, -1))
    jittered = [Correspondence(seed=seed).views(crops, 0)[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(jittered[0], jittered[1])
    assert not np.array_equal(jittered[0], jittered[2])
    assert not np.array_equal(jittered[0], second)
    assert (jittered[0] == jittered[0][..., :1]).all()  # still grey


def test_some_pictures_stand_for_all(tmp_path):
    data = mosaics(tmp_path / 'data', 10)
    seen = []

    class Spy(Correspondence):
        def views(self, crops, index):
            seen.append(crops.paths[index][-7:-4])
            return super().views(crops, index)

    scores = Spy(resize=32, crop=32, max_pictures=4).run(
        extractor(Ranks()), data, tmp_path
    )
    assert scores.settings['num_pictures'] == 4
    assert seen == ['000', '004', '001', '005']  # of 0, 2, .. 8, 1, 3, .. 9


@pytest.mark.parametrize(
    ('options', 'make', 'words'),
    [
        ({}, None, 'no folder .*data; give'),
        ({}, 'empty', 'no picture below .*data; give'),
        (dict(crop=28), 'full', '28x28 px do not divide into patches of 8 px'),
        (dict(crop=40), 'full', 'crop=40 px of pictures resized to 32'),
    ],
)
def test_wrong_data_end_in_one_line(tmp_path, options, make, words):
    data = tmp_path / 'data'
    if make:
        data.mkdir()
        (data / 'note.txt').write_text('no picture')
    if make == 'full':
        mosaics(data, 2)
    with pytest.raises(DenseSSLError, match=words) as error:
        Correspondence(**dict(resize=32, crop=32) | options).run(
            extractor(Ranks()), data, tmp_path
        )
    assert '\n' not in str(error.value)


def test_wrong_settings_and_features_end_in_one_line(tmp_path):
    with pytest.raises(DenseSSLError, match='top=0 is too small; give 1 or more'):
        Correspondence(top=0)
    data = mosaics(tmp_path / 'data', 1)
    with pytest.raises(DenseSSLError, match='features are not finite'):
        small().run(extractor(Noise(math.nan)), data, tmp_path)


def test_the_config_has_the_defaults():
    cfg = Config.fromfile(ROOT / 'configs/evaluation/correspondence.py')
    assert EVALUATORS.build(cfg.protocol) == Correspondence()
