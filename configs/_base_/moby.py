"""MoBY's optimiser and schedule: lr 1e-3 at 512 images, weight decay 0.05, global clip 5.

From the authors' code: the learning rate ends at 0.5 % of its peak.
"""

_base_ = ['runtime.py']
train_cfg = dict(max_epochs=300)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.05),
    clip_grad=dict(type='norm', max_norm=5.0),
)
default_hooks = dict(
    schedule=dict(
        warmup_epochs=5,
        min_lr=0.005,
        relative=True,
        end_weight_decay=None,
        base_batch_size=512,
    )
)
