"""The same for 1,000 steps: docs/guide.md."""

_base_ = ['camvid_small_semantic-fpn_vit-t8.py']
train_cfg = dict(max_iters=1000, val_interval=1000)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=1000),
]
default_hooks = dict(checkpoint=dict(interval=1000))
