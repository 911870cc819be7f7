from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from densessl.errors import DenseSSLError
from densessl.evaluation.features import (
    FeatureExtractor,
    channel_moments,
    labelled_batches,
)
from densessl.models.features import Tokens

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)


class PatchMeans(nn.Module):
    """Tokens are the mean colours of the patches, through a linear layer and a BN."""

    patch_size = 4
    embed_dims = 3

    def __init__(self, cls: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.frozen = nn.BatchNorm1d(3)
        self.cls = cls
        self.seen = []

    def forward(self, images):
        self.seen.append((len(images), self.training, torch.is_grad_enabled()))
        maps = nn.functional.avg_pool2d(images, self.patch_size)
        patches = self.linear(maps.flatten(2).mT)
        self.frozen(patches.flatten(0, 1).float())
        cls = patches.mean(1) if self.cls else None
        return Tokens(patches, tuple(maps.shape[2:]), cls)


def _images(n=5, height=8, width=12):
    pixels = np.random.default_rng(0).integers(0, 256, (n, height, width, 3))
    return torch.from_numpy(pixels.astype(np.uint8))


def test_tokens_are_those_of_normalised_pixels():
    images = _images()
    tokens = FeatureExtractor(PatchMeans(cls=True), MEAN, STD)(images)
    pixels = (images.numpy() - np.array(MEAN)) / np.array(STD)
    means = pixels.reshape(5, 2, 4, 3, 4, 3).mean((2, 4)).reshape(5, 6, 3)
    assert tokens.grid == (2, 3)
    np.testing.assert_allclose(tokens.patches, means, atol=1e-5)
    np.testing.assert_allclose(tokens.cls, means.mean(1), atol=1e-5)


@pytest.mark.parametrize('batch_size', [1, 2, 5, 64])
def test_batches_and_channel_order_do_not_matter(batch_size):
    images, backbone = _images(), PatchMeans()
    whole = FeatureExtractor(PatchMeans(), MEAN, STD)(images).patches
    extractor = FeatureExtractor(backbone, MEAN, STD, batch_size=batch_size)
    patches = extractor(images.permute(0, 3, 1, 2)).patches
    torch.testing.assert_close(patches, whole)
    assert [n for n, _, _ in backbone.seen] == [
        min(batch_size, 5 - start) for start in range(0, 5, batch_size)
    ]


def test_backbone_is_left_as_it_was():
    backbone = PatchMeans()
    backbone.train()
    backbone.frozen.eval()  # a part that its owner keeps in evaluation mode
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    tokens = FeatureExtractor(backbone, MEAN, STD)(_images())
    assert backbone.seen == [(5, False, False)]
    assert not tokens.patches.requires_grad
    assert backbone.training and backbone.linear.training
    assert not backbone.frozen.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_mode_comes_back_after_a_failure():
    backbone = PatchMeans().train()
    backbone.linear = nn.Linear(7, 7)
    with pytest.raises(RuntimeError):
        FeatureExtractor(backbone, MEAN, STD)(_images())
    assert all(part.training for part in backbone.modules())


def test_fp32_is_fp32_under_autocast_and_bf16_is_not():
    images = _images()
    plain = FeatureExtractor(PatchMeans(), MEAN, STD)(images).patches
    with torch.autocast('cpu', torch.bfloat16):
        inside = FeatureExtractor(PatchMeans(), MEAN, STD)(images).patches
    assert torch.equal(inside, plain)
    rounded = FeatureExtractor(PatchMeans(), MEAN, STD, precision='bf16')(images)
    assert rounded.patches.dtype == torch.float32
    difference = (rounded.patches - plain).abs()
    assert 0 < difference.max() < 2**-7 * plain.abs().max()


@pytest.mark.parametrize(
    ('images', 'found'),
    [
        (_images(height=10), '10x12 px do not divide into patches of 4 px'),
        (_images(width=6), '8x6 px do not divide'),
        (_images().float(), r'torch.float32 \(5, 8, 12, 3\)'),
        (_images()[0], r'torch.uint8 \(8, 12, 3\)'),
        (_images()[..., :2], r'torch.uint8 \(5, 8, 12, 2\)'),
        (_images()[:0], 'no images'),
    ],
)
def test_wrong_images_are_told_in_one_line(images, found):
    with pytest.raises(DenseSSLError, match=found) as caught:
        FeatureExtractor(PatchMeans(), MEAN, STD)(images)
    assert '\n' not in str(caught.value)


def test_wrong_settings_are_told():
    with pytest.raises(DenseSSLError, match='multiply fractions by 255'):
        FeatureExtractor(PatchMeans(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(DenseSSLError, match="precision 'half' is unknown"):
        FeatureExtractor(PatchMeans(), MEAN, STD, precision='half')


def test_moments_are_numpy_s_over_several_chunks():
    patches = torch.randn(130, 6, 4, generator=torch.Generator().manual_seed(0))
    patches = patches * torch.tensor([1e-8, 1.0, 1e6, 0.0]) + 5 * torch.arange(4.0)
    mean, std = channel_moments(patches)
    flat = patches.double().flatten(0, 1).numpy()
    np.testing.assert_allclose(mean, flat.mean(0))
    np.testing.assert_allclose(std[:3], flat.std(0)[:3])
    assert std[3] == 1  # the constant channel


def test_labelled_batches_keep_order_and_labels():
    images = list(_images(5).numpy())
    masks = [np.full((8, 12), label, np.uint16) for label in (0, 1, 2, 300, 65535)]
    batches = list(labelled_batches(zip(images, masks, strict=True), 2, 'training'))
    assert [len(picture) for picture, _ in batches] == [2, 2, 1]
    np.testing.assert_array_equal(torch.cat([p for p, _ in batches]), images)
    np.testing.assert_array_equal(torch.cat([m for _, m in batches]), masks)


def test_labelled_batches_tell_wrong_sizes():
    image, mask = np.zeros((8, 12, 3), np.uint8), np.zeros((8, 12), np.uint8)
    cases = [
        ([(image, mask), (image, mask[:4])], r'sample 1: the mask is \(4, 12\)'),
        ([(image, mask), (image[:4], mask[:4])], r'sample 1: the picture is \(4, 12\)'),
        ([], 'no training samples'),
    ]
    for samples, found in cases:
        with pytest.raises(DenseSSLError, match=found) as caught:
            list(labelled_batches(samples, 1, 'training'))
        assert '\n' not in str(caught.value)
