"""Windows of a map against rolling, filling up and cutting, and attention in them."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from densessl.models.backbones import window_attention, windows
from densessl.models.backbones.window_attention import _shift_mask, in_parts
from densessl.models.backbones.windows import (
    attend_in_windows,
    from_windows,
    to_windows,
    window_layout,
)

CPU = torch.device('cpu')
MAPS = [((8, 8), 4, 0), ((8, 8), 4, 2), ((7, 5), 4, 0), ((7, 5), 4, 1), ((3, 3), 7, 3)]


def cut(x, hw_shape, side, shift, filler):
    """Windows as Swin's authors describe them: fill up, roll, cut."""
    x = x.unflatten(1, hw_shape)
    down, right = (-length % side for length in hw_shape)
    full = filler.expand(len(x), hw_shape[0] + down, hw_shape[1] + right, -1).clone()
    full[:, : hw_shape[0], : hw_shape[1]] = x
    full = full.roll((-shift, -shift), (1, 2))
    rows = [
        full[:, i : i + side, j : j + side].flatten(1, 2)
        for i in range(0, full.shape[1], side)
        for j in range(0, full.shape[2], side)
    ]
    return torch.cat(rows, 1)


@pytest.mark.parametrize(('hw_shape', 'side', 'shift'), MAPS)
def test_layout_is_filling_up_rolling_and_cutting(hw_shape, side, shift):
    torch.manual_seed(0)
    layout = window_layout(hw_shape, side, shift, CPU)
    height, width = hw_shape
    x = torch.randn(2, height * width, 3)
    filler = torch.randn(3)
    found = to_windows(x, layout, filler)
    assert found.equal(cut(x, hw_shape, side, shift, filler))
    assert to_windows(x, layout).equal(cut(x, hw_shape, side, shift, torch.zeros(3)))
    assert from_windows(found, layout).equal(x)
    assert (layout.holes is None) == (height % side == width % side == 0)


@pytest.mark.parametrize(('hw_shape', 'side', 'shift'), MAPS)
def test_gradients_of_bringing_in_order(hw_shape, side, shift):
    layout = window_layout(hw_shape, side, shift, CPU)
    make = dict(dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, hw_shape[0] * hw_shape[1], 3, **make)
    assert gradcheck(lambda x, f: to_windows(x, layout, f), (x, torch.randn(3, **make)))
    taken = torch.randn(2, len(layout.order), 3, **make)
    assert gradcheck(lambda x: from_windows(x, layout), taken)


def plain_attention(qkv, bias):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = bias.repeat(len(qkv) // len(bias), 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


@pytest.mark.parametrize('scores', [1, 3 * 2 * 5 * 5 + 1, 10**6])
@pytest.mark.parametrize('kinds', [1, 3])
def test_attention_with_gradients(scores, kinds, monkeypatch):
    monkeypatch.setattr(windows, '_CPU_SCORES', scores)  # by windows, or all at once
    torch.manual_seed(0)
    make = dict(dtype=torch.float64, requires_grad=True)
    qkv, bias = torch.randn(6, 5, 3, 2, 4, **make), torch.randn(kinds, 2, 5, 5, **make)
    upper = torch.randn(6, 5, 2, 4, dtype=torch.float64)
    results = []
    for attend in (plain_attention, attend_in_windows):
        out = attend(qkv, bias)
        results.append([out, *torch.autograd.grad(out, (qkv, bias), upper)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_attention_in_bfloat16():
    torch.manual_seed(0)
    qkv = torch.randn(6, 9, 3, 2, 4, requires_grad=True)
    bias = torch.randn(3, 2, 9, 9, requires_grad=True)
    upper = torch.randn(6, 9, 2, 4)
    exact = plain_attention(qkv, bias)
    rounded = attend_in_windows(qkv.bfloat16(), bias)
    assert rounded.dtype == torch.bfloat16
    pairs = zip(
        [exact, *torch.autograd.grad(exact, (qkv, bias), upper)],
        [rounded, *torch.autograd.grad(rounded, (qkv, bias), upper.bfloat16())],
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).norm() < 0.02 * a.norm()


def test_parts_that_a_shift_brought_together_share_nothing():
    mask = _shift_mask((8, 8), 4, 2, CPU)
    shares = mask.softmax(-1)
    together = shares > 0
    assert together.equal(mask == 0) and not together.all()
    assert (shares[together] > 1e-3).all()  # and no denormal number among them
    assert together.sum(-1).min() == 4  # a 2 x 2 corner is the smallest part


def test_samples_in_parts(monkeypatch):
    monkeypatch.setattr(window_attention, '_CPU_BYTES', 2 * 5 * 16 * 8)
    torch.manual_seed(0)
    layer, seen = torch.nn.Linear(4, 16).double(), []

    def branch(x):
        seen.append(len(x))
        return layer(x)

    x = torch.randn(5, 5, 4, dtype=torch.float64, requires_grad=True)
    found, expected = in_parts(branch, x, 16), layer(x)
    assert seen == [2, 2, 1]
    for a, b in zip(
        torch.autograd.grad(found.sin().sum(), [x, *layer.parameters()]),
        torch.autograd.grad(expected.sin().sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    seen.clear()
    in_parts(branch, x[:2], 16)
    assert seen == [2]
