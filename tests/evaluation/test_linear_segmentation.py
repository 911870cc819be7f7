from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from densessl.errors import DenseSSLError
from densessl.evaluation.features import FeatureExtractor
from densessl.evaluation.linear_segmentation import (
    LinearSegmentation,
    linear_segmentation,
    resize_bilinear,
    resize_nearest,
)
from densessl.evaluation.metrics import mean_iou
from densessl.models.features import Tokens

GRID = (4, 6)


class Colours(nn.Module):
    """Tokens are the mean colours of 8 px patches: a red patch is (1, 0, 0)."""

    patch_size = 8
    embed_dims = 3

    def forward(self, images):
        maps = F.avg_pool2d(images, 8)
        return Tokens(maps.flatten(2).mT, tuple(maps.shape[2:]))


def _extractor(**options):
    return FeatureExtractor(Colours(), (0, 0, 0), (255, 255, 255), **options)


def _stripes(num, seed, ignored=()):
    """Pictures with one class, and one pure colour, per column of patches."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        classes = rng.permutation([0, 1, 2, 0, 1, 2])
        mask = np.tile(classes.repeat(8), (32, 1)).astype(np.uint8)
        image = (np.eye(3)[mask] * 255).astype(np.uint8)
        mask[list(ignored)] = 255
        yield image, mask


def _planted(num=12, width=5, num_classes=3, seed=0):
    """Gaussian tokens and masks whose pixels are a noisy function of the tokens."""
    gen = torch.Generator().manual_seed(seed)
    patches = torch.randn(num, GRID[0] * GRID[1], width, generator=gen)
    labels = (patches + torch.randn(patches.shape, generator=gen))[..., :num_classes]
    masks = labels.argmax(2).view(num, *GRID)
    masks = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return Tokens(patches, GRID), masks.to(torch.uint8)


def _same(a, b):
    return all(
        torch.equal(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(a)
    )


def test_tokens_that_spell_the_label_score_one():
    result = linear_segmentation(_extractor(), _stripes(60, 0), _stripes(20, 1), 4)
    assert result.miou == 1.0
    assert result.pixel_accuracy == 1.0
    assert result.per_class[:3] == (1.0, 1.0, 1.0)
    assert np.isnan(result.per_class[3])  # the fourth class never occurs
    assert result.settings['num_train'] == 60
    assert result.settings['num_val'] == 20
    assert result.settings['val_size'] == (32, 48)
    assert result.settings['grid'] == (4, 6)
    assert result.settings['epochs'] == 25


def test_tokens_that_know_nothing_score_like_the_majority():
    gen = torch.Generator().manual_seed(0)
    patches = torch.randn(150, 24, 8, generator=gen)
    share = torch.tensor([0.7, 0.2, 0.1])
    masks = torch.multinomial(share, 150 * 24, replacement=True, generator=gen)
    masks = masks.view(150, *GRID)
    protocol = LinearSegmentation(3, batch_size=20, lr=0.03, train_mask_size=12)
    classifier = protocol.fit(Tokens(patches[:100], GRID), masks[:100])
    confusion = protocol.evaluate(classifier, Tokens(patches[100:], GRID), masks[100:])
    majority = (masks[100:] == 0).double().mean().item()
    miou, per_class = mean_iou(confusion)
    assert per_class[0] == pytest.approx(majority, abs=0.02)
    assert miou == pytest.approx(majority / 3, abs=0.02)


def test_training_is_sgd_written_out():
    """Full-batch steps with gradients of the mean cross-entropy, in NumPy float64."""
    features, masks = _planted(num=7)
    protocol = LinearSegmentation(
        3, epochs=10, batch_size=30, lr=0.4, weight_decay=0.01, train_mask_size=9
    )
    classifier = protocol.fit(features, masks)

    x = features.patches.double().numpy()
    x = (x - x.mean((0, 1))) / x.std((0, 1))
    maps = torch.from_numpy(x).mT.unflatten(2, GRID)
    pixels = F.interpolate(maps, (9, 9), mode='bilinear').movedim(1, 3).flatten(0, 2)
    pixels = np.concatenate([pixels.numpy(), np.ones((len(pixels), 1))], 1)
    labels = F.interpolate(masks[:, None], (9, 9), mode='nearest-exact').flatten()
    onehot = np.eye(3)[labels.numpy()]
    weight, speed = np.zeros((6, 3)), np.zeros((6, 3))
    for epoch in range(10):
        scores = np.exp(pixels @ weight)
        probs = scores / scores.sum(1, keepdims=True)
        gradient = pixels.T @ (probs - onehot) / len(pixels) + 0.01 * weight
        speed = 0.9 * speed + gradient
        weight = weight - 0.4 * 30 / 60 * (1.0 if epoch < 8 else 0.1) * speed
    np.testing.assert_allclose(classifier.weight, weight[:-1], atol=1e-5)
    np.testing.assert_allclose(classifier.bias, weight[-1], atol=1e-5)


def test_seed_alone_decides():
    features, masks = _planted()
    protocol = LinearSegmentation(3, epochs=3, batch_size=5, train_mask_size=16)
    state = torch.get_rng_state()
    first = protocol.fit(features, masks)
    torch.rand(3)
    with torch.no_grad():  # as a hook may call it
        assert _same(first, protocol.fit(features, masks))
    torch.set_rng_state(state)
    protocol.fit(features, masks)
    assert torch.equal(torch.get_rng_state(), state)  # nobody's dice are touched
    other = dataclasses.replace(protocol, seed=1).fit(features, masks)
    assert not _same(first, other)


def test_scale_and_offset_of_a_channel_do_not_matter_when_standardised():
    features, masks = _planted()
    factors = 2.0 ** torch.tensor([-30, 0, 3, 20, -7])
    moved = Tokens(features.patches * factors, GRID)
    shifted = Tokens(features.patches + torch.tensor([0, -3, 50, 7, 0.5]), GRID)
    protocol = LinearSegmentation(3, train_mask_size=20, batch_size=4)
    plain = protocol.fit(features, masks)
    weight = plain.weight
    torch.testing.assert_close(protocol.fit(moved, masks).weight, weight)
    torch.testing.assert_close(
        protocol.fit(shifted, masks).weight, weight, rtol=1e-3, atol=1e-4
    )
    bare = dataclasses.replace(protocol, standardize=False)
    assert not torch.allclose(bare.fit(features, masks).weight, weight, rtol=1e-3)


def test_ignored_pixels_are_ignored_in_training():
    features, masks = _planted()
    masks[:, :16] = 255  # rows 0 and 1 of the patches; row 1 touches row 2 by bilinear
    other = features.patches.clone().view(12, *GRID, 5)
    other[:, 0] = 99.0
    other = Tokens(other.flatten(1, 2), GRID)
    protocol = LinearSegmentation(
        3, epochs=4, batch_size=5, train_mask_size=32, standardize=False
    )
    first = protocol.fit(features, masks)
    assert _same(first, protocol.fit(other, masks))
    relabelled = torch.where(masks == 255, 0, masks)
    assert not _same(first, protocol.fit(features, relabelled))


def test_ignored_pixels_are_ignored_in_evaluation():
    trained, spoilt, hidden = list(_stripes(30, 0)), [], []
    for image, mask in _stripes(5, 1):
        image[:8] = 255 - image[:8]  # the first row of patches shows wrong colours,
        spoilt.append((image, mask))  # which reach to pixel row 12 by interpolation
        hidden.append((image, np.where(np.arange(32)[:, None] < 12, 255, mask)))
    assert linear_segmentation(_extractor(), trained, spoilt, 3).miou < 0.9
    assert linear_segmentation(_extractor(), trained, hidden, 3).miou == 1.0


def test_a_batch_without_labels_does_no_harm():
    features, masks = _planted(num=4)
    protocol = LinearSegmentation(3, epochs=2, batch_size=1, train_mask_size=8)
    masks[:3] = 255
    assert torch.isfinite(protocol.fit(features, masks).weight).all()


def test_half_precision_cache_changes_little():
    samples = list(_stripes(30, 0)), list(_stripes(10, 1))
    options = {'epochs': 2, 'train_mask_size': 16}
    full = linear_segmentation(_extractor(), *samples, 3, **options)
    half = linear_segmentation(_extractor(), *samples, 3, cache='fp16', **options)
    assert half.settings['cache'] == 'fp16'
    assert half.miou == pytest.approx(full.miou, abs=0.02)


def test_large_predictions_come_in_parts(monkeypatch):
    features, masks = _planted()
    protocol = LinearSegmentation(3, epochs=2, train_mask_size=8)
    classifier = protocol.fit(features, masks)
    whole = classifier.predict(features, (30, 50))
    module = sys.modules[LinearSegmentation.__module__]
    monkeypatch.setattr(module, '_LOGITS_AT_ONCE', 3 * 30 * 50 * 5)
    assert torch.equal(classifier.predict(features, (30, 50)), whole)
    assert whole.shape == (12, 30, 50)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 40)] * 2))
def test_resizing_equals_torch_s(old, new):
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, *old, generator=gen)
    expected = F.interpolate(logits, new, mode='bilinear', align_corners=False)
    torch.testing.assert_close(resize_bilinear(logits, new), expected)
    masks = torch.randint(0, 200, (2, *old), generator=gen, dtype=torch.uint8)
    resized = resize_nearest(masks, new)
    for y in range(new[0]):
        for x in range(new[1]):
            row = int((y + 0.5) * old[0] / new[0])
            column = int((x + 0.5) * old[1] / new[1])
            assert torch.equal(resized[:, y, x], masks[:, row, column])


def _spoil(samples, index, change):
    samples = list(samples)
    samples[index] = change(*samples[index])
    return samples


@pytest.mark.parametrize(
    ('train', 'val', 'found'),
    [
        (
            _spoil(_stripes(3, 0), 1, lambda image, mask: (image, mask[:8])),
            _stripes(2, 1),
            r'training sample 1: the mask is \(8, 48\) and its picture \(32, 48\)',
        ),
        (
            _spoil(_stripes(3, 0), 2, lambda image, mask: (image, mask + 7)),
            _stripes(2, 1),
            r'value \d is outside 0\.\.2 \(and 255, ignored\)',
        ),
        (
            _stripes(3, 0),
            _spoil(_stripes(3, 0), 0, lambda image, mask: (image, mask / 2)),
            'float64 is not an integer',
        ),
        ([], _stripes(2, 1), 'no training samples'),
        (_stripes(2, 0), [], 'no validation samples'),
        (_stripes(2, 0, range(32)), _stripes(2, 1), 'training masks label no pixel'),
        (_stripes(2, 0), _stripes(2, 1, range(32)), 'validation masks label no pixel'),
    ],
)
def test_wrong_samples_are_told_in_one_line(train, val, found):
    with pytest.raises(DenseSSLError, match=found) as caught:
        linear_segmentation(_extractor(), train, val, 3, epochs=1)
    assert '\n' not in str(caught.value)


def test_a_single_wrong_pixel_is_told_although_training_masks_are_small():
    samples = list(_stripes(3, 0))
    samples[1][1][31, 47] = 9
    with pytest.raises(DenseSSLError, match='value 9 is outside'):
        linear_segmentation(
            _extractor(), samples, _stripes(2, 1), 3, epochs=1, train_mask_size=4
        )


def test_features_that_are_not_finite_are_told():
    features, masks = _planted()
    features.patches[4, 2, 1] = torch.inf
    with pytest.raises(DenseSSLError, match='picture 4 are not finite'):
        LinearSegmentation(3).fit(features, masks)
    with pytest.raises(DenseSSLError, match='12 pictures and 11 masks'):
        LinearSegmentation(3).fit(features, masks[1:])
