"""Clipping, groups, precision, and the schedules as the optimiser sees them."""

from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from torch import nn

from densessl.engine.hooks import ScheduleHook
from densessl.engine.optim import TwoGroupConstructor, clip_each_
from densessl.errors import DenseSSLError
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


def test_schedule_hook_sets_both_values_each_step():
    model = nn.Linear(2, 2)
    wrap = wrapper(model)
    sampler = SimpleNamespace(global_batch_size=1024)
    loop = SimpleNamespace(progress=None)
    logged = []
    runner = SimpleNamespace(
        optim_wrapper=wrap,
        train_dataloader=SimpleNamespace(batch_sampler=sampler),
        train_loop=loop,
        world_size=8,
        logger=SimpleNamespace(info=logged.append),
    )
    hook = ScheduleHook(warmup_epochs=1, min_lr=1e-6, end_weight_decay=0.4)
    hook.before_run(runner)
    assert '0.001 x 1024 / 256 images = 0.004' in logged[0]
    weights, flat = wrap.optimizer.param_groups
    seen = []
    for step in range(40):
        loop.progress = Progress(step, 40, 10)
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
