"""The ViT against timm's own, position embeddings, dropping, masks and extra tokens."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from densessl.errors import DenseSSLError
from densessl.models.backbones import VisionTransformer, resize_pos_embed

SMALL = dict(embed_dims=32, depth=3, num_heads=2)


def vit(**options):
    torch.manual_seed(0)
    options = dict(arch=SMALL, patch_size=8, img_size=32) | options
    return VisionTransformer(**options).eval()


@pytest.mark.parametrize('cls_token', [True, False])
def test_equals_timm(cls_token):
    ours = vit(cls_token=cls_token)
    theirs = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=0,
        class_token=cls_token,
        global_pool='token' if cls_token else 'avg',
        fc_norm=False,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected = theirs.forward_features(images)
    out = ours(images)
    first = int(cls_token)
    torch.testing.assert_close(out.patches, expected[:, first:])
    if cls_token:
        torch.testing.assert_close(out.cls, expected[:, 0])


@pytest.mark.parametrize(
    ('arch', 'millions'),
    [('tiny', 5.5), ('small', 21.7), ('base', 85.8), ('large', 303.3), ('huge', 630.8)],
)
def test_parameter_counts(arch, millions):
    with torch.device('meta'):
        model = VisionTransformer(arch, 16 if arch != 'huge' else 14)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize('size', [(32, 32), (16, 48), (64, 24)])
def test_any_size_in_whole_patches(size):
    out = vit()(torch.randn(1, 3, *size))
    assert out.grid == (size[0] // 8, size[1] // 8)
    assert out.patches.shape == (1, out.grid[0] * out.grid[1], 32)


def test_size_that_the_patch_does_not_divide():
    with pytest.raises(
        DenseSSLError, match=r'30x32 px is not a multiple of patch_size=8'
    ):
        vit()(torch.randn(1, 3, 30, 32))


def cubic_matrix(size_in, size_out, offset):
    """Rows of bicubic weights (a = -0.75), without antialiasing, border repeated."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        place = (i + 0.5) * size_in / (size_out + offset) - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            d, a = abs(place - j), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), size_in - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize('grid', [(6, 6), (14, 20), (28, 5)])
@pytest.mark.parametrize('offset', [0.0, 0.1])
def test_pos_embed_is_bicubic_by_the_scale(grid, offset):
    table = torch.randn(1, 14, 14, 3)
    rows = cubic_matrix(14, grid[0], offset)
    columns = cubic_matrix(14, grid[1], offset)
    expected = torch.einsum('ih,jw,hwd->ijd', rows, columns, table[0].double())
    out = resize_pos_embed(table, grid, offset)
    assert (out.view(*grid, 3) - expected).abs().max() < 1e-5


def test_pos_embed_of_an_equal_token_count_is_still_resized():
    table = torch.randn(1, 8, 18, 4)
    square = resize_pos_embed(table, (12, 12), 0.0)
    plain = F.interpolate(table.permute(0, 3, 1, 2), (12, 12), mode='bicubic')
    torch.testing.assert_close(square, plain.permute(0, 2, 3, 1).flatten(1, 2))
    assert resize_pos_embed(table, (8, 18)).equal(table.flatten(1, 2))


def test_kept_tokens_equal_a_model_that_only_sees_them():
    model = vit(pos_embed=False)  # then a token depends on which others there are only
    images = torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(16)[:8] for _ in range(2)])
    out = model(images, keep=keep)
    assert out.patches.shape == (2, 8, 32)
    cells = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # B, 3, 16, 8, 8
    for b in range(2):
        strip = torch.cat(list(cells[b][:, keep[b]].unbind(1)), dim=2)[None]
        alone = model(strip)  # the kept patches side by side, one row of 8
        torch.testing.assert_close(out.patches[b], alone.patches[0], atol=1e-5, rtol=0)


def test_keep_all_in_order_changes_nothing():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    keep = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(model(images, keep=keep).patches, model(images).patches)


def test_masked_extra_tokens_leave_the_others_alone():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    extra = torch.randn(2, 3, 32)
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[:17, 17:] = False  # nobody attends to an extra token
    out = model(images, extra_tokens=extra, attn_mask=mask)
    plain = model(images)
    torch.testing.assert_close(out.patches, plain.patches, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.cls, plain.cls, atol=1e-5, rtol=0)
    assert out.extra.shape == (2, 3, 32)
    free = model(images, extra_tokens=extra)
    assert (free.patches - plain.patches).abs().max() > 1e-3


def test_layers_are_prefixes_of_the_model():
    model, images = vit(final_norm=False), torch.randn(1, 3, 32, 32)
    first, last = model.forward_layers(images, [0, -1])
    x, _ = model.embed(images)
    torch.testing.assert_close(first.patches, model.blocks[0](x)[:, 1:])
    torch.testing.assert_close(last.patches, model(images).patches)
    with pytest.raises(DenseSSLError, match='3 blocks'):
        model.forward_layers(images, [3])


def test_last_attention_reproduces_the_last_block():
    model, images = vit(final_norm=False), torch.randn(2, 3, 32, 32)
    attention = model.last_attention(images)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 17))
    x, _ = model.embed(images)
    for block in model.blocks[:-1]:
        x = block(x)
    block = model.blocks[-1]
    values = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 16))[:, :, 2]
    mixed = attention @ values.transpose(1, 2)
    x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
    x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(x[:, 1:], model(images).patches)


def test_options_take_effect():
    names = dict(
        vit(cls_token=False, final_norm=False, pos_embed=False).named_parameters()
    )
    assert not {'cls_token', 'pos_embed', 'norm.weight'} & set(names)
    rates = [block.drop_path1 for block in vit(drop_path_rate=0.3).blocks]
    assert [getattr(rate, 'drop_prob', 0.0) for rate in rates] == pytest.approx(
        [0.0, 0.15, 0.3]
    )
    assert vit(in_channels=5)(torch.randn(1, 5, 32, 32)).patches.shape == (1, 16, 32)


def test_every_parameter_gets_a_gradient():
    model = vit().train()
    out = model(torch.randn(2, 3, 16, 32))
    (out.patches.square().sum() + out.cls.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_unknown_arch_lists_the_known():
    with pytest.raises(DenseSSLError, match='choose from tiny, small'):
        VisionTransformer('smal')
