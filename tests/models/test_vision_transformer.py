"""The ViT against timm's own, position embeddings, dropping, masks and extra tokens."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

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
    """Rows of bicubic weights, without antialiasing."""
    places = [(i + 0.5) * size_in / (size_out + offset) for i in range(size_out)]
    return torch.cat([cubic_row(size_in, place) for place in places])


def cubic_row(size, place):
    """Weights ``(1, size)`` of samples at 0.5, 1.5, ...; a = -0.75, border repeated."""
    row = torch.zeros(1, size, dtype=torch.float64)
    place = float(place) - 0.5
    for j in range(math.floor(place) - 1, math.floor(place) + 3):
        d, a = abs(place - j), -0.75
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        row[0, min(max(j, 0), size - 1)] += near if d <= 1 else far
    return row


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


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('keep', [None, 7])
def test_references_leave_the_others_alone_to_the_bit(mode, keep):
    model, images = vit(drop_path_rate=0.5), torch.randn(3, 3, 32, 32)
    getattr(model, mode)()
    references = torch.randn(3, 5, 32)
    if keep is not None:
        keep = torch.stack([torch.randperm(16)[:keep] for _ in range(3)])
    outs = []
    for options in (dict(references=references), {}):
        torch.manual_seed(3)  # the same drop path
        outs.append(model(images, keep=keep, **options))
    (with_, without) = outs
    assert with_.patches.equal(without.patches) and with_.cls.equal(without.cls)
    assert with_.references.shape == (3, 5, 32) and without.references is None


def test_a_reference_does_not_see_the_other_references():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    references = torch.randn(2, 5, 32)
    changed = torch.randn(2, 5, 32)
    changed[:, 2] = references[:, 2]
    first, second = (
        model(images, references=x).references for x in (references, changed)
    )
    assert first[:, 2].equal(second[:, 2])
    assert (first[:, 3] - second[:, 3]).abs().max() > 1e-3


@pytest.mark.parametrize('cls_token', [True, False])
def test_references_are_masked_attention_of_timm(cls_token):
    model, images = vit(cls_token=cls_token), torch.randn(2, 3, 32, 32)
    references = torch.randn(2, 3, 32)
    x, _ = model.embed(images)
    count, first = x.shape[1], int(cls_token)
    mask = torch.zeros(count + 3, count + 3, dtype=torch.bool)
    mask[:count, :count] = True
    mask[count:, first:count] = True  # patches, not the class token
    mask[count:, count:] = torch.eye(3, dtype=torch.bool)
    x = torch.cat([x, references], 1)
    for block in model.blocks:
        x = Block.forward(block, x, attn_mask=mask)  # timm's
    x = model.norm(x)
    layers = model.forward_layers(images, [0, -1], references=references)
    torch.testing.assert_close(layers[1].references, x[:, count:])
    torch.testing.assert_close(layers[1].patches, x[:, first:count])
    assert layers[0].references.shape == (2, 3, 32)


def test_references_drop_the_paths_of_their_image():
    model = vit(drop_path_rate=0.6).train()
    images, references = torch.randn(1, 3, 32, 32), torch.randn(1, 2, 32)
    x, _ = model.embed(images)
    block = model.blocks[-1]  # of rate 0.6
    for seed in range(20):
        torch.manual_seed(seed)
        out, refs = block(x, None, references, 1)
        assert out.equal(x) == refs.equal(references)


@pytest.mark.parametrize('grid', [(4, 4), (6, 6), (3, 5)])
@pytest.mark.parametrize('cls_token', [True, False])
def test_embedding_at_a_patch_centre_is_the_patchs_own(grid, cls_token):
    model = vit(cls_token=cls_token)
    model.pos_embed.data.normal_()
    h, w = grid
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing='ij')
    centres = torch.stack([x / w, y / h], -1).view(1, -1, 2).expand(2, -1, -1)
    _, own = model.position_embeddings(grid)
    at = model.position_embeddings_at(centres, grid)
    assert (at - own).abs().max() < 2e-5


def test_embedding_between_the_patches_is_bicubic():
    model = vit(img_size=64)
    model.pos_embed.data.normal_()
    points = torch.rand(2, 50, 2)
    at = model.position_embeddings_at(points, (8, 8))
    rows, columns = (
        torch.cat([cubic_row(8, 8 * share) for share in points[..., axis].flatten()])
        for axis in (1, 0)
    )
    table = model.pos_embed.data[0, 1:].view(8, 8, 32).double()
    expected = torch.einsum('ph,pw,hwd->pd', rows, columns, table)
    assert (at.flatten(0, 1) - expected).abs().max() < 1e-4


def test_points_that_have_no_embedding():
    outside = torch.tensor([[[0.5, 1.2]]])
    with pytest.raises(DenseSSLError, match=r'outside its view, at 0\.5 or 1\.2'):
        vit().position_embeddings_at(outside, (4, 4))
    with pytest.raises(DenseSSLError, match='pos_embed=False leaves none'):
        vit(pos_embed=False).position_embeddings_at(outside, (4, 4))


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


@pytest.mark.parametrize('cls_token', [True, False])
def test_last_reference_attention_is_a_masked_softmax(cls_token):
    model, images = vit(cls_token=cls_token).double(), torch.randn(2, 3, 16, 32)
    images, references = images.double(), torch.randn(2, 3, 32).double()
    found = model.last_reference_attention(images, references)
    # all tokens in one table, and what a reference must not see at minus infinity
    x, _ = model.embed(images)
    count, first = x.shape[1], int(cls_token)
    mask = torch.full((count + 3, count + 3), -math.inf).double()
    mask[:count, :count] = 0
    mask[count:, first:count] = 0
    mask[count:, count:].fill_diagonal_(0)
    x = torch.cat([x, references], 1)
    for block in model.blocks[:-1]:
        x = Block.forward(block, x, attn_mask=mask)  # timm's
    block = model.blocks[-1]
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, -1)
    for head in (0, 1):
        part = slice(16 * head, 16 * (head + 1))  # channels of the head
        logits = q[..., part] @ k[..., part].mT / 4 + mask
        weights = (logits.exp() / logits.exp().sum(-1, keepdim=True))[:, count:]
        own = weights[:, :, count:].diagonal(dim1=1, dim2=2)
        expected = torch.cat([weights[:, :, first:count], own[..., None]], -1)
        torch.testing.assert_close(found[:, head], expected)


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


def test_bilinear_positions_are_triangle_weighted_means():
    # 6 -> 3: cell i's weights fall linearly over 2 old cells from its centre, 2 i + 1
    table = torch.randn(1, 6, 6, 2, dtype=torch.float64)
    weights = torch.zeros(3, 6).double()
    for i in range(3):
        for j in range(6):
            weights[i, j] = max(0.0, 1 - abs((j + 0.5) - (2 * i + 1)) / 2)
    weights /= weights.sum(1, keepdim=True)
    expected = torch.einsum('ia,jb,nabd->nijd', weights, weights, table)
    found = resize_pos_embed(table, (3, 3), mode='bilinear')
    torch.testing.assert_close(found.unflatten(1, (3, 3)), expected, rtol=0, atol=1e-6)
    model = vit(pos_embed_resize='bilinear')
    images = torch.randn(1, 3, 16, 16)
    assert not model(images).patches.allclose(vit()(images).patches)
    with pytest.raises(DenseSSLError, match="pos_embed_resize='nearest'; choose"):
        vit(pos_embed_resize='nearest')


@pytest.mark.parametrize('keep', [None, 5])
def test_without_positions_tokens_do_not_know_their_place(keep):
    model = vit(cls_token=False)
    images = torch.randn(1, 3, 32, 32)
    mirrored = images.unflatten(3, (4, 8)).flip(3).flatten(3)  # patches change places
    index = torch.arange(16)
    other = index.unflatten(0, (4, 4)).flip(1).flatten()
    options = dict(positions=False)
    if keep:
        options['keep'] = index[None, :keep]
    found = model(images, **options).patches
    if keep:
        options['keep'] = other[None, :keep]
        torch.testing.assert_close(model(mirrored, **options).patches, found)
    else:
        swapped = model(mirrored, **options).patches
        torch.testing.assert_close(swapped[:, other], found)
        assert not model(mirrored).patches[:, other].allclose(model(images).patches)
