"""Colour, blur and inversion of one view: pure functions on RGB uint8 ``(H, W, 3)``.

They compute what Pillow and torchvision compute for the same parameters, to within
rounding; hue is shifted in 8-bit HSV, as by Pillow. A 1-px side is fine everywhere.
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
    return cv2.addWeighted(image, factor, image, 0.0, 0.0)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale distances from the picture's mean grey by ``factor`` >= 0."""
    mean = sum(w * m for w, m in zip(_LUMA, cv2.mean(image), strict=False))
    return cv2.addWeighted(image, factor, image, 0.0, (1.0 - factor) * mean)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale distances from each pixel's grey by ``factor`` >= 0."""
    return cv2.addWeighted(image, factor, to_grayscale(image), 1.0 - factor, 0.0)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by ``shift``, in turns of the colour circle, -0.5 to 0.5."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(shift * 255) % 256)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=hsv)


def to_grayscale(image: np.ndarray) -> np.ndarray:
    """Grey, still with three channels."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with standard deviation ``sigma`` > 0 px (Pillow's radius).

    Beyond the border, border pixels are repeated, as by Pillow.
    """
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def solarize(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Invert (``255 - level``) every level of ``threshold`` and above."""
    levels = np.arange(256, dtype=np.uint8)
    return cv2.LUT(image, np.where(levels < threshold, levels, ~levels))


_JITTERS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(
    image: np.ndarray, strength: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, in random order.

    Args:
        image: RGB uint8 ``(H, W, 3)``.
        strength: ``(b, c, s, h)``: the first three factors come from
            ``U(max(0, 1 - x), 1 + x)``, the hue's shift from ``U(-h, h)``.
        rng: source of the order and the four numbers.
    """
    bounds = [(max(0.0, 1.0 - limit), 1.0 + limit) for limit in strength[:3]]
    bounds.append((-strength[3], strength[3]))
    amounts = [rng.uniform(low, high) for low, high in bounds]
    for kind in rng.permutation(4).tolist():
        if strength[kind] > 0:
            image = _JITTERS[kind](image, amounts[kind])
    return image


def augment(
    view: np.ndarray, recipe: ViewRecipe, rng: np.random.Generator
) -> np.ndarray:
    """Colour jitter, grey, blur and inversion, each with its recipe's probability.

    Args:
        view: RGB uint8 ``(H, W, 3)``; not changed.
        recipe: probabilities and ranges.
        rng: source of all random numbers; their count does not depend on ``view``.

    Returns:
        RGB uint8 ``(H, W, 3)``; ``view`` itself where nothing fired.
    """
    jitter, gray, blur, invert = rng.random(4)
    if jitter < recipe.jitter:
        view = color_jitter(view, recipe.jitter_strength, rng)
    if gray < recipe.grayscale:
        view = to_grayscale(view)
    if blur < recipe.blur:
        view = gaussian_blur(view, rng.uniform(*recipe.blur_sigma))
    if invert < recipe.solarize:
        view = solarize(view, recipe.solarize_threshold)
    return view
