"""Swin and timm's models behind the same interface, and what CvT and ViL share."""

import copy

import pytest
import torch
from mmpretrain.models import SwinTransformer as MMSwin

from densessl.errors import DenseSSLError
from densessl.models.backbones import (
    CvT,
    SwinTransformer,
    TimmBackbone,
    VisionLongformer,
)

NARROW = dict(embed_dims=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 3, 4])


def mmpretrains_swin(ours, arch, windows, **options):
    """MMPretrain's own model with the weights of ours."""
    theirs = MMSwin(arch, stage_cfgs=[dict(window_size=w) for w in windows], **options)
    theirs.eval()  # returns None
    theirs.load_state_dict(ours.model.state_dict())
    return theirs


@pytest.mark.parametrize('windows', [[7] * 4, [14, 14, 14, 7]])
def test_swin_tiny_equals_mmpretrain(windows):
    torch.manual_seed(0)
    ours = SwinTransformer(window_size=windows).eval()
    images = torch.randn(1, 3, 224, 224)
    (expected,) = mmpretrains_swin(ours, 'tiny', windows)(images)
    out = ours(images)
    assert out.grid == (7, 7) and ours.embed_dims == 768
    torch.testing.assert_close(out.patches, expected.flatten(2).mT)


def spread_biases(model):
    """Position biases that matter: at std 0.02 a shift of windows hardly shows."""
    for name, parameter in model.named_parameters():
        if name.endswith('relative_position_bias_table'):
            torch.nn.init.normal_(parameter, std=2.0)
    return model.eval()


@pytest.mark.parametrize(
    ('size', 'windows'),
    [
        (96, [7, 7, 6, 3]),
        (160, [7, 7, 7, 5]),
        (224, [14, 14, 14, 7]),
        (256, [7, 7, 7, 7]),
        (448, [14, 14, 14, 7]),
    ],
)
def test_swin_equals_mmpretrain_at_its_own_size(size, windows):
    torch.manual_seed(0)
    ours = SwinTransformer(NARROW, img_size=size, window_size=windows)
    theirs = mmpretrains_swin(spread_biases(ours), NARROW, windows)
    images = torch.randn(1, 3, size, size)
    out = ours(images)
    assert out.grid == (size // 32, size // 32)
    torch.testing.assert_close(out.patches, theirs(images)[0].flatten(2).mT)


@pytest.mark.parametrize('size', [96, 160, 200, 224, 320, 448])
@pytest.mark.parametrize(
    ('windows', 'depths'), [([7] * 4, [2, 2, 2, 1]), ([14, 14, 14, 7], [2, 2, 1, 1])]
)
def test_swin_pads_views_of_other_sizes_as_mmpretrain(size, windows, depths):
    # one block in the stages that do not shift at 224: MMPretrain's does not shift
    torch.manual_seed(0)
    arch = NARROW | dict(depths=depths)
    ours = spread_biases(SwinTransformer(arch, window_size=windows))
    theirs = mmpretrains_swin(ours, arch, windows, pad_small_map=True)
    images = torch.randn(1, 3, size, size)
    out = ours(images)
    assert out.grid == (-(-size // 32),) * 2
    torch.testing.assert_close(out.patches, theirs(images)[0].flatten(2).mT)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(window_size=14),
            r'stage 4 has a window of 14 on a 7 x 7 map at img_size=224; '
            r'give window_size=\[14, 14, 14, 7\]$',
        ),
        (
            dict(img_size=96),
            r'stage 3 has a window of 7 on a 6 x 6 map at img_size=96; '
            r'give window_size=\[7, 7, 6, 3\]$',
        ),
        (dict(window_size=[7, 7]), r'window_size=\[7, 7\] for 4 stages; give one'),
    ],
)
def test_swin_windows_that_do_not_fit(options, message):
    with pytest.raises(DenseSSLError, match=message):
        SwinTransformer(NARROW, **options)


def test_swin_window_may_be_the_whole_map():
    out = SwinTransformer(NARROW, img_size=200, window_size=[7, 7, 7, 7]).eval()(
        torch.randn(1, 3, 200, 200)  # 200 / 32 rounds up to 7
    )
    assert out.grid == (7, 7)


def test_swin_of_three_stages():
    arch = dict(embed_dims=12, depths=[1, 1, 2], num_heads=[1, 2, 3])
    model = SwinTransformer(arch, window_size=[7, 7, 14])
    out = model.eval()(torch.randn(1, 3, 96, 96))
    assert model.embed_dims == 48 and out.grid == (6, 6)
    assert out.patches.shape == (1, 36, 48) and out.patches.isfinite().all()


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


SMALL = dict(embed_dims=[8, 16, 24, 32], depths=[1, 2, 2, 1], num_heads=[1, 2, 2, 4])
both = pytest.mark.parametrize('kind', [CvT, VisionLongformer])


def small(kind, seed=0, **options):
    torch.manual_seed(seed)
    return kind(SMALL, **options)


@both
def test_parameters_as_in_the_paper(kind):
    with torch.device('meta'):
        model = kind()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx({CvT: 29, VisionLongformer: 28}[kind], rel=0.03)
    assert model.embed_dims == 768 and model.patch_size == 32


@both
@pytest.mark.parametrize('size', [(96, 96), (160, 160), (224, 96), (448, 448)])
def test_grids_of_views(kind, size):
    model = small(kind).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, *size))
    assert out.grid == (size[0] // 32, size[1] // 32) and out.cls is None
    assert out.patches.shape == (1, out.grid[0] * out.grid[1], 32)
    assert out.patches.isfinite().all()
    torch.testing.assert_close(  # LayerNormed, with a new norm's weights
        out.patches.mean(-1), torch.zeros(1, out.patches.shape[1]), atol=1e-5, rtol=0
    )


@both
def test_uneven_sizes_and_channels(kind):
    out = small(kind, in_channels=5).eval()(torch.randn(2, 5, 100, 65))
    assert out.grid == (4, 3 if kind is VisionLongformer else 2)
    assert out.patches.isfinite().all()


@both
@pytest.mark.parametrize('autocast', [False, True])
def test_gradients_reach_all_parameters(kind, autocast):
    model = small(kind, drop_path_rate=0.0).train()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        patches = model(torch.randn(2, 3, 96, 96)).patches
    (patches.float() * torch.randn(patches.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@both
def test_state_dict_and_evaluation_are_exact(kind):
    model, other = small(kind).eval(), small(kind, seed=1).eval()
    images = torch.randn(1, 3, 96, 96)
    out = model(images).patches
    assert not out.equal(other(images).patches)
    other.load_state_dict(model.state_dict(), strict=True)
    assert out.equal(other(images).patches) and out.equal(model(images).patches)


@both
def test_teacher_without_drop_path(kind):
    student = small(kind, drop_path_rate=0.9).train()
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.0
    plain = small(kind, drop_path_rate=0.0).train()
    images = torch.randn(2, 3, 96, 96)
    expected = plain(images).patches
    assert teacher(images).patches.equal(expected)
    assert not student(images).patches.equal(expected)


@both
def test_drop_path_grows_from_block_to_block(kind):
    model = small(kind, drop_path_rate=0.5)
    rates = [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@both
def test_initial_weights(kind):
    model = kind()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any()


@both
@pytest.mark.parametrize(
    ('arch', 'message'),
    [
        ('large', "unknown arch 'large'; choose from tiny"),
        (dict(embed_dims=[8]), 'give embed_dims, depths, num_heads'),
        (SMALL | dict(depths=[1]), 'each with one number a stage'),
        (SMALL | dict(num_heads=[1, 2, 2, 5]), 'embed_dims=32 do not divide among'),
    ],
)
def test_architectures_that_do_not_fit(kind, arch, message):
    with pytest.raises(DenseSSLError, match=f'^{kind.__name__}: .*{message}'):
        kind(arch)
