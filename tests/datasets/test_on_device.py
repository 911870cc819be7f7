"""Changes of batches against those of single views, which have tests of their own."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from densessl.datasets.collate import collate_views
from densessl.datasets.transforms import MultiCrop, ViewRecipe
from densessl.datasets.transforms.on_device import augment_views, bells, pack
from densessl.datasets.transforms.photometric import (
    Changes,
    apply_changes,
    draw_changes,
)
from densessl.errors import DenseSSLError
from densessl.models.preprocessor import ViewPreprocessor

NOTHING = Changes((), False, 0.0, None)
ALL = ViewRecipe('a', 40, (0.3, 1.0), count=3, blur=0.6, solarize=0.4, grayscale=0.3)


def photo(seed=0, height=45, width=38):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 5, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    return (image + rng.integers(-20, 21, image.shape)).clip(0, 255).astype(np.uint8)


def as_batch(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous()


def error(changes):
    """Distances of levels from what single views become, one change a picture."""
    images = [photo(seed) for seed in range(len(changes))]
    wanted = [apply_changes(*pair) for pair in zip(images, changes, strict=True)]
    found = augment_views(as_batch(images), pack(changes))
    return (found - as_batch(wanted)).abs().numpy()


@pytest.mark.parametrize(
    ('kind', 'amounts', 'most'),
    [
        (0, (0.0, 0.6, 1.4), 0.501),  # they round to the nearest level
        (1, (0.0, 0.6, 1.4), 0.501),
        (2, (0.0, 0.6, 1.4), 0.88),  # and weights to 1024ths
        (3, (-0.1, 0.03, 0.5), 12.0),  # and hues to 256ths of the circle
    ],
)
def test_jitter_is_that_of_single_views(kind, amounts, most):
    found = error([NOTHING._replace(jitter=((kind, x),)) for x in amounts])
    assert found.max() <= most and found.mean() < 1.2


@pytest.mark.parametrize(
    ('changes', 'most'),
    [
        ([NOTHING._replace(gray=True), NOTHING], 0.51),
        ([NOTHING._replace(sigma=s) for s in (0.1, 0.7, 2.0, 1.3)], 2.0),
        ([NOTHING._replace(threshold=t) for t in (0, 100, 128, 256)], 0.0),
    ],
)
def test_grey_blur_and_inversion_are_those_of_single_views(changes, most):
    assert error(changes).max() <= most


def test_jitters_follow_their_order():
    darker, flatter = (0, 0.5), (1, 0.2)
    for order in ((darker, flatter), (flatter, darker)):
        assert error([NOTHING._replace(jitter=order)]).max() < 1.1
    bright = NOTHING._replace(jitter=((0, 3.0), (1, 0.4)))  # cut off in between
    assert error([bright]).max() < 1.1


def test_a_third_of_a_turn_permutes_channels():
    image = as_batch([photo()])
    turned = augment_views(
        image.clone(), pack([NOTHING._replace(jitter=((3, 1 / 3),))])
    )
    torch.testing.assert_close(turned, image[:, [2, 0, 1]], rtol=0, atol=2e-3)


def test_weights_of_blurs_are_opencvs():
    sigmas = [0.3, 1.0, 2.0]
    for weights, sigma in zip(bells(torch.tensor(sigmas)), sigmas, strict=True):
        size = round(6 * sigma + 1) | 1
        inside = weights[len(weights) // 2 - size // 2 :][:size]
        wanted = cv2.getGaussianKernel(size, sigma)[:, 0]
        np.testing.assert_allclose(inside, wanted, atol=1e-6)
        assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert bells(torch.zeros(2)).tolist() == [[1.0], [1.0]]


def test_views_do_not_see_each_other():
    rng = np.random.default_rng(0)
    changes = [draw_changes(ALL, rng) for _ in range(12)]
    images = as_batch([photo(seed) for seed in range(12)])
    together = augment_views(images.clone(), pack(changes))
    alone = [augment_views(images[[i]].clone(), pack([changes[i]])) for i in range(12)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-3)


def test_nothing_drawn_is_nothing_done():
    images = as_batch([photo(), photo(1)])
    found = augment_views(images.clone(), pack([NOTHING, NOTHING]))
    assert torch.equal(found, images)


def batch(augment_on):
    crop = MultiCrop(
        [ALL, ViewRecipe('b', 24, (0.1, 0.4), count=2)], augment_on=augment_on
    )
    samples = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        results = crop({'img': photo(seed, 90, 120), 'rng': rng, 'path': str(seed)})
        samples.append(results)
    return collate_views(samples)


def test_pipeline_gives_the_same_views():
    here, later = batch('worker'), batch('device')
    assert 'changes' not in here
    assert {role: x.shape for role, x in later['changes'].items()} == {
        'a': (4, 3, 11),
        'b': (4, 2, 11),
    }
    assert torch.equal(here['geometry'].box, later['geometry'].box)
    assert torch.equal(here['geometry'].flip, later['geometry'].flip)
    preprocess = ViewPreprocessor(mean=(0, 0, 0), std=(1, 1, 1))
    raw = {role: views.clone() for role, views in later['inputs'].items()}
    wanted, found = preprocess(here)['inputs'], preprocess(later)['inputs']
    for role, views in found.items():
        assert views.is_contiguous() and views.shape == wanted[role].shape
        apart = (views - wanted[role]).abs()
        # A level that rounding puts on the other side of 128 is inverted or is not.
        assert apart.mean() < 1.0 and apart.flatten().quantile(0.98) < 6
        assert (wanted[role] - raw[role].transpose(0, 1)).abs().mean() > 10
        assert torch.equal(later['inputs'][role], raw[role])  # the batch is left alone


def test_bad_choices():
    with pytest.raises(DenseSSLError, match="augment_on='gpu'; give 'worker' or"):
        MultiCrop([ALL], augment_on='gpu')
    grey = {'img': photo()[..., :1], 'rng': np.random.default_rng(0), 'path': 'g.png'}
    with pytest.raises(DenseSSLError, match=r"'g\.png' has 1 channels of 8 bits"):
        MultiCrop([ALL], augment_on='device')(grey)
