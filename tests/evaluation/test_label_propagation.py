from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from densessl.evaluation.label_propagation import hard_labels, propagate_labels


def brute_force(query, context, labels, radius, top_k, temperature):
    """One token after the other, against all tokens of all frames."""
    h, w, _ = query.shape
    found = torch.zeros(h, w, labels.shape[-1], dtype=labels.dtype)
    for y in range(h):
        for x in range(w):
            near = [
                (float(query[y, x] @ frame[v, u]), label[v, u])
                for frame, label in zip(context, labels, strict=True)
                for v in range(max(0, y - radius), min(h, y + radius + 1))
                for u in range(max(0, x - radius), min(w, x + radius + 1))
            ]
            last = sorted((c for c, _ in near), reverse=True)[:top_k][-1]
            chosen = [(math.exp(c / temperature), v) for c, v in near if c >= last]
            total = sum(weight for weight, _ in chosen)
            found[y, x] = sum(weight * label for weight, label in chosen) / total
    return found


def features(*shape, exact=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    if exact:  # lengths and cosines are exact, and most of them are equal to others
        return torch.randint(0, 2, (*shape, 4), generator=g).double() - 0.5
    drawn = torch.randn(*shape, 6, generator=g, dtype=torch.float64)
    return nn.functional.normalize(drawn, dim=-1)


@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize(
    ('grid', 'frames', 'radius', 'top_k'),
    [
        ((1, 1), 1, 12, 5),
        ((5, 7), 2, 1, 5),
        ((13, 25), 1, 3, 5),  # several tiles, in both directions
        ((24, 12), 2, 0, 5),  # tiles without a rest; only its own place
        ((14, 13), 2, 50, 1),
        ((6, 14), 2, 2, 1000),  # all of the window
    ],
)
def test_labels_are_those_of_a_dense_comparison(grid, frames, radius, top_k, exact):
    query, context = (
        features(*grid, exact=exact),
        features(frames, *grid, exact=exact, seed=1),
    )
    labels = features(frames, *grid, seed=2).abs()
    found = propagate_labels(query, context, labels, radius=radius, top_k=top_k)
    expected = brute_force(query, context, labels, radius, top_k, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_temperature_and_length_one_are_in_the_weights():
    query = torch.tensor([[[1.0, 0.0]]]).double()
    context = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
    context = context.view(2, 1, 1, 2)
    labels = torch.eye(2).double().view(2, 1, 1, 2)
    for temperature in (0.1, 1.0, 1e-4):
        found = propagate_labels(query, context, labels, temperature=temperature)
        share = 1 / (1 + math.exp(-0.4 / temperature))
        assert found[0, 0, 0].item() == pytest.approx(share, abs=1e-12)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_memory_does_not_grow_with_the_square_of_the_grid():
    sizes = {}
    for width in (48, 192):
        query, context = features(48, width), features(2, 48, width, seed=1)
        labels = context[..., :2].abs()
        with Largest() as largest:
            propagate_labels(query, context, labels, radius=3)
        sizes[width] = largest.numel
    tile = 12 * 12 * 2 * (12 + 2 * 3) ** 2
    assert sizes[48] == sizes[192] == tile < (48 * 48) ** 2 / 10


def test_scores_become_classes_by_rank_within_each_class():
    labels = torch.zeros(2, 4, 3)
    labels[..., 0] = 1
    labels[:, 2, 1] = 0.4  # never above the background, yet the most that class 1 has
    labels[:, 2, 0] = 0.6
    labels[..., 2] = 0.5  # the same everywhere says nothing
    assert hard_labels(labels, (2, 4)).tolist() == [[0, 0, 1, 0]] * 2
    ramp = torch.tensor([0.0, 1.0]).expand(1, 2)
    both = torch.stack([1 - ramp, ramp], -1)
    assert hard_labels(both, (4, 8)).tolist() == [[0] * 4 + [1] * 4] * 4
