"""Colour, blur and inversion of one view: pure functions on ``(H, W, C)`` pictures.

Three channels are RGB, and get all operations; they compute what Pillow and torchvision
compute for the same parameters, to within rounding, and hue is shifted in 8-bit HSV, as
by Pillow. Of any other number of channels none is a colour: brightness, contrast, blur
and inversion act on each by itself, while saturation, hue and grey are left out.

Samples are uint8, or uint16 whose range is 0 to 65535. A 1-px side is fine everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:
    from densessl.datasets.transforms.multi_crop import ViewRecipe

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as cv2's and Pillow's grey
_SAME, _GREY = np.eye(3), np.full((3, 3), LUMA)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale all levels by ``factor`` >= 0; 1 changes nothing."""
    return with_channels(cv2.addWeighted(image, factor, image, 0.0, 0.0))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale distances from the mean by ``factor`` >= 0.

    It is the picture's mean grey for RGB, and else each channel's own.
    """
    if not is_rgb(image):
        shift = (1.0 - factor) * image.mean(axis=(0, 1))
        return to_levels(image * factor + shift, image.dtype)
    mean = sum(w * m for w, m in zip(LUMA, cv2.mean(image), strict=False))
    return cv2.addWeighted(image, factor, image, 0.0, (1.0 - factor) * mean)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale distances from each pixel's grey by ``factor`` >= 0; RGB only.

    For 8 bits the weights have 10 binary places: within 1 level of the exact result.
    """
    return cv2.transform(image, factor * _SAME + (1.0 - factor) * _GREY)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by ``shift``, in turns of the colour circle, -0.5 to 0.5; RGB only.

    Hue has 256 steps for 8 bits, and is a real number for 16.
    """
    if image.itemsize == 2:
        hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + 360 * shift) % 360
        return to_levels(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), image.dtype)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    turn = np.zeros(hsv.shape[1:], np.uint8)
    turn[:, 0] = round(shift * 255) % 256
    hsv += turn  # wraps around; by whole rows, as single samples are slow to reach
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=hsv)


def to_grayscale(image: np.ndarray) -> np.ndarray:
    """Grey, still with three channels; RGB only."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with standard deviation ``sigma`` > 0 px (Pillow's radius).

    Beyond the border, border pixels are repeated, as by Pillow. For 8 bits the weights
    are those of ``cv2.GaussianBlur``, and so is the result, but for a level at ties.
    """
    border = cv2.BORDER_REPLICATE
    if image.itemsize == 2:
        return with_channels(cv2.GaussianBlur(image, (0, 0), sigma, borderType=border))
    # The general filter is up to three times as fast as cv2's own Gaussian one.
    size = round(6 * sigma + 1) | 1
    half = cv2.getGaussianKernel(size, sigma)[: size // 2, 0]
    # In 256ths that add up to 256: differences of the running sum's nearest integers.
    left = np.rint(half.cumsum() * 256)
    sums = np.concatenate(([0.0], left, 256.0 - left[::-1], [256.0]))
    bell = (sums[1:] - sums[:-1]) / 256
    return with_channels(cv2.sepFilter2D(image, -1, bell, bell, borderType=border))


def solarize(image: np.ndarray, threshold: float = 128) -> np.ndarray:
    """Invert (``255 - level``) every level of ``threshold`` and above.

    For 16 bits, ``65535 - level`` from ``256 threshold``: half of the range in both.
    """
    if image.itemsize == 2:
        return np.where(image < 256 * threshold, image, ~image)
    least = math.ceil(threshold) - 1
    _, bright = cv2.threshold(image, least, 255, cv2.THRESH_BINARY)
    return with_channels(cv2.bitwise_xor(image, bright))


def with_channels(image: np.ndarray) -> np.ndarray:
    """``(H, W, C)``, of which OpenCV drops the last axis where ``C`` is 1."""
    return image if image.ndim == 3 else image[..., None]


def is_rgb(image: np.ndarray) -> bool:
    """Whether a picture's channels are colours: three are, other numbers are not."""
    return image.shape[2] == 3


def to_levels(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The nearest levels of an unsigned integer type."""
    return values.round().clip(0, np.iinfo(dtype).max).astype(dtype)


_JITTERS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


class Changes(NamedTuple):
    """What is done to one view, in this order.

    Attributes:
        jitter: ``(kind, amount)`` by turns; the kinds are brightness, contrast,
            saturation and hue, 0 to 3, the amounts factors and for hue a shift.
        gray: whether it turns grey.
        sigma: of the blur in px; 0 for none.
        threshold: the lowest level that is inverted; None for none.
    """

    jitter: tuple[tuple[int, float], ...]
    gray: bool
    sigma: float
    threshold: float | None


def draw_jitter(
    strength: Sequence[float], rng: np.random.Generator
) -> tuple[tuple[int, float], ...]:
    """Draw ``Changes.jitter``; what has no strength is left out.

    Args:
        strength: ``(b, c, s, h)``: the first three factors come from
            ``U(max(0, 1 - x), 1 + x)``, the hue's shift from ``U(-h, h)``.
        rng: source of the order and the four numbers.
    """
    bounds = [(max(0.0, 1.0 - limit), 1.0 + limit) for limit in strength[:3]]
    bounds.append((-strength[3], strength[3]))
    amounts = [rng.uniform(low, high) for low, high in bounds]
    order = rng.permutation(4).tolist()
    return tuple((kind, amounts[kind]) for kind in order if strength[kind] > 0)


def draw_changes(recipe: ViewRecipe, rng: np.random.Generator) -> Changes:
    """Draw colour jitter, grey, blur and inversion, each with its probability."""
    jitter, gray, blur, invert = rng.random(4)
    return Changes(
        draw_jitter(recipe.jitter_strength, rng) if jitter < recipe.jitter else (),
        gray < recipe.grayscale,
        rng.uniform(*recipe.blur_sigma) if blur < recipe.blur else 0.0,
        recipe.solarize_threshold if invert < recipe.solarize else None,
    )


def apply_jitter(image: np.ndarray, jitter: Sequence[tuple[int, float]]) -> np.ndarray:
    """Change the colours of ``(H, W, C)`` as :func:`draw_jitter` has it."""
    for kind, amount in jitter:
        if kind < 2 or is_rgb(image):  # saturation and hue are RGB's only
            image = _JITTERS[kind](image, amount)
    return image


def color_jitter(
    image: np.ndarray, strength: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, in random order.

    Args:
        image: ``(H, W, C)`` uint8 or uint16; saturation and hue are RGB's only.
        strength: see :func:`draw_jitter`.
        rng: source of the order and the four numbers.
    """
    return apply_jitter(image, draw_jitter(strength, rng))


def apply_changes(view: np.ndarray, changes: Changes) -> np.ndarray:
    """Change ``(H, W, C)`` uint8 or uint16 as drawn; grey is RGB's only.

    ``view`` itself is left alone, and returned where there is nothing to do.
    """
    if changes.jitter:
        view = apply_jitter(view, changes.jitter)
    if changes.gray and is_rgb(view):
        view = to_grayscale(view)
    if changes.sigma:
        view = gaussian_blur(view, changes.sigma)
    if changes.threshold is not None:
        view = solarize(view, changes.threshold)
    return view


def augment(
    view: np.ndarray, recipe: ViewRecipe, rng: np.random.Generator
) -> np.ndarray:
    """Colour jitter, grey, blur and inversion, each with its recipe's probability.

    Args:
        view: ``(H, W, C)`` uint8 or uint16; not changed. Grey is RGB's only.
        recipe: probabilities and ranges.
        rng: source of all random numbers; their count does not depend on ``view``.

    Returns:
        Array like ``view``; ``view`` itself where nothing fired.
    """
    return apply_changes(view, draw_changes(recipe, rng))
