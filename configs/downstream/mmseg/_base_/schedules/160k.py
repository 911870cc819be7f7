"""160,000 steps: warm-up of 1500, then linear decay to 0 (poly of power 1)."""

_base_ = ['../runtime.py']
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160_000, val_interval=16_000)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(
        type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160_000
    ),
]
