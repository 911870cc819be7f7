"""Sides of views for small pictures, and batches that fit a memory."""

from __future__ import annotations

from collections.abc import Sequence

from densessl.models.backbones.openmmlab import SwinTransformer as MMSwinTransformer
from densessl.models.backbones.vision_transformer import ARCHITECTURES

GIB = 2**30
_VALUE_BYTES = dict(cuda=48, cpu=80)  # see image_bytes
_INPUT_BYTES = 15  # of a pixel: 3 bytes, and 3 normalised floats
_FIXED_BYTES = 3 * GIB
_USABLE = 0.9
_LEAST_SIDE, _LEAST_LOCAL_SIDE = 96, 48  # px


def fit_sides(sides: Sequence[int], picture: float, stride: int) -> list[int]:
    """Sides of views for small pictures.

    The largest views get the picture's shorter side, rounded down to the stride, but 96
    px at least; the others shrink as much, rounded up, but stay at 48 px at least.
    Pictures at least as large as the largest views change nothing.

    Args:
        sides: of the views, in px.
        picture: shorter side of the pictures, in px.
        stride: of the backbone's tokens, in px.
    """

    def up(side: float) -> int:
        return int(-(-side // stride) * stride)

    largest = max(sides)
    new = max(int(picture // stride * stride), up(_LEAST_SIDE))
    if new >= largest:
        return list(sides)
    smaller = [max(up(side * new / largest), up(_LEAST_LOCAL_SIDE)) for side in sides]
    return [
        new if side == largest else min(side, less)
        for side, less in zip(sides, smaller, strict=True)
    ]


def split_batch(images: int, processes: int, fits: int) -> tuple[int, int]:
    """Images of a process in a step, and the parts they are split into.

    Where the processes do not divide the images, each gets the nearest multiple of 8
    (at least 1), and the step has some more or less. The parts are the fewest equal
    ones of at most ``fits`` images.

    Args:
        images: of a step, over all processes.
        processes: of the run.
        fits: images that fit the memory at once, 1 or more.
    """
    each, rest = divmod(images, processes)
    if rest or not each:
        each = max(8 * round(images / processes / 8), 1)
    parts = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= fits)
    return each, parts


def image_bytes(backbone: dict, views: Sequence[dict], device: str) -> float | None:
    """Memory that the views of an image take in a step, an estimate.

    ``c x sum over views and blocks of tokens x width``. Autograd keeps 25 to 28 bytes a
    value in bf16 and 42 to 55 in float32 (measured, docs/presets.md); ``c`` is 48 and
    80, for heads, gradients and what lies between the pieces.

    Returns:
        Bytes, or None for backbones other than ViT and Swin.
    """
    stages = backbone_stages(backbone)
    if stages is None or not views:
        return None
    values = sum(
        view.get('count', 1) * _pixels(view['size']) / stride**2 * width * depth
        for view in views
        for stride, width, depth in stages
    )
    return _VALUE_BYTES[device] * values


def images_at_once(
    memory: float, image: float, batch: float, views: Sequence[dict]
) -> int:
    """Images that a process can train on at once, at least 1.

    ``(0.9 memory - 3 GiB - inputs) / image``: 3 GiB for weights, gradients and
    optimiser (1.0 to 1.4 GiB, benchmarks/RESULTS.md) and for CUDA; the views of the
    whole batch lie in the memory, however many parts it has.

    Args:
        memory: of the process, in bytes.
        image: what an image takes, see :func:`image_bytes`.
        batch: images of the process in a step.
        views: of the config.
    """
    pixels = sum(view.get('count', 1) * _pixels(view['size']) for view in views)
    room = _USABLE * memory - _FIXED_BYTES - _INPUT_BYTES * batch * pixels
    return max(int(room / image), 1)


def backbone_stages(backbone: dict) -> list[tuple[int, int, int]] | None:
    """``(stride in px, width, blocks)`` of each stage of a ViT's or Swin's config."""
    kind, arch = backbone['type'].split('.')[-1], backbone.get('arch', 'small')
    if kind == 'VisionTransformer':
        if isinstance(arch, str):
            width, depth, _ = ARCHITECTURES[arch]
        else:
            width, depth = arch['embed_dims'], arch['depth']
        return [(backbone.get('patch_size', 16), width, depth)]
    if kind == 'SwinTransformer':
        known = MMSwinTransformer.arch_zoo[arch] if isinstance(arch, str) else arch
        return [
            (4 * 2**i, known['embed_dims'] * 2**i, depth)
            for i, depth in enumerate(known['depths'])
        ]
    return None


def _pixels(size: int | Sequence[int]) -> int:
    return size**2 if isinstance(size, int) else size[0] * size[1]
