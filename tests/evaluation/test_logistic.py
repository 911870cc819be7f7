"""Logistic regression, its strength and its scores, beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densessl.evaluation.logistic import STRENGTHS, fit_logistic, search_strength
from densessl.evaluation.scores import accuracy, map_11_point, mean_per_class, roc_auc


def problem(num_classes, total=90, dims=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, total)
    centres = rng.normal(size=(num_classes, dims))
    features = centres[labels] + rng.normal(size=(total, dims)) + 7  # off the origin
    return torch.from_numpy(features), torch.from_numpy(labels)


@pytest.mark.parametrize('num_classes', [2, 4])
@pytest.mark.parametrize('strength', [1e-3, 1.0, 1e3])
def test_minimum_is_scikit_learn_s(num_classes, strength):
    linear_model = pytest.importorskip('sklearn.linear_model')
    features, labels = problem(num_classes)
    theirs = linear_model.LogisticRegression(C=strength, tol=1e-10, max_iter=100_000)
    theirs.fit(features.numpy(), labels.numpy())
    ours = fit_logistic(features, labels, strength, num_classes)
    np.testing.assert_allclose(ours.weight.mT, theirs.coef_, rtol=1e-3, atol=1e-5)
    logits = ours(features)
    shown = logits.flatten() if num_classes == 2 else logits - logits.mean(1)[:, None]
    expected = theirs.decision_function(features.numpy())
    if num_classes > 2:
        expected = expected - expected.mean(1)[:, None]  # softmax ignores a shift
    np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-4)
    assert accuracy(logits, labels) == theirs.score(features.numpy(), labels.numpy())


def test_several_labels_are_one_problem_a_class():
    linear_model = pytest.importorskip('sklearn.linear_model')
    features, first = problem(2, seed=1)
    _, second = problem(2, seed=2)
    targets = torch.stack([first, second], 1)
    targets[::7, 1] = -1  # left out for the second class alone
    ours = fit_logistic(features, targets, 0.3, 2)
    for c in range(2):
        kept = targets[:, c] >= 0
        theirs = linear_model.LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000)
        theirs.fit(features[kept].numpy(), targets[kept, c].numpy())
        np.testing.assert_allclose(
            ours.weight[:, c], theirs.coef_[0], rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(ours.bias[c], theirs.intercept_[0], rtol=1e-3)


def test_iterations_are_bounded_and_float32_agrees():
    features, labels = problem(4)
    assert fit_logistic(features, labels, 1.0, 4, max_iterations=3).iterations <= 3
    double = fit_logistic(features, labels, 1.0, 4)
    single = fit_logistic(features.float(), labels, 1.0, 4)
    assert single.weight.dtype == torch.float32
    torch.testing.assert_close(
        single.weight.double(), double.weight, rtol=5e-3, atol=5e-4
    )


@given(st.integers(0, 95))
@settings(max_examples=96)
def test_search_finds_the_peak_and_asks_few(peak):
    asked = []

    def score(strength):
        asked.append(strength)
        return -abs(np.log10(strength) - np.log10(STRENGTHS[peak]))

    best, scores = search_strength(score)
    assert best == STRENGTHS[peak]
    assert len(asked) == len(set(asked)) == len(scores) <= 7 + 2 * 4


def test_search_range_and_ties():
    assert len(STRENGTHS) == 96
    np.testing.assert_allclose(STRENGTHS[[0, -1]], [1e-6, 1e6])
    best, _ = search_strength(lambda strength: 0.5)
    assert best == STRENGTHS[0]  # equals: the most regularised
    best, _ = search_strength(lambda c: float('nan') if c < 1 else -c)
    assert 1 <= best < 1.4


def test_scores_are_scikit_learn_s():
    metrics = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(rng.integers(0, 2, 200))
    logits = torch.from_numpy(rng.normal(size=(200, 1)).round(1))  # many ties
    expected = metrics.roc_auc_score(targets.numpy(), logits[:, 0].numpy())
    assert roc_auc(logits, targets) == pytest.approx(expected)
    targets = torch.from_numpy(rng.integers(0, 5, 300) * 2)  # the odd ones are absent
    logits = torch.from_numpy(rng.normal(size=(300, 10)))
    logits[range(300), targets] += 1
    seen = logits.argmax(1).numpy()
    expected = metrics.recall_score(
        targets.numpy(), seen, labels=[0, 2, 4, 6, 8], average='macro'
    )
    assert mean_per_class(logits, targets) == pytest.approx(expected)
    assert accuracy(logits, targets) == pytest.approx(
        metrics.accuracy_score(targets.numpy(), seen)
    )


def test_map_by_loops():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(40, 3))
    targets = rng.integers(-1, 2, (40, 3))
    targets[:, 2] = 0  # never there: not counted
    expected = []
    for c in range(2):
        kept = [i for i in range(40) if targets[i, c] >= 0]
        kept.sort(key=lambda i: -logits[i, c])
        points, hits = [], 0
        for n, i in enumerate(kept, 1):
            hits += targets[i, c]
            points.append((hits, hits / n))
        levels = [k / 10 for k in range(11)]
        expected += [
            sum(
                max([p for h, p in points if h >= level * hits - 1e-9], default=0)
                for level in levels
            )
            / 11
        ]
    found = map_11_point(torch.from_numpy(logits), torch.from_numpy(targets))
    assert found == pytest.approx(np.mean(expected))


def test_scores_of_one_class_alone():
    ones = torch.ones(4, dtype=torch.int64)
    assert np.isnan(roc_auc(torch.randn(4, 1), ones))
    assert np.isnan(map_11_point(torch.randn(4, 2), torch.zeros(4, 2)))
    assert mean_per_class(torch.ones(4, 1), ones) == 1
