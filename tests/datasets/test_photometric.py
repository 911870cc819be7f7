from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from densessl.datasets.transforms import ViewRecipe, photometric
from densessl.datasets.transforms.photometric import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment,
    color_jitter,
    gaussian_blur,
    solarize,
    to_grayscale,
)

OFF = {
    'jitter': 0.0,
    'grayscale': 0.0,
    'blur': 0.0,
    'solarize': 0.0,
}


def photo(height=61, width=83):
    """Smooth areas, edges and noise, all levels."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    noise = rng.integers(-20, 21, image.shape)
    return (image.astype(int) + noise).clip(0, 255).astype(np.uint8)


def recipe(**options):
    return ViewRecipe('view', 32, (0.2, 1.0), **{**OFF, **options})


def draws(count, **options):
    """Views that ``augment`` makes of one picture, by one generator."""
    view, rng = photo(16, 16), np.random.default_rng(0)
    return view, [augment(view, recipe(**options), rng) for _ in range(count)]


def difference(image, reference):
    return np.abs(image.astype(int) - reference.astype(int))


@pytest.fixture
def functional():
    return pytest.importorskip('torchvision.transforms.functional')


def by_tensor(function, image, *args):
    tensor = function(torch.from_numpy(image).permute(2, 0, 1), *args)
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize('factor', [0.0, 0.6, 0.93, 1.0, 1.4, 3.0])
@pytest.mark.parametrize(
    ('ours', 'name', 'levels'),  # torchvision cuts decimals off, twice for saturation
    [
        (adjust_brightness, 'adjust_brightness', 1),
        (adjust_contrast, 'adjust_contrast', 2),
        (adjust_saturation, 'adjust_saturation', 3),
    ],
)
def test_factors_agree_with_torchvision(functional, ours, name, levels, factor):
    reference = by_tensor(getattr(functional, name), photo(), factor)
    assert difference(ours(photo(), factor), reference).max() <= levels


@pytest.mark.parametrize('shift', [-0.5, -0.1, -0.03, 0.0, 0.02, 0.1])
def test_hue_agrees_with_torchvision(functional, shift):
    # 8-bit hue steps by 1.4 degrees, up to 6 levels of a colour, and is rounded twice.
    found = difference(
        adjust_hue(photo(), shift), by_tensor(functional.adjust_hue, photo(), shift)
    )
    assert found.mean() < 1.2  # Pillow's own: 1.4
    assert found.max() <= 12  # Pillow's own: 16


def test_gray_and_inversion_agree_with_torchvision(functional):
    gray = by_tensor(functional.rgb_to_grayscale, photo(), 3)
    assert difference(to_grayscale(photo()), gray).max() <= 1
    for threshold in (1, 100, 128, 255):
        reference = by_tensor(functional.solarize, photo(), threshold)
        np.testing.assert_array_equal(solarize(photo(), threshold), reference)


@pytest.mark.parametrize('sigma', [0.1, 0.5, 1.0, 2.0])
def test_blur_agrees_with_torchvision_inside(functional, sigma):
    size = 2 * math.ceil(4 * sigma) + 1
    reference = by_tensor(functional.gaussian_blur, photo(), [size] * 2, [sigma] * 2)
    edge = size // 2  # torchvision mirrors at the border, we repeat
    inside = (slice(edge, -edge),) * 2
    found = difference(gaussian_blur(photo(), sigma)[inside], reference[inside])
    assert found.max() <= 2


@pytest.mark.parametrize('sigma', [0.5, 1.0, 2.0])
def test_blur_agrees_with_pillow(sigma):
    # Pillow approximates the bell by three box filters; borders included.
    pillow = Image.fromarray(photo()).filter(ImageFilter.GaussianBlur(sigma))
    found = difference(gaussian_blur(photo(), sigma), np.asarray(pillow))
    assert found.mean() < 1.0


@pytest.mark.parametrize('sigma', [0.3, 1.0, 2.0])
def test_blurred_edge_is_the_error_function(sigma):
    step = np.zeros((5, 40, 3), np.uint8)
    step[:, 20:] = 255
    places = np.arange(40) + 0.5 - 20
    weights = np.exp(-(np.arange(-15, 16) ** 2) / (2 * sigma**2))  # sampled bell
    wanted = [
        255 * sum(w for k, w in zip(range(-15, 16), weights, strict=True) if x + k > 0)
        for x in places
    ] / weights.sum()
    assert np.abs(gaussian_blur(step, sigma)[2, :, 1] - wanted).max() <= 2
    if sigma >= 1:
        bell = [127.5 * (1 + math.erf(x / sigma / math.sqrt(2))) for x in places]
        assert np.abs(gaussian_blur(step, sigma)[2, :, 1] - bell).max() <= 4


def test_closed_forms():
    image = photo()
    gray = image @ [0.299, 0.587, 0.114]
    assert not adjust_brightness(image, 0.0).any()
    wanted = (2.0 * image).clip(0, 255)
    np.testing.assert_array_equal(adjust_brightness(image, 2.0), wanted)
    assert np.abs(adjust_contrast(image, 0.0) - gray.mean()).max() <= 0.51
    assert np.abs(adjust_saturation(image, 0.0) - gray[..., None]).max() <= 0.88
    assert np.abs(to_grayscale(image) - gray[..., None]).max() <= 0.51
    for unchanged in (adjust_brightness, adjust_contrast, adjust_saturation):
        np.testing.assert_array_equal(unchanged(image, 1.0), image)
    np.testing.assert_array_equal(solarize(image), np.minimum(image, 255 - image))
    np.testing.assert_array_equal(solarize(image, 0), 255 - image)
    np.testing.assert_array_equal(solarize(image, 256), image)


@settings(deadline=None, max_examples=100)
@given(
    sigma=st.floats(0.05, 5.0),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_blur_is_that_of_opencv_but_for_ties(sigma, size, seed):
    image = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    border = cv2.BORDER_REPLICATE
    plain = cv2.GaussianBlur(image, (0, 0), sigma, borderType=border).reshape(size)
    found = difference(gaussian_blur(image, sigma), plain)
    assert found.max() <= 1
    # The exact value of such a sample lies in the middle between two levels.
    assert (found > 0).sum() <= 2 + 0.01 * found.size


@pytest.mark.parametrize('factor', [0.0, 0.6, 0.9, 1.1, 1.4, 2.0])
def test_saturation_is_exact_within_its_weights(factor):
    image = photo()
    gray = (image @ [0.299, 0.587, 0.114])[..., None]
    exact = (factor * image + (1 - factor) * gray).clip(0, 255)
    error = np.abs(adjust_saturation(image, factor) - exact)
    assert error.max() <= 0.5 + 3 * 255 * 0.5 / 1024  # weights in 1024ths
    assert abs((adjust_saturation(image, factor) - exact).mean()) < 0.1


def test_hue_turns_by_hand():
    shift = 0.07
    hsv = cv2.cvtColor(photo(), cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(shift * 255)) % 256
    wanted = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    np.testing.assert_array_equal(adjust_hue(photo(), shift), wanted)


@pytest.mark.parametrize('threshold', [0, 1, 99.5, 128, 255, 255.5, 256])
@pytest.mark.parametrize('channels', [1, 2, 3, 5])
def test_inversion_by_a_table(threshold, channels):
    levels = np.arange(256)
    table = np.where(levels < threshold, levels, 255 - levels)
    image = np.random.default_rng(0).integers(0, 256, (9, 8, channels), np.uint8)
    np.testing.assert_array_equal(solarize(image, threshold), table[image])


def test_a_third_of_a_turn_makes_red_green():
    red = np.full((2, 3, 3), (200, 20, 20), np.uint8)
    assert difference(adjust_hue(red, 1 / 3), red[..., [1, 0, 2]]).max() <= 6
    assert difference(adjust_hue(red, -1 / 3), red[..., [1, 2, 0]]).max() <= 6


FIRES = {
    'jitter': {'jitter': 1.0, 'jitter_strength': (0.9, 0.9, 0.9, 0.5)},
    'grayscale': {'grayscale': 1.0},
    'blur': {'blur': 1.0, 'blur_sigma': (1.0, 2.0)},
    'solarize': {'solarize': 1.0},
}


def test_nothing_happens_at_p_0():
    view, views = draws(300)
    assert all(np.array_equal(view, made) for made in views)


@pytest.mark.parametrize('name', FIRES)
def test_always_happens_at_p_1(name):
    view, views = draws(300, **FIRES[name])
    assert not any(np.array_equal(view, made) for made in views)


@pytest.mark.parametrize('name', FIRES)
@pytest.mark.parametrize('share', [0.1, 0.5])
def test_happens_at_its_rate(name, share):
    view, views = draws(2000, **{**FIRES[name], name: share})
    count = sum(not np.array_equal(view, made) for made in views)
    assert abs(count / 2000 - share) < 5 * math.sqrt(share * (1 - share) / 2000)


def test_operations_fire_independently_and_in_order(monkeypatch):
    fired = []
    for name in ('apply_jitter', 'to_grayscale', 'gaussian_blur', 'solarize'):

        def note(view, *_, name=name):
            fired[-1].append(name)
            return view

        monkeypatch.setattr(photometric, name, note)
    rng = np.random.default_rng(1)
    for _ in range(3200):
        fired.append([])
        half = recipe(jitter=0.5, grayscale=0.5, blur=0.5, solarize=0.5)
        augment(photo(4, 4), half, rng)
    order = ['apply_jitter', 'to_grayscale', 'gaussian_blur', 'solarize']
    assert all(names == [name for name in order if name in names] for names in fired)
    counts = {}
    for names in fired:
        counts[tuple(names)] = counts.get(tuple(names), 0) + 1
    assert len(counts) == 16  # all subsets, 200 times each
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in counts.values())


def test_jitter_draws(monkeypatch):
    calls = []
    monkeypatch.setattr(
        photometric,
        '_JITTERS',
        [lambda image, x, k=k: calls.append((k, x)) or image for k in range(4)],
    )
    rng, strength = np.random.default_rng(2), (0.4, 1.5, 0.2, 0.1)
    for _ in range(2400):
        color_jitter(photo(2, 2), strength, rng)
    orders = [tuple(kind for kind, _ in calls[i : i + 4]) for i in range(0, 9600, 4)]
    counts = {order: orders.count(order) for order in orders}
    assert len(counts) == 24  # all permutations, 100 times each
    assert all(abs(count - 100) < 50 for count in counts.values())
    for kind, low, high in ((0, 0.6, 1.4), (1, 0, 2.5), (2, 0.8, 1.2), (3, -0.1, 0.1)):
        shares = np.sort([(x - low) / (high - low) for k, x in calls if k == kind])
        # Kolmogorov-Smirnov distance to U(0, 1); 0.04 has p = 0.001 for 2400 draws.
        assert np.abs(shares - np.linspace(0, 1, 2400)).max() < 0.04
    calls.clear()
    color_jitter(photo(2, 2), (0.0, 0.0, 0.3, 0.0), rng)
    assert [kind for kind, _ in calls] == [2]


def test_blur_width_is_drawn_within_bounds(monkeypatch):
    sigmas = []
    monkeypatch.setattr(
        photometric, 'gaussian_blur', lambda view, s: sigmas.append(s) or view
    )
    draws(2400, blur=1.0, blur_sigma=(0.5, 1.5))
    shares = np.sort(sigmas) - 0.5
    assert np.abs(shares - np.linspace(0, 1, 2400)).max() < 0.04


def test_threshold_is_used():
    view, (made,) = draws(1, solarize=1.0, solarize_threshold=40)
    np.testing.assert_array_equal(made, np.where(view < 40, view, 255 - view))


ALL = {'jitter': 0.8, 'grayscale': 0.2, 'blur': 0.5, 'solarize': 0.2}


def test_a_generator_decides_everything():
    _, first = draws(30, **ALL)
    _, second = draws(30, **ALL)
    np.testing.assert_array_equal(first, second)
    assert len({made.tobytes() for made in first}) > 20


def test_input_is_left_alone():
    view = photo(16, 16)
    rng = np.random.default_rng(0)
    for _ in range(50):
        augment(view, recipe(**ALL), rng)
    np.testing.assert_array_equal(view, photo(16, 16))


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (9, 1)])
def test_thin_views(size):
    rng = np.random.default_rng(0)
    every = recipe(**dict.fromkeys(ALL, 1.0))
    made = augment(photo(*size), every, rng)
    assert made.shape == (*size, 3) and made.dtype == np.uint8
