from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import extractor

from densessl.errors import DenseSSLError
from densessl.evaluation.training_features import (
    KeptFeatures,
    StreamedFeatures,
    resize_nearest,
    training_features,
)


def _samples(num=7):
    """Pictures that grow brighter, so that batches differ; one channel is constant."""
    rng = np.random.default_rng(0)
    for i in range(num):
        image = rng.integers(30 * i, 30 * i + 40, (16, 24, 3)).astype(np.uint8)
        image[..., 2] = 77
        yield image, rng.integers(0, 5, (16, 24)).astype(np.uint8)


def _features(cache, **options):
    frozen = extractor(batch_size=3)
    return training_features(frozen, list(_samples()), (4, 6), cache, **options)


def test_streamed_features_are_the_kept_ones():
    kept, streamed = _features('fp32'), _features('none')
    assert isinstance(kept, KeptFeatures) and isinstance(streamed, StreamedFeatures)
    chosen = torch.tensor([5, 0, 3, 3])
    torch.testing.assert_close(streamed.patches(chosen), kept.patches(chosen))
    assert torch.equal(streamed.labels, kept.labels)
    assert streamed.grid == kept.grid == (2, 3)


@pytest.mark.parametrize('cache', ['fp32', 'none'])
def test_moments_are_those_of_all_tokens(cache):
    features = _features(cache)
    patches = np.stack([image for image, _ in _samples()]) / 255
    patches = patches.reshape(7, 2, 8, 3, 8, 3).mean((2, 4)).reshape(-1, 3)
    np.testing.assert_allclose(features.shift, patches.mean(0), rtol=1e-5)
    np.testing.assert_allclose(features.scale[:2], patches.std(0)[:2], rtol=1e-5)
    assert features.scale[2] == 1  # constant up to rounding


def test_half_precision_is_kept_in_half():
    kept = _features('fp16')
    assert kept.tokens.dtype == torch.float16
    assert kept.tokens.shape == (7, 6, 3)


def test_labels_are_shrunk_after_they_were_checked():
    seen = []
    features = _features('fp32', check=seen.append)
    masks = torch.from_numpy(np.stack([mask for _, mask in _samples()]))
    assert torch.equal(torch.cat(seen), masks)
    assert torch.equal(features.labels, resize_nearest(masks, (4, 6)))


def test_wrong_input_is_told_in_one_line():
    with pytest.raises(DenseSSLError, match="cache 'gpu' is unknown"):
        _features('gpu')
    frozen = extractor(batch_size=2)
    frozen.backbone.gain = torch.nan
    for cache in ('fp32', 'none'):
        with pytest.raises(DenseSSLError, match='picture 0 are not finite') as caught:
            training_features(frozen, list(_samples()), (4, 6), cache)
        assert '\n' not in str(caught.value)
