"""Multi-crop: several random views of one picture, each with its geometry."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from densessl.datasets.image_io import JpegImage
from densessl.datasets.transforms.on_device import pack
from densessl.datasets.transforms.photometric import (
    apply_changes,
    draw_changes,
    to_levels,
    with_channels,
)
from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.registry import TRANSFORMS

_CROP_TRIES = 10
_SHRINK_STEPS = 8
Box = Sequence[int]  # x, y, width, height in px


@dataclass(frozen=True)
class ViewRecipe:
    """How views of one kind are cut and coloured; probabilities lie in ``[0, 1]``.

    Attributes:
        role: the views' name in ``results['inputs']``, such as ``'global'``.
        size: output ``(H, W)`` in px; one number means a square.
        scale: bounds of the crop's share of the picture's area, in ``(0, 1]``.
        count: how many views to cut.
        ratio: bounds of width / height, drawn log-uniformly.
        flip: probability of mirroring left to right.
        jitter: probability of :func:`~densessl.datasets.transforms.color_jitter`.
        jitter_strength: brightness, contrast, saturation (>= 0), hue (<= 0.5).
        grayscale: probability of turning grey.
        blur: probability of a Gaussian blur.
        blur_sigma: bounds of its standard deviation in px of the output.
        solarize: probability of inverting the bright levels.
        solarize_threshold: the lowest level that is inverted, 0 to 256; times 256 for
            samples of 16 bits.

    Raises:
        DenseSSLError: a value is out of range.
    """

    role: str
    size: int | tuple[int, int]
    scale: tuple[float, float]
    count: int = 1
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.size, int):
            object.__setattr__(self, 'size', (self.size, self.size))
        for name in ('size', 'scale', 'ratio', 'jitter_strength', 'blur_sigma'):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._need('role', isinstance(self.role, str) and self.role, 'a name')
        self._need(
            'size',
            _are_numbers(self.size, 2, int) and min(self.size) > 0,
            'px > 0, one int or (H, W)',
        )
        self._need(
            'count', isinstance(self.count, int) and self.count > 0, 'an int > 0'
        )
        for name, most in (('scale', 1), ('ratio', math.inf), ('blur_sigma', math.inf)):
            pair = getattr(self, name)
            self._need(
                name,
                _are_numbers(pair, 2) and 0 < pair[0] <= pair[1] <= most,
                '(low, high), 0 < low <= high' + (' <= 1' if most == 1 else ''),
            )
        for name in ('flip', 'jitter', 'grayscale', 'blur', 'solarize'):
            share = getattr(self, name)
            self._need(
                name, _are_numbers((share,), 1) and 0 <= share <= 1, 'a share, 0 to 1'
            )
        self._need(
            'jitter_strength',
            _are_numbers(self.jitter_strength, 4)
            and min(self.jitter_strength) >= 0
            and self.jitter_strength[3] <= 0.5,
            '(brightness, contrast, saturation, hue), all >= 0 and hue <= 0.5',
        )
        self._need(
            'solarize_threshold',
            _are_numbers((self.solarize_threshold,), 1)
            and 0 <= self.solarize_threshold <= 256,
            '0 to 256',
        )

    def _need(self, name: str, holds: object, what: str) -> None:
        if not holds:
            raise DenseSSLError(
                f'ViewRecipe {self.role!r}: {name}={getattr(self, name)!r}; give {what}'
            )

    @classmethod
    def from_config(cls, config: ViewRecipe | Mapping[str, Any]) -> ViewRecipe:
        """Build from a config's dict; a recipe passes through.

        Raises:
            DenseSSLError: a key is unknown or missing, or a value out of range.
        """
        if isinstance(config, cls):
            return config
        known = {field.name for field in fields(cls)}
        label = f'ViewRecipe {config.get("role", "")!r}'
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f'did you mean {near[0]!r}?' if near else f'use {sorted(known)}'
                raise DenseSSLError(f'{label}: unknown key {key!r}; {hint}')
        for key in ('role', 'size', 'scale'):
            if key not in config:
                raise DenseSSLError(f'{label}: {key!r} is missing; add it')
        return cls(**config)


def _are_numbers(values: object, length: int, kind: Any = (int, float)) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == length
        and all(isinstance(value, kind) for value in values)
    )


@TRANSFORMS.register_module()
class MultiCrop:
    """Cut ``V`` random views by recipes and keep where each was cut.

    Crops are drawn as by torchvision's ``RandomResizedCrop`` and resampled once, with
    an antialiased bicubic filter; a crop smaller than its output is enlarged. Of a
    :class:`~densessl.datasets.image_io.JpegImage`, the crops are drawn before decoding,
    and the picture is decoded at a half, quarter or eighth of its size if every crop
    still has at least its output's resolution; crop boxes then lie on multiples of
    that step, and stay in px of the full-size source.

    Needs ``results['img']`` (``(H, W, C)`` uint8 or uint16, or a ``JpegImage``) and
    ``results['rng']`` (a ``numpy.random.Generator``). Writes ``results['inputs']``,
    ``{role: tensor (v, C, H, W)}`` of that type, and ``results['geometry']``, a
    :class:`~densessl.geometry.ViewGeometry` with leading shape ``(V,)``; both follow
    the recipes' order. A subclass with rules for crops overrides :meth:`draw_boxes`.

    With ``min_overlap``, a crop that shares too little with the global views before it
    is drawn again, at most ``overlap_tries`` times; then it shrinks in equal steps
    towards what these views have in common, and ``results['shrunk']`` counts it. The
    bound is of the whole picture's area, but at most what they have in common: in a
    very thin picture a crop may be smaller than any bound.

    Args:
        views: recipes, as :class:`ViewRecipe` or as dicts of its arguments. Recipes of
            one role follow each other and share a size.
        min_overlap: least shares of the picture's area that two global views, and
            another view with each global view, have in common (DenseDINO: 0.02 and
            0.01); the global views are those of the first role. None: any crops.
        overlap_tries: how many times a crop is drawn again.
        augment_on: ``'worker'`` changes colours here. ``'device'`` only draws how, into
            ``results['changes']``, ``{role: tensor (v, 11)}``, and leaves the work to
            :class:`~densessl.models.ViewPreprocessor`; RGB of 8 bits only.

    Raises:
        DenseSSLError: no recipe, a bad recipe, roles that cannot be stacked, an overlap
            that no crop can have, another ``augment_on``, or other pictures than it
            takes.

    Example:
        >>> MultiCrop(views=[
        ...     dict(role='global', size=224, scale=(0.4, 1.0), blur=1.0),
        ...     dict(role='global', size=224, scale=(0.4, 1.0), blur=0.1, solarize=0.2),
        ...     dict(role='local', size=96, scale=(0.05, 0.4), blur=0.5, count=8),
        ... ])
    """

    def __init__(
        self,
        views: Sequence[ViewRecipe | Mapping[str, Any]],
        min_overlap: tuple[float, float] | None = None,
        overlap_tries: int = 20,
        augment_on: str = 'worker',
    ) -> None:
        recipes = tuple(ViewRecipe.from_config(view) for view in views)
        if not recipes:
            raise DenseSSLError('MultiCrop: views is empty; give at least one recipe')
        self.recipes: tuple[ViewRecipe, ...] = recipes
        """One recipe per entry of ``views``."""
        self.views: tuple[ViewRecipe, ...] = tuple(
            recipe for recipe in recipes for _ in range(recipe.count)
        )
        """One recipe per view, ``V`` in all."""
        self.roles: dict[str, int] = {}
        """Number of views by role, in order."""
        self._sizes: dict[str, tuple[int, int]] = {}
        previous = None
        for recipe in recipes:
            role, size = recipe.role, recipe.size
            if self._sizes.setdefault(role, size) != size:
                raise DenseSSLError(
                    f'MultiCrop: role {role!r} has sizes {self._sizes[role]} and '
                    f'{size}; give them one size, or two roles'
                )
            if role in self.roles and role != previous:
                raise DenseSSLError(
                    f'MultiCrop: views of role {role!r} are apart; list them together'
                )
            self.roles[role] = self.roles.get(role, 0) + recipe.count
            previous = role
        if isinstance(min_overlap, list):
            min_overlap = tuple(min_overlap)
        self.min_overlap = min_overlap
        self.overlap_tries = overlap_tries
        if augment_on not in ('worker', 'device'):
            raise DenseSSLError(
                f"MultiCrop: augment_on={augment_on!r}; give 'worker' or 'device'"
            )
        self.augment_on = augment_on
        self._globals = self.roles[self.views[0].role]
        self._view_sizes = np.array([view.size for view in self.views])
        self._flips = np.array([view.flip for view in self.views])
        if self.min_overlap is not None:
            self._check_overlap()

    @property
    def num_views(self) -> int:
        """``V``, over all roles."""
        return len(self.views)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``inputs`` and ``geometry``."""
        image, rng = results['img'], results['rng']
        source = image.shape[:2]
        boxes = self.draw_boxes(*source, rng)
        if self.min_overlap is not None:
            boxes, results['shrunk'] = self._keep_overlap(boxes, *source, rng)
        flips = rng.random(self.num_views) < self._flips
        image, boxes, step = self._decode(image, boxes)
        channels = image.shape[2]
        later = self.augment_on == 'device'
        if later and (channels, image.itemsize) != (3, 1):
            raise DenseSSLError(
                f"MultiCrop: augment_on='device' takes RGB of 8 bits, and '"
                f"{results.get('path')}' has {channels} channels of "
                f"{8 * image.itemsize} bits; set augment_on='worker'"
            )
        dtype = torch.uint8 if image.itemsize == 1 else torch.uint16
        inputs = {
            role: torch.empty(count, channels, *self._sizes[role], dtype=dtype)
            for role, count in self.roles.items()
        }
        planes = [view for stack in inputs.values() for view in stack.numpy()]
        drawn = []
        for recipe, box, flip, out in zip(
            self.views, (boxes // step).tolist(), flips, planes, strict=True
        ):
            view = resize_crop(image, box, recipe.size)
            if flip:
                view = with_channels(cv2.flip(view, 1))
            drawn.append(draw_changes(recipe, rng))
            if not later:
                view = apply_changes(view, drawn[-1])
            cv2.split(view, list(out))
        results['inputs'] = inputs
        if later:
            numbers = pack(drawn).split(list(self.roles.values()))
            results['changes'] = dict(zip(self.roles, numbers, strict=True))
        results['geometry'] = ViewGeometry.from_lists(
            box=boxes,
            flip=flips,
            size=self._view_sizes,
            source=np.full((self.num_views, 2), source),
        )
        return results

    def draw_boxes(
        self, height: int, width: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Draw each view's crop: int ``(V, 4)``, ``(x, y, width, height)`` in px.

        Args:
            height: of the source picture, in px.
            width: of the source picture, in px.
            rng: source of all random numbers.
        """
        return np.array(
            [
                draw_box(height, width, view.scale, view.ratio, rng)
                for view in self.views
            ]
        )

    def _decode(
        self, image: np.ndarray | JpegImage, boxes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Decode what is not yet; returns the array, boxes on its grid, its step."""
        if not isinstance(image, JpegImage):
            return image, boxes, 1
        step = image.reduction((boxes[:, :1:-1] / self._view_sizes).min())
        if self.min_overlap is not None:
            while step > 1 and not self._overlap_holds(boxes - boxes % step, image):
                step //= 2
        return image.decode(step), boxes - boxes % step, step

    def _keep_overlap(
        self, boxes: np.ndarray, height: int, width: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        """Boxes with the least overlaps, and how many of them had to shrink for it."""
        kept: list[Box] = [boxes[0].tolist()]
        shrunk = 0
        for view, box in zip(self.views[1:], boxes[1:].tolist(), strict=True):
            fixed, area = self._bound(kept, height, width)
            tries = 0
            while not _shares(box, fixed, area) and tries < self.overlap_tries:
                box = draw_box(height, width, view.scale, view.ratio, rng)
                tries += 1
            if not _shares(box, fixed, area):
                box = shrink_towards(box, fixed, area)
                shrunk += 1
            kept.append(box)
        return np.array(kept), shrunk

    def _overlap_holds(self, boxes: np.ndarray, image: JpegImage) -> bool:
        height, width = image.shape[:2]
        kept = boxes.tolist()
        return all(
            _shares(kept[i], *self._bound(kept[:i], height, width))
            for i in range(1, len(kept))
        )

    def _bound(
        self, before: Sequence[Box], height: int, width: int
    ) -> tuple[Sequence[Box], float]:
        """Global views the next view must overlap, and the least overlap in px²."""
        fixed = before[: self._globals]
        share = self.min_overlap[len(before) >= self._globals]
        return fixed, min(share * height * width, _area(intersection(fixed)))

    def _check_overlap(self) -> None:
        bounds = self.min_overlap
        if not (_are_numbers(bounds, 2) and all(0 < share <= 1 for share in bounds)):
            raise DenseSSLError(
                f'MultiCrop: min_overlap={bounds!r}; give two shares of the picture, '
                'each more than 0 and at most 1: between global views, and of other '
                'views with a global one'
            )
        if self.num_views < 2:
            raise DenseSSLError(
                'MultiCrop: min_overlap with a single view; give two views or more, or '
                'leave min_overlap out'
            )
        for place, view in enumerate(self.views):
            share = bounds[place >= self._globals]
            if view.scale[1] < share:
                raise DenseSSLError(
                    f'MultiCrop: min_overlap={share} of the picture cannot be met by '
                    f'views of role {view.role!r}, whose scale {view.scale} ends '
                    'below it; lower min_overlap or raise the scale'
                )

    def __repr__(self) -> str:
        return f'MultiCrop(views={list(self.recipes)}, min_overlap={self.min_overlap})'


def intersection(boxes: Sequence[Box]) -> Box:
    """What boxes have in common; width and height are at least 0."""
    x, y = (max(box[axis] for box in boxes) for axis in (0, 1))
    right, bottom = (min(b[axis] + b[axis + 2] for b in boxes) for axis in (0, 1))
    return x, y, max(right - x, 0), max(bottom - y, 0)


def shrink_towards(box: Box, fixed: Sequence[Box], area: float) -> Box:
    """Move a crop's edges towards what ``fixed`` have in common, until it fits.

    Args:
        box: the crop.
        fixed: boxes to overlap, each by ``area``.
        area: in px², at most that of what they have in common.

    Returns:
        The first of 8 equal steps that fits; the last is the common part itself.
    """
    x, y, w, h = intersection(fixed)
    start = box[0], box[1], box[0] + box[2], box[1] + box[3]
    end = x, y, x + w, y + h
    for step in range(1, _SHRINK_STEPS + 1):
        left, top, right, bottom = (
            a + (b - a) * step // _SHRINK_STEPS for a, b in zip(start, end, strict=True)
        )
        box = left, top, right - left, bottom - top
        if _shares(box, fixed, area):
            break
    return box


def _shares(box: Box, fixed: Sequence[Box], area: float) -> bool:
    """Whether a box has at least ``area`` in common with each of ``fixed``."""
    return all(_area(intersection([box, other])) >= area for other in fixed)


def _area(box: Box) -> int:
    return box[2] * box[3]


def draw_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw a crop ``(x, y, width, height)`` in px, never empty, inside the picture.

    The area is uniform within ``scale`` and the ratio log-uniform, 10 draws until one
    fits; then the largest centred crop with a ratio within bounds.

    Args:
        height: of the picture, in px.
        width: of the picture, in px.
        scale: bounds of the area, as shares of the picture's.
        ratio: bounds of width / height.
        rng: source of all random numbers.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area_draw, ratio_draw = rng.random(2)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(x), int(y), w, h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def resize_crop(
    image: np.ndarray, box: Sequence[int], size: tuple[int, int]
) -> np.ndarray:
    """Cut ``box`` out and resample it once, bicubic and antialiased, as Pillow does.

    Args:
        image: ``(H, W, C)`` uint8 or uint16.
        box: ``(x, y, width, height)`` in px, inside the picture.
        size: output ``(H, W)`` in px.

    Returns:
        Array of that size and of the type given, contiguous: of uint8 within 2 levels
        of Pillow's result, of uint16 within 1 level of the exact one.
    """
    x, y, w, h = box
    crop = image[y : y + h, x : x + w]
    if (h, w) == tuple(size):
        return np.ascontiguousarray(crop)
    # Channels-last strides reach torch's fast uint8 kernel and leave without a copy.
    # OpenCV's bicubic filter does not antialias, and its area filter is slower.
    levels = crop if crop.itemsize == 1 else crop.astype(np.float32)
    channels_last = torch.from_numpy(levels)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(channels_last, size=size, mode='bicubic', antialias=True)
    resized = resized[0].permute(1, 2, 0).contiguous().numpy()
    return resized if levels is crop else to_levels(resized, crop.dtype)
