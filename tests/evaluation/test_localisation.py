from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CLASSES, extractor, noise, stripes, write_split, write_stripes

from densessl.evaluation.localisation import (
    Localisation,
    average_precision,
    take_best_label,
)
from densessl.evaluation.metrics import confusion_matrix

HEAD = dict(epochs=10, batch_size=5, lr=1.0, train_mask_size=24)


def _run(data, out):
    return Localisation(classes=CLASSES, size=(32, 48), head=HEAD).run(
        extractor(), data, out
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_masks_take_the_label_they_overlap_best(seed):
    rng = np.random.default_rng(seed)
    truth, pred = rng.integers(0, 4, (2, 3, 12))
    truth[rng.random(truth.shape) < 0.1] = 255
    expected = np.zeros((3, 4, 4))
    for picture in range(3):
        counted = truth[picture] != 255
        for p in range(4):
            mask = (pred[picture] == p) & counted
            ious = []
            for t in range(4):
                true = truth[picture] == t
                union = (mask | true).sum()
                ious.append((mask & true).sum() / union if union else 0.0)
            for t in range(4):
                overlap = (mask & (truth[picture] == t)).sum()
                expected[picture, t, int(np.argmax(ious))] += overlap
    counts = torch.stack(
        [
            confusion_matrix(torch.from_numpy(p), torch.from_numpy(t), 4)
            for p, t in zip(pred, truth, strict=True)
        ]
    )
    np.testing.assert_array_equal(take_best_label(counts), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_average_precision_is_that_of_the_loop(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (9, 3)) / 5  # with ties
    present = rng.random((9, 3)) < 0.4
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(present))
    for c in range(3):
        expected, recall = 0.0, 0.0
        for threshold in sorted(set(scores[:, c]), reverse=True):
            picked = scores[:, c] >= threshold
            hits = (picked & present[:, c]).sum()
            if present[:, c].any():
                gained = hits / present[:, c].sum() - recall
                expected += gained * hits / picked.sum()
                recall += gained
        if present[:, c].any():
            assert found[c].item() == pytest.approx(expected)
        else:
            assert found[c].isnan()


def test_average_precision_by_hand():
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    present = torch.tensor([[True], [False], [True], [False]])
    assert average_precision(scores, present).item() == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(-scores, present).item() == pytest.approx(
        (1 / 2 + 2 / 4) / 2
    )


def _two_classes(num, seed, names=(0, 1, 2)):
    """Each picture lacks one class, so that a set of labels is worth telling."""
    for i, (image, mask) in enumerate(stripes(num, seed)):
        lacking, other = i % 3, (i + 1) % 3
        image[mask == lacking] = image[mask == other][0]
        mask[mask == lacking] = other
        yield image, np.array(names, np.uint8)[mask]


def test_tokens_that_spell_the_label_score_one(tmp_path):
    write_split(tmp_path, 'train', _two_classes(24, 0))
    write_split(tmp_path, 'val', _two_classes(6, 1))
    scores = _run(tmp_path, tmp_path / 'out')
    assert set(scores.metrics.values()) == {1.0}
    assert list(scores.metrics)[:3] == [
        'localisation_miou',
        'classification_map',
        'miou',
    ]
    assert {'localisation_iou/red', 'ap/blue'} <= set(scores.metrics)
    assert len(scores.pictures) == 6


def test_wrong_names_cost_classification_but_not_localisation(tmp_path):
    write_split(tmp_path, 'train', _two_classes(24, 0))
    write_split(tmp_path, 'val', _two_classes(6, 1, names=(1, 2, 0)))
    metrics = _run(tmp_path, tmp_path).metrics
    assert metrics['localisation_miou'] == 1.0
    assert metrics['miou'] == 0.0
    # each class is absent where it is predicted with certainty in two of six pictures
    assert metrics['classification_map'] < 0.7


def test_tokens_that_know_nothing_score_like_chance(tmp_path):
    write_split(tmp_path, 'train', noise(40, 0))
    labels = [mask for _, mask in _two_classes(60, 1)]
    pictures = [image for image, _ in noise(60, 1)]
    write_split(tmp_path, 'val', zip(pictures, labels, strict=True))
    metrics = _run(tmp_path, tmp_path).metrics
    assert metrics['classification_map'] == pytest.approx(2 / 3, abs=0.12)
    assert metrics['localisation_miou'] < 0.5


def test_plain_miou_is_the_protocol_s(tmp_path):
    from densessl.evaluation.segmentation_protocol import LinearSegmentationProtocol

    data = write_stripes(tmp_path, noise)
    plain = LinearSegmentationProtocol(classes=CLASSES, size=(32, 48), head=HEAD)
    scores = plain.run(extractor(), data, tmp_path)
    assert _run(data, tmp_path).metrics['miou'] == scores.metrics['miou']
