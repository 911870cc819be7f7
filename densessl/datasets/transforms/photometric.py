"""Colour, blur and inversion of one view: pure functions on ``(H, W, C)`` pictures.

Three channels are RGB, and get all operations; they compute what Pillow and torchvision
compute for the same parameters, to within rounding, and hue is shifted in 8-bit HSV, as
by Pillow. Of any other number of channels none is a colour: brightness, contrast, blur
and inversion act on each by itself, while saturation, hue and grey are left out.

Samples are uint8, or uint16 whose range is 0 to 65535. A 1-px side is fine everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from densessl.datasets.transforms.multi_crop import ViewRecipe

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as cv2's and Pillow's grey


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
    mean = sum(w * m for w, m in zip(_LUMA, cv2.mean(image), strict=False))
    return cv2.addWeighted(image, factor, image, 0.0, (1.0 - factor) * mean)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale distances from each pixel's grey by ``factor`` >= 0; RGB only."""
    return cv2.addWeighted(image, factor, to_grayscale(image), 1.0 - factor, 0.0)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by ``shift``, in turns of the colour circle, -0.5 to 0.5; RGB only.

    Hue has 256 steps for 8 bits, and is a real number for 16.
    """
    if image.itemsize == 2:
        hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + 360 * shift) % 360
        return to_levels(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), image.dtype)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(shift * 255) % 256)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=hsv)


def to_grayscale(image: np.ndarray) -> np.ndarray:
    """Grey, still with three channels; RGB only."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with standard deviation ``sigma`` > 0 px (Pillow's radius).

    Beyond the border, border pixels are repeated, as by Pillow.
    """
    return with_channels(
        cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    )


def solarize(image: np.ndarray, threshold: float = 128) -> np.ndarray:
    """Invert (``255 - level``) every level of ``threshold`` and above.

    For 16 bits, ``65535 - level`` from ``256 threshold``: half of the range in both.
    """
    if image.itemsize == 2:
        return np.where(image < 256 * threshold, image, ~image)
    levels = np.arange(256, dtype=np.uint8)
    table = np.where(levels < threshold, levels, ~levels)
    return with_channels(cv2.LUT(image, table))


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


def color_jitter(
    image: np.ndarray, strength: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, in random order.

    Args:
        image: ``(H, W, C)`` uint8 or uint16; saturation and hue are RGB's only.
        strength: ``(b, c, s, h)``: the first three factors come from
            ``U(max(0, 1 - x), 1 + x)``, the hue's shift from ``U(-h, h)``.
        rng: source of the order and the four numbers.
    """
    bounds = [(max(0.0, 1.0 - limit), 1.0 + limit) for limit in strength[:3]]
    bounds.append((-strength[3], strength[3]))
    amounts = [rng.uniform(low, high) for low, high in bounds]
    for kind in rng.permutation(4).tolist():
        if strength[kind] > 0 and (kind < 2 or is_rgb(image)):
            image = _JITTERS[kind](image, amounts[kind])
    return image


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
    jitter, gray, blur, invert = rng.random(4)
    if jitter < recipe.jitter:
        view = color_jitter(view, recipe.jitter_strength, rng)
    if gray < recipe.grayscale and is_rgb(view):
        view = to_grayscale(view)
    if blur < recipe.blur:
        view = gaussian_blur(view, rng.uniform(*recipe.blur_sigma))
    if invert < recipe.solarize:
        view = solarize(view, recipe.solarize_threshold)
    return view
