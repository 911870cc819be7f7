"""Features of imported networks against forwards that read the authors' names."""

import pytest
import timm
import torch
import torch.nn.functional as F
from authors_checkpoints import (
    SWINS,
    VITS,
    assert_near,
    densedino_file,
    dinov2_file,
    images,
    load,
    mmpretrain_vit,
    part,
    save,
)
from authors_files import (
    Draw,
    ca_head,
    cvt,
    dino_head,
    moby_mlp,
    named,
    selfpatch_vit,
    swin,
    vit,
)
from mmpretrain.models import VisionTransformer as MMVisionTransformer
from timm.models import swin_transformer, vision_transformer
from torch import nn

from densessl.interop.authors import export_checkpoint
from densessl.models.batch_norm import BatchNormMLP
from densessl.models.features import Tokens
from densessl.models.heads.projector import DINOProjector
from densessl.models.necks import ClassAttentionNeck


def linear(x, weights, name):
    return F.linear(x, weights[f'{name}.weight'], weights[f'{name}.bias'])


def layer_norm(x, weights, name, eps=1e-6):
    shape = x.shape[-1:]
    weight, bias = weights[f'{name}.weight'], weights[f'{name}.bias']
    return F.layer_norm(x, shape, weight, bias, eps)


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v):
    shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize('sizes', VITS)
def test_dino_vit_is_timms(tmp_path, sizes):
    width, depth, patch, side = sizes
    weights = vit(Draw(1), *sizes)
    _, backbone = load(save(tmp_path, dict(teacher=named('backbone', weights))), 'dino')
    theirs = timm.create_model(
        'vit_small_patch16_224',
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=max(1, width // 64),
        patch_size=patch,
        img_size=side * patch,
    ).eval()
    theirs.load_state_dict(weights)
    x = images(side * patch)
    expected = theirs.forward_features(x)
    tokens = backbone(x)
    assert_near(torch.cat([tokens.cls[:, None], tokens.patches], 1), expected)


@torch.no_grad()
def test_selfpatch_vit_and_aggregator(tmp_path):
    width, depth, patch, side = sizes = (128, 2, 8, 3)
    weights, head = selfpatch_vit(Draw(2), *sizes), ca_head(Draw(3), width)
    projector = dino_head(Draw(4), width, 12)
    file = dict(
        teacher={
            **named('backbone', weights),
            **named('ca_head', head),
            **named('p_head', projector),
            **named('c_head', projector),
        }
    )
    imported, backbone = load(save(tmp_path, file), 'selfpatch')

    pictures = images(side * patch)
    kernel = weights['patch_embed.proj.weight']
    x = F.conv2d(pictures, kernel, weights['patch_embed.proj.bias'], patch)
    x = x.flatten(2).mT + weights['pos_embed']
    for i in range(depth):
        name = f'blocks.{i}'
        qkv = linear(
            layer_norm(x, weights, f'{name}.norm1'), weights, f'{name}.attn.qkv'
        )
        out = attend(*(split(y, 2) for y in qkv.chunk(3, -1)))
        x = x + linear(out, weights, f'{name}.attn.proj')
        hidden = linear(
            layer_norm(x, weights, f'{name}.norm2'), weights, f'{name}.mlp.fc1'
        )
        x = x + linear(F.gelu(hidden), weights, f'{name}.mlp.fc2')
    tokens = backbone(pictures)
    assert_near(tokens.patches, x)

    token = head['cls_token'].expand(len(x), -1, -1)
    for i in range(2):
        name = f'cls_blocks.{i}'
        both = layer_norm(torch.cat([token, x], 1), head, f'{name}.norm1')
        q, k, v = (
            split(linear(y, head, f'{name}.attn.{layer}'), 2)
            for y, layer in ((both[:, :1], 'q'), (both, 'k'), (both, 'v'))
        )
        token = token + linear(attend(q, k, v), head, f'{name}.attn.proj')
        hidden = linear(
            layer_norm(token, head, f'{name}.norm2'), head, f'{name}.mlp.fc1'
        )
        token = token + linear(F.gelu(hidden), head, f'{name}.mlp.fc2')
    neck = ClassAttentionNeck(width)
    neck.load_state_dict(part(imported, 'teacher.neck.'))
    assert_near(neck.pool(tokens), layer_norm(token, head, 'norm')[:, 0])

    z = x
    for i in (0, 2):
        z = F.gelu(linear(z, projector, f'mlp.{i}'))
    z = F.normalize(linear(z, projector, 'mlp.4'), dim=-1)
    direction = F.normalize(projector['last_layer.weight_v'], dim=1)
    logits = z @ (projector['last_layer.weight_g'] * direction).T
    ours = DINOProjector(width, 12, hidden_dims=48, bottleneck_dims=16)
    ours.load_state_dict(part(imported, 'projectors.selfpatch.'))
    assert_near(ours(x), logits)


@torch.no_grad()
@pytest.mark.parametrize('layout', ['esvit', 'moby', 'timm', 'mmpretrain'])
@pytest.mark.parametrize('sizes', SWINS)
def test_swin_is_timms(tmp_path, sizes, layout):
    """The order of patch merging, the bias tables and the shifts among others."""
    width, depths, heads, windows, side = sizes
    weights = swin(Draw(5), *sizes)
    theirs = timm.create_model(
        'swin_tiny_patch4_window7_224',
        num_classes=0,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        window_size=windows[0],
        img_size=4 * side,
    ).eval()
    state = swin_transformer.checkpoint_filter_fn(weights, theirs)
    theirs.load_state_dict(state)
    file = dict(
        esvit=dict(teacher=weights | named('head', dino_head(Draw(6), 8 * width, 12))),
        moby=dict(model=named('encoder_k', weights)),
        timm=state,
        mmpretrain=None,
    )[layout]
    if layout == 'mmpretrain':
        imported, _ = load(save(tmp_path, weights), 'esvit')
        file = export_checkpoint(imported.state, imported.config, 'mmpretrain')
    _, backbone = load(save(tmp_path, file), layout)
    x = images(4 * side)
    expected = theirs.forward_features(x).flatten(1, 2)
    assert_near(backbone(x).patches, expected)


@torch.no_grad()
@pytest.mark.parametrize('registers', [0, 4])
def test_dinov2_is_timms_own_conversion(tmp_path, registers):
    sizes = (64, 2, 14, 3)
    weights = dinov2_file(Draw(7), sizes, registers)
    _, backbone = load(save(tmp_path, dict(weights)), 'dinov2')
    name = f'vit_small_patch14_{"reg4_" if registers else ""}dinov2'
    options = dict(embed_dim=64, depth=2, num_heads=1, img_size=42, num_classes=0)
    theirs = timm.create_model(name, **options).eval()
    converted = vision_transformer.checkpoint_filter_fn(dict(weights), theirs)
    theirs.load_state_dict(converted)
    for name, value in converted.items():
        assert torch.equal(backbone.model.state_dict()[name], value), name
    x = images(42)
    expected = theirs.forward_features(x)
    assert_near(backbone(x).patches, expected[:, 1 + registers :])
    assert_near(backbone(x).cls, expected[:, 0])


@torch.no_grad()
def test_mmpretrain_vit_is_mmpretrains(tmp_path):
    width, depth, patch, side = sizes = (64, 2, 8, 4)
    weights = mmpretrain_vit(vit(Draw(8), *sizes))
    _, backbone = load(save(tmp_path, dict(state_dict=weights)), 'mmpretrain')
    arch = dict(
        embed_dims=width, num_layers=depth, num_heads=1, feedforward_channels=4 * width
    )
    theirs = MMVisionTransformer(arch, 32, patch, out_type='raw')
    theirs.eval()  # returns None there
    theirs.load_state_dict({k.removeprefix('backbone.'): v for k, v in weights.items()})
    x = images(side * patch)
    tokens = backbone(x)
    ours = torch.cat([tokens.cls[:, None], tokens.patches], 1)
    assert_near(ours, theirs(x)[0])


@torch.no_grad()
def test_cvt_but_for_its_gelu(tmp_path):
    depths, heads, window = [2, 1], [1, 2], 3
    weights = cvt(Draw(10), [8, 12], depths, heads, window)
    _, backbone = load(save(tmp_path, dict(teacher=weights)), 'esvit')
    pictures = x = images(48)
    for s in range(2):
        name = f'stage{s}.0'
        stride, padding = (2, 1) if s else (4, 2)
        kernel, bias = weights[f'{name}.proj.weight'], weights[f'{name}.proj.bias']
        x = F.conv2d(x, kernel, bias, stride, padding).permute(0, 2, 3, 1)
        x = layer_norm(x, weights, f'{name}.norm', 1e-5)
        for i in range(depths[s]):
            x = x + cvt_attention(
                x, weights, f'stage{s}.1.layers.{i}.0', heads[s], window
            )
            mlp = f'stage{s}.1.layers.{i}.1'
            hidden = layer_norm(x, weights, f'{mlp}.norm', 1e-5)
            for layer in (0, 2):
                kernel = weights[f'{mlp}.fn.net.{layer}.weight'][:, :, 0, 0]
                hidden = F.linear(hidden, kernel, weights[f'{mlp}.fn.net.{layer}.bias'])
                hidden = hidden if layer else F.gelu(hidden)
            x = x + hidden
        x = x.permute(0, 3, 1, 2)
    expected = layer_norm(x.flatten(2).mT, weights, 'norm', 1e-5)
    assert_near(backbone(pictures).patches, expected)


def cvt_attention(x, weights, name, heads, window):
    """Attention of ``(B, H, W, C)`` that windows divide; biases by the file's index."""
    side, width = x.shape[2:]
    out = torch.zeros_like(x)
    x = layer_norm(x, weights, f'{name}.norm', 1e-5).permute(0, 3, 1, 2)
    x = F.conv2d(x, weights[f'{name}.fn.qkv.dw.weight'], padding=1, groups=width)
    bn = [
        weights[f'{name}.fn.qkv.bn.{leaf}']
        for leaf in ('running_mean', 'running_var', 'weight', 'bias')
    ]
    x = F.batch_norm(x, *bn)
    x = F.conv2d(
        x, weights[f'{name}.fn.qkv.pw.weight'], weights[f'{name}.fn.qkv.pw.bias']
    )
    index = weights[f'{name}.fn.rel_pos_idx']
    bias = weights[f'{name}.fn.rel_pos_bias_table'][index].permute(2, 0, 1)
    for top in range(0, side, window):
        for left in range(0, side, window):
            rows, columns = slice(top, top + window), slice(left, left + window)
            qkv = x[:, :, rows, columns].flatten(2)  # B, 3 C, w * w
            q, k, v = qkv.unflatten(1, (3, heads, -1)).mT.unbind(1)
            shares = (q @ k.mT * width**-0.5 + bias).softmax(-1)
            tokens = (shares @ v).transpose(1, 2).flatten(2)
            out[:, rows, columns] = tokens.unflatten(1, (window, window))
    kernel = weights[f'{name}.fn.proj_out.weight'][:, :, 0, 0]
    return F.linear(out, kernel, weights[f'{name}.fn.proj_out.bias'])


@torch.no_grad()
def test_moby_projector(tmp_path):
    weights = moby_mlp(Draw(11), 32, 24, 10)
    model = {
        **named('encoder_k', vit(Draw(12), *VITS[0])),
        **named('projector_k', weights),
    }
    imported, _ = load(save(tmp_path, dict(model=model)), 'moby')
    theirs = nn.Sequential(nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU())
    theirs.append(nn.Linear(24, 10)).eval()
    names = {'linear_hidden.1': '0', 'linear_hidden.2': '1', 'linear_out': '3'}
    theirs.load_state_dict(
        {
            f'{names[key.rpartition(".")[0]]}.{key.rpartition(".")[2]}': value
            for key, value in weights.items()
        }
    )
    ours = BatchNormMLP(32, 24, 10).eval()
    ours.load_state_dict(part(imported, 'teacher.projectors.view.'))
    x = Draw(13)(5, 32)
    assert_near(ours(x), theirs(x))


@torch.no_grad()
def test_densedino_positions_go_with_their_tokens(tmp_path):
    """Class token's and patches' are told apart in the file and in one table here."""
    sizes = VITS[1]
    file = densedino_file(Draw(14), sizes)
    _, backbone = load(save(tmp_path, file), 'densedino')
    prefix = 'backbone.'
    weights = {
        name.removeprefix(prefix): value
        for name, value in file['teacher'].items()
        if name.startswith(prefix)
    }
    x = images(sizes[2] * sizes[3])
    kernel, bias = (weights[f'patch_embed.proj.{leaf}'] for leaf in ('weight', 'bias'))
    patches = F.conv2d(x, kernel, bias, sizes[2]).flatten(2).mT
    cls = weights['cls_token'] + weights['cls_pos_embed']
    expected = torch.cat(
        [cls.expand(len(x), -1, -1), patches + weights['patch_pos_embed']], 1
    )
    assert_near(backbone.embed(x)[0], expected)
    assert isinstance(backbone(x), Tokens)
