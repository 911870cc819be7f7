"""One step of every method on a small model, and what must agree between two."""

import torch
from conftest import (
    build_model,
    keep_gradients,
    loca_config,
    moby_config,
    model_config,
    optim_wrapper,
    point_config,
    region_config,
    views,
)

from densessl.engine.optim import MixedPrecisionOptimWrapper
from densessl.schedules import Progress

PROJECTOR = dict(projector=dict(hidden_dims=48, bottleneck_dims=16))
VIEW = dict(view=dict(type='ViewHead', out_dims=64, **PROJECTOR))
VIT = model_config()['backbone'] | dict(drop_path_rate=0.5)
SWIN = dict(
    type='SwinTransformer',
    arch=dict(embed_dims=16, depths=[1, 2], num_heads=[1, 2]),
    img_size=32,
    window_size=4,
    drop_path_rate=0.5,
)
RESNET = dict(type='TimmBackbone', name='resnet10t')
AVERAGE = dict(type='AveragePoolNeck')
POINTS = point_config(content=True)
METHODS = dict(
    dino=dict(backbone=VIT, heads=VIEW),
    selfpatch=dict(backbone=VIT),
    selfpatch_in_parts=dict(backbone=VIT, accumulate=2),
    esvit=region_config('similarity', backbone=SWIN),
    glsd=region_config('geometric', backbone=SWIN),
    densedino=POINTS | dict(backbone=POINTS['backbone'] | dict(drop_path_rate=0.5)),
    loca=loca_config(backbone=VIT),
    moby=moby_config(backbone=VIT),
    resnet=dict(backbone=RESNET, heads=VIEW, neck=AVERAGE),
)


def batch(options: dict, seed: int = 0) -> dict:
    """Views, larger ones of a single role for a ResNet."""
    data = views(seed=seed)
    if options.get('backbone') is RESNET:
        data['inputs'] = {'global': data['inputs']['global'].repeat(1, 1, 1, 3, 3)}
    return data


def step(precision='fp32', seed=0, device='cpu', **options):
    """Log, gradients, state after a step, and the next random number."""
    model = build_model(**options).to(device).train()
    wrapper = optim_wrapper(model)
    assert isinstance(wrapper, MixedPrecisionOptimWrapper)
    wrapper.precision = precision
    grads = keep_gradients(model, wrapper)
    model.progress = Progress(10, 100, 10)
    data = batch(options, seed)
    torch.manual_seed(seed)
    log = model.train_step(data, wrapper)
    return log, grads, model.state_dict(), torch.rand(())


def assert_same_step(found, expected, tolerance):
    for name, grad in expected[1].items():
        error = (found[1][name] - grad).norm() / grad.norm().clamp_min(1e-9)
        assert error < tolerance, (name, error)
    assert found[1].keys() == expected[1].keys()
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[0], expected[0], **close)
    torch.testing.assert_close(found[3], expected[3], rtol=0, atol=0)
    state = {k: v for k, v in expected[2].items() if k not in expected[1]}
    for key, value in state.items():  # the teacher, centres, queues, batch norm
        torch.testing.assert_close(found[2][key], value, **close, msg=key)
