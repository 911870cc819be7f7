"""Views of ours and of torchvision's, operation by operation, as distributions.

Each side makes many views of one picture by its own random numbers. Compared are the
mean and the variance over a view's pixels, how far its colours are from grey, and the
histogram of its levels: their means over all views within 4.5 standard errors, and
their spreads within a ninth. torchvision works on floats here, as it cuts decimals off
on bytes.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from densessl.datasets.transforms import ViewRecipe
from densessl.datasets.transforms.on_device import augment_views, pack
from densessl.datasets.transforms.photometric import augment, draw_changes

COUNT, SIDE, BINS = 1500, 24, 16
# In levels, as a share of the picture's own, in levels, in shares of all samples.
ROUNDING = {'mean': 0.2, 'variance': 0.01, 'colour': 0.2, 'histogram': 0.004}
OFF = dict.fromkeys(('jitter', 'grayscale', 'blur', 'solarize'), 0.0)
SIGMA = (0.5, 2.0)
OPERATIONS = {
    'brightness': {'jitter': 0.8, 'jitter_strength': (0.4, 0, 0, 0)},
    'contrast': {'jitter': 0.8, 'jitter_strength': (0, 0.4, 0, 0)},
    'saturation': {'jitter': 0.8, 'jitter_strength': (0, 0, 0.4, 0)},
    'hue': {'jitter': 0.8, 'jitter_strength': (0, 0, 0, 0.1)},
    'jitter': {'jitter': 0.8},
    'grayscale': {'grayscale': 0.2},
    'blur': {'blur': 0.5, 'blur_sigma': SIGMA},
    'solarize': {'solarize': 0.2},
    'all': {
        'jitter': 0.8,
        'grayscale': 0.2,
        'blur': 0.5,
        'blur_sigma': SIGMA,
        'solarize': 0.2,
    },
}


def picture():
    """Colours of all levels; the edges lie inside, as blurs differ at the border."""
    coarse = np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8)
    smooth = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    smooth[9:15, 9:15] = 255 - smooth[9:15, 9:15]
    return smooth


def recipe(**options):
    return ViewRecipe('view', SIDE, (0.5, 1.0), **{**OFF, **options})


def in_worker(options):
    rng = np.random.default_rng(0)
    return np.stack([augment(picture(), recipe(**options), rng) for _ in range(COUNT)])


def on_device(options):
    rng = np.random.default_rng(0)
    changes = pack([draw_changes(recipe(**options), rng) for _ in range(COUNT)])
    views = torch.from_numpy(picture()).permute(2, 0, 1).float()
    views = augment_views(views.repeat(COUNT, 1, 1, 1), changes)
    return views.round().permute(0, 2, 3, 1).numpy()


def by_torchvision(options):
    T = pytest.importorskip('torchvision.transforms')
    view = recipe(**options)
    steps = T.Compose(
        [
            T.RandomApply([T.ColorJitter(*view.jitter_strength)], p=view.jitter),
            T.RandomGrayscale(view.grayscale),
            T.RandomApply([T.GaussianBlur(17, view.blur_sigma)], p=view.blur),
            T.RandomSolarize(127.5 / 255, p=view.solarize),
        ]
    )
    image = torch.from_numpy(picture()).permute(2, 0, 1) / 255
    with torch.random.fork_rng():
        torch.manual_seed(0)
        views = torch.stack([steps(image) for _ in range(COUNT)])
    return (255 * views).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()


def statistics(views):
    """Of each view: channels' means and variances, colourfulness, shares of levels."""
    pixels = views.reshape(COUNT, -1, 3).astype(float)
    edges = np.linspace(0, 256, BINS + 1)
    return {
        'mean': pixels.mean(1),
        'variance': pixels.var(1) / picture().var(),
        'colour': pixels.std(2).mean(1),
        'histogram': np.stack([np.histogram(p, edges)[0] / p.size for p in pixels]),
    }


def excess(ours, theirs):
    """How far apart the means over views are, beyond 4.5 standard errors and rounding.

    And how far apart the spreads over views, beyond a ninth, where there is any.
    """
    ours, theirs = statistics(ours), statistics(theirs)
    found = []
    for name, rounding in ROUNDING.items():
        a, b = ours[name], theirs[name]
        error = np.sqrt((a.var(0) + b.var(0)) / COUNT)
        found.append((np.abs(a.mean(0) - b.mean(0)) - 4.5 * error - rounding).max())
        spread = a.std(0).mean(), b.std(0).mean()
        found.append(abs(spread[0] - spread[1]) - max(spread) / 9 - rounding)
    return max(found)


@pytest.mark.parametrize('make_views', [in_worker, on_device])
@pytest.mark.parametrize('name', OPERATIONS)
def test_each_operation_has_torchvisions_statistics(name, make_views):
    options = OPERATIONS[name]
    assert excess(make_views(options), by_torchvision(options)) <= 0


@pytest.mark.parametrize(
    ('name', 'change'),
    [
        ('brightness', {'jitter_strength': (0.6, 0, 0, 0)}),
        ('contrast', {'jitter_strength': (0, 0.6, 0, 0)}),
        ('saturation', {'jitter_strength': (0, 0, 0.6, 0)}),
        ('hue', {'jitter_strength': (0, 0, 0, 0.15)}),
        ('grayscale', {'grayscale': 0.3}),
        ('blur', {'blur_sigma': (0.5, 3.0)}),
        ('solarize', {'solarize_threshold': 100}),
        ('all', {'jitter': 0.5}),
    ],
)
def test_the_comparison_notices(name, change):
    changed = {**OPERATIONS[name], **change}
    assert excess(in_worker(changed), by_torchvision(OPERATIONS[name])) > 0
