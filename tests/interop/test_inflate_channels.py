"""The first convolution for other channels: closed forms, and every backbone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densessl.errors import DenseSSLError
from densessl.interop.backbone import load_strictly
from densessl.interop.channels import fit_channels, inflate_channels
from densessl.registry import MODELS

SMALL = dict(embed_dims=[8] * 4, depths=[1] * 4, num_heads=[1] * 4)
BACKBONES = dict(
    vit=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=16, depth=1, num_heads=2),
        patch_size=8,
        img_size=64,
    ),
    swin=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=8, depths=[2] * 4, num_heads=[1, 2, 4, 8]),
    ),
    cvt=dict(type='CvT', arch=SMALL),
    vil=dict(type='VisionLongformer', arch=SMALL, num_heads=None),
    timm_vit=dict(type='TimmBackbone', name='vit_tiny_patch16_224'),
    timm_resnet=dict(type='TimmBackbone', name='resnet10t'),
)


def weights(stored, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, stored, 3, 4, generator=generator)


@settings(max_examples=60, deadline=None)
@given(stored=st.integers(1, 6), channels=st.integers(1, 20), seed=st.integers(0, 99))
def test_grey_is_answered_as_before(stored, channels, seed):
    weight = weights(stored, seed)
    found = inflate_channels(weight, channels)
    assert found.shape == (7, channels, 3, 4) and found.dtype == weight.dtype
    torch.testing.assert_close(found.sum(1), weight.sum(1), rtol=1e-5, atol=1e-5)


def test_closed_forms():
    w = weights(3)
    r, g, b = w.unbind(1)
    assert inflate_channels(w, 3) is w
    for channels, wanted in (
        (1, [r + g + b]),
        (2, [(r + g + b) / 2] * 2),
        (4, [r / 2, g, b, r / 2]),
        (5, [r / 2, g / 2, b, r / 2, g / 2]),
        (6, [r / 2, g / 2, b / 2] * 2),
        (7, [r / 3, g / 2, b / 2, r / 3, g / 2, b / 2, r / 3]),
    ):
        found = inflate_channels(w, channels)
        torch.testing.assert_close(found, torch.stack(wanted, 1))
    (one,) = weights(1).unbind(1)
    found = inflate_channels(weights(1), 5)
    torch.testing.assert_close(found, torch.stack([one / 5] * 5, 1))


@pytest.mark.parametrize('channels', [1, 6, 9])
def test_agrees_with_timm_where_timm_keeps_the_response(channels):
    from timm.models import adapt_input_conv

    wanted = adapt_input_conv(channels, weights(3))
    torch.testing.assert_close(inflate_channels(weights(3), channels), wanted)


def build(name, channels):
    torch.manual_seed(channels)
    return MODELS.build(BACKBONES[name] | dict(in_channels=channels)).eval()


@pytest.mark.parametrize('channels', [1, 2, 4, 5])
@pytest.mark.parametrize('name', BACKBONES)
def test_every_backbone_takes_inflated_weights(name, channels):
    rgb, other = build(name, 3), build(name, channels)
    state = rgb.state_dict()
    with pytest.raises(DenseSSLError, match='--inflate-channels') as error:
        fit_channels(other, state, 'weights.safetensors', inflate=False)
    assert f'3 channels and the backbone has in_channels={channels}' in str(error.value)
    fitted = fit_channels(other, state, 'weights.safetensors', inflate=True)
    load_strictly(other, fitted, 'weights.safetensors')
    grey = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = rgb(grey.expand(-1, 3, -1, -1)).patches
        found = other(grey.expand(-1, channels, -1, -1)).patches
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    again = build(name, 3).state_dict()
    assert fit_channels(rgb, again, 'x', inflate=False) is again


def test_other_differences_are_left_to_the_loader():
    vit, swin = build('vit', 5), build('swin', 5)
    state = build('vit', 3).state_dict()
    wider = MODELS.build(
        BACKBONES['vit'] | dict(arch=dict(embed_dims=32, depth=1, num_heads=2))
    ).state_dict()
    assert fit_channels(vit, wider, 'x', inflate=True) is wider
    assert fit_channels(swin, state, 'x', inflate=True) is state
    one = dict(state, **{'norm.weight': torch.zeros(5)})
    one['patch_embed.proj.weight'] = vit.state_dict()['patch_embed.proj.weight']
    assert fit_channels(vit, one, 'x', inflate=True) is one
    with pytest.raises(DenseSSLError, match='another architecture'):
        load_strictly(vit, one, 'x')
