"""Swin and timm's models behind the same interface."""

import pytest
import torch
from mmpretrain.models import SwinTransformer as MMSwin

from densessl.errors import DenseSSLError
from densessl.models.backbones import SwinTransformer, TimmBackbone


def test_swin_equals_mmpretrain():
    torch.manual_seed(0)
    ours = SwinTransformer('tiny').eval()
    theirs = MMSwin('tiny')
    theirs.eval()  # returns None
    theirs.load_state_dict(ours.model.state_dict())
    images = torch.randn(1, 3, 224, 224)
    (expected,) = theirs(images)
    out = ours(images)
    assert out.grid == (7, 7) and ours.embed_dims == 768
    torch.testing.assert_close(out.patches, expected.flatten(2).mT)


@pytest.mark.parametrize('size', [96, 160])
def test_swin_takes_small_and_uneven_views(size):
    out = SwinTransformer('tiny').eval()(torch.randn(1, 3, size, size))
    assert out.grid == (size // 32, size // 32)
    assert out.patches.isfinite().all()


def test_swin_attends_within_shifted_windows_only_where_maps_exceed_them():
    # On a 3 x 3 map every token sees every other: a change anywhere reaches all.
    model = SwinTransformer('tiny').eval()
    images = torch.randn(1, 3, 96, 96)
    changed = images.clone()
    changed[..., :32, :32] += 1
    moved = (model(images).patches - model(changed).patches).abs().amax(-1)
    assert (moved > 1e-6).all()


@pytest.mark.parametrize(
    ('name', 'size', 'grid', 'cls'),
    [
        ('vit_tiny_patch16_224', 96, (6, 6), True),
        ('vit_tiny_r_s16_p8_224', 64, (2, 2), True),
        ('swin_tiny_patch4_window7_224', 96, (3, 3), False),
        ('resnet18', 96, (3, 3), False),
        ('vit_small_patch14_reg4_dinov2', 98, (7, 7), True),
    ],
)
def test_timm_models_at_other_sizes(name, size, grid, cls):
    model = TimmBackbone(name).eval()
    out = model(torch.randn(1, 3, size, size))
    assert out.grid == grid
    assert out.patches.shape == (1, grid[0] * grid[1], model.embed_dims)
    assert (out.cls is not None) == cls


def test_timm_tokens_are_timms():
    torch.manual_seed(0)
    model = TimmBackbone('vit_small_patch14_reg4_dinov2').eval()
    images = torch.randn(1, 3, 56, 56)
    x = model.model.forward_features(images)
    out = model(images)
    assert out.patches.equal(x[:, 5:]) and out.cls.equal(x[:, 0])


def test_unknown_timm_name_suggests():
    with pytest.raises(DenseSSLError, match=r"no model 'vit_tinny'.*such as .*_tiny"):
        TimmBackbone('vit_tinny')
