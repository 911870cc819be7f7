from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CLASSES, extractor, noise, write_stripes

from densessl.errors import DenseSSLError
from densessl.evaluation import kmeans_segmentation
from densessl.evaluation.kmeans_segmentation import (
    KMeansSegmentation,
    kmeans,
    match_clusters,
    nearest_centre,
    overlaps,
)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _protocol(**options):
    options = dict(classes=CLASSES, size=(32, 48)) | options
    return KMeansSegmentation(**options)


def _least_inertia(points: np.ndarray, num: int) -> float:
    """Over every assignment of the points to clusters."""
    best = np.inf
    for labels in product(range(num), repeat=len(points)):
        groups = [points[np.array(labels) == k] for k in range(num)]
        cost = sum(((g - g.mean(0)) ** 2).sum() for g in groups if len(g))
        best = min(best, cost / len(points))
    return best


@pytest.mark.parametrize('seed', range(4))
def test_kmeans_finds_the_best_of_all_partitions(seed):
    points = torch.randn(8, 2, generator=_rng(seed)) + 100
    centres, inertia = kmeans(points, 3, _rng(), restarts=20)
    assert inertia == pytest.approx(
        _least_inertia(points.double().numpy(), 3), rel=1e-4
    )
    distance = torch.cdist(points, centres).square().amin(1).mean()
    assert distance.item() == pytest.approx(inertia, rel=1e-3)


def test_centres_are_the_means_of_their_tokens():
    points = torch.randn(300, 5, generator=_rng())
    centres, _ = kmeans(points, 7, _rng(1), restarts=1)
    nearest = torch.cdist(points, centres).argmin(1)
    for k in range(7):
        torch.testing.assert_close(points[nearest == k].mean(0), centres[k])


def test_distances_come_in_parts(monkeypatch):
    points, centres = torch.randn(50, 4), torch.randn(6, 4)
    monkeypatch.setattr(kmeans_segmentation, '_ROWS', 7)
    index, distance = nearest_centre(points, centres)
    all_of_them = torch.cdist(points, centres).square()
    torch.testing.assert_close(distance, all_of_them.amin(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(index, all_of_them.argmin(1))
    whole = kmeans(points, 3, _rng(), restarts=1)[0]
    monkeypatch.undo()
    torch.testing.assert_close(kmeans(points, 3, _rng(), restarts=1)[0], whole)


def test_more_restarts_are_no_worse_and_a_seed_decides():
    points = torch.rand(400, 2, generator=_rng())
    inertia = [kmeans(points, 12, _rng(5), restarts=n)[1] for n in (1, 4, 12)]
    assert inertia == sorted(inertia, reverse=True)
    first = kmeans(points, 12, _rng(5), restarts=1)[0]
    assert torch.equal(kmeans(points, 12, _rng(5), restarts=1)[0], first)
    assert not torch.equal(kmeans(points, 12, _rng(6), restarts=1)[0], first)


def test_first_centres_are_drawn_by_squared_distance():
    """From {0, 1, 3} with 0 first: 1 with 1/10 and 3 with 9/10, and so on."""
    points, rng = torch.tensor([[0.0], [1.0], [3.0]]), _rng()
    seconds = {0.0: {1.0: 0.1, 3.0: 0.9}, 1.0: {0.0: 0.2, 3.0: 0.8}}
    drawn = [
        tuple(kmeans_segmentation._plus_plus(points, 2, rng)[:, 0].tolist())
        for _ in range(3000)
    ]
    for first, shares in seconds.items():
        after = [b for a, b in drawn if a == first]
        assert len(after) == pytest.approx(1000, abs=120)
        for second, share in shares.items():
            assert after.count(second) / len(after) == pytest.approx(share, abs=0.05)


def test_first_centres_are_far_from_all_before_them():
    points, rng = torch.tensor([[0.0], [1.0], [3.0], [9.0]]), _rng()
    for _ in range(50):  # a token that was chosen has no weight
        chosen = kmeans_segmentation._plus_plus(points, 4, rng)
        assert len(set(chosen[:, 0].tolist())) == 4


def test_a_cluster_that_lost_its_tokens_starts_again():
    points = torch.tensor([[0.0], [0.0], [1.0], [10.0]])
    labels, distance = torch.tensor([0, 0, 0, 0]), torch.tensor([0.0, 0, 1, 100])
    centres = kmeans_segmentation._means(points, labels, distance, 2)
    torch.testing.assert_close(centres, torch.tensor([[2.75], [10.0]]))


def test_equal_tokens_do_no_harm():
    centres, inertia = kmeans(torch.ones(5, 3), 4, _rng())
    assert inertia == 0 and torch.isfinite(centres).all()


def test_too_few_tokens_are_told():
    with pytest.raises(DenseSSLError, match='3 tokens, 4 clusters'):
        kmeans(torch.randn(3, 2), 4, _rng())
    with pytest.raises(DenseSSLError, match='0 restarts'):
        kmeans(torch.randn(3, 2), 2, _rng(), restarts=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_matching_is_the_best_of_all_permutations(classes, clusters, data):
    cells = st.lists(st.integers(0, 6), min_size=clusters, max_size=clusters)
    rows = st.lists(cells, min_size=classes, max_size=classes)
    counts = np.array(data.draw(rows))
    best = 0.0
    padded = list(range(clusters)) + [None] * classes
    for order in set(permutations(padded, classes)):
        ious = [0.0] * classes
        for c, k in enumerate(order):
            if k is not None and counts[c, k]:
                union = counts[c].sum() + counts[:, k].sum() - counts[c, k]
                ious[c] = counts[c, k] / union
        best = max(best, sum(ious) / classes)
    labels, per_class = match_clusters(torch.from_numpy(counts))
    assert per_class.mean().item() == pytest.approx(best)
    matched = [label for label in labels.tolist() if label != 255]
    assert len(matched) == len(set(matched)) == min(classes, clusters)
    for k, c in enumerate(labels.tolist()):
        if c != 255 and counts[c, k]:
            union = counts[c].sum() + counts[:, k].sum() - counts[c, k]
            assert per_class[c].item() == pytest.approx(counts[c, k] / union)


def test_overlaps_are_those_of_the_loop():
    masks = torch.randint(0, 4, (2, 5, 6), generator=_rng())
    masks[0, 0] = 255
    clusters = torch.randint(0, 3, (2, 5, 6), generator=_rng(1))
    counts = np.zeros((4, 3))
    for c, k in zip(masks.flatten().tolist(), clusters.flatten().tolist(), strict=True):
        if c != 255:
            counts[c, k] += 1
    np.testing.assert_array_equal(overlaps(masks, clusters, (4, 3)), counts)


@pytest.mark.parametrize('options', [{}, dict(normalize=False), dict(max_tokens=60)])
def test_tokens_that_spell_the_label_score_one(tmp_path, options):
    data = write_stripes(tmp_path)
    scores = _protocol(**options).run(extractor(batch_size=4), data, tmp_path / 'out')
    assert scores.metrics.pop('inertia') == pytest.approx(0, abs=1e-6)
    names = ['miou', 'pixel_accuracy', 'iou/red', 'iou/green', 'iou/blue']
    assert scores.metrics == dict.fromkeys(names, 1.0)
    assert scores.settings['num_tokens'] == (60 if 'max_tokens' in options else 6 * 24)
    assert len(scores.pictures) == 6 and scores.pictures[0].is_file()


def test_tokens_that_know_nothing_score_like_chance(tmp_path):
    data = write_stripes(tmp_path, noise, val=40)
    metrics = _protocol().run(extractor(), data, tmp_path).metrics
    assert metrics['pixel_accuracy'] == pytest.approx(1 / 3, abs=0.06)
    assert metrics['miou'] == pytest.approx(1 / 5, abs=0.04)


def test_more_and_fewer_clusters_than_classes(tmp_path):
    data = write_stripes(tmp_path)
    few = _protocol(num_clusters=2).run(extractor(), data, tmp_path).metrics
    # one class alone, the other two together: 1, 1/2 and none
    assert few['miou'] == pytest.approx((1 + 0.5 + 0) / 3)
    assert few['pixel_accuracy'] == pytest.approx(2 / 3)
    noisy = write_stripes(tmp_path / 'noise', noise)
    many = _protocol(num_clusters=12).run(extractor(), noisy, tmp_path).metrics
    assert many['pixel_accuracy'] < 0.3  # nine clusters are wrong


def test_seed_alone_decides(tmp_path):
    data = write_stripes(tmp_path, noise)
    runs = [
        _protocol(seed=seed, restarts=1, max_tokens=90).run(extractor(), data, tmp_path)
        for seed in (0, 0, 1)
    ]
    assert runs[0].metrics == runs[1].metrics != runs[2].metrics


def test_wrong_data_is_told_in_one_line(tmp_path):
    data = write_stripes(tmp_path)
    for options, found in (
        (dict(num_clusters=1000), '144 tokens, 1000 clusters'),
        (dict(classes=4), 'val masks .*: no pixel of class 3'),
        (dict(val_split='test'), 'images/test: no such folder'),
    ):
        with pytest.raises(DenseSSLError, match=found) as caught:
            _protocol(**options).run(extractor(), data, tmp_path)
        assert '\n' not in str(caught.value)
