"""Demo scenes: drawn pictures with labels, so that every part runs without a download.

A scene is two or three regions of textured *stuff* and several textured *things*
before it, under one light. What tells the classes apart is structure alone: colours,
contrast, phase and place are drawn without a look at the class. A network has to
learn textures and shapes; neither colour nor a linear map of a patch's pixels will do.

Lengths are in reference pixels: a scene is 128 of them wide, whatever its ``size``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch.utils.data import Dataset

from densessl.errors import DenseSSLError
from densessl.registry import DATASETS, TRANSFORMS

REFERENCE_PX = 128
_TAU = 2 * math.pi
_STREAM = 0x5CE2E  # keeps the scenes' random numbers apart from other uses of a seed


@dataclass(frozen=True)
class Scene:
    """A picture, or a frame of a video, and what there is to know about it.

    Attributes:
        image: ``(H, W, 3)`` uint8, RGB.
        labels: ``(H, W)`` uint8, index into ``DemoScenes.CLASSES``, at every pixel.
        instances: ``(H, W)`` uint8, 0 on stuff and ``i + 1`` on thing ``i``; of two
            things the one with the higher number lies in front.
        boxes: ``(n, 4)`` float32 ``x, y, width, height`` in pixels around the visible
            part of each thing; zeros for a thing that is wholly hidden.
        box_labels: ``(n,)`` int64, index into ``DemoScenes.CLASSES``.
    """

    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    boxes: np.ndarray
    box_labels: np.ndarray


def _ramp(x: np.ndarray, slope: float) -> np.ndarray:
    """Soft step from 0 to 1, ``1 / slope`` wide, around ``x = 0``."""
    return np.clip(x * slope + 0.5, 0, 1)


def _bands(phase: np.ndarray) -> np.ndarray:
    """Two tones by turns with soft edges; a period is 2 pi."""
    return _ramp(np.sin(phase), 1.4)


def _pick(table: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """A cell's random number; the table is square, its side a power of 2."""
    side = len(table)
    rows, cols = (axis.astype(np.int32) & (side - 1) for axis in (row, col))
    return table.ravel().take(rows * side + cols)


# Stuff: (u, v, table) -> tone in [0, 1], with u and v in periods of the texture and a
# table of random numbers in [0, 1).


def _brick(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    row = np.floor(v)
    x = (u + row) * 0.5
    col = np.floor(x)
    x, y = np.abs(x - col - 0.5), np.abs(v - row - 0.5)
    joint = np.minimum(1 - 2 * x, 0.5 - y)
    return _ramp(joint - 0.14, 9) * (0.75 + 0.25 * _pick(table, row, col))


def _waves(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    bend = np.sin(u * 1.9) + 0.6 * np.sin(u * 0.8 + v * 0.9)
    return _bands(_TAU * v + 1.5 * bend)


def _pebbles(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    row = np.floor(v)
    x = u + 0.5 * row
    col = np.floor(x)
    chance = _pick(table, row, col)
    x, y = x - col - 0.38 - 0.24 * chance, v - row - 0.5
    return _ramp(0.33 + 0.1 * chance - np.sqrt(x * x + y * y), 6)


def _weave(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    x, y = u * 0.5, v * 0.5
    col, row = np.floor(x), np.floor(y)
    x, y = x - col, y - row
    across = np.mod(col + row, 2) > 0
    along, over = np.where(across, x, y), np.where(across, y, x)
    strand = 0.5 - 0.5 * np.cos(2 * _TAU * over)
    return strand * (0.4 + 2.4 * along * (1 - along))


def _grass(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    u, v = 3.6 * u, 0.6 * v
    blade = cv2.remap(table, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return _ramp(blade - 0.5, 2.4)


def _shingles(u: np.ndarray, v: np.ndarray, table: np.ndarray) -> np.ndarray:
    row = np.floor(v)
    x = (u + row) * 0.5
    x, y = 2 * (x - np.floor(x)) - 1, v - row
    reach = x * x + y * y
    return _ramp(1 - reach, 6) * (0.2 + 0.8 * reach)


# Things: (a, b, repeats) -> (how far inside the outline, tone in [0, 1]), with a, b and
# the distance in radii of the thing.


def _ball(a: np.ndarray, b: np.ndarray, repeats: float) -> tuple[np.ndarray, ...]:
    turn = np.arctan2(b - 0.3, a + 0.2)
    return 1 - np.sqrt(a * a + b * b), _bands((2 + round(repeats / 2)) * turn)


def _crate(a: np.ndarray, b: np.ndarray, repeats: float) -> tuple[np.ndarray, ...]:
    edge = np.maximum(np.abs(a), np.abs(b))
    stripes = _bands(3 * repeats * (a + b))
    return 0.74 - edge, np.maximum(stripes, _ramp(edge - 0.56, 12))


def _ring(a: np.ndarray, b: np.ndarray, repeats: float) -> tuple[np.ndarray, ...]:
    r = np.sqrt(a * a + b * b)
    return np.minimum(1 - r, r - 0.22), _bands(_TAU * repeats * r)


def _star(a: np.ndarray, b: np.ndarray, repeats: float) -> tuple[np.ndarray, ...]:
    part = np.arctan2(b, a) * (5 / _TAU)
    part -= np.floor(part + 0.5)
    r = np.sqrt(a * a + b * b)
    # An arm's side runs from its tip at radius 1 to a notch at radius 0.5.
    return 0.505 - r * np.cos(np.abs(part) * (_TAU / 5) - 1.0417), _ramp(part, 9)


def _kite(a: np.ndarray, b: np.ndarray, repeats: float) -> tuple[np.ndarray, ...]:
    b = b - 0.25
    inside = 0.58 - 0.8 * np.abs(a) - np.maximum(0.46 * -b, 0.77 * b)
    pitch = 2.2 * repeats
    return inside, _ramp(np.sin(pitch * a) * np.sin(pitch * b), 3)


def _leaf(a: np.ndarray, b: np.ndarray, repeats: float) -> tuple[np.ndarray, ...]:
    width = np.abs(a)
    veins = _bands(_TAU * repeats * (b + 0.8 * width))
    inside = 1.25 - np.sqrt((width + 0.65) ** 2 + b * b)
    return inside, veins * _ramp(width - 0.06, 10)


_STUFF: dict[str, Callable[..., np.ndarray]] = {
    'brick': _brick,
    'waves': _waves,
    'pebbles': _pebbles,
    'weave': _weave,
    'grass': _grass,
    'shingles': _shingles,
}
_THINGS: dict[str, Callable[..., tuple[np.ndarray, ...]]] = {
    'ball': _ball,
    'crate': _crate,
    'ring': _ring,
    'star': _star,
    'kite': _kite,
    'leaf': _leaf,
}
CLASSES = (*_STUFF, *_THINGS)
_PERIOD = (9.0, 7.0, 10.0, 5.0, 8.0, 6.5)  # of each stuff, in reference pixels
_COLOURS = (
    'b2523e 4287c8 96908a ceaa6c 60a048 70548c '
    'ec5c78 805020 46bebe f5cd46 eb8228 286e50'
)
PALETTE = np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3)


class _Thing(NamedTuple):
    """A thing's look and its path; reference pixels and radians."""

    label: int
    x: float
    y: float
    radius: float
    angle: float
    repeats: float
    sway: float  # length of the path to its turning point
    heading: float
    spin: float  # radians a frame
    swell: float  # share by which it has grown or shrunk at the turning point

    def pose(self, time: int) -> tuple[float, float, float, float]:
        """Centre x, y, radius and angle in frame ``time``; frame 0 is the scene."""
        swing = math.sin(0.1 * time)
        heading = self.heading + 0.04 * time
        return (
            self.x + self.sway * swing * math.cos(heading),
            self.y + self.sway * swing * math.sin(heading),
            self.radius * (1 + self.swell * swing),
            self.angle + self.spin * time,
        )


class _Plan(NamedTuple):
    """All random choices of a scene but the sensor's noise, as plain floats."""

    regions: list[int]  # class of each region of stuff
    borders: list[list[float]]  # place, slope, bend, wave number, phase
    textures: list[list[float]]  # period, angle, two offsets
    tables: np.ndarray  # (3, 32, 32) random numbers of the textures
    things: list[_Thing]
    colours: np.ndarray  # (3 + n, 2, 3) two colours in 0 to 1 for each surface
    light: list[float]  # gradient x, y; shadow's place, angle, depth; vignette
    noise: float  # standard deviation, in grey levels


class _Canvas(NamedTuple):
    """What is being drawn on."""

    colour: np.ndarray  # (3, H, W) float32: planes first, for speed
    labels: np.ndarray  # (H, W) uint8
    instances: np.ndarray  # (H, W) uint8


def _plan(rng: np.random.Generator) -> _Plan:
    # Most scenes are of one stuff in several colours: two crops of a scene then agree
    # in texture more often than in colour, which is what a short run can learn from.
    count = 2 + int(rng.random() < 0.4)
    regions = rng.permutation(len(_STUFF))[:count].tolist()
    if rng.random() < 0.6:
        regions = regions[:1] * count
    borders = rng.uniform((-18, -0.3, 2, 0.03, 0), (18, 0.3, 8, 0.08, _TAU), (2, 5))
    textures = rng.uniform((0.85, -0.15, 0, 0), (1.18, 0.15, 32, 32), (3, 4)).tolist()
    for texture, kind in zip(textures, regions, strict=False):
        texture[0] *= _PERIOD[kind]
        texture[1] += _TAU / 8 * (CLASSES[kind] == 'weave')
    things = _plan_things(rng)
    light = rng.uniform((-1, -1, -50, 0, 0, 0), (1, 1, 50, _TAU, 0.4, 0.3))
    return _Plan(
        regions=regions,
        borders=borders.tolist(),
        textures=textures,
        tables=rng.random((3, 32, 32), dtype=np.float32),
        things=things,
        colours=_plan_colours(3 + len(things), rng),
        light=light.tolist(),
        noise=rng.uniform(1.5, 4),
    )


def _plan_things(rng: np.random.Generator) -> list[_Thing]:
    """3 to 6 things of one or two kinds, less those for which there is no room."""
    count = int(rng.integers(3, 7))
    kinds = len(_STUFF) + rng.permutation(len(_THINGS))[: 1 + int(rng.random() < 0.4)]
    labels = rng.choice(kinds, count).tolist()
    low = (12, 0, 2.3, 6, 0, -0.04, -0.08)
    high = (32, _TAU, 3.8, 18, _TAU, 0.04, 0.08)
    looks = rng.uniform(low, high, (count, len(low))).tolist()
    places = rng.uniform(12, REFERENCE_PX - 12, (count, 6, 2)).tolist()
    things: list[_Thing] = []
    for label, look, choices in zip(labels, looks, places, strict=True):

        def room(place: list[float], radius: float = look[0]) -> float:
            gaps = (
                math.hypot(place[0] - other.x, place[1] - other.y)
                - 0.65 * (radius + other.radius)
                for other in things
            )
            return min(gaps, default=0.0)

        best = max(choices, key=room)
        if room(best) >= 0:
            things.append(_Thing(label, *best, *look))
    return things


def _plan_colours(count: int, rng: np.random.Generator) -> np.ndarray:
    """Two colours for each surface; hues of a scene are apart by the golden ratio."""
    light, step, chroma, sign = rng.random((4, count))
    light = 0.45 + 0.1 * light
    step = (0.23 + 0.12 * step) * np.sign(sign - 0.5)
    hue = _TAU * (rng.random() + 0.618 * rng.permutation(count))[:, None]
    hue = hue + rng.normal(0, 0.4, (count, 2))
    chroma = (0.06 + 0.07 * chroma[:, None]) * rng.uniform(0.4, 1, (count, 2))
    tone = np.stack((light - step, light + step), axis=1)
    wheel = np.cos(hue[..., None] - _TAU / 3 * np.arange(3))
    return (tone[..., None] + chroma[..., None] * wheel).astype(np.float32)


def _blend(colours: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """``(3, H, W)`` between two colours ``(2, 3)`` by a tone ``(H, W)``."""
    first, second = colours[:, :, None, None]
    return first + (second - first) * tone


def _axis(size: int) -> np.ndarray:
    """Pixel centres along a side, in reference pixels."""
    return (np.arange(size, dtype=np.float32) + 0.5) * (REFERENCE_PX / size)


def _paint_stuff(plan: _Plan, size: int) -> _Canvas:
    axis = _axis(size) - REFERENCE_PX / 2
    x, y = axis[None], axis[:, None]
    colour = np.zeros((3, size, size), np.float32)
    labels = np.zeros((size, size), np.uint8)
    cover = np.ones((size, size), np.float32)
    for k, kind in enumerate(plan.regions):
        if k:  # a wavy horizon; then a border across what lies below it
            place, slope, bend, number, phase = plan.borders[k - 1]
            along, across = (x, y) if k == 1 else (y, x)
            border = place + slope * along + bend * np.sin(number * along + phase)
            beyond = (across - border) * (size / REFERENCE_PX) + 0.5
            cover = np.minimum(cover, np.clip(beyond, 0, 1))
        period, angle, shift_u, shift_v = plan.textures[k]
        c, s = math.cos(angle) / period, math.sin(angle) / period
        u = (c * x + 0.25 * np.sin(0.06 * x + shift_u) + shift_u) + s * y
        v = (c * y + 0.25 * np.sin(0.06 * y + shift_v) + shift_v) - s * x
        tone = _STUFF[CLASSES[kind]](u, v, plan.tables[k])
        colour += cover * (_blend(plan.colours[k], tone) - colour)
        labels[cover >= 0.5] = kind
    return _Canvas(colour, labels, np.zeros_like(labels))


def _paint_thing(canvas: _Canvas, plan: _Plan, number: int, time: int) -> None:
    """Draw thing ``number`` and its shadow over what is there."""
    thing = plan.things[number]
    cx, cy, radius, angle = thing.pose(time)
    size = len(canvas.labels)
    unit = size / REFERENCE_PX
    x0, x1, y0, y1 = (
        min(max(round(edge * unit), 0), size)
        for centre in (cx, cy)
        for edge in (centre - 1.3 * radius, centre + 1.3 * radius)
    )
    if x0 == x1 or y0 == y1:
        return
    axis = _axis(size)
    x, y = (axis[None, x0:x1] - cx) / radius, (axis[y0:y1, None] - cy) / radius
    c, s = math.cos(angle), math.sin(angle)
    kind = CLASSES[thing.label]
    inside, tone = _THINGS[kind](c * x + s * y, c * y - s * x, thing.repeats)
    cover = np.clip(inside * (radius * unit) + 0.5, 0, 1)
    dx, dy = plan.light[:2]
    colour = canvas.colour[:, y0:y1, x0:x1]
    # The shadow: the outline moved away from the light, and blurred.
    reach, blur = 0.16 * radius * unit, 2 * int(0.12 * radius * unit) + 1
    move = np.array([[1, 0, -reach * dx], [0, 1, -reach * dy]])
    shadow = cv2.warpAffine(cover, move, cover.shape[::-1])
    shadow = cv2.blur(shadow, (blur, blur), borderType=cv2.BORDER_CONSTANT)
    colour *= 1 - 0.45 * shadow
    slope = dx * x + dy * y
    if kind == 'ball':
        dome = np.sqrt(np.maximum(1 - x * x - y * y, 0))
        slope = 1.6 * slope + dome - 2 / 3  # mean 0: shading keeps the mean colour
    paint = _blend(plan.colours[3 + number], tone) * (1 + 0.3 * slope)
    colour += cover * (paint - colour)
    mine = cover >= 0.5
    canvas.labels[y0:y1, x0:x1][mine] = thing.label
    canvas.instances[y0:y1, x0:x1][mine] = number + 1


def _lighting(plan: _Plan, size: int) -> np.ndarray:
    """Brightness ``(H, W)``: a gradient, the soft edge of a shadow, a vignette."""
    dx, dy, place, angle, depth, vignette = plan.light
    axis = _axis(size) / (REFERENCE_PX / 2) - 1
    x, y = axis[None], axis[:, None]
    edge = math.cos(angle) * x + math.sin(angle) * y + 0.2 * np.sin(3 * x)
    gradient = 1.1 + 0.12 * (dx * x + dy * y) - 0.5 * vignette * (x * x + y * y)
    return gradient * (1 - depth * _ramp(edge - place / 64, 5))


def _develop(
    colour: np.ndarray, light: np.ndarray, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """``(H, W, 3)`` uint8 of a canvas: light, sensor noise, rounding."""
    # The sum of two uniform bytes is nearly normal and 5 times as quick to draw.
    grain = np.frombuffer(rng.bytes(2 * colour.size), np.uint8)
    grain = grain.reshape(2, *colour.shape).sum(axis=0, dtype=np.float32)
    image = colour * (255 * light) + (grain - 255) * (noise / 104.5) + 0.5
    return cv2.merge(list(np.clip(image, 0, 255).astype(np.uint8)))


@DATASETS.register_module()
class DemoScenes(Dataset):
    """Endless drawn scenes with labels, for first runs, tests and examples.

    A scene is a function of ``seed`` and its index alone: the same in every process
    and in whatever order. Take another seed for a validation split.

    Args:
        length: scenes an epoch shows, 1 or more.
        size: side of the square pictures in pixels, 32 or more.
        seed: seed of the scenes and of the samples, 0 or more.
        pipeline: transforms, as callables or configs, that turn
            ``dict(img, path, rng)`` into a sample.

    Attributes:
        CLASSES: names of the classes, six kinds of stuff, then six of things.
        PALETTE: ``(C, 3)`` uint8, a colour for each class.

    Raises:
        DenseSSLError: an argument is out of range.
    """

    CLASSES = CLASSES
    PALETTE = PALETTE

    def __init__(
        self,
        length: int = 2000,
        size: int = 128,
        seed: int = 0,
        pipeline: Sequence[dict[str, Any] | Callable] = (),
    ) -> None:
        for name, value, low in (
            ('length', length, 1),
            ('size', size, 32),
            ('seed', seed, 0),
        ):
            _require(name, value, low)
        self.length = length
        self.size = size
        self.seed = seed
        self.transforms = [
            TRANSFORMS.build(step) if isinstance(step, dict) else step
            for step in pipeline
        ]
        self.metainfo: dict[str, Any] = {'classes': CLASSES, 'palette': PALETTE}

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.length))

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict[str, Any]:
        """Make the sample of a key ``(epoch, position, index)``.

        A plain index stands for the key ``(0, index, index)``.
        """
        epoch, position, index = key if isinstance(key, tuple) else (0, key, key)
        results: dict[str, Any] = {
            'img': self.scene(index).image,
            'path': f'demo_scene_{index:06d}',
            'rng': np.random.default_rng((self.seed, epoch, position)),
        }
        for transform in self.transforms:
            results = transform(results)
        return results

    def scene(self, index: int) -> Scene:
        """Draw scene ``index``, any number from 0 on.

        Raises:
            DenseSSLError: the index is negative.
        """
        return self.video(index, frames=1)[0]

    def video(self, index: int, frames: int = 8) -> list[Scene]:
        """Draw scene ``index`` in motion; its first frame is the scene itself.

        The things drift, turn and swell, by less than 4 reference pixels a frame at
        any point; their order in depth and their numbers stay, and so does the stuff.

        Raises:
            DenseSSLError: the index is negative, or there are no frames.
        """
        _require('index', index, 0)
        _require('frames', frames, 1)
        plan = _plan(self._rng(index, 0))
        backdrop = _paint_stuff(plan, self.size)
        light = _lighting(plan, self.size)
        box_labels = np.array([thing.label for thing in plan.things], np.int64)
        scenes = []
        for time in range(frames):
            canvas = _Canvas(*(layer.copy() for layer in backdrop))
            for number in range(len(plan.things)):
                _paint_thing(canvas, plan, number, time)
            boxes = np.zeros((len(plan.things), 4), np.float32)
            for number in range(len(plan.things)):
                mine = (canvas.instances == number + 1).view(np.uint8)
                boxes[number] = cv2.boundingRect(mine)
            rng = self._rng(index, 1 + time)
            image = _develop(canvas.colour, light, plan.noise, rng)
            scenes.append(
                Scene(image, canvas.labels, canvas.instances, boxes, box_labels.copy())
            )
        return scenes

    def write_folder(self, folder: str | Path, indices: Iterable[int]) -> list[Path]:
        """Write scenes as ``images/NNNNNN.jpg`` and ``annotations/NNNNNN.png``.

        Args:
            folder: where to; made if need be.
            indices: which scenes.

        Returns:
            The pictures' paths. A picture's annotation has one byte a pixel, the
            class.
        """
        folder = Path(folder)
        for name in ('images', 'annotations'):
            (folder / name).mkdir(parents=True, exist_ok=True)
        pictures = []
        for index in indices:
            scene = self.scene(index)
            pictures.append(folder / 'images' / f'{index:06d}.jpg')
            bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
            jpeg = cv2.imencode('.jpg', bgr, (cv2.IMWRITE_JPEG_QUALITY, 95))[1]
            pictures[-1].write_bytes(jpeg.tobytes())
            png = cv2.imencode('.png', scene.labels)[1]
            (folder / 'annotations' / f'{index:06d}.png').write_bytes(png.tobytes())
        return pictures

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        key = (_STREAM, index, stream)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


def _require(name: str, value: int, low: int) -> None:
    if value < low:
        raise DenseSSLError(
            f'DemoScenes: {name}={value} is too small; give {low} or more'
        )
