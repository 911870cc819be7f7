"""A stand-in for mmcv's compiled ops where they are missing, as with mmcv-lite.

MMSegmentation and MMDetection import ``mmcv.ops`` throughout, also for models that
need none or few of them. After :func:`install`, that import works; of the ops
themselves, those of a Mask R-CNN are served by torchvision, and any other is refused
by name when a model calls it. Nothing happens on import: who wants it, installs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

import torch
import torchvision
from torch import Tensor

from densessl.errors import DenseSSLError

EXTENSION = 'mmcv._ext'
_REMEDY = (
    "install mmcv with compiled ops (pip install 'mmcv>=2.0.1,<2.2.0' in place of "
    'mmcv-lite)'
)


def install() -> bool:
    """Put the stand-in where ``mmcv.ops`` looks for its extension.

    Call it before ``mmseg.models`` or ``mmdet.models`` is imported. With full mmcv,
    nothing is replaced.

    Returns:
        Whether the stand-in serves the ops: ``False`` where compiled ones do.

    Raises:
        DenseSSLError: there is no mmcv at all.
    """
    if isinstance(sys.modules.get(EXTENSION), _StandIn):
        return True
    try:
        compiled = importlib.util.find_spec(EXTENSION)
    except ModuleNotFoundError:
        raise DenseSSLError(
            "mmcv is not installed; pip install 'mmcv-lite>=2.0.1,<2.2.0'"
        ) from None
    if compiled is not None:
        return False
    sys.modules[EXTENSION] = _StandIn()
    # One module of mmcv imports an op on its own, and goes without when it cannot.
    bricks = sys.modules.get('mmcv.cnn.bricks.transformer')
    if bricks is not None:
        ops = importlib.import_module('mmcv.ops')
        bricks.MultiScaleDeformableAttention = ops.MultiScaleDeformableAttention
    return True


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: ``(N, 4)`` as ``x1, y1, x2, y2``.
        scores: ``(N,)``.
        iou_threshold: boxes that overlap a better one by more than this are left out.
        offset: 1 where ``x2, y2`` are the last pixels inside a box, so that a side
            is ``x2 - x1 + 1`` long; else 0.

    Returns:
        ``(n,)`` int64, the boxes that stay, best first.
    """
    boxes = _wide(boxes) + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, _wide(scores), iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average features in the bins of regions (Mask R-CNN, arXiv:1703.06870, Sec. 3).

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(R, 5)``, number in the batch, then ``x1, y1, x2, y2`` in pixels.
        output: ``(R, C, aligned_height, aligned_width)``, is written.
        argmax_y: not used: of max pooling.
        argmax_x: likewise.
        aligned_height: bins of a region, down.
        aligned_width: bins of a region, across.
        spatial_scale: cells of ``input`` a pixel.
        sampling_ratio: samples in a bin along each axis; 0: one a cell, rounded up.
        pool_mode: 1, the average; 0, the maximum, is refused.
        aligned: take the centre of the first cell as ``(0.5, 0.5)``; else ``(0, 0)``,
            with regions at least one cell wide.

    Raises:
        DenseSSLError: maximum asked for.
    """
    _only_average(pool_mode)
    size = aligned_height, aligned_width
    pooled = torchvision.ops.roi_align(
        _wide(input), _wide(rois), size, spatial_scale, sampling_ratio, aligned
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` by its input, into ``grad_input``."""
    _only_average(pool_mode)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            _wide(grad_output),
            _wide(rois),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


SERVED = dict(
    nms=nms,
    roi_align_forward=roi_align_forward,
    roi_align_backward=roi_align_backward,
)


class _StandIn(ModuleType):
    """The extension: has every op that is asked of it; most refuse to run."""

    def __init__(self) -> None:
        super().__init__(EXTENSION, 'torchvision instead of compiled ops')
        # No loader: by that, mmengine goes on to see that the real ops are missing.
        self.__spec__ = ModuleSpec(EXTENSION, None)
        vars(self).update(SERVED)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith('__'):
            raise AttributeError(name)

        def refused(*args: object, **options: object) -> NoReturn:
            _refuse(name)

        return refused


def _wide(x: Tensor) -> Tensor:
    """Float32 of half precision, in which torchvision lacks ops and sums badly."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _only_average(pool_mode: int) -> None:
    if pool_mode != 1:
        _refuse('roi_align (max)')


def _refuse(name: str) -> NoReturn:
    raise DenseSSLError(
        f'mmcv op {name}: not compiled here, and the stand-in serves nms and '
        f'roi_align (average) alone; {_REMEDY}'
    )
