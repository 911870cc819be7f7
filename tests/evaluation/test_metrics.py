from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densessl.errors import DenseSSLError
from densessl.evaluation.metrics import confusion_matrix, mean_iou, pixel_accuracy

NUM_CLASSES = 5


def _maps(seed: int, ignored: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    present = rng.permutation(NUM_CLASSES)[: rng.integers(1, NUM_CLASSES + 1)]
    pred, target = rng.choice(present, (2, 3, 6, 7)).astype(np.uint8)
    target[rng.random(target.shape) < ignored] = 255
    return torch.from_numpy(pred), torch.from_numpy(target)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_scores_equal_those_of_pixel_sets(seed):
    pred, target = _maps(seed)
    pairs = [
        (i, p, t)
        for i, (p, t) in enumerate(
            zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True)
        )
        if t != 255
    ]
    confusion = confusion_matrix(pred, target, NUM_CLASSES)
    ious = []
    for c in range(NUM_CLASSES):
        said = {i for i, p, _ in pairs if p == c}
        true = {i for i, _, t in pairs if t == c}
        ious.append(len(said & true) / len(said | true) if said | true else math.nan)
        for other in range(NUM_CLASSES):
            both = sum(1 for _, p, t in pairs if t == c and p == other)
            assert confusion[c, other] == both
    miou, per_class = mean_iou(confusion)
    np.testing.assert_allclose(per_class, ious)
    present = [iou for iou in ious if not math.isnan(iou)]
    np.testing.assert_allclose(miou, np.mean(present) if present else math.nan)
    right = np.mean([p == t for _, p, t in pairs]) if pairs else math.nan
    np.testing.assert_allclose(pixel_accuracy(confusion), right)


def test_halves_by_hand():
    # 4 pixels of class 0, all found, and 2 of class 1 called 0: IoU 4/6 and 0/2;
    # class 2 is nowhere and is left out of the mean.
    pred = torch.zeros(6, dtype=torch.long)
    target = torch.tensor([0, 0, 0, 0, 1, 1])
    miou, per_class = mean_iou(confusion_matrix(pred, target, 3))
    assert per_class[:2].tolist() == [4 / 6, 0.0]
    assert per_class[2].isnan()
    assert miou == pytest.approx(1 / 3)


def test_a_class_only_predicted_counts_as_missed():
    pred, target = torch.tensor([0, 1]), torch.tensor([0, 0])
    miou, _ = mean_iou(confusion_matrix(pred, target, 2))
    assert miou == pytest.approx((1 / 2 + 0) / 2)


def test_matrices_of_pictures_add_up():
    pred, target = _maps(1)
    parts = [
        confusion_matrix(p, t, NUM_CLASSES) for p, t in zip(pred, target, strict=True)
    ]
    assert torch.equal(sum(parts), confusion_matrix(pred, target, NUM_CLASSES))


def test_no_labelled_pixel_has_no_score():
    nothing = confusion_matrix(torch.tensor([1]), torch.tensor([255]), 2)
    assert nothing.sum() == 0
    assert math.isnan(mean_iou(nothing)[0])


def test_prediction_under_ignored_pixels_does_not_count():
    pred, target = _maps(2)
    other = torch.where(target == 255, (pred + 1) % NUM_CLASSES, pred)
    assert not torch.equal(pred, other)
    assert torch.equal(
        confusion_matrix(pred, target, NUM_CLASSES),
        confusion_matrix(other, target, NUM_CLASSES),
    )


def test_bytes_neither_wrap_at_256_classes_nor_at_minus_one():
    labels = torch.tensor([0, 254, 255], dtype=torch.uint8)
    confusion = confusion_matrix(labels, labels, 256, ignore_index=-1)
    assert confusion.diagonal()[[0, 254, 255]].tolist() == [1, 1, 1]
    assert confusion.sum() == 3


@pytest.mark.parametrize(
    ('pred', 'target', 'found'),
    [
        ([0, 1], [0, 7], r'value 7 is outside 0\.\.2 \(and 255, ignored\)'),
        ([0, 1], [0, -1], r'value -1 is outside 0\.\.2'),
        ([0, 3], [0, 1], r'value 3 is outside 0\.\.2;'),
        ([0, 1], [0, 1, 2], r'\(2,\) and target \(3,\)'),
        ([0, 1], [0.0, 1.0], r'torch.float32 is not an integer'),
    ],
)
def test_wrong_labels_are_told_in_one_line(pred, target, found):
    with pytest.raises(DenseSSLError, match=found) as caught:
        confusion_matrix(torch.tensor(pred), torch.tensor(target), 3)
    assert '\n' not in str(caught.value)
