"""Clipping, groups, precision, and the schedules as the optimiser sees them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model, model_config
from timm.optim import param_groups_layer_decay
from torch import nn

from densessl.engine.hooks import ScheduleHook
from densessl.engine.optim import TwoGroupConstructor, clip_each_
from densessl.errors import DenseSSLError
from densessl.registry import MODELS
from densessl.schedules import Progress, cosine


def wrapper(model, **options):
    optimizer = dict(type='AdamW', lr=1e-3, weight_decay=0.04)
    return TwoGroupConstructor(dict(optimizer=optimizer, **options))(model)


def test_clip_each_by_its_own_norm():
    torch.manual_seed(0)
    gradients = [torch.randn(20) * scale for scale in (0.1, 1.0, 10.0)]
    expected = [g * min(1.0, 3.0 / g.norm().item()) for g in gradients]
    clip_each_(gradients, 3.0)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize('kind', ['each', 'norm', None])
def test_wrapper_clips_as_it_is_told(kind):
    model = nn.Linear(4, 3)
    clip = None if kind is None else dict(type=kind, max_norm=1.0)
    wrap = wrapper(model, clip_grad=clip)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    wrap.step()
    weight, bias = model.weight.grad.norm(), model.bias.grad.norm()
    total = (weight**2 + bias**2) ** 0.5
    if kind == 'each':
        assert weight == pytest.approx(1.0, rel=1e-4) == bias
    elif kind == 'norm':
        assert total == pytest.approx(1.0, rel=1e-4)
    else:
        assert total == pytest.approx(10 * 15**0.5)


def test_only_weights_decay():
    model = build_model()
    decayed, others = wrapper(model).optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decayed['params']}
    others_names = {names[id(p)] for p in others['params']}
    assert others['weight_decay'] == 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert decayed | others_names == trained and not decayed & others_names
    assert not any(name.startswith('teacher.') for name in decayed)
    assert {'backbone.pos_embed', 'backbone.blocks.0.attn.qkv.weight'} <= decayed
    assert {'backbone.blocks.0.norm1.weight', 'neck.norm.bias'} <= others_names
    assert 'backbone.patch_embed.proj.bias' in others_names


def vit_table(decay):
    """Factors of conftest's ViT of 2 blocks with a class token, prefix by prefix."""
    table = dict.fromkeys(('cls_token', 'pos_embed', 'patch_embed.'), decay**3)
    return table | {'blocks.0.': decay**2, 'blocks.1.': decay, 'norm.': decay}


def swin_factor(backbone, name, decay):
    """By MMPretrain's own count of layers; it sets the final norm after the blocks."""
    layer, count = backbone.model.get_layer_depth(name, 'model.')
    return decay ** (count - 1 - min(layer, count - 2))


def timm_factors(backbone, decay):
    """By timm's own grouping, with a classifier where we have projectors."""
    model = copy.deepcopy(backbone.model)
    model.reset_classifier(5)
    groups = param_groups_layer_decay(model, layer_decay=decay)
    scales = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    return {f'model.{name}': scales[id(p)] for name, p in model.named_parameters()}


BACKBONES = dict(
    vit=model_config()['backbone'] | dict(cls_token=True, final_norm=True),
    swin=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=16, depths=[1, 2, 1], num_heads=[1, 2, 4]),
        img_size=64,
        window_size=4,
    ),
    timm=dict(
        type='TimmBackbone',
        name='vit_small_patch14_dinov2',
        embed_dim=32,
        depth=3,
        num_heads=2,
        img_size=56,
    ),
)


@pytest.mark.parametrize('kind', BACKBONES)
@pytest.mark.parametrize('decay', [0.5, 0.75])
def test_lr_of_every_parameter_by_its_depth(kind, decay):
    options = dict(backbone=BACKBONES[kind], neck=dict(type='AveragePoolNeck'))
    model = build_model(**options)
    optimizer = wrapper(SimpleNamespace(module=model), layer_decay=decay).optimizer
    of_timm = timm_factors(model.backbone, decay) if kind == 'timm' else {}
    lr, weight_decay = (
        {id(p): group[key] for group in optimizer.param_groups for p in group['params']}
        for key in ('lr', 'weight_decay')
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(lr) == {id(p) for p in trained.values()}
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(trained)
    for name, parameter in trained.items():
        inner = name.removeprefix('backbone.')
        if name == inner:
            factor = 1.0
        elif kind == 'vit':
            (factor,) = (f for p, f in vit_table(decay).items() if inner.startswith(p))
        elif kind == 'swin':
            factor = swin_factor(model.backbone, inner, decay)
        else:
            factor = of_timm[inner]
        assert lr[id(parameter)] == pytest.approx(1e-3 * factor), name
        flat = parameter.ndim == 1 or name.endswith('.bias')
        assert weight_decay[id(parameter)] == (0 if flat else 0.04)
    assert optimizer.param_groups[0]['lr'] == 1e-3  # the one that is logged


def test_without_layer_decay_there_are_two_groups():
    for options in ({}, dict(layer_decay=1)):
        groups = wrapper(build_model(), **options).optimizer.param_groups
        assert [group['lr'] for group in groups] == [1e-3, 1e-3]


@pytest.mark.parametrize('decay', [0, -0.5, 1.5])
def test_layer_decay_out_of_range(decay):
    with pytest.raises(DenseSSLError, match=r'above 0 and at most 1'):
        wrapper(build_model(), layer_decay=decay)


def test_a_backbone_without_blocks_has_no_depths():
    backbone = MODELS.build(dict(type='TimmBackbone', name='resnet10t'))
    with pytest.raises(DenseSSLError, match='ResNet has no parameters named'):
        wrapper(SimpleNamespace(backbone=backbone), layer_decay=0.75)


def schedule(wrap, hook):
    """A runner of 1024 images a step for a hook, with what it logged."""
    logged = []
    sampler = SimpleNamespace(global_batch_size=1024)
    runner = SimpleNamespace(
        optim_wrapper=wrap,
        train_dataloader=SimpleNamespace(batch_sampler=sampler),
        train_loop=SimpleNamespace(progress=None),
        world_size=8,
        logger=SimpleNamespace(info=logged.append),
    )
    hook.before_run(runner)
    return runner, logged


def test_schedule_keeps_the_share_of_each_group():
    wrap = wrapper(build_model(), layer_decay=0.5)
    hook = ScheduleHook(warmup_epochs=1, min_lr=1e-4)
    runner, _ = schedule(wrap, hook)
    for step in range(40):
        runner.train_loop.progress = Progress(step, 40, 10)
        hook.before_train_iter(runner, step)
        rates = [group['lr'] for group in wrap.optimizer.param_groups]
        shares = [share for share in (1, 0.5, 0.25, 0.125) for _ in range(2)]
        assert rates == pytest.approx([rates[0] * share for share in shares])
        assert step == 0 or rates[0] > 0


def test_schedule_hook_sets_both_values_each_step():
    model = nn.Linear(2, 2)
    wrap = wrapper(model)
    hook = ScheduleHook(warmup_epochs=1, min_lr=1e-6, end_weight_decay=0.4)
    runner, logged = schedule(wrap, hook)
    assert '0.001 x 1024 / 256 images = 0.004' in logged[0]
    weights, flat = wrap.optimizer.param_groups
    seen = []
    for step in range(40):
        runner.train_loop.progress = Progress(step, 40, 10)
        hook.before_train_iter(runner, step)
        seen.append(weights['lr'])
        assert flat['lr'] == weights['lr'] and flat['weight_decay'] == 0
        assert weights['weight_decay'] == pytest.approx(cosine(0.04, 0.4, step, 40))
    assert seen[0] == 0 and seen[9] == pytest.approx(0.004) == seen[10]
    assert seen[25] == pytest.approx((0.004 + 1e-6) / 2)


def test_precision_on_this_machine():
    model = nn.Linear(2, 2)
    wrap = wrapper(model, precision='bf16')
    with wrap.optim_context(model):
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    if not torch.cuda.is_available():
        wrap = wrapper(model)
        assert wrap.precision == 'fp32'
        with wrap.optim_context(model):
            assert model(torch.ones(1, 2)).dtype == torch.float32
        with pytest.raises(DenseSSLError, match='fp16 on a GPU'):
            wrapper(model, precision='fp16')


def test_paramwise_cfg_is_not_dropped_silently():
    with pytest.raises(DenseSSLError, match='paramwise_cfg is not read'):
        TwoGroupConstructor(dict(), paramwise_cfg=dict(norm_decay_mult=0.0))
