"""Stochastic depth without the dropped samples, against timm's and MMPretrain's."""

import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block

from densessl.models.backbones import SwinTransformer
from densessl.models.backbones.openmmlab import ShiftWindowMSA, SwinBlock
from densessl.models.backbones.reference_block import ReferenceBlock
from densessl.models.backbones.stochastic_depth import Kept
from densessl.models.mlp import LeanMlp


def vit_blocks(rate):
    """Ours and timm's, with the same weights, float64."""
    torch.manual_seed(0)
    options = dict(dim=16, num_heads=2, qkv_bias=True, drop_path=rate)
    ours = ReferenceBlock(**options, mlp_layer=LeanMlp).double()
    theirs = Block(**options).double()
    theirs.load_state_dict(ours.state_dict())
    return (ours, theirs), ()


def swin_blocks(rate):
    """Ours and MMPretrain's: windows of 4 on maps of 6 x 6."""
    blocks = []
    arch = dict(embed_dims=16, depths=[2], num_heads=[2])
    for plain in (False, True):
        torch.manual_seed(0)
        swin = SwinTransformer(arch, img_size=24, window_size=4, drop_path_rate=rate)
        block = swin.double().model.stages[0].blocks[1]
        if plain:
            block.__class__, block.attn.__class__ = SwinBlock, ShiftWindowMSA
        blocks.append(block)
    return blocks, ((6, 6),)


def run(block, x, *args, seed):
    """Output, gradients and the next random number of a training call."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = block.train()(x, *args)
    grads = torch.autograd.grad((out * out.sin()).sum(), [x, *block.parameters()])
    return out, *grads, torch.rand(())


@pytest.mark.parametrize('build', [vit_blocks, swin_blocks])
@pytest.mark.parametrize(('rate', 'batch'), [(0.0, 2), (0.3, 5), (0.8, 3), (0.9, 1)])
def test_equals_a_mask_with_gradients(build, rate, batch):
    (ours, theirs), args = build(rate)
    x = torch.randn(batch, 36, 16, dtype=torch.float64)
    outs = []
    for seed in range(4):
        found, expected = (run(b, x, *args, seed=seed) for b in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        outs.append(found[0])
    different = any(not out.equal(outs[0]) for out in outs)
    assert different == (rate > 0 and (batch, rate) != (1, 0.9)) or batch == 1


def test_dropped_samples_do_not_go_through_the_branch():
    (block, _), _ = vit_blocks(0.5)
    seen = {}
    for name, module in (('attn', block.attn.proj), ('mlp', block.mlp)):
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: len(args[0])})
        )
    x = torch.randn(64, 4, 16, dtype=torch.float64)
    out = block.train()(x)
    assert all(16 < count < 48 for count in seen.values())
    assert seen['attn'] != seen['mlp']  # each branch draws its own
    untouched = (out == x).flatten(1).all(1).sum()
    assert 4 < untouched <= 64 - max(seen.values())
    block.eval()(x)
    assert seen == dict(attn=64, mlp=64)


def test_samples_on_another_device_are_masked():
    """There the number that stays would have to be waited for."""
    path = DropPath(0.5)
    kept = Kept.draw(path, torch.ones(6, 4, 16, device='meta'))
    assert kept.index is None and kept.scale.shape == (6, 1, 1)
    mask = torch.tensor([0.0, 2.0])[:, None, None]
    x, residual = torch.randn(2, 2, 4, 16)
    assert Kept(None, mask).of(x) is x
    torch.testing.assert_close(Kept(None, mask).add(x, residual), x + mask * residual)


def test_a_gradient_of_zero_where_all_are_dropped():
    (block, _), _ = vit_blocks(0.999)
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    torch.manual_seed(0)
    out = block.train()(x)
    assert out.equal(x)  # to the bit
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize('rate', [0.1, 0.4])
def test_share_and_scale(rate):
    (block, _), _ = vit_blocks(rate)
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1)
    kept = Kept.draw(block.train().drop_path1, x)
    assert len(kept.index) / len(x) == pytest.approx(1 - rate, abs=0.01)
    added = kept.add(x, kept.of(x)) - x
    assert added.mean() == pytest.approx(1, abs=0.02)
