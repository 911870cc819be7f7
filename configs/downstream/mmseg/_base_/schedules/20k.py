"""20,000 steps; else as 160k.py."""

_base_ = ['160k.py']
train_cfg = dict(max_iters=20_000, val_interval=2_000)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=20_000),
]
default_hooks = dict(checkpoint=dict(interval=2_000))
