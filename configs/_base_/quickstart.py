"""A run of a few minutes on a CPU, with a score at the end."""

_base_ = ['runtime.py']
train_cfg = dict(max_epochs=9)
optim_wrapper = dict(optimizer=dict(lr=8e-3))
default_hooks = dict(
    logger=dict(interval=20),
    schedule=dict(warmup_epochs=1, end_weight_decay=None),
    health=dict(interval=20),
    checkpoint=dict(interval=4),
    report=dict(probe=True, size=128),
)
log_processor = dict(window_size=20)
