"""The stand-in for mmcv's compiled ops against loops in float64."""

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from densessl.errors import DenseSSLError
from densessl.interop import mmcv_ops

EMPTY = torch.empty(0)


def random_boxes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of 1 to 12 in a field of 20, and scores without ties."""
    g = torch.Generator().manual_seed(seed)
    corner = 20 * torch.rand(count, 2, generator=g, dtype=torch.float64)
    side = 1 + 11 * torch.rand(count, 2, generator=g, dtype=torch.float64)
    scores = torch.randperm(count, generator=g).double() / count
    return torch.cat([corner, corner + side], 1), scores


def greedy(boxes, scores, threshold: float, offset: int) -> list[int]:
    """Best first; one at a time, against all that were kept."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        ax1, ay1, ax2, ay2 = boxes[i].tolist()
        area = (ax2 - ax1 + offset) * (ay2 - ay1 + offset)
        for j in kept:
            bx1, by1, bx2, by2 = boxes[j].tolist()
            wide = max(0.0, min(ax2, bx2) - max(ax1, bx1) + offset)
            high = max(0.0, min(ay2, by2) - max(ay1, by1) + offset)
            other = (bx2 - bx1 + offset) * (by2 - by1 + offset)
            if wide * high / (area + other - wide * high) > threshold:
                break
        else:
            kept.append(i)
    return kept


def at(plane: np.ndarray, y: float, x: float) -> float:
    """Bilinear value; cells' centres at whole numbers, 0 past one cell outside."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    total = 0.0
    for row in range(height):
        for col in range(width):
            total += (
                plane[row, col] * max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - col))
            )
    return total


def pooled(x, rois, size, scale, ratio, aligned) -> np.ndarray:
    """The definition of RoIAlign, one sample at a time."""
    out = np.zeros((len(rois), x.shape[1], *size))
    for r, (b, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (scale * c - 0.5 * aligned for c in corners)
        wide, high = x2 - x1, y2 - y1
        if not aligned:
            wide, high = max(wide, 1.0), max(high, 1.0)
        down, across = high / size[0], wide / size[1]
        rows, cols = ratio or math.ceil(down), ratio or math.ceil(across)
        for c, i, j in np.ndindex(x.shape[1], *size):
            samples = [
                at(
                    x[int(b), c].numpy(),
                    y1 + down * (i + (m + 0.5) / rows),
                    x1 + across * (j + (n + 0.5) / cols),
                )
                for m in range(rows)
                for n in range(cols)
            ]
            out[r, c, i, j] = sum(samples) / max(len(samples), 1)
    return out


class Pool(torch.autograd.Function):
    """The two halves as mmcv joins them."""

    @staticmethod
    def forward(ctx, x, rois, size, scale, ratio, aligned):
        ctx.options = dict(
            aligned_height=size[0],
            aligned_width=size[1],
            spatial_scale=scale,
            sampling_ratio=ratio,
            pool_mode=1,
            aligned=aligned,
        )
        ctx.save_for_backward(rois)
        ctx.shape = x.shape
        out = x.new_full((len(rois), x.shape[1], *size), math.nan)
        mmcv_ops.roi_align_forward(x, rois, out, EMPTY, EMPTY, **ctx.options)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad.new_full(ctx.shape, math.nan)
        (rois,) = ctx.saved_tensors
        mmcv_ops.roi_align_backward(
            grad.contiguous(), rois, EMPTY, EMPTY, grad_x, **ctx.options
        )
        return grad_x, None, None, None, None, None


def some_rois(dtype=torch.float64) -> torch.Tensor:
    """Inside, across two borders, outside, and narrower than a cell; pixels."""
    return torch.tensor(
        [
            [0, 1.3, 2.2, 9.7, 11.1],
            [1, -6.1, -3.3, 5.2, 7.9],
            [0, 10.4, 9.1, 22.6, 19.4],
            [1, 40.0, 40.0, 50.0, 50.0],
            [1, 4.1, 4.2, 4.4, 4.9],
        ],
        dtype=dtype,
    )


@pytest.mark.parametrize('offset', (0, 1))
@pytest.mark.parametrize('threshold', (0.1, 0.5, 0.7))
def test_nms_is_greedy(threshold, offset):
    changed = 0
    for seed in range(5):
        boxes, scores = random_boxes(40, seed)
        kept = mmcv_ops.nms(boxes, scores, iou_threshold=threshold, offset=offset)
        assert kept.tolist() == greedy(boxes, scores, threshold, offset)
        changed += kept.tolist() != greedy(boxes, scores, threshold, 1 - offset)
        half = mmcv_ops.nms(boxes.half(), scores.half(), threshold, offset)
        rounded = greedy(
            boxes.half().double(), scores.half().double(), threshold, offset
        )
        assert half.tolist() == rounded
    assert changed  # the offset matters on these boxes


@pytest.mark.parametrize('aligned', (True, False))
@pytest.mark.parametrize('ratio', (0, 1, 2))
@pytest.mark.parametrize('scale', (0.5, 0.25))
def test_roi_align_averages_bilinear_samples(scale, ratio, aligned):
    x = torch.randn(2, 2, 6, 7, generator=torch.Generator().manual_seed(0)).double()
    rois, size = some_rois(), (3, 2)
    out = Pool.apply(x, rois, size, scale, ratio, aligned)
    expected = pooled(x, rois, size, scale, ratio, aligned)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
    assert (
        np.abs(expected - pooled(x, rois, size, scale, ratio, not aligned)).max() > 0.1
    )


@pytest.mark.parametrize('aligned', (True, False))
@pytest.mark.parametrize('ratio', (0, 2))
def test_gradient_of_roi_align(ratio, aligned):
    x = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: Pool.apply(x, some_rois(), (2, 3), 0.3, ratio, aligned), x
    )


def test_half_precision_is_pooled_in_float32():
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(2))
    grads = []
    for cast in (torch.float32, torch.bfloat16):
        leaf = x.bfloat16().to(cast).requires_grad_()
        rois = some_rois(torch.bfloat16).to(cast)
        out = Pool.apply(leaf, rois, (2, 2), 0.5, 0, True)
        assert out.dtype == cast
        out.sum().backward()
        grads.append((out.detach(), leaf.grad))
    for wide, half in zip(*grads, strict=True):
        assert half.equal(wide.bfloat16())


def run(code: str) -> subprocess.CompletedProcess:
    """A process of its own, because the stand-in stays for good."""
    return subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def lite() -> bool:
    """Whether this mmcv lacks compiled ops."""
    ops = sys.modules.get(mmcv_ops.EXTENSION)
    if ops is None:
        return importlib.util.find_spec(mmcv_ops.EXTENSION) is None
    return isinstance(ops, mmcv_ops._StandIn)  # that another test installed


@pytest.mark.skipif('not lite()', reason='mmcv has compiled ops here')
def test_mmcv_ops_work_with_the_stand_in():
    result = run(
        """
import torch, densessl, sys
assert 'mmcv._ext' not in sys.modules  # nothing happens on import
from densessl.interop import mmcv_ops
assert mmcv_ops.install() and mmcv_ops.install()
from mmengine.utils.dl_utils import mmcv_full_available
assert not mmcv_full_available()
from mmcv.ops import RoIAlign, batched_nms
boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]])
kept = batched_nms(
    boxes, torch.tensor([0.5, 0.9, 0.4]), torch.tensor([0, 0, 1]),
    dict(type='nms', iou_threshold=0.5),
)[1]
assert kept.tolist() == [1, 2], kept
x = torch.arange(16.).reshape(1, 1, 4, 4).requires_grad_()
out = RoIAlign(2, 1.0, 1)(x, torch.tensor([[0., 0, 0, 4, 4]]))
out.sum().backward()
# bins of 2 x 2 cells, sampled between the four: their mean
assert torch.allclose(out.flatten(), torch.tensor([2.5, 4.5, 10.5, 12.5])), out
assert torch.allclose(x.grad, torch.full((1, 1, 4, 4), 0.25)), x.grad
"""
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif('not lite()', reason='mmcv has compiled ops here')
def test_other_ops_are_refused_by_name():
    result = run(
        """
import torch
from densessl.errors import DenseSSLError
from densessl.interop import mmcv_ops
mmcv_ops.install()
from mmcv.ops import RoIAlign, sigmoid_focal_loss, soft_nms
ones = torch.ones(1, 4)
for call in (
    lambda: soft_nms(ones, torch.ones(1)),
    lambda: sigmoid_focal_loss(ones, torch.zeros(1, dtype=torch.long)),
    lambda: RoIAlign(2, pool_mode='max')(torch.ones(1, 1, 4, 4), torch.ones(1, 5)),
):
    try:
        call()
    except DenseSSLError as error:
        print(error)
"""
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result.stderr
    names = ('softnms', 'sigmoid_focal_loss_forward', 'roi_align (max)')
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f'mmcv op {name}: ') and "pip install 'mmcv>=2" in line


def test_compiled_ops_are_left_alone(tmp_path):
    (tmp_path / '_ext.py').write_text('def __getattr__(name): return "compiled"\n')
    result = run(
        f"""
import mmcv
mmcv.__path__ = [{str(tmp_path)!r}, *mmcv.__path__]
from densessl.interop import mmcv_ops
assert mmcv_ops.install() is False
import mmcv._ext
assert mmcv._ext.nms == 'compiled'
"""
    )
    assert result.returncode == 0, result.stderr


def test_no_mmcv_at_all(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)
    with pytest.raises(DenseSSLError, match='mmcv is not installed; pip install'):
        mmcv_ops.install()


@pytest.mark.skipif('lite()', reason='mmcv has no compiled ops here to compare with')
def test_equals_compiled_ops():
    from mmcv.ops import nms, roi_align

    for offset in (0, 1):
        for threshold in (0.3, 0.6):
            boxes, scores = (t.float() for t in random_boxes(200, 7))
            ours = mmcv_ops.nms(boxes, scores, threshold, offset)
            assert ours.equal(nms(boxes, scores, threshold, offset)[1])
    for ratio in (0, 2):
        for aligned in (True, False):
            x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(3))
            found = []
            for pool in (Pool.apply, None):
                leaf = x.clone().requires_grad_()
                rois = some_rois(torch.float32)
                if pool:
                    out = pool(leaf, rois, (3, 2), 0.5, ratio, aligned)
                else:
                    out = roi_align(leaf, rois, (3, 2), 0.5, ratio, 'avg', aligned)
                out.square().sum().backward()
                found.append((out.detach(), leaf.grad))
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
