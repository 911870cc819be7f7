"""The pyramid of a ViT: sizes, values found in other ways, refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS as ROOT_MODELS

from densessl.errors import DenseSSLError
from densessl.interop import mmcv_ops
from densessl.models.necks import ViTFeaturePyramid
from densessl.registry import MODELS

BN = dict(type='BN')


def maps(dims=6, h=5, w=7, batch=2):
    g = torch.Generator().manual_seed(h * 100 + w)
    return [torch.randn(batch, dims, h, w, generator=g) for _ in range(4)]


@given(st.sampled_from([8, 16]), st.integers(4, 9), st.integers(4, 9))
@settings(max_examples=20, deadline=None)
def test_strides_are_4_8_16_32(patch, h, w):
    out = ViTFeaturePyramid(6, patch, BN)(maps(h=h, w=w))
    for stride, x in zip((4, 8, 16, 32), out, strict=True):
        assert x.shape == (2, 6, h * patch // stride, w * patch // stride)


@pytest.mark.parametrize('patch', [8, 16])
def test_levels_are_written_out(patch):  # a deconvolution fills disjoint 2 x 2 blocks
    torch.manual_seed(0)
    neck = ViTFeaturePyramid(6, patch, BN)
    xs = maps()

    def double(x, layer):
        out = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        for i in (0, 1):
            for j in (0, 1):
                part = torch.einsum('bchw,cd->bdhw', x, layer.weight[:, :, i, j])
                out[:, :, i::2, j::2] = part + layer.bias[:, None, None]
        return out

    def blocks(x, side):  # whole ones only
        h, w = (n // side for n in x.shape[2:])
        x = x[:, :, : h * side, : w * side].reshape(*x.shape[:2], h, side, w, side)
        return x.amax((3, 5))

    out = neck(xs)
    if patch == 8:
        expected = [double(xs[0], neck.levels[0]), xs[1], blocks(xs[2], 2)]
        expected.append(blocks(xs[3], 4))
    else:
        first, norm, _, second = neck.levels[0]
        x = double(xs[0], first)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        expected = [double(x, second), double(xs[1], neck.levels[1]), xs[2]]
        expected.append(blocks(xs[3], 2))
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('patch', [8, 16])
def test_equals_mmsegmentation_s_with_its_weights(patch):
    pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    mmcv_ops.install()
    from mmseg.models.necks.featurepyramid import Feature2Pyramid

    rescales = [4, 2, 1, 0.5] if patch == 16 else [2, 1, 0.5, 0.25]
    torch.manual_seed(1)
    theirs = Feature2Pyramid(6, rescales, norm_cfg=BN)
    ours = ViTFeaturePyramid(6, patch, BN)
    state = theirs.state_dict()
    finest, next_finest = 'upsample_4x.', 'upsample_2x.0.'
    if patch == 8:
        finest = 'upsample_2x.0.'
    ours.load_state_dict(
        {
            key.replace(finest, 'levels.0.').replace(next_finest, 'levels.1.'): value
            for key, value in state.items()
        }
    )
    for a, b in zip(ours(maps()), theirs(maps()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('patch', [8, 16])
def test_each_map_and_each_weight_gets_a_gradient(patch):
    neck = ViTFeaturePyramid(6, patch, BN)
    xs = [x.requires_grad_() for x in maps()]
    for level, out in enumerate(neck(xs)):
        grads = torch.autograd.grad(out.square().sum(), xs, allow_unused=True)
        assert [grad is not None for grad in grads] == [i == level for i in range(4)]
    sum(out.pow(3).sum() for out in neck(xs)).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_pooling_takes_the_greatest():
    torch.testing.assert_close(
        ViTFeaturePyramid(6, 8, BN)(maps(h=8, w=8))[3],
        F.max_pool2d(F.max_pool2d(maps(h=8, w=8)[3], 2), 2),
    )


def test_synchronised_norm_by_default():
    (norm,) = (m for m in ViTFeaturePyramid(6).modules() if 'Batch' in type(m).__name__)
    assert isinstance(norm, torch.nn.SyncBatchNorm)
    assert isinstance(ViTFeaturePyramid(6, 16, BN).levels[0][1], torch.nn.BatchNorm2d)


def test_other_packages_build_it_in_a_list():
    neck = ROOT_MODELS.build(
        [dict(type='densessl.ViTFeaturePyramid', embed_dims=6, patch_size=8)]
    )
    assert [x.shape[-1] for x in neck.eval()(maps())] == [14, 7, 3, 1]
    assert MODELS.get('ViTFeaturePyramid') is ViTFeaturePyramid


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: ViTFeaturePyramid(6, 32), 'patch_size=32.*8 or 16'),
        (lambda: ViTFeaturePyramid(6, 14), 'patch_size=14.*8 or 16'),
        (lambda: ViTFeaturePyramid(6)(maps()[:3]), '3 maps for 4.*out_indices'),
        (lambda: ViTFeaturePyramid(8)(maps()), r'\(2, 6, 5, 7\).*embed_dims'),
        (lambda: ViTFeaturePyramid(6)(maps(h=1)), '1 x 7.*at least 32 px'),
        (lambda: ViTFeaturePyramid(6, 8)(maps(w=3)), '5 x 3.*at least 32 px'),
    ],
)
def test_wrong_input_is_one_line(make, message):
    with pytest.raises(DenseSSLError, match=message) as error:
        make()
    assert '\n' not in str(error.value)
